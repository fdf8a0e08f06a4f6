"""Byte sizes as people write them."""

from __future__ import annotations

import re

from spillway.api.errors import SpillwayError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


class SizeError(SpillwayError):
    """Text that is not a size."""


def parse_size(text: str) -> int:
    """Bytes of ``512MiB``, ``1.5GB``, ``2g``, ``0``. Ki, Mi, Gi, Ti are powers of 1024; k, M, G, T of 1000.

    Raises:
        SizeError: not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SizeError(f"{text!r} is not a size", "Write it like 512MiB, 1.5GB or 0.")
    size = float(match[1]) * _UNITS[(match[2] or "").lower()]
    if size >= 2**63:
        raise SizeError(f"{text[:40]!r} is more bytes than any machine has", "Write it like 512MiB, 1.5GB or 0.")
    return int(size)


def format_size(size_bytes: float) -> str:
    """``1.5 GiB``: three significant digits at most, powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" or size_bytes >= 100 else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
