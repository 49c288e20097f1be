"""The one look at the test images: what may be tested, and what is written of it."""

import numpy as np

from common import checkpoint
from common.cli import UserError
from common.metrics import prediction_table, score
from common.report import class_counts
from common.splits import cross_split_duplicates
from common.starts import all_seen

SHOWN = ("macro_f1", "micro_f1", "balanced_accuracy", "accuracy", "auroc")


def refuse_unlabelled(images):
    """Raise UserError where there is nothing to tell apart."""
    if not images.classes:
        raise UserError(
            f"{images.path}: has no labels, or one class only; give each class a folder "
            f"of its own directly below, or a CSV file: --data labels.csv --images DIR"
        )
    if len(images.classes) == 1 and not images.multilabel:
        raise UserError(f"{images.path}: has one class only ({images.classes[0]})")


def refuse_untestable(images, split, seen, allow_seen):
    """Raise UserError where a split is empty, or pre-training saw every test image."""
    for part in ("train", "val", "test"):
        if not (split == part).any():
            raise UserError(f"{images.path}: {len(images)} images leave none for the {part} split")
    if seen is not None and seen[split == "test"].all() and not allow_seen:
        raise UserError(
            f"{images.path}: pre-training saw every test image, which leaves no leak-free "
            f"test; add others, or give --allow-seen"
        )


def write_best(job, model, epoch, seed, options, config, training):
    """best.pt, which knows what the model saw and how training ended."""
    checkpoint.save(
        job.out / "best.pt",
        checkpoint.weights_file(
            model,
            **job.start.metadata,
            class_names=job.images.classes,
            multilabel=job.images.multilabel,
            epoch=epoch,
            seed=seed,
            seen=all_seen(job.images, job.split, job.start.seen),
            data=options,
            config=config,
            training=training,
        ),
    )


def write_results(job, probabilities, settings, facts):
    """predictions.csv, confusion.csv and metrics.json, which is returned; prints the scores."""
    images, split, used, start = job.images, job.split, job.used, job.start
    test, classes = split == "test", images.classes
    copied = cross_split_duplicates(images, split)[test]
    unseen = np.ones(test.sum(), bool) if job.seen is None else ~job.seen[test]

    def part(mask):
        return (
            score(images.labels[test][mask], probabilities[mask], classes, images.multilabel)
            if mask.any()
            else None
        )

    metrics = {
        "arch": start.metadata["arch"],
        "arm": start.metadata["arm"],
        **settings,
        "seed": job.seed,
        "classes": classes,
        "multilabel": images.multilabel,
        "n_train": int((split == "train").sum()),
        "n_labelled": int(used.sum()),
        "labelled": class_counts(images, used),
        "n_val": int((split == "val").sum()),
        "n_test": int(test.sum()),
        "n_test_duplicates": int(copied.sum()),
        "n_test_seen": int((~unseen).sum()),
        **facts,
        "test": part(np.ones(test.sum(), bool)),
        "test_without_duplicates": part(~copied),
        "test_without_seen": part(unseen),
    }
    names = [n for n, t in zip(images.names, test) if t]
    checkpoint.write_csv(
        job.out / "predictions.csv",
        *prediction_table(
            names, probabilities, classes, images.multilabel, images.labels[test], copied, ~unseen
        ),
    )
    header = (
        ["label", "tp", "fp", "fn", "tn"] if images.multilabel else ["true \\ predicted", *classes]
    )
    checkpoint.write_csv(
        job.out / "confusion.csv",
        header,
        ([c, *row] for c, row in zip(classes, metrics["test"]["confusion"])),
    )
    checkpoint.write_json(
        job.out / "metrics.json", metrics
    )  # last: it says that the run is finished
    for key, note in (
        ("test", ""),
        (
            "test_without_duplicates",
            f" without the {copied.sum()} that are exact "
            f"duplicates of training or validation images",
        ),
        ("test_without_seen", f" without the {(~unseen).sum()} that pre-training saw"),
    ):
        part = metrics[key]
        if part and (key == "test" or part["n"] < metrics["n_test"]):
            print(
                f"test, {part['n']} images{note}: "
                + ", ".join(f"{k} {part[k]:.4f}" for k in SHOWN if part.get(k) is not None)
            )
    return metrics
