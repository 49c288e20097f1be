"""Scores of a classifier, their 95 % intervals, and probabilities that mean something."""

from collections import defaultdict
from itertools import product
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F

BINS = 15  # of the expected calibration error
ROUNDS = 1000  # of the bootstrap
FEW, FEW_OF_CLASS, FEW_FOR_ECE = 20, 10, 300  # units, units of a class, images: results/intervals
OF_CLASSES = ("macro_f1", "macro_f1_present", "balanced_accuracy", "auroc")  # means over them


def predicted_labels(probabilities, multilabel):
    """(N, C) probabilities -> (N, C) bool: what is predicted. Multi-label at 0.5, else argmax."""
    if multilabel:
        return probabilities >= 0.5
    return np.eye(probabilities.shape[1], dtype=bool)[probabilities.argmax(1)]


def fit_temperature(logits, labels, multilabel):
    """The T of probabilities_of() with the least cross-entropy on logits (N, C) and labels (N, C)
    bool, of 201 from 0.1 to 10 (Guo et al., arXiv 1706.04599, section 4.2)."""
    candidates, y = np.geomspace(0.1, 10, 201), torch.from_numpy(labels).float()
    loss = F.binary_cross_entropy_with_logits if multilabel else F.cross_entropy
    return float(min(candidates, key=lambda T: loss(logits.cpu() / T, y).item()))


def probabilities_of(logits, T, multilabel):
    """Logits (N, C) -> two (N, C) arrays that predict the same: sigmoids of the classes, as trained
    (F.3.2); softmax(logits / T), which sums to 1, or, multi-label, sigmoids of logits / T."""
    scaled = logits / T
    both = logits.sigmoid(), scaled.sigmoid() if multilabel else scaled.softmax(1)
    return [x.cpu().numpy() for x in both]


def auroc(positive, score, weights):
    """(B,) areas under the ROC curve, ties as half, of (N,) bool by (N,) scores that count weights
    (B, N) times; NaN where one side is empty."""
    order = score.argsort()
    first = np.unique(score[order], return_index=True)[1]
    sides = (weights[:, order] * side[order] for side in (positive, ~positive))
    above, below = (np.add.reduceat(side, first, axis=1) for side in sides)
    pairs = above.sum(1) * below.sum(1)
    return (above * (below.cumsum(1) - below / 2)).sum(1) / pairs


def decisions(labels, p, multilabel):
    """Confidence (N, K) and whether it is right, (N, K), of probabilities p (N, C): K is 1, what is
    predicted; multi-label: C."""
    best = p.argmax(1)[:, None]
    return (p, labels) if multilabel else [np.take_along_axis(x, best, 1) for x in (p, labels)]


def calibration_errors(labels, p, multilabel):
    """What each image adds, with probabilities p (N, C): (N,) to the Brier score (over classes a
    sum, over labels a mean), and (N, BINS) to the gaps whose absolute values sum to the expected
    calibration error (Guo et al., equation 3)."""
    squares, (confidence, right) = np.square(p - labels), decisions(labels, p, multilabel)
    bins = np.eye(BINS)[np.minimum((confidence * BINS).astype(int), BINS - 1)]
    gaps = ((confidence - right)[..., None] * bins).mean(1)
    return squares.mean(1) if multilabel else squares.sum(1), gaps


def measures(labels, probabilities, distribution, multilabel, weights):
    """Scores of N images that count weights (B, N) times: {name: (B,)}, and {name: (B, C)} of each
    class; NaN where undefined. labels: (N, C) bool; the two (N, C) of probabilities_of()."""
    predicted, n = predicted_labels(probabilities, multilabel), weights.sum(1)
    tp, support, found = (weights @ x for x in (labels & predicted, labels, predicted))
    each = {"precision": tp / np.maximum(found, 1), "recall": tp / np.maximum(support, 1)}
    each["f1"] = 2 * tp / np.maximum(support + found, 1)
    each["auroc"] = np.stack([auroc(*x, weights) for x in zip(labels.T, probabilities.T)], 1)
    present, known = support > 0, ~np.isnan(each["auroc"])
    f1 = (each["f1"] * present).sum(1) / present.sum(1)
    scores = {"macro_f1": f1 * labels.any(0).mean()}  # absent classes count as 0
    scores["micro_f1"] = 2 * tp.sum(1) / np.maximum((support + found).sum(1), 1)
    scores |= {"macro_f1_present": f1, "auroc": np.nansum(each["auroc"], 1) / known.sum(1)}
    scores["exact_match" if multilabel else "accuracy"] = weights @ (labels == predicted).all(1) / n
    if not multilabel:
        scores["balanced_accuracy"] = (each["recall"] * present).sum(1) / present.sum(1)
    for name, p in (("", distribution), ("_uncalibrated", probabilities)):
        squares, gaps = calibration_errors(labels, p, multilabel)
        scores["brier" + name] = weights @ squares / n
        scores["ece" + name] = np.abs(weights @ gaps).sum(1) / n
    return scores, each


def bootstrap(units, *what):
    """measures(*what) of ROUNDS resamples of units (N,), the number of each image's patient, say.
    Equal units are drawn equally, so that differences between two models are paired."""
    _, unit = np.unique(units, return_inverse=True)
    rng, U = np.random.default_rng(0), unit.max() + 1
    draws = (rng.multinomial(U, np.full(U, 1 / U), 100) for _ in range(ROUNDS // 100))
    parts = [measures(*what, some[:, unit].astype(float)) for some in draws]
    return [{k: np.concatenate([x[k] for x in xs]) for k in xs[0]} for xs in zip(*parts)]


def limits(replicates, U):
    """Lower and upper 95 % limit, (2, ...), of replicates (ROUNDS, ...) from U units: percentiles
    as far out as a t interval reaches (Hesterberg, arXiv 1411.5279)."""
    z, v = 1.959964, max(U - 1, 1)
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)  # its quantile
    tail = NormalDist().cdf(-t * (U / v) ** 0.5)
    known = np.where(np.isnan(replicates).all(0), 0, replicates)  # else a warning
    return np.nanquantile(known, [tail, 1 - tail], axis=0)


def ece_limits(replicates, ece, U):
    """As limits(). Noise alone makes gaps, and a resample has that of the sample and its own: where
    confidence is right, its bias is sqrt(2) - 1 of the sample's. Both are taken off the lower."""
    low, high = limits(replicates, U)
    bias = replicates.mean() - ece
    return np.array([max(0.0, low - bias - bias / (2**0.5 - 1)), high])


def too_few(units, labels):
    """Which scores have too few units for an interval, {score: bool} and {score: (C,) bool}, and
    how many units have each label."""
    U = len(np.unique(units))
    counts = np.array([[len(np.unique(units[x])) for x in y.T] for y in (labels, ~labels)])
    few = (U < FEW) | (counts < FEW_OF_CLASS)  # with the label, without it
    each = defaultdict(lambda: few[0], auroc=few.any(0))
    means = {key: (each[key] & (counts[0] > 0)).any() for key in OF_CLASSES}
    means["ece"] = means["ece_uncalibrated"] = U < FEW or len(units) < FEW_FOR_ECE
    return defaultdict(lambda: U < FEW, means), each, counts[0].tolist()


def interval(few, ends):
    """95 % limits as [low, high]; None of too few units or of none but equal resamples."""
    return None if few or ends[0] == ends[1] else ends.tolist()


@np.errstate(invalid="ignore")  # 0 / 0 where a score is undefined: None
def score(units, labels, probabilities, distribution, multilabel, classes):
    """Scores, as of measures(), of N > 0 images and, unless units is None, ci95: each's interval().
    Absent classes count as 0 in macro_f1; macro_f1_present, auroc and balanced_accuracy leave them
    out. confusion: rows true, or [tp, fp, fn, tn] each."""
    what = labels, probabilities, distribution, multilabel
    points, each = measures(*what, np.ones((1, len(labels))))
    points = {key: None if np.isnan(x) else x.item() for key, (x,) in points.items()}
    rows = {"class": classes, "support": labels.sum(0).tolist()}
    rows |= {key: np.where(np.isnan(x), None, x).tolist() for key, (x,) in each.items()}
    scores = {"n": len(labels), **points}
    if units is not None:
        U = scores["n_units"] = len(np.unique(units))
        (few, few_each, rows["n_units"]), drawn = too_few(units, labels), bootstrap(units, *what)
        scores["ci95"], rows["ci95"] = {}, [{} for _ in classes]
        for key, x in drawn[0].items():
            ends = ece_limits(x, points[key], U) if "ece" in key else limits(x, U)
            scores["ci95"][key] = interval(few[key], ends)
        for i, key in product(range(len(classes)), drawn[1]):
            rows["ci95"][i][key] = interval(few_each[key][i], limits(drawn[1][key][:, i], U))
    scores["per_class"] = [dict(zip(rows, row)) for row in zip(*rows.values())]
    predicted = predicted_labels(probabilities, multilabel)
    cells = [labels & predicted, ~labels & predicted, labels & ~predicted, ~labels & ~predicted]
    confusion = np.stack([x.sum(0) for x in cells], 1) if multilabel else labels.T * 1 @ predicted
    return scores | {"confusion": confusion.tolist()}
