"""Score finished fine-tuning runs beside their mean: nobody knows beforehand which arm to pick.

    python -m tools.ensemble finetune_cnn_0.1 finetune_vit_0.1

averages the probabilities that two or more runs of finetune.py gave for the same test images, and
scores each run and the mean; nothing is trained or chosen. Of runs with several --seeds, equal
seeds are averaged, and the table shows mean ± standard deviation (n - 1) over them. An image that
is a duplicate, or was seen, for one of the runs is left out of all scores without such images.
Writes to --out (default: ensemble_NAME_NAME beside the first run) ensemble.json and
ensemble_predictions.csv, the latter in a folder for each of several seeds. For new images:
predict.py --ckpt with the best.pt of each run.
"""

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common import cli, metrics
from common.checkpoint import write_csv, write_json
from common.cli import UserError

PARTS = {
    "test": "",
    "test_without_duplicates": " without exact duplicates of training or validation images",
    "test_without_seen": " without those that pre-training saw",
}
SHOWN = ("macro_f1", "micro_f1", "balanced_accuracy", "exact_match", "auroc")
EQUAL = {"classes": "classes", "multilabel": "kinds of labels", "names": "test images"}
EQUAL |= {"true": "true labels"}  # what tests of runs that can be averaged have in common


def folders_of(run):
    """{"seed0": folder, ...} of the finished seeds of a run; {"": run} where it had only one."""
    if (run / "metrics.json").exists():
        return {"": run}
    found = {file.parent.name: file.parent for file in sorted(run.glob("seed*/metrics.json"))}
    if not found:
        raise UserError(f"{run}: holds no finished run of finetune.py (no metrics.json)")
    return found


def read_run(folder):
    """What finetune.py wrote of the N test images: facts (metrics.json), classes, multilabel, names,
    true (as text), labels (N, C) bool, probabilities (N, C) float32, copied, seen (N,) bool. Raises
    ValueError or another error where the two files do not fit each other."""
    facts = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    how = {"encoding": "utf-8", "newline": "", "errors": "surrogateescape"}
    with open(folder / "predictions.csv", **how) as file:
        rows = list(csv.DictReader(file))
    classes, multilabel = facts["classes"], facts["multilabel"]
    names, true = ([row[key] for row in rows] for key in ("path", "true"))
    has = [text.split("|") if multilabel else [text] for text in true]
    labels = np.array([[c in texts for c in classes] for texts in has])
    each = np.array([[row[f"prob_{c}"] for c in classes] for row in rows], np.float32)
    copied, seen = (np.array([r.get(key) == "1" for r in rows]) for key in ("duplicate", "seen"))
    counts = [facts[key] for key in ("n_test", "n_test_duplicates", "n_test_seen")]
    texts = [metrics.label_text(classes, row) for row in labels]
    if counts != [len(rows), copied.sum(), seen.sum()] or texts != true:
        raise ValueError("predictions.csv does not fit metrics.json")
    ...


def read_equal(folders, runs):
    """read_run() of each folder. Raises UserError unless all tested the same images."""
    tests = []
    for folder, run in zip(folders, runs):
        try:
            tests.append(read_run(folder))
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            fix = f"delete it, and finetune.py --resume --out {run} writes it anew"
            problem = "is missing or does not fit the metrics.json beside it"
            raise UserError(f"{folder / 'predictions.csv'}: {problem}; {fix}") from error
        for key, what in EQUAL.items():
            if getattr(tests[-1], key) != getattr(tests[0], key):
                fix = "fine-tune both on the same data and split"
                raise UserError(f"{run}: its {what} are not those of {runs[0]}; {fix}")
    return tests
