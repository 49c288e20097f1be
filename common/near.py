"""Hashes that compression, scale, brightness or a slight crop change little; see results/near/."""

from functools import lru_cache

import numpy as np

RADIUS = 30  # of 256 bits; the search is exact up to here
LOW = np.array(sorted(np.ndindex(24, 24), key=lambda f: (f[0] % 2, f[1] % 2, sum(f)))) @ (24, 1)
LOW = LOW.reshape(4, 18, 8)[:, :8].transpose(0, 2, 1).ravel()  # the 64 lowest of each parity
ONES = np.float32([i.bit_count() - 8 for i in range(2**16)])
FLIPS = np.float32([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])  # invert words


@lru_cache(1000)
def _basis(length):  # (24, cells) integers, for exact sums: cosines over cells of whole pixels
    cell = max(length // 32, 1)
    edges = np.minimum(np.arange(0, length + cell, cell), length) / length
    return np.rint(2**20 * np.diff(edges * np.sinc(np.arange(24)[:, None] * edges)))


def perceptual_hash(rgb):
    """Pillow RGB -> (4,) uint64: the signs of 256 low frequencies of its grey image on the unit
    square, after pHash (Zauner's thesis, 2010), a word per parity, so that a flip inverts words. 0,
    near to nothing, without contrast: blocks of 1/32 of a side differ by less than 4 of 255."""
    (width, height), grey = rgb.size, rgb.convert("L")
    grey = grey.reduce((max(width // 32, 1), max(height // 32, 1)))
    low, high = grey.getextrema()
    if high - low < 4:
        return np.zeros(4, np.uint64)
    spectrum = _basis(height).dot(np.asarray(grey, np.float64)).dot(_basis(width).T)  # @ is slower
    return np.packbits(spectrum.take(LOW) > 0).view(np.uint64)


def near_pairs(hashes, radius=RADIUS):
    """(N, 4) uint64 -> (P, 3) int64, sorted: i < j and the Hamming distance, the least over flips,
    of all pairs within the radius, at most 30, equal hashes included. Exact: such pairs have a word
    of which at most 7 bits are unequal (or equal), so one of its 8 bytes is equal (or inverted);
    only those are compared (multi-index hashing, Norouzi et al., CVPR 2012)."""
    if not 0 <= radius <= RADIUS:
        raise ValueError(f"radius {radius}: outside of 0..{RADIUS}")
    known, found = np.flatnonzero(np.any(hashes, 1)), [np.zeros((3, 0), int)]
    words, chunks = hashes[known], hashes[known].view(np.uint8)
    chunks ^= 255 * (chunks >> 7)  # a byte and its inverse become the same
    for c in range(32):
        signs = np.unpackbits(words[:, c // 8, None].view(np.uint8), 1) * np.float32(2) - 1
        order = np.argsort(chunks[:, c], kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(chunks[order, c])) + 1):
            while len(rows):
                i, j = np.nonzero(np.abs(signs[rows[:256]] @ signs[rows].T) >= 50)
                a, b = rows[np.stack([i, j])[:, i < j]]
                ones = ONES[(words[a] ^ words[b]).view(np.uint16)].reshape(-1, 4, 4).sum(2)
                distance = 128 + (ones @ FLIPS).min(1).astype(int)
                hits = (chunks[a] == chunks[b]) & (np.abs(ones) >= 25).repeat(8, 1)
                new = (distance <= radius) & (hits.argmax(1) == c)  # not found by another chunk
                found.append(np.stack([a, b, distance])[:, new])
                rows = rows[256:]
    a, b, distance = np.concatenate(found, 1)
    return np.stack([known[a], known[b], distance], 1)[np.lexsort([b, a])]
