"""Scores of a classifier in numpy. Every function says what it does where a class is absent."""

import numpy as np

from common.report import label_text


def predicted_labels(probabilities, multilabel):
    """(N, C) probabilities -> (N, C) bool: what is predicted. Multi-label at 0.5, else argmax."""
    if multilabel:
        return probabilities >= 0.5
    return np.eye(probabilities.shape[1], dtype=bool)[probabilities.argmax(1)]


def confusion_matrix(true, predicted, num_classes):
    """(N,) and (N,) class indices -> (C, C) counts: rows are true classes, columns predicted."""
    flat = np.bincount(np.asarray(true) * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def auroc(positive, score):
    """Area under the ROC curve of one class, the probability that a positive outranks a negative,
    ties counted as half; None where a side is empty. positive: (N,) 0/1; score: (N,) numbers."""
    positive, score = np.asarray(positive, bool), np.asarray(score)
    positives, negatives = score[positive], np.sort(score[~positive])
    if not len(positives) or not len(negatives):
        return None
    below, up_to = (np.searchsorted(negatives, positives, side) for side in ("left", "right"))
    return float((below + up_to).sum() / 2 / (len(positives) * len(negatives)))


def _ratio(a, b):
    return np.divide(a, b, out=np.zeros(np.shape(b)), where=np.asarray(b) > 0)


def _mean(values):
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def _summary(truth, probabilities, classes, multilabel):
    """F1 and AUROC, per class and averaged, for true labels (N, C) bool; and tp, fp, fn, (C,)."""
    predicted = predicted_labels(probabilities, multilabel)
    sides = ((truth, predicted), (~truth, predicted), (truth, ~predicted))
    tp, fp, fn = ((a & b).sum(0) for a, b in sides)
    precision, recall, support = _ratio(tp, tp + fp), _ratio(tp, tp + fn), tp + fn
    f1 = _ratio(2 * tp, 2 * tp + fp + fn)
    areas = [auroc(t, p) for t, p in zip(truth.T, probabilities.T)]
    keys = ("class", "support", "precision", "recall", "f1", "auroc")
    columns = (x.tolist() for x in (support, precision, recall, f1))
    per_class = [dict(zip(keys, row)) for row in zip(classes, *columns, areas)]
    micro = float(_ratio(2 * tp.sum(), (2 * tp + fp + fn).sum()))
    scores = {"n": len(truth), "macro_f1": float(f1.mean()), "micro_f1": micro}
    return {**scores, "auroc": _mean(areas), "per_class": per_class}, tp, fp, fn


def multiclass_scores(true, probabilities, classes):
    """Scores of argmax predictions. true: (N,) indices; probabilities: (N, C); classes: C names.

    F1 of a class neither there nor predicted is 0. Balanced accuracy: mean recall of the classes
    there (ISIC's metric). AUROC: one class against the rest, mean over those with both sides.
    """
    truth = np.eye(len(classes), dtype=bool)[true]
    scores, tp, *_ = _summary(truth, probabilities, classes, multilabel=False)
    recalls = [row["recall"] for row in scores["per_class"] if row["support"]]
    confusion = confusion_matrix(true, probabilities.argmax(1), len(classes)).tolist()
    scores["accuracy"] = float(_ratio(tp.sum(), len(truth)))
    return {**scores, "balanced_accuracy": _mean(recalls), "confusion": confusion}


def multilabel_scores(true, probabilities, classes):
    """Scores of predictions at 0.5. true: (N, C) 0/1; probabilities: (N, C); see multiclass_scores.
    "exact_match": share of images with every label right; "confusion": [tp, fp, fn, tn] per class.
    """
    true = np.asarray(true, bool)
    scores, tp, fp, fn = _summary(true, probabilities, classes, multilabel=True)
    scores["exact_match"] = _mean((true == (probabilities >= 0.5)).all(1))
    confusion = np.stack([tp, fp, fn, len(true) - tp - fp - fn], axis=1)
    return {**scores, "confusion": confusion.tolist()}


def score(labels, probabilities, classes, multilabel):
    """The scores of these probabilities (n, C) on images with these labels (n, C) bool."""
    if multilabel:
        return multilabel_scores(labels, probabilities, classes)
    return multiclass_scores(labels.argmax(1), probabilities, classes)


def summarize(results):
    """{score: mean, standard deviation (n - 1) and values over the seeds} of metrics dicts."""
    summary = {}
    for part in ("test", "test_without_duplicates", "test_without_seen"):
        if any(r[part] is None for r in results):
            continue
        for key, value in results[0][part].items():
            values = [r[part][key] for r in results]
            if isinstance(value, float) and None not in values:
                name = key if part == "test" else f"{key}_{part[5:]}"
                mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
                summary[name] = {"mean": mean, "std": std, "values": values}
    return summary


def prediction_table(names, probabilities, classes, multilabel, true, duplicate, seen):
    """Header and rows of predictions.csv. probabilities: (N, C) float32, written to the last bit;
    true: (N, C) bool; duplicate (of an image in an earlier split), seen (in pre-training): (N,)."""
    predicted = predicted_labels(probabilities, multilabel)
    header = ["path", "true", "predicted", *(f"prob_{c}" for c in classes), "duplicate", "seen"]
    return header, (
        [n, label_text(classes, t), label_text(classes, p), *map(str, q), *map(int, flags)]
        for n, t, p, q, *flags in zip(names, true, predicted, probabilities, duplicate, seen)
    )
