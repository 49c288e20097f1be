"""The splits of results/pretrained, drawn once for all seeds and methods.

    python tests/draw_split.py --data /path [data flags] --out results/pretrained/brain_mri

writes brain_mri.csv: at most 2,000 training and 200 validation images of a 70/10/20 split and all
of its test images; and brain_mri_trials.csv: the same, where the other validation images stand in
for the test images. What is chosen is chosen by the second, which names no test image.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
from common import cli, readers, splits
from common.checkpoint import write_csv

SIZES = {"train": 2000, "val": 200}


def main():
    parser = cli.Parser(__doc__)
    data.add_arguments(parser)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    images = readers.read(args.data, **data.options(args))
    images.decode(84, data.cache_dir(args.cache), args.skip_bad)
    split = data.split_and_report(images, 0, args.dedup)
    some, units = np.zeros(len(images), bool), splits.indivisible_units(images)
    for number, (side, size) in enumerate(SIZES.items()):
        index = np.flatnonzero(split == side)
        unit = np.unique(units[index], return_inverse=True)[1]  # lesions, near-duplicates
        rng = np.random.default_rng([0, number])
        order, _ = splits.stratified_order(images.labels[index], unit, rng)
        chosen = order[np.cumsum(np.bincount(unit)[order]) <= size]
        some[index[np.isin(unit, chosen)]] = True
    for name, others in (("", split == "test"), ("_trials", (split == "val") & ~some)):
        sides = np.where(some, split, np.where(others, "test", ""))
        rows = sorted((n, s) for n, s in zip(images.names, sides.tolist()) if s)
        write_csv(f"{args.out}{name}.csv", ("path", "split"), rows)
        for side in splits.SIDES:
            counts = images.labels[sides == side].sum(0).tolist()
            print(f"{args.out}{name}.csv, {side}: {dict(zip(images.classes, counts))}")


if __name__ == "__main__":
    cli.run(main)
