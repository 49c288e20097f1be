"""Near-duplicates: hashes of images that differ by compression, scale, brightness, a slight crop or
a flip have a small Hamming distance. Measured in results/near/."""

from functools import lru_cache
from itertools import combinations, product

import numpy as np

RADIUS = 30  # of 256 bits; the search is exact up to here
GRIDS = product((0, 1), (0, 1))  # frequencies by parity, the 64 lowest of each, spread over 8 bytes
LOW = np.array([sorted(product(range(v, 24, 2), range(u, 24, 2)), key=sum)[:64] for v, u in GRIDS])
LOW = (LOW @ (24, 1)).reshape(4, 8, 8).transpose(0, 2, 1).ravel()
ONES = np.float32([i.bit_count() - 8 for i in range(2**16)])
FLIPS = np.float32([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])  # invert words


@lru_cache(1000)
def _basis(length):  # (24, cells): cosines over the length, integrated over cells of whole pixels
    cell = max(length // 32, 1)
    edges = np.minimum(np.arange(0, length + cell, cell), length) / length
    return np.rint(2**20 * np.diff(edges * np.sinc(np.arange(24)[:, None] * edges)))


def perceptual_hash(rgb):
    """Pillow RGB -> (4,) uint64: the signs of 256 low frequencies of its grey image on the unit
    square, after pHash (Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions,
    2010), a word per parity, so that a flip inverts words. All 0, which is near to nothing, without
    contrast: where blocks of 1/32 of its sides differ by less than 4 of 255."""
    (width, height), grey = rgb.size, rgb.convert("L")
    grey = grey.reduce((max(width // 32, 1), max(height // 32, 1)))
    low, high = grey.getextrema()
    if high - low < 4:
        return np.zeros(4, np.uint64)
    spectrum = _basis(height) @ np.asarray(grey, np.float64) @ _basis(width).T
    return np.packbits(spectrum.take(LOW) > 0).view(np.uint64)


def near_pairs(hashes, radius=RADIUS):
    """(N, 4) uint64 -> (P, 3) int64, sorted: i < j and the Hamming distance, the least over flips,
    of all pairs within the radius, at most 30. Exact: two of their 32 bytes are equal or inverted
    (multi-index hashing, Norouzi et al., CVPR 2012). P counts every pair of equal hashes."""
    if not 0 <= radius <= RADIUS:
        raise ValueError(f"radius {radius}: outside of 0..{RADIUS}")
    unique, group, count = np.unique(hashes, axis=0, return_inverse=True, return_counts=True)
    known, chunks = np.flatnonzero(unique.any(1)), unique.view(np.uint8).T.copy()
    chunks[8:] ^= 255 * (chunks[8:] >> 7)  # a byte and its inverse become the same
    equal = known[count[known] > 1]
    found = [np.stack([equal, equal, 0 * equal])]
    for c, d in combinations(range(32), 2):
        key = chunks[c, known].astype(np.uint16) << 8 | chunks[d, known]
        order = np.argsort(key, kind="stable")
        key, order, at, step = key[order], known[order], np.arange(len(key)), 1
        while (at := at[: np.searchsorted(at, len(key) - step)]).size:
            at = at[key[at] == key[at + step]]  # pairs of one bucket, `step` apart
            a, b = order[at], order[at + step]
            for e in range(min(c, 3)):  # found before, by chunk e: quick for most of them
                fresh = chunks[e, a] != chunks[e, b]
                a, b = a[fresh], b[fresh]
            ones = ONES[(unique[a] ^ unique[b]).view(np.uint16)]
            distance = (128 + (FLIPS.repeat(4, 1) @ ones.T).min(0)).astype(np.uint8)
            new = distance <= radius
            new[new] = (chunks[:d, a[new]] == chunks[:d, b[new]]).sum(0) == 1  # only c is before d
            found.append(np.stack([a[new], b[new], distance[new]]))
            step += 1
    a, b, distance = np.concatenate(found, 1)
    image, start = np.argsort(group.ravel(), kind="stable"), np.cumsum(count) - count
    pair = np.repeat(np.arange(len(a)), count[a] * count[b])  # to all images with these hashes
    k, a, b = np.arange(len(pair)) - np.searchsorted(pair, pair), a[pair], b[pair]
    i, j = image[start[a] + k // count[b]], image[start[b] + k % count[b]]
    rows = np.stack([np.minimum(i, j), np.maximum(i, j), distance[pair]], 1)[(i < j) | (a != b)]
    return rows[np.lexsort(rows[:, 1::-1].T)]
