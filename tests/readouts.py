"""What the features of pre-trainings are good for, before any fine-tuning: k-NN and a linear probe.

    python tests/readouts.py runs --draws 20

For each folder of pretrain.py below `runs` that is finished and still has its weights, writes
readouts.json there: {arm: {"knn" or "linear", "|", fraction of the labels: {"val" or "test": macro
F1}}}, the mean over draws of labels (of all labels there is one); and features.npz, float16: of all
images, and of augmented ones of VIEWED training images, a row of VIEWS each.
"""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
from common import cli, collapse, readers, splits, starts
from common.checkpoint import atomic_open, write_json
from common.metrics import measures
from common.run import on_device

ARMS, CPU = ("cnn", "vit"), torch.device("cpu")
VIEWED, VIEWS = 200, 10  # training images whose augmented views are kept, too


def linear(features, labels, queries):
    """Scores (M, C) of ridge regression on standardized features (N, D), whose penalty is N.
    labels: (N, C) float 0/1; queries: (M, D)."""
    bias = labels.mean(0)
    penalized = features.T @ features + len(features) * torch.eye(features.shape[1])
    return queries @ torch.linalg.solve(penalized, features.T @ (labels - bias)) + bias


def macro_f1(labels, scores):
    """Of (N, C) bool labels and float scores."""
    p = scores.numpy()
    return measures(labels, p, p, False, np.ones((1, len(p))))[0]["macro_f1"].item()


def embed(model, images, index, transform=None):
    """Features (N, D) of the images at `index`, augmented by `transform` if there is one."""
    chosen = data.AugmentedImages(images, index, transform)
    batches = data.EpochBatches(len(index), 64, drop_single=False)
    loader = data.loader(chosen, batches, CPU)
    return collapse.embed(model, on_device(loader, CPU))[0].flatten(1)


def readouts(folder, draws, fracs):
    """Write the files of one folder. fracs: of the labels."""
    starting, found, arrays = starts.from_checkpoint(folder / "cnn.pt"), {}, {}
    options, size = dict(starting.data), starting.metadata["img_size"]
    path, cache, _ = (options.pop(key) for key in ("data", "cache", "dedup"))
    images = readers.read(path, **options)
    images.decode(size, data.cache_dir(cache))
    split = splits.make_split(images, starting.seed)
    index = {side: np.flatnonzero(split == side) for side in splits.SIDES}
    used = {}  # (fraction, draw): of the training images
    for frac, draw in product(fracs, range(draws)):
        if frac < 1 or draw == 0:
            mask = splits.label_fraction(
                images, split == "train", frac, 1000 * starting.seed + draw
            )
            used[frac, draw] = torch.from_numpy(mask[index["train"]])
    y = torch.from_numpy(images.labels[index["train"]]).float()
    for arm in ARMS:
        model = starts.from_checkpoint(folder / f"{arm}.pt").make()
        features = {side: embed(model, images.images, index[side]) for side in index}
        viewed = np.repeat(index["train"][:VIEWED], VIEWS)
        views = embed(model, images.images, viewed, data.augmentation(size))
        arrays[f"{arm}_views"] = views.unflatten(0, (-1, VIEWS)).half().numpy()
        arrays |= {f"{arm}_{side}": x.half().numpy() for side, x in features.items()}
        mean, std = features["train"].mean(0), features["train"].std(0) + 1e-6
        scaled = {side: (x - mean) / std for side, x in features.items()}
        scores = {}
        for side, ((frac, _), mask) in product(("val", "test"), used.items()):
            true = images.labels[index[side]]
            votes = collapse.knn(features["train"][mask], y[mask], features[side])
            probe = linear(scaled["train"][mask], y[mask], scaled[side])
            for kind, p in (("knn", votes), ("linear", probe)):
                scores.setdefault((f"{kind}|{frac:g}", side), []).append(macro_f1(true, p))
        found[arm] = {}
        for (key, side), x in scores.items():
            found[arm].setdefault(key, {})[side] = round(float(np.mean(x)), 5)
    with atomic_open(folder / "features.npz", "wb") as file:
        np.savez(file, **arrays)
    write_json(folder / "readouts.json", found)


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--draws", type=cli.positive, default=20)
    parser.add_argument("--fracs", nargs="+", type=cli.fraction, default=[0.01, 0.1, 1.0])
    args = parser.parse_args()
    for mark in sorted(args.runs.glob("*/finished")):
        folder, claimed = mark.parent, mark.parent / "readouts"
        if (folder / "cnn.pt").exists() and not claimed.exists():
            claimed.mkdir()  # for this process, where several run
            readouts(folder, args.draws, args.fracs)


if __name__ == "__main__":
    cli.run(main)
