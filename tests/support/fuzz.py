"""Files made wrong at random: bytes changed, JSON with one value replaced. The same seed makes the same files."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Iterator
from typing import Any

# Seconds for each fuzz test; .ci/run gives more.
SECONDS = float(os.environ.get("KPATCH_FUZZ_SECONDS", "6")) / 3
# Another text makes other files.
SEED = os.environ.get("KPATCH_FUZZ_SEED", "")

_NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 255, 2**31, 2**53, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1e308, 1e-320, "", " ", "\0", "a", "../x", "/etc/passwd", "C:x", "F32", "BF16", "I8", "é" * 300),
    *("\x1b[2J", "\u202e", "\ud800", "9" * 400, [], {}, [[]], [{}], {"": 0}, [0, 0], [1, -1], [0, 2**60], ["0", "1"]),
    *([0] * 50, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
]

_PIECES = [b'"', b"{", b"}", b"[", b",", b":", b"\\", b"-", b"e", b"\xff", b"0"]


def rounds(name: str, minimum: int = 50) -> Iterator[random.Random]:
    """Dice for one file after the other, until the time is up."""
    end, number = time.monotonic() + SECONDS, 0
    while number < minimum or time.monotonic() < end:
        yield random.Random(f"{SEED}{name} {number}")
        number += 1


def wrong_bytes(raw: bytes, dice: random.Random) -> bytes:
    """Some bytes changed, dropped, doubled or moved."""
    data = bytearray(raw)
    for _ in range(dice.choice([1, 1, 1, 2, 5, 20])):
        if not data:
            break
        place, length = dice.randrange(len(data)), dice.choice([1, 1, 2, 8, 64])
        kind = dice.randrange(6)
        if kind == 0:
            data[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            data[place : place + length] = bytes(dice.randrange(256) for _ in range(length))
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length]
        elif kind == 4:
            del data[place:]
        else:
            data[place : place + 1] = dice.choice(
                [b'"', b"{", b"}", b"[", b",", b":", b"\\", b"-", b"e", b"\xff", b"0"]
            )
    return bytes(data)


def wrong_value(value: Any, dice: random.Random) -> Any:
    """A copy of a JSON value with one part of it replaced, dropped, doubled or renamed."""
    if not isinstance(value, (dict, list)) or not value or dice.random() < 0.08:
        return dice.choice(_NASTY)
    if isinstance(value, list):
        place = dice.randrange(len(value))
        kind = dice.randrange(8)
        if kind == 0:
            return value[:place] + value[place + 1 :]
        if kind == 1:
            return [*value, value[place]]
        return [*value[:place], wrong_value(value[place], dice), *value[place + 1 :]]
    key = dice.choice(list(value))
    kind = dice.randrange(8)
    if kind == 0:
        return {name: item for name, item in value.items() if name != key}
    if kind == 1:
        new = dice.choice([str(item) for item in _NASTY[:40]] + list(value))
        return {**value, new: value[key]}
    return {**value, key: wrong_value(value[key], dice)}


def container(header: Any, data: bytes) -> bytes:
    """A safetensors file from its header as JSON."""
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


def parts(raw: bytes) -> tuple[Any, bytes]:
    """The header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]
