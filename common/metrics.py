"""Scores of a classifier, and the one look at the test images."""

import numpy as np

from common.checkpoint import write_csv, write_json
from common.cli import UserError
from common.splits import SIDES, class_counts, cross_split_duplicates, label_text

FLAGS = {"duplicate": "exact duplicates", "near": "exact and near-duplicates"}  # of test images
FLAGS["seen"] = "that pre-training saw"
PARTS = ("test", "test_without_duplicates", "test_without_near", "test_without_seen")
COUNTS = ("n_test_duplicates", "n_test_near", "n_test_seen")
SHOWN = ("macro_f1", "micro_f1", "balanced_accuracy", "accuracy", "auroc")


def predicted_labels(probabilities, multilabel):
    """(N, C) probabilities -> (N, C) bool: what is predicted. Multi-label at 0.5, else argmax."""
    if multilabel:
        return probabilities >= 0.5
    return np.eye(probabilities.shape[1], dtype=bool)[probabilities.argmax(1)]


def auroc(positive, score):
    """Area under the ROC curve of (N,) 0/1 by (N,) scores, ties as half; None if one-sided."""
    positives, negatives = score[positive > 0], np.sort(score[positive == 0])
    below, up_to = (np.searchsorted(negatives, positives, side) for side in ("left", "right"))
    pairs = len(positives) * len(negatives)
    return float((below + up_to).sum() / 2 / pairs) if pairs else None


def score(labels, probabilities, classes, multilabel):
    """Scores of labels (N, C) bool and probabilities (N, C), N > 0. Absent classes count as 0 in
    macro_f1; macro_f1_present, auroc and balanced_accuracy leave them out. confusion: rows true, or
    [tp, fp, fn, tn] each."""
    predicted = predicted_labels(probabilities, multilabel)
    tp, support, found = (x.sum(0) for x in (labels & predicted, labels, predicted))
    precision, recall = tp / np.maximum(found, 1), tp / np.maximum(support, 1)
    f1 = 2 * tp / np.maximum(support + found, 1)
    micro = float(2 * tp.sum() / max((support + found).sum(), 1))
    areas = [auroc(*x) for x in zip(labels.T, probabilities.T)]
    known = [x for x in areas if x is not None]
    keys = ("class", "support", "precision", "recall", "f1", "auroc")
    columns = (x.tolist() for x in (support, precision, recall, f1))
    scores = {"n": len(labels), "macro_f1": float(f1.mean()), "micro_f1": micro}
    scores["macro_f1_present"] = float(f1[support > 0].mean()) if support.any() else None
    scores["auroc"] = float(np.mean(known)) if known else None
    scores["per_class"] = [dict(zip(keys, row)) for row in zip(classes, *columns, areas)]
    scores["exact_match" if multilabel else "accuracy"] = (labels == predicted).all(1).mean().item()
    if not multilabel:
        scores["balanced_accuracy"] = recall[support > 0].mean().item()
    counts = [tp, found - tp, support - tp, len(labels) - found - support + tp]
    confusion = np.stack(counts, 1) if multilabel else labels.T.astype(int) @ predicted
    return {**scores, "confusion": confusion.tolist()}


def score_parts(labels, probabilities, flags, *what):
    """{part: score() or None}; flags: (3, N) bool, left out; what: classes, multilabel."""
    kept = zip(PARTS, (np.ones(len(labels), bool), *~flags))
    return {p: score(labels[k], probabilities[k], *what) if k.any() else None for p, k in kept}


def summarize(results):
    """{score: mean, standard deviation (n - 1) and values over the seeds} of metrics dicts."""
    summary = {}
    for part in PARTS:
        for key, value in (results[0][part] or {}).items():
            values = [(r[part] or {}).get(key) for r in results]
            if isinstance(value, float) and None not in values:
                mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
                summary[key + part[len("test") :]] = {"mean": mean, "std": std, "values": values}
    return summary


def prediction_table(names, probabilities, classes, multilabel, true, flags):
    """Header and rows of predictions.csv, of (N, C) and (N,) arrays, to the last bit of float32;
    flags: (3, N) bool, the FLAGS."""
    predicted = predicted_labels(probabilities, multilabel)
    header = ["path", "true", "predicted", *(f"prob_{c}" for c in classes), *FLAGS]
    return header, (
        [n, label_text(classes, t), label_text(classes, p), *map(str, q), *map(int, f)]
        for n, t, p, q, f in zip(names, true, predicted, probabilities, flags.T)
    )


def refuse_unlabelled(images):  # where there is nothing to tell apart
    if len(images.classes) < (1 if images.multilabel else 2):
        raise UserError(f"{images.path}: has no labels, or one class; give class folders or a CSV")


def refuse_untestable(images, split, seen, allow_seen):  # an empty split, or all test images seen
    if none := [part for part in SIDES if part not in split]:
        raise UserError(f"{images.path}: {len(images)} images leave none for the {none[0]} split")
    if seen[split == "test"].all() and not allow_seen:
        raise UserError(f"{images.path}: pre-training saw all test images; add new or --allow-seen")


def write_results(job, probabilities, settings, training):
    """Print and write the test results of probabilities (N, C). Returns what metrics.json holds."""
    images, split, test = job.images, job.split, job.split == "test"
    classes, multilabel, labels = images.classes, images.multilabel, images.labels[test]
    copies = (cross_split_duplicates(images, split, near)[test] for near in (False, True))
    flags = np.stack([*copies, job.seen[test]])
    metrics = {key: job.start.metadata[key] for key in ("arch", "arm")} | settings
    metrics |= {"seed": job.seed, "classes": classes, "multilabel": multilabel}
    metrics |= {f"n_{name}": int((split == name).sum()) for name in SIDES}
    metrics |= {"n_labelled": int(job.used.sum()), "labelled": class_counts(images, job.used)}
    metrics |= {**dict(zip(COUNTS, flags.sum(1).tolist())), **training}
    metrics |= score_parts(labels, probabilities, flags, classes, multilabel)
    notes = [f" without the {n} {what}" for n, what in zip(flags.sum(1), FLAGS.values())]
    for part, note, some in zip(PARTS, ["", *notes], [True, *flags.any(1)]):
        if some and (scores := metrics[part]):
            shown = ", ".join(f"{k} {scores[k]:.4f}" for k in SHOWN if scores.get(k) is not None)
            print(f"test, {scores['n']} images{note}: {shown}")
    if (predicted := predicted_labels(probabilities, multilabel).any(0)).sum() == 1:
        print(f"every prediction is {classes[predicted.argmax()]}: the model tells nothing apart")
    columns = np.array(images.names)[test], probabilities, classes, multilabel, labels, flags
    write_csv(job.out / "predictions.csv", *prediction_table(*columns))
    header = ["label", "tp", "fp", "fn", "tn"] if multilabel else ["true \\ predicted", *classes]
    confusion = ([c, *row] for c, row in zip(classes, metrics["test"]["confusion"]))
    write_csv(job.out / "confusion.csv", header, confusion)
    write_json(job.out / "metrics.json", metrics)  # last: it says that the run is finished
    return metrics
