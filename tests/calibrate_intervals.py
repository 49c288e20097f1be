"""How often do our 95 % intervals hold the truth? Simulated, by the project's own functions.

    python tests/calibrate_intervals.py --out results/intervals

A number of units (images; patients of about 20 images; patients in out-of-fold predictions of 5
folds) is drawn again and again from a population whose scores are known, since it is large; and
differences of two classifiers on the same images. Writes coverage.csv: for each score the share of
the drawn sets whose interval held the truth, without leaving out those that the project calls too
few, and the share that it calls so. The last column is of plain percentiles, without the reach of a
t interval. Takes about half an hour on a core; sets that coverage.csv has already are skipped.
"""

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import metrics  # noqa: E402
from common.checkpoint import write_csv  # noqa: E402
from tools.folds import draw_folds  # noqa: E402

SCORES = ("accuracy", "micro_f1", "macro_f1", "balanced_accuracy", "auroc", "brier", "ece")
SCENES = {  # name: (images of a unit, priors of the classes, noise of a patient, numbers of units)
    "images, 2 equal classes": (1, (0.5, 0.5), 0, (10, 20, 50, 100, 300)),
    "images, 4 classes of 50, 30, 15, 5 %": (
        1,
        (0.5, 0.3, 0.15, 0.05),
        0,
        (20, 50, 100, 300, 1000),
    ),
    "patients, 2 equal classes": (20, (0.5, 0.5), 0.7, (7, 10, 20, 100)),
    "patients, 4 classes": (20, (0.5, 0.3, 0.15, 0.05), 0.7, (7, 10, 20, 100)),
    "patients of one class, 2 classes": (-20, (0.5, 0.5), 0.7, (7, 10, 20, 100)),
    "patients in 5 folds, 2 classes": (20, (0.5, 0.5), 0.7, (7, 10, 20, 100)),
}
DIFFERENCES = {  # of two classifiers on the same images
    "difference on images, 2 equal classes": "images, 2 equal classes",
    "difference on patients, 2 equal classes": "patients, 2 equal classes",
}
HEADER = ["scene", "units", "sets", "score", "coverage", "low", "high", "too_few", "percentile"]
DIM = 8  # of the features that the folds are trained on


def draw_population(rng, units, size, priors, noise):
    """(N,) classes, (N,) numbers of the units, and features (N, DIM) of N images."""
    classes, each = len(priors), abs(size)
    sizes = rng.integers(each // 3, 2 * each, units) if each > 1 else np.ones(units, int)
    unit = np.repeat(np.arange(units), sizes)
    of_one = rng.choice(classes, units, p=priors)[unit]
    mixed = np.cumsum(rng.dirichlet(3 * np.array(priors), units), 1)[unit]
    y = of_one if size < 0 else (rng.random((len(unit), 1)) > mixed).sum(1).clip(max=classes - 1)
    if each == 1:
        y = rng.choice(classes, units, p=priors)
    x = 1.4 * np.eye(DIM)[y] + rng.normal(0, 1, (len(unit), DIM))
    return y, unit, x + rng.normal(0, noise, (units, DIM))[unit]


def linear(x, y, classes):
    """Weights and offsets of a linear discriminant with the shared covariance I."""
    means = np.stack([x[y == c].mean(0) if (y == c).any() else 0 * x[0] for c in range(classes)])
    shares = np.bincount(y, minlength=classes) / len(y)
    return means.T, np.log(shares + 1e-3) - (means**2).sum(1) / 2


def arrays_of(y, logits):
    """What metrics.measures() takes."""
    labels = np.eye(logits.shape[1], dtype=bool)[y]
    return labels, *metrics.probabilities_of(torch.from_numpy(logits), 1.0, False), False


def predictions(rng, units, scene):
    """(units, *arrays) of a drawn set: of a fixed classifier, or out of 5 folds."""
    size, priors, noise, _ = SCENES[scene]
    y, unit, x = draw_population(rng, units, size, priors, noise)
    if "folds" not in scene:
        means = 1.4 * np.eye(DIM)[: len(priors)]
        return unit, *arrays_of(y, x @ means.T + np.log(priors))
    logits, labels = np.zeros((len(y), len(priors))), np.eye(len(priors), dtype=bool)[y]
    fold = draw_folds(labels, np.ones(len(y), bool), unit, 5, int(rng.integers(1e6)))
    for f in range(5):
        weights, offsets = linear(x[fold != f], y[fold != f], len(priors))
        logits[fold == f] = x[fold == f] @ weights + offsets
    return unit, *arrays_of(y, logits)


def shares(held, few):
    """As text: the share of intervals that held the truth, its own 95 % limits, of too few."""
    p = np.mean(held)
    error = 1.96 * np.sqrt(p * (1 - p) / len(held))
    return [f"{x:.3f}" for x in (p, max(p - error, 0), min(p + error, 1), np.mean(few))]


@np.errstate(invalid="ignore")
def differences(scene, units, sets):
    """Rows of coverage.csv for the difference of two classifiers, whose errors are related."""
    size, priors, noise, _ = SCENES[DIFFERENCES[scene]]
    rng, classes = np.random.default_rng([units, 100 + list(DIFFERENCES).index(scene)]), len(priors)
    means = 1.4 * np.eye(DIM)[:classes]
    turned = means + rng.normal(0, 0.5, means.shape)  # the second one's

    def drawn(n):
        y, unit, x = draw_population(rng, n, size, priors, noise)
        return unit, [arrays_of(y, x @ m.T - (m**2).sum(1) / 2) for m in (means, turned)]

    _, whats = drawn(200_000 if size == 1 else 20_000)
    points = [metrics.measures(*x, np.ones((1, len(x[0]))))[0] for x in whats]
    held, few = defaultdict(list), defaultdict(list)
    for _ in range(sets):
        unit, whats = drawn(units)
        a, b = (metrics.bootstrap(unit, *what)[0] for what in whats)
        none = metrics.too_few(unit, whats[0][0])[0]
        for key in set(SCORES) - {"ece"}:
            low, high = metrics.limits(b[key] - a[key], len(np.unique(unit)))
            held[key].append(low <= points[1][key][0] - points[0][key][0] <= high)
            few[key].append(none[key])
    for key in (key for key in SCORES if key in held):
        yield [scene, units, sets, key, *shares(held[key], few[key]), ""]


def truth_of(rng, units, scene):
    """The scores of the population; of folds the mean over classifiers trained on 4 / 5 units."""
    size, priors, noise, _ = SCENES[scene]
    if "folds" not in scene:
        _, *what = predictions(rng, 200_000 if abs(size) == 1 else 20_000, scene)
        found = [metrics.measures(*what, np.ones((1, len(what[0]))))[0]]
    else:
        found, (y, _, x) = [], draw_population(rng, 2000, size, priors, noise)
        for _ in range(100):
            y0, unit, x0 = draw_population(rng, units, size, priors, noise)
            kept = unit >= units / 5
            weights, offsets = linear(x0[kept], y0[kept], len(priors))
            what = arrays_of(y, x @ weights + offsets)
            found.append(metrics.measures(*what, np.ones((1, len(y))))[0])
    return {key: np.mean([f[key] for f in found]) for key in SCORES}


@np.errstate(invalid="ignore")
def coverage(scene, units, sets):
    """Rows of coverage.csv for a scene and a number of units."""
    rng = np.random.default_rng([units, list(SCENES).index(scene)])
    truth, held, few, plain = truth_of(rng, units, scene), *(defaultdict(list) for _ in range(3))
    for _ in range(sets):
        unit, *what = predictions(rng, units, scene)
        points = metrics.measures(*what, np.ones((1, len(unit))))[0]
        drawn, U = metrics.bootstrap(unit, *what)[0], len(np.unique(unit))
        none = metrics.too_few(unit, what[0])[0]
        for key in SCORES:
            found = metrics.limits(drawn[key], U)
            if key == "ece":
                found = metrics.ece_limits(drawn[key], points[key][0], U)
            held[key].append(found[0] <= truth[key] <= found[1])
            low, high = np.nanquantile(drawn[key], [0.025, 0.975])
            plain[key].append(low <= truth[key] <= high)
            few[key].append(none[key])
    for key in SCORES:
        yield [scene, units, sets, key, *shares(held[key], few[key]), f"{np.mean(plain[key]):.3f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="results/intervals", help="folder of coverage.csv")
    parser.add_argument("--sets", type=int, default=400, help="drawn sets of each scene and number")
    args = parser.parse_args()
    file, rows = Path(args.out, "coverage.csv"), []
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        rows = list(csv.reader(file.open()))[1:]
    done = {tuple(row[:3]) for row in rows}
    todo = [(scene, units, coverage) for scene, x in SCENES.items() for units in x[-1]]
    todo += [(scene, units, differences) for scene in DIFFERENCES for units in (20, 100)]
    for scene, units, measure in todo:
        if (scene, str(units), str(args.sets)) not in done:
            new = list(measure(scene, units, args.sets))
            rows += new
            write_csv(file, HEADER, rows)
            print(*(" ".join(map(str, row)) for row in new), sep="\n", flush=True)


if __name__ == "__main__":
    main()
