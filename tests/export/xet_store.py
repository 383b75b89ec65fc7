"""What the Xet client sends, read back: a xorb is chunks, each with a header of 8 bytes before it.

version 1 · bytes that follow 3 · how they are packed 1 · bytes unpacked 3      (little-endian)
packed: 0 as they are; 1 an LZ4 frame; 2 an LZ4 frame of the 1st of each 4 bytes, then the 2nd, 3rd, 4th
"""

from __future__ import annotations


def chunks_of(xorb: bytes) -> bytes:
    """Return what a xorb's chunks hold, in order."""
    at, found = 0, bytearray()
    while at + 8 <= len(xorb) and xorb[at] == 0:
        packed, how, whole = _number(xorb, at + 1, 3), xorb[at + 4], _number(xorb, at + 5, 3)
        body = xorb[at + 8 : at + 8 + packed]
        plain = body if how == 0 else _frame(body)
        plain = _ungrouped(plain) if how == 2 else plain
        assert len(plain) == whole, f"a chunk of {whole} bytes unpacked into {len(plain)}"
        found += plain
        at += 8 + packed
    return bytes(found)


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _ungrouped(data: bytes) -> bytes:
    out, at = bytearray(len(data)), 0
    for first in range(4):
        size = len(range(first, len(data), 4))
        out[first::4] = data[at : at + size]
        at += size
    return bytes(out)


def _frame(data: bytes) -> bytes:
    """Unpack an LZ4 frame (blocks may refer to those before)."""
    assert data[:4] == b"\x04\x22\x4d\x18"
    flags = data[4]
    at = 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
    out = bytearray()
    while size := _number(data, at, 4):
        at += 4
        if size >> 31:
            size &= 0x7FFFFFFF
            out += data[at : at + size]
        else:
            _block(data[at : at + size], out)
        at += size + (4 if flags & 16 else 0)
    return bytes(out)


def _block(data: bytes, out: bytearray) -> None:
    at = 0

    def length(start: int) -> int:
        nonlocal at
        found = start
        while start == 15 and (found - 15) % 255 == 0:
            more = data[at]
            at += 1
            found += more
            if more < 255:
                break
        return found

    while at < len(data):
        token = data[at]
        at += 1
        literal = length(token >> 4)
        out += data[at : at + literal]
        at += literal
        if at >= len(data):
            return
        back = _number(data, at, 2)
        at += 2
        for _ in range(length(token & 15) + 4):
            out.append(out[-back])
