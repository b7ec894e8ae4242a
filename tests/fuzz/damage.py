"""Bytes that are damaged by chance, whatever they are of."""

from __future__ import annotations

from random import Random


def damaged(data: bytes, chance: Random) -> bytes:
    """Cut, flipped, doubled, lost, overwritten, of zeros, or with another beginning or end."""
    if not data:
        return data
    place, length = chance.randrange(len(data)), chance.randrange(1, 2000)
    match chance.randrange(9):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + data[place + length :]
        case 2:
            return data[:place] + data[place : place + length] + data[place:]
        case 3:
            return data[:place] + chance.randbytes(length) + data[place + length :]
        case 4:
            return data[:place] + bytes(length) + data[place + length :]
        case 5:
            return chance.randbytes(chance.randrange(64)) + data
        case 6:
            return data + data[:place]
        case 7:
            return _flipped(data, chance, within=64)
    return _flipped(data, chance, within=len(data))


def _flipped(data: bytes, chance: Random, *, within: int) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 30)):
        changed[chance.randrange(min(within, len(data)))] ^= 1 << chance.randrange(8)
    return bytes(changed)
