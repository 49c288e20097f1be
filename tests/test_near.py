"""common/near.py: against all pairs by brute force, and on drawn images."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from common.near import RADIUS, near_pairs, perceptual_hash


def scene(seed, width=200, height=150):
    """Blurred colour noise: every frequency, as in a photograph the low ones most."""
    rng = np.random.default_rng(seed)
    layers = [rng.integers(0, 256, (s, s, 3), dtype=np.uint8) for s in (3, 6, 12, 24, 48)]
    images = [Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC) for x in layers]
    return Image.fromarray(np.mean([np.asarray(x) for x in images], 0).astype(np.uint8))


def distance(a, b):
    """Python integers, bit by bit, over the flips of words as written down in the docstring."""
    words = [int(x) ^ int(y) for x, y in zip(a, b)]
    inverted = [(), (1, 3), (2, 3), (1, 2)]
    full = 2**64 - 1
    return min(
        sum((w ^ full * (k in f)).bit_count() for k, w in enumerate(words)) for f in inverted
    )


def clustered(rng, n):
    """Random hashes; clusters around 4 centres, by 0 to 16 inverted bits, some flipped; equal ones;
    without contrast."""
    hashes = rng.integers(0, 2**64, (n, 4), dtype=np.uint64)
    inverted = np.uint64([[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0]]) * (2**64 - 1)
    for i in range(n // 2):
        hashes[i] = hashes[n - 1 - i % 4] ^ inverted[rng.integers(4)]
        for bit in rng.choice(256, rng.integers(17), replace=False):
            hashes[i, bit // 64] ^= np.uint64(1 << int(bit % 64))
    hashes[n // 4 : n // 4 + 3] = hashes[0]
    hashes[-7:-4] = 0
    return hashes[rng.permutation(n)]


@pytest.mark.parametrize("radius", (0, 1, 13, RADIUS))
def test_the_pairs_are_those_of_a_comparison_of_all_with_all(radius):
    hashes = clustered(np.random.default_rng(radius), 120)
    expected = [
        (i, j, d)
        for i in range(120)
        for j in range(i + 1, 120)
        if hashes[i].any() and hashes[j].any()
        if (d := distance(hashes[i], hashes[j])) <= radius
    ]
    found = near_pairs(hashes, radius)
    assert found.dtype == np.int64 and found.tolist() == [list(row) for row in expected]
    assert len(expected) > 5 and any(d == radius for *_, d in expected)


def test_the_farthest_pairs_are_found_wherever_their_bits_differ():
    rng, full = np.random.default_rng(0), np.uint64(2**64 - 1)
    hashes = rng.integers(0, 256, (24, 32), np.uint8)
    for i in range(12):  # one bit in each of 30 bytes: only two bytes are left to find it by
        hashes[i + 12] = hashes[i]
        for byte in rng.choice(32, RADIUS, replace=False):
            hashes[i + 12, byte] ^= 1 << rng.integers(8)
    hashes = hashes.view(np.uint64)
    for first, flip in ((15, (1, 3)), (18, (2, 3)), (21, (1, 2))):
        hashes[first : first + 3, flip] ^= full
    assert near_pairs(hashes).tolist() == [[i, i + 12, RADIUS] for i in range(12)]


def test_thousands_of_equal_or_contrastless_hashes_take_no_quadratic_search():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (3000, 4), dtype=np.uint64)
    hashes[:700], hashes[1000:] = hashes[0], 0
    pairs = near_pairs(hashes)
    assert len(pairs) == 700 * 699 // 2 and not pairs[:, 2].any() and pairs.max() == 699


def test_many_hashes_that_share_bytes_are_all_compared():
    hashes = np.random.default_rng(0).integers(0, 2**64, (1200, 4), dtype=np.uint64)
    hashes[600:] = hashes[:600] ^ np.uint64(1 << 40)
    hashes.view(np.uint8)[:, 3:20:8] = 7
    assert near_pairs(hashes).tolist() == [[i, i + 600, 4] for i in range(600)]


def test_no_hashes_give_no_pairs_and_a_radius_without_guarantee_is_refused():
    for n in (0, 1):
        assert near_pairs(np.ones((n, 4), np.uint64)).shape == (0, 3)
    for radius in (-1, RADIUS + 1):
        with pytest.raises(ValueError, match=f"radius {radius}"):
            near_pairs(np.ones((2, 4), np.uint64), radius)


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


SAME = {
    "JPEG 90": lambda x: jpeg(x, 90),
    "JPEG 50": lambda x: jpeg(x, 50),
    "half": lambda x: x.resize((x.width // 2, x.height // 2), Image.Resampling.BICUBIC),
    "double": lambda x: x.resize((x.width * 2, x.height * 2), Image.Resampling.BICUBIC),
    "other aspect": lambda x: x.resize((150, 170), Image.Resampling.BICUBIC),
    "grey": lambda x: x.convert("L").convert("RGB"),
    "darker": lambda x: ImageEnhance.Brightness(x).enhance(0.8),
    "blurred": lambda x: x.filter(ImageFilter.GaussianBlur(1)),
    "mirrored": ImageOps.mirror,
    "upside down": ImageOps.flip,
    "half a turn": lambda x: x.rotate(180),
    "mirrored, JPEG 70, half": lambda x: jpeg(ImageOps.mirror(x), 70).resize((100, 75)),
}


@pytest.mark.parametrize("name", SAME)
def test_changed_images_are_near_to_their_own_original_alone(name):
    scenes = [scene(seed) for seed in range(15)]
    hashes = [perceptual_hash(x) for x in (*scenes, *map(SAME[name], scenes))]
    assert all(x.dtype == np.uint64 and x.shape == (4,) for x in hashes)
    pairs = near_pairs(np.stack(hashes))
    assert pairs[:, :2].tolist() == [[i, i + 15] for i in range(15)]


def test_a_flip_inverts_the_words_that_the_search_inverts():
    image = scene(0, 192, 160)  # whole cells, so that the grid is symmetric
    plain, full = perceptual_hash(image), 2**64 - 1
    for flip, words in ((ImageOps.mirror, (1, 3)), (ImageOps.flip, (2, 3))):
        inverted = [int(w) ^ full * (k in words) for k, w in enumerate(plain)]
        assert (
            sum((int(a) ^ b).bit_count() for a, b in zip(perceptual_hash(flip(image)), inverted))
            < 4
        )


@pytest.mark.parametrize("size", ((1, 1), (7, 300), (28, 28), (224, 224), (640, 480)))
def test_images_without_contrast_are_near_to_nothing(size):
    noisy = np.random.default_rng(0).integers(0, 2, (size[1], size[0], 3)).astype(np.uint8)
    flat = [Image.new("RGB", size, colour) for colour in ("black", "black", "white", "#804020")]
    hashes = np.stack([perceptual_hash(x) for x in (*flat, Image.fromarray(noisy))])
    assert not hashes.any() and not len(near_pairs(hashes))


def test_small_shapes_on_black_are_told_apart():
    hashes = []
    for seed in range(12):
        page = Image.new("RGB", (224, 224))
        page.paste(scene(seed, 90, 90), (67, 67))
        hashes.append(perceptual_hash(page))
    assert not len(near_pairs(np.stack(hashes)))
