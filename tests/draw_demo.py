"""Draws docs/demo.npz, images to try the commands on: grey cells of four kinds, told apart by
outline and texture, in the form of a MedMNIST file.

    python tests/draw_demo.py docs/demo.npz
"""

import sys

import numpy as np

KINDS, PER_KIND, SIZE = ("granular", "ringed", "spiky", "striped"), 150, 32


def cells(kind, rng):
    """(SIZE, SIZE) uint8: an image of two to four cells of KINDS[kind]."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    image = np.full((SIZE, SIZE), 215 + rng.normal(0, 8))
    for _ in range(rng.integers(2, 5)):
        dx, dy = x - rng.uniform(6, SIZE - 6), y - rng.uniform(6, SIZE - 6)
        angle, distance = np.arctan2(dy, dx), np.hypot(dx, dy)
        radius, turn, stain = rng.uniform(6, 8), rng.uniform(0, 2 * np.pi), rng.normal(115, 10)
        grains = np.kron(rng.choice([-1, 1], (SIZE // 2, SIZE // 2)), np.ones((2, 2)))
        stripes = np.cos((dx * np.cos(turn) + dy * np.sin(turn)) * 1.5)
        texture = (grains, np.cos(distance * 1.5 + turn), 0 * x, stripes)[kind]
        waves = (0.05, 0.05, 0.4, 0.05)[kind] * np.sin(rng.integers(6, 9) * angle + turn)
        inside = np.clip(radius * (1 + waves) - distance, 0, 1)
        image = image * (1 - inside) + (stain + 50 * texture) * inside
    return np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)


def draw():
    """{name in the file: array}: 70 % of the images to train, 10 to validate, 20 to test."""
    n = PER_KIND * len(KINDS)
    images = np.stack([cells(i % 4, np.random.default_rng([0, i])) for i in range(n)])
    labels = np.arange(n)[:, None] % 4
    ends = {"train": slice(n * 7 // 10), "val": slice(n * 7 // 10, n * 8 // 10)}
    ends["test"] = slice(n * 8 // 10, n)
    arrays = {f"{side}_images": images[part] for side, part in ends.items()}
    return arrays | {f"{side}_labels": labels[part] for side, part in ends.items()}


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **draw())
