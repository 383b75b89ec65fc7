"""Bytes, counts and times as people read them, and text from elsewhere as a terminal may show it."""

import re
import reprlib

GIB = 1 << 30
_CONTROLS = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3


def escape_control_characters(text: str) -> str:
    r"""Return a text with its control characters written out: ESC becomes `\x1b`.

    They are what can steer a terminal or turn the direction of its text, except line feeds and tabs, and halves of
    characters, which cannot be encoded.
    """
    if text.isascii() and text.isprintable():
        return text
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def truncate_noting_length(value: str, limit: int = 80) -> str:
    """Return a text, or its first `limit` characters and its length if it is longer."""
    value = value.strip()
    return value if len(value) <= limit else f"{value[:limit]}… ({len(value)} characters)"


def format_short_value(value: object, limit: int = 100) -> str:
    """Return a value as short text."""
    if isinstance(value, int) and abs(value) > 1e100:  # Python refuses to print integers of over 4,300 digits
        return f"an integer of {value.bit_length()} bits"
    text = repr(value[:limit]) if isinstance(value, str) else _SHORT.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def format_bytes(n: float) -> str:
    """Return bytes in binary units: `27262976 -> '26.0 MiB'`."""
    if abs(n) < 1024:
        return f"{n:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        n /= 1024
        if abs(n) < 1024:
            return f"{n:.1f} {unit}"
    return f"{n / 1024:.1f} TiB"


def format_count(n: float) -> str:
    """Return a count in short form: `4884480 -> '4.88 M'`."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(n) >= 0.9995 * size:  # what three digits round up to the unit
            return f"{n / size:.3g}{unit}"
    return f"{n:g}"


def format_duration(seconds: float) -> str:
    """Return seconds as a duration: `75 -> '1 min 15 s'`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def compute_trained_share(method: str, trained: int, total: int) -> float:
    """Return the share of a model's numbers that a method trains; the copy that `full` trains counts once."""
    return trained / (total - trained if method == "full" else total)
