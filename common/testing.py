"""The one look at the test images: what may be tested, and what is written of it."""

import numpy as np

from common.checkpoint import write_csv, write_json
from common.cli import UserError
from common.metrics import prediction_table, score
from common.report import class_counts
from common.splits import cross_split_duplicates

SHOWN = ("macro_f1", "micro_f1", "balanced_accuracy", "accuracy", "auroc")


def refuse_unlabelled(images):
    """Raise UserError where there is nothing to tell apart."""
    if len(images.classes) < (1 if images.multilabel else 2):
        fix = "give each class a folder directly below, or use --data labels.csv --images DIR"
        raise UserError(f"{images.path}: has no labels, or one class only; {fix}")


def refuse_untestable(images, split, seen, allow_seen):
    """Raise UserError where a split is empty, or pre-training saw every test image."""
    for part in ("train", "val", "test"):
        if not (split == part).any():
            raise UserError(f"{images.path}: {len(images)} images leave none for the {part} split")
    if seen is not None and seen[split == "test"].all() and not allow_seen:
        fix = "add other images, or give --allow-seen"
        raise UserError(f"{images.path}: pre-training saw every test image; {fix}")


def write_results(job, probabilities, settings, training):
    """Print the scores of the test images' probabilities (N, C); write predictions.csv,
    confusion.csv and metrics.json, which is returned."""
    images, split, test = job.images, job.split, job.split == "test"
    classes, multilabel, labels = images.classes, images.multilabel, images.labels[test]
    copied = cross_split_duplicates(images, split)[test]
    seen = np.zeros_like(copied) if job.seen is None else job.seen[test]
    metrics = {key: job.start.metadata[key] for key in ("arch", "arm")} | settings
    metrics |= {"seed": job.seed, "classes": classes, "multilabel": multilabel}
    metrics |= {f"n_{name}": int((split == name).sum()) for name in ("train", "val", "test")}
    metrics |= {"n_labelled": int(job.used.sum()), "labelled": class_counts(images, job.used)}
    metrics |= {"n_test_duplicates": int(copied.sum()), "n_test_seen": int(seen.sum()), **training}
    parts = [("test", np.zeros_like(copied), "")]
    parts += [("test_without_duplicates", copied, f" without the {copied.sum()} exact duplicates")]
    parts += [("test_without_seen", seen, f" without the {seen.sum()} that pre-training saw")]
    for key, left_out, note in parts:
        kept = ~left_out
        scores = score(labels[kept], probabilities[kept], classes, multilabel) if kept.any() else {}
        metrics[key] = scores or None
        if scores and (left_out.any() or key == "test"):
            shown = ", ".join(f"{k} {scores[k]:.4f}" for k in SHOWN if scores.get(k) is not None)
            print(f"test, {scores['n']} images{note}: {shown}")
    names = [name for name, tested in zip(images.names, test) if tested]
    table = prediction_table(names, probabilities, classes, multilabel, labels, copied, seen)
    write_csv(job.out / "predictions.csv", *table)
    header = ["label", "tp", "fp", "fn", "tn"] if multilabel else ["true \\ predicted", *classes]
    confusion = ([c, *row] for c, row in zip(classes, metrics["test"]["confusion"]))
    write_csv(job.out / "confusion.csv", header, confusion)
    write_json(job.out / "metrics.json", metrics)  # last: it says that the run is finished
    return metrics
