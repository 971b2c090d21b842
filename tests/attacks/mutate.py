"""Mutations of good files: the same for the fuzz target and for the tests."""

from __future__ import annotations

import random

INTERESTING = [0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 255, 256, 1 << 15, (1 << 16) - 1, 1 << 20]
INTERESTING += [(1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 62), (1 << 63) - 1, 1 << 63]
INTERESTING += [(1 << 64) - 1, (1 << 64) - 32, (1 << 61) + 1]


def mutate(raw: bytes, rng: random.Random, head: int) -> bytes:
    """Return `raw` damaged in one to four places, nearly always before byte `head`."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        end = head if rng.random() < 0.95 else len(data)
        at = rng.randrange(max(1, min(end, len(data))))
        match rng.randrange(8):
            case 0:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)])
            case 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                data[at : at + 4] = (rng.choice(INTERESTING) & 0xFFFFFFFF).to_bytes(4, "little")
            case 3:
                data[at : at + 8] = rng.choice(INTERESTING).to_bytes(8, "little")
            case 4:
                value = int.from_bytes(data[at : at + 8], "little") + rng.choice((-32, -1, 1, 32))
                data[at : at + 8] = (value % (1 << 64)).to_bytes(8, "little")
            case 5:
                del data[at : at + rng.choice((1, 4, 8, 100))]
            case 6:
                data[at:at] = data[at : at + rng.choice((1, 4, 8, 100))]
            case 7:
                if rng.random() < 0.1:
                    del data[at:]
                else:
                    other = rng.randrange(len(data))
                    data[at : at + 8] = data[other : other + 8]
        data = data or bytearray(b"\0")
    return bytes(data)
