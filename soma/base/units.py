"""Sizes as people write and read them."""

import re

from soma.base.errors import UserError

UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def human_bytes(count: float) -> str:
    """Bytes in decimal units, three significant figures: 12_345_678 → `12.3 MB`."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= limit * 0.9995:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f} B"


def parse_bytes(text: str, where: str) -> int:
    """`20GB`, `1.5 GiB`, `500000` → bytes. `where` names the setting in the error."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS:
        raise UserError(f"{where}: {text!r} is not a size; write a number and a unit, such as 20GB or 512MiB")
    count = float(match[1]) * UNITS[match[2].lower()]
    if count == float("inf"):
        raise UserError(f"{where}: {text!r} is more than a number can hold")
    return int(count)
