"""What the perceptual hash of common/near.py finds, what it confuses and what it costs.

    python tests/calibrate_near.py --data DIR [--out results/near] [--sheets DIR]

DIR holds ham10000/ (images/, metadata.csv), brain_mri/ (Training/CLASS/, Testing/CLASS/) and
bccd/images/. Writes CSV files to --out and, with --sheets, pictures of the nearest pairs of
different lesions. About 10 minutes on one core. Not collected by pytest."""

import argparse
import contextlib
import csv
import io
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import near, pixels
from common.checkpoint import write_csv
from common.decode import decode_all, digest

RADII = (0, 4, 8, 12, 16, 20, 24, 28, 30, 32, 36, 40, 48, 56)
SETS = ("ham10000", "brain_mri")


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def crop(image, share, rng):
    w, h = (round(side * (1 - share)) for side in image.size)
    x, y = rng.integers(image.width - w + 1), rng.integers(image.height - h + 1)
    return image.crop((x, y, x + w, y + h))


def noise(image, sigma, rng):
    noisy = np.asarray(image) + rng.normal(0, sigma, (image.height, image.width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def transformations(rng):
    scale = lambda x, s: x.resize([max(round(side * s), 1) for side in x.size], 3)  # noqa: E731
    make = {"none": lambda x: x}
    make |= {f"JPEG quality {q}": lambda x, q=q: jpeg(x, q) for q in (90, 70, 50, 30)}
    make |= {f"scale x{s:g}": lambda x, s=s: scale(x, s) for s in (0.5, 0.25, 2)}
    for name in ("Brightness", "Contrast"):
        for c in (-20, -10, 10, 20):
            effect = getattr(ImageEnhance, name)
            make[f"{name.lower()} {c:+} %"] = lambda x, c=c, e=effect: e(x).enhance(1 + c / 100)
    make["Gaussian blur, 1 px"] = lambda x: x.filter(ImageFilter.GaussianBlur(1))
    make |= {f"noise, sigma {s} of 255": lambda x, s=s: noise(x, s, rng) for s in (5, 10)}
    make |= {f"crop {c} %": lambda x, c=c: crop(x, c / 100, rng) for c in (1, 2, 5, 10)}
    make |= {f"rotation {r} degrees": lambda x, r=r: x.rotate(r, 3) for r in (1, 2, 5, 10)}
    make["horizontal flip"], make["vertical flip"] = ImageOps.mirror, ImageOps.flip
    for r in (180, 90):
        make[f"rotation {r} degrees"] = lambda x, r=r: x.rotate(r, expand=True)
    make["flip, JPEG 70, scale x0.5"] = lambda x: scale(jpeg(ImageOps.mirror(x), 70), 0.5)
    return make


def grey(image, width, height):
    return np.asarray(image.convert("L").resize((width, height), 3), float)


CANDIDATES = {  # other known hashes, each to a vector of bits
    "DCT signs, 256 bits": lambda x: np.unpackbits(near.perceptual_hash(x).view(np.uint8)) > 0,
    "pHash, 64 bits": lambda x: (
        (c := (near._basis(32) @ grey(x, 32, 32) @ near._basis(32).T)[1:9, 1:9].ravel())
        > np.median(c)
    ),
    "dHash, 256 bits": lambda x: np.r_[
        np.diff(grey(x, 17, 8), axis=1).ravel() > 0, np.diff(grey(x, 8, 17), axis=0).ravel() > 0
    ],
    "block means, 256 bits": lambda x: (m := grey(x, 16, 16).ravel()) > np.median(m),
}


def opened(files):
    return (Image.open(file).convert("RGB") for file in files)


def pairwise(a, b, flips=True):
    """(N, 4), (M, 4) uint64 -> (N, M) Hamming distances, by matrix products over all bits."""
    bits = lambda x: np.unpackbits(x.view(np.uint8), axis=1).astype(np.float32) * 2 - 1  # noqa: E731
    signs = np.repeat(near.FLIPS if flips else near.FLIPS[:1], 64, axis=1)
    return np.min([128 - bits(a) * s @ bits(b).T / 2 for s in signs], 0).round().astype(np.uint8)


def recall(files, rng, n=400):
    """Rows (transformation, median, 95 %, maximum of the distance, recall at 20, 24 and RADIUS)."""
    picks = [files[i] for i in rng.choice(len(files), n, replace=False)]
    first = np.stack([near.perceptual_hash(x) for x in opened(picks)])
    for name, change in transformations(rng).items():
        changed = np.stack([near.perceptual_hash(change(x)) for x in opened(picks)])
        d = np.array([pairwise(a[None], b[None])[0, 0] for a, b in zip(first, changed)])
        found = [f"{(d <= r).mean():.4f}" for r in (20, 24, near.RADIUS)]
        yield name, n, *np.percentile(d, [50, 95, 100]).round(1), *found


def compare(files, lesion, half, rng, n=300):
    """Candidates at the largest radius with at most 1 pair of different lesions in the first half,
    without flips: (candidate, radius, pairs in the second half, recall by transformation)."""
    change = transformations(rng)
    names = ("JPEG quality 30", "scale x0.25", "noise, sigma 10 of 255", "brightness +20 %")
    picks = rng.choice(np.flatnonzero(half == 1), n, replace=False)
    for name, function in CANDIDATES.items():
        bits = np.stack([function(x) for x in opened(files)])
        counts = []
        for side in (0, 1):
            signs, own = bits[half == side].astype(np.float32) * 2 - 1, lesion[half == side]
            d = ((bits.shape[1] - signs @ signs.T) / 2).round().astype(int)
            d = d[np.triu(own[:, None] != own, 1)]
            counts.append(np.bincount(d, minlength=bits.shape[1] + 1).cumsum())
        radius = int(np.searchsorted(counts[0], 1, "right")) - 1
        found = []
        for key in (*names, "crop 2 %"):
            other = np.stack([function(change[key](x)) for x in opened(files[i] for i in picks)])
            found.append(f"{((other != bits[picks]).sum(1) <= radius).mean():.3f}")
        yield name, radius, counts[1][max(radius, 0)], *found


def lesions(hashes, lesion, half):
    """Pairs of HAM10000 by radius, and the 100 nearest of different lesions (i, j, distance)."""
    d = pairwise(hashes, hashes)
    i, j = np.nonzero(np.triu(d <= 60, 1))
    d, same = d[i, j], lesion[i] == lesion[j]
    rows = []
    for name, side in (("first half", half == 0), ("second half", half == 1), ("all", half >= 0)):
        number, own = side.sum(), np.unique(lesion[side], return_counts=True)[1]
        related = (own * (own - 1) // 2).sum()
        different = number * (number - 1) // 2 - related
        for r in RADII:
            hit = (d <= r) & side[i] & side[j]
            wrong = hit & ~same
            images = len(np.union1d(i[wrong], j[wrong])) / number
            row = (wrong.sum(), different, f"{wrong.sum() / different:.2e}", f"{images:.5f}")
            rows.append((name, r, *row, (hit & same).sum(), related))
    order = np.argsort(d[~same], kind="stable")[:100]
    return rows, np.stack([i[~same], j[~same], d[~same]], 1)[order]


def sheets(pairs, files, captions, folder, rows=5, columns=4):
    """Pictures of `rows` x `columns` pairs side by side, each with its distance and captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(pairs), rows * columns):
        page = Image.new("RGB", (columns * 330, rows * 145), "white")
        draw = ImageDraw.Draw(page)
        for k, (i, j, d) in enumerate(pairs[start : start + rows * columns]):
            x, y = k % columns * 330, k // columns * 145
            for part, image in enumerate((i, j)):
                with Image.open(files[image]) as opened_image:
                    page.paste(opened_image.convert("RGB").resize((160, 120)), (x + 162 * part, y))
            draw.text((x, y + 122), f"{start + k}: d {d}  {captions[i]} | {captions[j]}", "black")
        page.save(folder / f"{start // (rows * columns)}.png")


def brain(files, hashes, content):
    """Test images with a training image within the radius, copies of it left out."""
    test = np.array(["Testing" in file.parts for file in files])
    label = np.array([file.parent.name for file in files])
    as_is, flipped = (pairwise(hashes[test], hashes[~test], flips) for flips in (False, True))
    copy = content[test][:, None] == content[~test]
    yield "exact duplicates", "", copy.sum(), copy.any(1).sum(), "", ""
    for name, d in (("same orientation", as_is), ("flips too", flipped)):
        for r in RADII:
            hit = (d <= r) & ~copy
            other = hit & (label[test][:, None] != label[~test])
            new = hit.any(1) & ~copy.any(1)
            yield name, r, hit.sum(), hit.any(1).sum(), new.sum(), other.sum()


def cost(files, rng, size, rounds=16, n=300):
    """The share that the hash adds to the pass over the images (decode_all, to a map of `size`
    pixels a side), CPU time, with and without it in random order: mean, 95 % interval."""
    picks, kinds = [str(files[i]) for i in rng.choice(len(files), n, replace=False)], {}
    kinds = [lambda rgb: np.zeros(4, np.uint64), near.perceptual_hash]
    ratios = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        for r in range(rounds + 1):
            seconds = [0, 0]
            for k in rng.permutation(2):
                pixels.perceptual_hash = kinds[k]
                start = time.process_time()
                decode_all(picks, size, "set", f"{folder}/{r}-{k}")
                seconds[k] = time.process_time() - start
            ratios += [np.log(seconds[1] / seconds[0])] * (r > 0)  # the first warms up
    half = 2.13 * np.std(ratios, ddof=1) / rounds**0.5  # t of 15 degrees of freedom
    shares = np.exp(np.mean(ratios) + np.array([0, -half, half])) - 1
    return [size, *(f"{x:.3f}" for x in shares)]


def synthetic(kind, n, rng):
    """(n, 4) uint64: random, or clusters of 100 whose bits are inverted with a probability."""
    if kind == "random":
        return rng.integers(0, 2**64, (n, 4), dtype=np.uint64)
    if kind == "a third equal":
        hashes = synthetic("random", n, rng)
        hashes[: n // 3] = hashes[np.arange(n // 3) // 100]
        return hashes
    centres = synthetic("random", n // 100, rng)
    share = float(kind.split()[-2]) / 100
    bits = np.unpackbits(np.repeat(centres, 100, axis=0).view(np.uint8), axis=1)
    bits ^= rng.random(bits.shape, np.float32) < share
    return np.packbits(bits, axis=1).view(np.uint64)


def search(kind, n):
    """CPU seconds and MB (peak, over those before) of near_pairs, in a process of its own."""
    hashes = synthetic(kind, n, np.random.default_rng(0))
    near.near_pairs(hashes[:100])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    pairs = near.near_pairs(hashes)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{kind},{n},{len(pairs)},{seconds:.2f},{peak / 1024:.0f}")


def searches():
    kinds = ("random", "a third equal", "clusters of 100, 2 %", "clusters of 100, 10 %")
    for kind, n in ((kind, n) for kind in kinds for n in (1000, 10000, 100000)):
        command = [sys.executable, __file__, "--search", kind, str(n)]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        yield kind, *line.strip().rsplit(",", 4)[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, help="folder of ham10000/ and brain_mri/")
    parser.add_argument("--out", type=Path, default=Path("results/near"))
    parser.add_argument("--sheets", type=Path, help="folder for pictures of the nearest pairs")
    parser.add_argument("--search", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.search:
        return search(args.search[0], int(args.search[1]))
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.data / "ham10000" / "metadata.csv", newline="") as f:
        table = list(csv.DictReader(f))
    folder = args.data / "ham10000" / "images"
    files = {"ham10000": [folder / f"{row['image_id']}.jpg" for row in table]}
    files["brain_mri"] = sorted((args.data / "brain_mri").glob("*/*/*.jpg"))
    lesion = np.unique([row["lesion_id"] for row in table], return_inverse=True)[1]
    half = np.random.default_rng(0).integers(0, 2, lesion.max() + 1)[lesion]
    new = lambda: np.random.default_rng(1)  # noqa: E731

    def write(name, header, rows):
        write_csv(args.out / name, header.split(","), rows)
        print(f"{name} after {time.perf_counter() - start:.0f} s", flush=True)

    start = time.perf_counter()
    files["bccd"] = sorted((args.data / "bccd/images").glob("*"))
    rows = [(name, *cost(files[name], new(), size)) for name in files for size in (64, 384)]
    write("cost.csv", "data,size,share,low,high", rows)
    hashes = {k: np.stack([near.perceptual_hash(x) for x in opened(files[k])]) for k in SETS}
    rows, nearest = lesions(hashes["ham10000"], lesion, half)
    header = "images,radius,different_lesion_pairs,of,rate,share_of_images,same_lesion_pairs,of_all"
    write("lesions.csv", header, rows)
    if args.sheets:
        captions = [f"{row['lesion_id'][-4:]} {row['dx']}" for row in table]
        sheets(nearest, files["ham10000"], captions, args.sheets)
    content = np.array([digest(f"{x.size}", np.asarray(x)) for x in opened(files[SETS[1]])])
    rows = brain(files["brain_mri"], hashes["brain_mri"], content)
    header = (
        "kind,radius,train_test_pairs,test_images,of_these_no_exact_duplicate,other_class_pairs"
    )
    write("brain_mri.csv", header, rows)
    rows = [(k, *row) for k in SETS for row in recall(files[k], new())]
    header = "data,transformation,n,median,p95,largest,recall_20,recall_24,recall_30"
    write("recall.csv", header, rows)
    header = "hash,radius,second_half_pairs,jpeg_30,scale_0.25,noise_10,brightness_20,crop_2"
    write("candidates.csv", header, compare(files["ham10000"], lesion, half, new()))
    write("search.csv", "hashes,n,pairs,cpu_seconds,mb", searches())


if __name__ == "__main__":
    main()
