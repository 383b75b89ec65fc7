"""Bytes, counts and times as people read them."""


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
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:g}"


def format_duration(s: float) -> str:
    """Return seconds as a duration: `75 -> '1 min 15 s'`."""
    if s < 60:
        return f"{s:.0f} s" if s >= 10 else f"{s:.1f} s"
    minutes, rest = divmod(round(s), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
