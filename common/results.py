"""What a fine-tuned model gave for the test images: its table, predictions.csv, and its scores."""

import csv
from dataclasses import dataclass, replace
from itertools import compress, product

import numpy as np

from common.checkpoint import TEXT, read_json, start_folder, write_csv, write_json
from common.cli import UserError, preview, refusing
from common.metrics import FEW, FEW_FOR_ECE, FEW_OF_CLASS, predicted_labels, score
from common.splits import SIDES, class_counts, cross_split_duplicates, indivisible_units, label_text

FLAGS = {"duplicate": "exact duplicates", "near": "exact and near-duplicates"}  # of test images
FLAGS["seen"] = "that pre-training saw"
PARTS = ("test", "test_without_duplicates", "test_without_near", "test_without_seen")
COUNTS = ("n_test_duplicates", "n_test_near", "n_test_seen")
SCORES = ("macro_f1", "micro_f1", "balanced_accuracy", "accuracy", "auroc")
SHOWN = (*SCORES, "brier", "ece")
KINDS = {"probabilities": "prob", "distribution": "calibrated"}  # {attribute: in column names}
SHARED = ("names", "labels", "units", "classes", "multilabel")  # what tests must share


@dataclass
class Predictions:
    """Of N images and C classes."""

    names: list
    labels: np.ndarray  # (N, C) bool, the true ones
    units: np.ndarray  # (N,) str, the same for images of one patient and for exact duplicates
    probabilities: np.ndarray  # (N, C) and
    distribution: np.ndarray  # (N, C), of metrics.probabilities_of()
    flags: np.ndarray  # (3, N) bool: FLAGS
    classes: list
    multilabel: bool

    def parts(self):
        """{part of PARTS: (N,) bool, the images in it}; without empty ones."""
        kept = zip(PARTS, (np.ones(len(self.names), bool), *~self.flags))
        return {part: mask for part, mask in kept if mask.any()}

    def arrays(self, kept=slice(None)):
        """What metrics.bootstrap() takes, of the kept images."""
        arrays = self.units, self.labels, self.probabilities, self.distribution
        return *(x[kept] for x in arrays), self.multilabel

    def scores(self):
        """{part: metrics.score(); None of no image}; one dict where no image is left out."""
        scores = dict.fromkeys(PARTS)
        for part, kept in self.parts().items():
            whole = scores["test"] if kept.all() else None
            scores[part] = whole or score(*self.arrays(kept), self.classes)
        return scores

    def table(self):
        """Header and rows of predictions.csv, to the last bit of float32."""
        both = self.probabilities, self.distribution
        header, cells = predicted_cells(*both, self.classes, self.multilabel)
        true = (label_text(self.classes, has) for has in self.labels)
        rows = zip(self.names, true, cells, self.flags.T.astype(int), self.units)
        header = ["path", "true", *header, *FLAGS, "group"]
        return header, ([name, true, *x, *flags, unit] for name, true, x, flags, unit in rows)


def predicted_cells(probabilities, distribution, classes, multilabel):
    """Header and rows of what is predicted of N images, and of both probabilities, (N, C)."""
    labels = predicted_labels(probabilities, multilabel)
    rows = zip(labels, np.hstack([probabilities, distribution]))
    header = ["predicted", *(f"{kind}_{c}" for kind in KINDS.values() for c in classes)]
    return header, [[label_text(classes, has), *map(str, p)] for has, p in rows]


def read_test(folder):
    """What finetune.py wrote to a folder: its Predictions, and the dict of metrics.json."""
    found = read_json(folder / "metrics.json", "classes")
    what = "is missing, of an earlier version, or does not fit the metrics.json beside it"
    fix = f"delete it and metrics.json, and give finetune.py --resume --out {folder}"
    with refusing(f"{folder / 'predictions.csv'}: {what}; {fix}"):
        with open(folder / "predictions.csv", **TEXT) as file:
            header, *rows = filter(None, csv.reader(file))
        table, classes = dict(zip(header, map(list, zip(*rows)))), found["classes"]
        names, true, units, *flags = (table[key] for key in ("path", "true", "group", *FLAGS))
        true = [text.split("|") if found["multilabel"] else [text] for text in true]
        labels, units = np.array([[c in x for c in classes] for x in true]), np.array(units)
        columns = ([table[f"{kind}_{c}"] for c in classes] for kind in KINDS.values())
        both, flags = (np.stack(x, 1).astype("f4") for x in columns), np.array(flags) == "1"
        if [found[n] for n in ("n_test", *COUNTS)] != [len(rows), *flags.sum(1)]:
            raise ValueError("of different runs")
        return Predictions(names, labels, units, *both, flags, classes, found["multilabel"]), found


def refuse_unequal(tests):
    """Raise UserError unless {folder: Predictions} are of the same images and labels."""
    (first, test), *others = tests.items()
    for folder, other in others:
        if not all(np.array_equal(getattr(other, key), getattr(test, key)) for key in SHARED):
            what = f"its test images, their labels or groups are not those of {first}"
            raise UserError(f"{folder}: {what}; fine-tune both on the same data and split")


def mean_of(tests):
    """The mean of Predictions of the same images, with the flags of any of them."""
    means = {key: np.mean([getattr(x, key) for x in tests], axis=0) for key in KINDS}
    return replace(tests[0], flags=np.any([x.flags for x in tests], axis=0), **means)


def report(job, probabilities, distribution, training):
    """Print and write what the job, of finetune.py, gave for its test images, both (N, C)."""
    images, split, test = job.images, job.split, job.split == "test"
    settings = {key: job.start.metadata[key] for key in ("arch", "arm")} | {"seed": job.seed}
    settings |= {f"n_{name}": int((split == name).sum()) for name in SIDES}
    settings |= {"n_labelled": int(job.used.sum()), "labelled": class_counts(images, job.used)}
    copies = (cross_split_duplicates(images, split, near)[test] for near in (False, True))
    arrays = images.labels[test], indivisible_units(images)[test].astype(str)
    arrays += probabilities, distribution, np.stack([*copies, job.seen[test]])
    found = Predictions([*compress(images.names, test)], *arrays, images.classes, images.multilabel)
    return write_test(job.out, found, settings | training)


def write_test(out, test, settings):
    """Print and write what a test gave; metrics.json begins with settings. Returns its dict."""
    scores, classes = test.scores(), test.classes
    counts = dict(zip(COUNTS, test.flags.sum(1).tolist()))
    show(f"test, {len(test.names)} images", scores["test"])
    for part, n, what in zip(PARTS[1:], counts.values(), FLAGS.values()):
        if n and scores[part]:
            show(f"test, {scores[part]['n']} images without the {n} {what}", scores[part])
    predicted = predicted_labels(test.probabilities, test.multilabel).any(0)
    if predicted.sum() == 1:
        print(f"every prediction is {classes[predicted.argmax()]}: the model tells nothing apart")
    write_csv(out / "predictions.csv", *test.table())
    cells = ([c, *row] for c, row in zip(classes, scores["test"]["confusion"]))
    header = "label tp fp fn tn".split() if test.multilabel else ["true \\ predicted", *classes]
    write_csv(out / "confusion.csv", header, cells)
    found = {**settings, "classes": classes, "multilabel": test.multilabel, **counts, **scores}
    write_json(out / "metrics.json", found)  # last: it says that the run is finished
    return found


def show(title, scores):
    """Print the scores of a part of the test images, each with its 95 % interval."""
    units = "images" if scores["n_units"] == scores["n"] else "patients or different images"
    print(f"{title}; 95 % intervals over {scores['n_units']} {units}:")
    shown = {key: scores["ci95"][key] for key in SHOWN if scores.get(key) is not None}
    for key, ends in shown.items():
        text = "{:.4f} to {:.4f}".format(*ends) if ends else "too few"
        print(f"  {key:18} {scores[key]:.4f}  ({text})")
    if None in shown.values():
        has = {x["class"]: x["n_units"] for x in scores["per_class"]}.items()
        rare = preview(f"{c} has {n}" for c, n in has if 0 < n < FEW_OF_CLASS)
        what = f"{FEW} {units}, {FEW_OF_CLASS} of each class" + f" ({rare})" * bool(rare)
        print(f"  an interval takes {what} and, for ece, {FEW_FOR_ECE} images; and some error")


def write_mean(out, folders):
    """Average what finetune.py wrote to these folders, and write it. Returns as write_test()."""
    tests, found = zip(*map(read_test, folders))
    refuse_unequal(dict(zip(folders, tests)))
    same = {k: v for k, v in found[0].items() if all(x.get(k) == v for x in found)}
    names = " and ".join(x["arm"] for x in found)
    print(f"mean of {names}, seed {found[0]['seed']}")
    start_folder(out, ("predictions.csv", "confusion.csv", "metrics.json"))
    return write_test(out, mean_of(tests), {"arm": f"mean of {names}", **same})


def write_summary(out, seeds, found):
    """Of several seeds: {score: mean, standard deviation (n - 1) and values} in summary.json."""
    if len(found) == 1:
        return
    summary = {}
    for part, key in product(PARTS, found[0]["test"]):
        values = [(x[part] or {}).get(key) for x in found]
        if all(isinstance(value, float) for value in values):
            mean, std = np.mean(values).item(), np.std(values, ddof=1).item()
            summary[key + part[len("test") :]] = {"mean": mean, "std": std, "values": values}
    write_json(out / "summary.json", {"seeds": seeds, "metrics": summary})
    shown = [(key, summary[key]) for key in SHOWN if key in summary]
    scores = ", ".join(f"{key} {x['mean']:.4f} ± {x['std']:.4f}" for key, x in shown)
    print(f"{len(seeds)} seeds: {scores}")


def refuse_unlabelled(images):
    """Raise UserError where an ImageSet has nothing to tell apart."""
    if len(images.classes) < (1 if images.multilabel else 2):
        raise UserError(f"{images.path}: has no labels, or one class; give class folders or a CSV")
