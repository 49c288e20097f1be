"""Do features tell other images from those of training? A row of outside.csv for each finished run
of finetune.py and set of images: how many are unlike the training images, that is, have a mean
cosine with the 20 nearest of 1,000 of these below that of 95 % of the validation images.

    python tests/outside.py RUN [RUN ...] [--also FILE] [--n 300] [--out results/evidence]

Images: n of the run's own test images, at most one of a patient or set of exact duplicates, in a
seeded order: what is flagged of these are false alarms. Then as many of the other runs' data, and
of a .npz file; and the run's own test images upside down, as negatives, and blurred. Shares with
95 % Wilson intervals. Not collected by pytest.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torchvision.transforms.v2 import functional as transforms

sys.path.insert(0, str(Path(__file__).parents[1]))

from deletion import some_images

import data
import predict
from common import readers
from common.checkpoint import read_json, write_csv

HEADER = ("run", "arm", "images", "n", "unlike", "low", "high")
CHANGES = {
    "own, upside down": transforms.vertical_flip,
    "own, negatives": transforms.invert,
    "own, blurred": lambda x: transforms.gaussian_blur(x, 15, 4.0),
}


def features(arm, images):
    """(N, D), of length 1, of images (3, S, S) uint8."""
    settings = 32, 0, torch.device("cpu"), None, True
    return F.normalize(torch.from_numpy(predict.outputs_of(arm, images, *settings)[2]), dim=1)


def likeness(known, queries):
    """(M,) mean cosine of queries (M, D) with the 20 nearest of known features (N, D)."""
    return (queries @ known.T).topk(20).values.mean(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with best.pt")
    parser.add_argument("--also", type=Path, metavar="FILE", help=".npz file of other images")
    parser.add_argument("--n", type=int, default=300, help="images of each set")
    parser.add_argument("--out", type=Path, default=Path("results/evidence"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, arms = [], {run: predict.load(run / "best.pt") for run in args.runs}
    path = {run: read_json(run / "config.json", "arguments")["arguments"]["data"] for run in arms}
    for run, arm in arms.items():
        known, val = (features(arm, list(some_images(run, arm, x, 1000))) for x in ("train", "val"))
        limit = likeness(known, val).quantile(0.05)
        own = list(some_images(run, arm, "test", args.n))
        sets = {"own": own}
        for other in {path[x]: x for x in arms if path[x] != path[run]}.values():
            name = "/".join(other.resolve().parts[-3:-2])
            sets[name] = list(some_images(other, arm, "test", args.n))
        if args.also:
            images = readers.read(str(args.also), label_col=["none"], split="none")
            images.decode(arm.img_size, data.cache_dir(None), False)
            order = np.random.default_rng(0).permutation(len(images))[: args.n]
            sets[args.also.stem] = [images.images[i] for i in order]
        for name, change in CHANGES.items():
            sets[name] = [change(torch.from_numpy(x.copy())).numpy() for x in own]
        for name, images in sets.items():
            found = (likeness(known, features(arm, images)) < limit).numpy()
            k, n = int(found.sum()), len(found)
            ends = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
            kind = read_json(run / "metrics.json")["arch"]
            name = "/".join(run.resolve().parts[-3:]), kind, name, n
            rows.append((*name, *(f"{x:.4f}" for x in (np.mean(found), *ends))))
            print(*rows[-1], flush=True)
            write_csv(args.out / "outside.csv", HEADER, rows)


if __name__ == "__main__":
    main()
