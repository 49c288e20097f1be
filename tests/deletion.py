"""Do the maps of tools/maps.py show what a prediction rests on? The deletion test, and randomised
weights, of finished runs of finetune.py; a row of deletion.csv for each run.

    python tests/deletion.py RUN [RUN ...] [--n 50] [--side test] [--out results/evidence]

Images: n of the run's test (or val) split, at most one of a patient or set of exact duplicates, in
a seeded order. Of each, with the class that is predicted: the area under its calibrated probability
while the pixels are masked, those of the map first, and the mean of it over 19 random maps of as
many cells; then the same with the map of the same architecture with random weights, and the rank
correlation of both maps (Adebayo et al., arXiv 1810.03292). Differences are paired by image, with
95 % t intervals over the images. 50 images of four runs at 64 px take 7 minutes of one core. Not
collected by pytest.
"""

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import predict
from common import readers, splits, starts
from common.checkpoint import read_json, write_csv
from tools import maps

HEADER = ("run", "arm", "side", "n", "cells", "area", "random", "difference", "low", "high")
HEADER += ("beats_all_random", "untrained_difference", "untrained_low", "untrained_high")
HEADER += ("over_untrained", "over_untrained_low", "over_untrained_high")
HEADER += ("rank_correlation", "correlation_low", "correlation_high", "seconds")


def interval(x):
    """Mean and 95 % t interval of (N,)."""
    x = np.asarray(x)
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return x.mean(), x.mean() - half, x.mean() + half


def some_images(run, arm, side, n):
    """Yields n images (3, S, S) uint8 of a side of the run's split, from different units."""
    args = SimpleNamespace(**read_json(run / "config.json", "arguments")["arguments"])
    images = readers.read(args.data, **data.options(args))
    images.decode(arm.img_size, data.cache_dir(args.cache), args.skip_bad)
    carried = starts.from_checkpoint(run / "best.pt").carried
    split = splits.make_split(images, args.seed, carried, allow_seen=True)
    units = splits.indivisible_units(images)
    order = np.random.default_rng(0).permutation(np.flatnonzero(split == side))
    first = np.sort(np.unique(units[order], return_index=True)[1])
    for i in order[first][:n]:
        yield images.images[i]


def untrained(arm, seed):
    """The same arm with the random weights that timm gives it."""
    weights = starts.load_weights(arm.path)
    torch.manual_seed(seed)
    kwargs = {"num_classes": weights["num_classes"], **weights["model_kwargs"]}
    return SimpleNamespace(**vars(arm) | {"model": timm.create_model(weights["arch"], **kwargs)})


def measure(arm, other, images):
    """(N, 4): of each image the area, the mean area of random maps, the area by the map of `other`
    weights for the same class, and the rank correlation of both maps."""
    rows = []
    for pixels in images:
        found = maps.explain(arm, pixels)
        image = maps.normalize(torch.from_numpy(pixels.copy())[None], arm.mean, arm.std)
        heat = other.explain(image, [found.target])
        area = maps.deletion(
            lambda x, c=found.target: maps.distribution(arm, x)[:, c], image[0], heat
        )
        both = found.heat.ravel(), heat.numpy().ravel()
        constant = min(map(np.ptp, both)) == 0  # an empty map: as if unrelated
        correlation = 0 if constant else stats.spearmanr(*both).statistic
        own, *random = found.areas
        rows.append((own, np.mean(random), own < min(random), area.item(), correlation))
    return np.array(rows), f"{found.heat.shape[0]} x {found.heat.shape[1]}"


def row(run, side, n):
    began, arm = time.perf_counter(), predict.load(run / "best.pt")
    other = untrained(arm, 1)
    arm.device = other.device = torch.device("cpu")
    for each in (arm, other):
        each.model.eval()
        each.explain = maps.explainer(each.model, arm.img_size)
    found, cells = measure(arm, other, some_images(run, arm, side, n))
    area, random, beats, fresh, correlation = found.T
    numbers = [area.mean(), random.mean(), *interval(area - random), beats.mean()]
    for each in (fresh - random, area - fresh, correlation):
        numbers += interval(each)
    name = "/".join(run.resolve().parts[-3:])
    kind = read_json(run / "metrics.json")["arch"]
    seconds = round(time.perf_counter() - began)
    return name, kind, side, len(found), cells, *(f"{x:.4f}" for x in numbers), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with best.pt")
    parser.add_argument("--n", type=int, default=50, help="images of each run")
    parser.add_argument("--side", default="test", choices=["val", "test"])
    parser.add_argument("--least", type=int, default=maps.LEAST, help="as maps.LEAST, to choose it")
    parser.add_argument("--out", type=Path, default=Path("results/evidence"))
    args = parser.parse_args()
    maps.LEAST = args.least
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for run in args.runs:
        rows.append(row(run, args.side, args.n))
        print(*(f"{key} {x}" for key, x in zip(HEADER, rows[-1])), sep="\n  ", flush=True)
        write_csv(args.out / "deletion.csv", HEADER, rows)


if __name__ == "__main__":
    main()
