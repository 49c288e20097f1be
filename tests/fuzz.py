"""Damaged files of every kind that is read: refused in one line, or read right; never a traceback,
a hang or a wrong result.

    python tests/fuzz.py --n 300 --seed 0          (so many files of each kind; minutes)

Each mutated file has one to three random changes: bits, bytes, blocks of zeros, cuts, insertions,
swaps. "Right" is told by an independent reader: what was written for weights and last.pt (their
checksums tell), Python's json and csv, numpy, Pillow, and for the decoded map a clean run.
"""

import argparse
import contextlib
import csv
import io
import json
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import timm
import torch
from conftest import picture
from PIL import Image, ImageOps

from common import checkpoint, decode, pixels, starts, tables
from common.cli import UserError

IMAGES = {
    "png": {},
    "jpg": {"quality": 90},
    "bmp": {},
    "gif": {},
    "tif": {"compression": "tiff_lzw"},
    "webp": {"lossless": True},
}


def mutate(data, rng):
    """One to three random changes of some bytes."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        end = len(data) if rng.random() < 0.7 else min(200, len(data))  # headers have their share
        at, n = int(rng.integers(0, end + 1)), int(rng.integers(1, 2 + min(40, len(data) // 50)))
        kind = rng.integers(0, 6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            data[at : at + n] = b"".join(rng.choice([b"0", b",", b"a", b"\xff", b"\n"], n))
        elif kind == 2:
            data[at : at + 16 * n] = bytes(len(data[at : at + 16 * n]))
        elif kind == 3:
            del data[at : at + n if rng.random() < 0.7 else None]
        elif kind == 4:
            data[at:at] = rng.bytes(n)
        else:
            other = int(rng.integers(0, len(data) + 1))
            data[at : at + n] = data[other : other + n]
    return bytes(data)


def equal(a, b):
    """Whether two values of nested dicts, lists, tensors and arrays are the same."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return a == b


# each kind: folder -> (name of the file, its good bytes, check of a mutated file). A check returns
# whether what was read is right, and raises UserError or ValueError to refuse it.


def weights(folder):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    metadata = {"arch": "test_vit", "arm": "vit", "model_kwargs": {}, "img_size": 160, "seed": 0}
    metadata |= {"mean": [0.5] * 3, "std": [0.5] * 3, "data": {}, "class_names": ["a", "b", "c"]}
    metadata |= {"seen": torch.arange(20), "split": torch.stack([torch.arange(9)] * 2) % 3}
    saved = checkpoint.weights_file(model, **metadata)
    checkpoint.save(folder / "good.pt", saved)

    def check(path):
        found = starts.load_weights(path)
        starts.build(found, path)
        return equal(found, saved)

    return "weights.pt", (folder / "good.pt").read_bytes(), check


def last(folder):
    saved = {"script": "pretrain.py", "args": {"bs": 4, "epochs": 2}, "epoch": 1, "batch": 0}
    saved |= {"iteration": 7, "loss": [0.5], "seconds": 0.0, "log": [{"epoch": 1}], "processes": 1}
    saved |= {"rng": {"cpu": torch.get_rng_state(), "cuda": []}, "seen": torch.arange(5)}
    saved |= {"initial": torch.zeros(2, 0, dtype=torch.int64), "method": {"w": torch.randn(99)}}
    checkpoint.save(folder / "good.pt", saved)
    return (
        "last.pt",
        (folder / "good.pt").read_bytes(),
        lambda path: equal(starts.load_last(path, "pretrain.py"), saved),
    )


def json_file(folder):
    value = {"arguments": {"bs": 4, "lr": 1e-3, "data": "/data/é", "seeds": [0, 1], "out": None}}
    good = json.dumps(value, indent=2, ensure_ascii=False).encode()

    def check(path):
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        return equal(checkpoint.read_json(path, "arguments"), json.loads(text))

    return "config.json", good, check


def csv_table(path):
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_bytes().decode("cp1252")
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(row)]
    return [[cell.strip() for cell in row] for row in rows]


def csv_file(folder):
    for i in range(12):
        Image.fromarray(picture(i, (8, 8))).save(folder / f"{i}.png")
    good = "image,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(12))

    def check(path):
        data = tables.read_csv(path)
        (header, *rows), has = csv_table(path), {}
        at = header.index(
            next(c for c in header if "image" in c or rows[0][header.index(c)] in data.names)
        )
        for row in rows:
            name, labels = row[at], [cell for i, cell in enumerate(row) if i != at]
            has[name.lower().removesuffix(".png")] = [x.lower() for x in labels if x]
        found = zip(data.names, data.labels)
        found = {
            n.removesuffix(".png"): [c.lower() for c, h in zip(data.classes, x) if h]
            for n, x in found
        }
        return len(data.classes) == 0 or found == has or data.multilabel

    return "table.csv", good.encode(), check


def split_file(folder):
    names = [f"{'abc'[i % 3]}/{i}.png" for i in range(30)]
    sides = ["train", "val", "test"]
    good = "path,split\n" + "".join(f"{n},{sides[i % 3]}\n" for i, n in enumerate(names))

    def check(path):
        found = tables.read_split(path, names)
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=False)
        told = {
            r["path"].strip(): tables.SPLITS.get((r["split"] or "").strip().lower()) for r in rows
        }
        return all(told.get(name, "") == side for name, side in zip(names, found.tolist()))

    return "split.csv", good.encode(), check


def npz_file(folder):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 9), ("val", 3), ("test", 5)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 6, 6), dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 3, (n, 1))
    np.savez(folder / "good.npz", **arrays)

    def check(path):
        data = tables.read_npz(path)
        with np.load(path) as found:
            parts = [p for p in ("train", "val", "test") if f"{p}_images" in found]
            images = [image for p in parts for image in found[f"{p}_images"]]
        return equal(data.sources, images)

    return "set.npz", (folder / "good.npz").read_bytes(), check


def map_file(folder):
    paths = []
    for i in range(20):
        paths.append(str(folder / f"{i}.png"))
        Image.fromarray(picture(i, (12, 9))).save(paths[-1])

    def pixels():
        table, images, _ = decode.decode_all(paths, 8, "set", folder / "cache")
        return table, np.stack([images[i] for i in range(len(paths))])

    table, right = pixels()
    (file,) = (folder / "cache").iterdir()

    def check(path):
        file.write_bytes(path.read_bytes())
        try:
            found = pixels()
        except UserError:
            found = pixels()  # made anew
        return equal(found[0], table) and equal(found[1], right)

    return "mutated.map", file.read_bytes(), check


def image_file(ending, folder):
    options = IMAGES[ending]
    Image.fromarray(picture(3, (50, 40))).save(folder / f"good.{ending}", **options)

    def check(path):
        array, metadata = pixels.decode(str(path), 16)
        with Image.open(path) as image:
            if image.mode not in ("RGB", "L", "P", "1") or "transparency" in image.info:
                return array.shape == (3, 16, 16)
            try:
                turned = ImageOps.exif_transpose(image).convert("RGB")
            except Exception:  # broken EXIF, which decode() ignores
                return array.shape == (3, 16, 16)
            resized = turned.resize((16, 16), Image.Resampling.BILINEAR)
        return equal(array, np.asarray(resized).transpose(2, 0, 1))

    return f"image.{ending}", (folder / f"good.{ending}").read_bytes(), check


KINDS = {"weights": weights, "last.pt": last, "json": json_file, "csv": csv_file}
KINDS |= {"split": split_file, "npz": npz_file, "map": map_file}
for _ending in IMAGES:
    KINDS[_ending] = lambda folder, ending=_ending: image_file(ending, folder)


def _hang(*_):
    raise TimeoutError("20 seconds")


def fuzz(kind, n, seed):
    """Read n mutated files of a kind. Returns {"right": ..., "refused": ..., "wrong": [...]}."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    count, wrong = {"right": 0, "refused": 0}, []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name, good, check = KINDS[kind](Path(folder))
        path = Path(folder) / name
        path.write_bytes(good)
        assert check(path), f"{kind}: the good file is not read right"
        before = signal.signal(signal.SIGALRM, _hang)
        for i in range(n):
            path.write_bytes(mutate(good, rng))
            signal.alarm(20)
            try:
                with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
                    right = check(path)
                if right:
                    count["right"] += 1
                else:
                    wrong.append(f"{kind} {i}: a wrong result")
            except UserError as error:
                count["refused"] += 1
                if "\n" in str(error):
                    wrong.append(f"{kind} {i}: more than a line: {error}")
            except Exception as error:
                if kind in IMAGES and type(error) is ValueError and "\n" not in str(error):
                    count["refused"] += 1  # decode's own
                else:
                    wrong.append(f"{kind} {i}: {type(error).__name__}: {error}")
            finally:
                signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return {**count, "wrong": wrong}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS), nargs="+", default=list(KINDS))
    args, failed = parser.parse_args(), 0
    for kind in args.only:
        found = fuzz(kind, args.n, args.seed)
        failed += len(found["wrong"])
        print(f"{kind:8} right {found['right']:5}, refused {found['refused']:5}, wrong:", end=" ")
        print(len(found["wrong"]), *found["wrong"][:5], sep="\n  " if found["wrong"] else " ")
    sys.exit(bool(failed))
