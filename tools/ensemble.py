"""Score finished fine-tuning runs beside their mean: nobody knows beforehand which arm to pick.

    python -m tools.ensemble finetune_cnn_0.1 finetune_vit_0.1

averages the probabilities that two or more runs of finetune.py gave for the same test images, and
scores each run and the mean; nothing is trained or chosen. Of runs with several --seeds, equal
seeds are averaged, and the table shows mean ± standard deviation (n - 1). An image that one of the
runs counts as a duplicate, or as seen, is left out of all scores without such images. Writes to
--out ensemble.json and, in a folder for each of several seeds, ensemble_predictions.csv.
"""

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common import cli, metrics
from common.checkpoint import TEXT, write_csv, write_json
from common.cli import UserError
from common.metrics import prediction_table, summarize
from common.report import label_text

PARTS = {
    "test": "",
    "test_without_duplicates": " without exact duplicates of training or validation images",
    "test_without_seen": " without those that pre-training saw",
}
SHOWN = ("macro_f1", "micro_f1", "balanced_accuracy", "exact_match", "auroc")
EQUAL = ("classes", "multilabel", "names", "true")  # what runs that can be averaged share, as
NAMED = ("classes", "kinds of labels", "test images", "true labels")  # error messages call it


def folders_of(run):
    """{"seed0": folder, ...} of the finished seeds of a run; {"": run} where it had only one."""
    if (run / "metrics.json").exists():
        return {"": run}
    found = {file.parent.name: file.parent for file in sorted(run.glob("seed*/metrics.json"))}
    if not found:
        raise UserError(f"{run}: holds no finished run of finetune.py (no metrics.json)")
    return found


def read_run(folder):
    """What finetune.py wrote of N test images: metrics, classes, multilabel, names,
    true (text), labels (N, C) bool, probabilities (N, C) float32, copied, seen (N,) bool."""
    written = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    with open(folder / "predictions.csv", **TEXT) as file:
        rows = list(csv.DictReader(file))
    test = SimpleNamespace(
        metrics=written, classes=written["classes"], multilabel=written["multilabel"]
    )
    test.names, test.true = ([row[key] for row in rows] for key in ("path", "true"))
    has = [text.split("|") if test.multilabel else [text] for text in test.true]
    test.labels = np.array([[c in texts for c in test.classes] for texts in has])
    probabilities = [[row[f"prob_{c}"] for c in test.classes] for row in rows]
    test.probabilities = np.array(probabilities, np.float32)
    test.copied = np.array([row.get("duplicate") == "1" for row in rows])
    test.seen = np.array([row.get("seen") == "1" for row in rows])
    counts = [written[key] for key in ("n_test", "n_test_duplicates", "n_test_seen")]
    texts = [label_text(test.classes, row) for row in test.labels]
    if counts != [len(rows), test.copied.sum(), test.seen.sum()] or texts != test.true:
        raise ValueError("predictions.csv and metrics.json are of different runs")
    return test


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
        for key, what in zip(EQUAL, NAMED):
            if getattr(tests[-1], key) != getattr(tests[0], key):
                fix = "fine-tune both on the same data and split"
                raise UserError(f"{run}: its {what} are not those of {runs[0]}; {fix}")
    return tests


def score(tests):
    """[{part of the test split: scores}] of each run and, last, of their mean; the mean (N, C); and
    (N,) bool: the images that are copied, or seen, for any of the runs."""
    copied, seen = (np.any([getattr(t, key) for t in tests], axis=0) for key in ("copied", "seen"))
    each, labels = [t.probabilities for t in tests], tests[0].labels
    mean, what = np.mean(each, axis=0), (tests[0].classes, tests[0].multilabel)
    masks = dict(zip(PARTS, (np.ones(len(mean), bool), ~copied, ~seen)))

    def scores(p, mask):
        return metrics.score(labels[mask], p[mask], *what) if mask.any() else None

    results = [{part: scores(p, mask) for part, mask in masks.items()} for p in (*each, mean)]
    return results, mean, copied, seen


def print_table(results):
    """results: {name: [{part: scores} of each seed]}."""
    width, first = max(map(len, results)), next(iter(results.values()))
    whole, several = first[0], len(first) > 1
    number = "{:.4f} ± {:.4f}" if several else "{:.4f}"
    for part, note in PARTS.items():
        if whole[part] is None or part != "test" and whole[part]["n"] == whole["test"]["n"]:
            continue
        shown = [key for key in SHOWN if whole[part].get(key) is not None]
        print(f"test, {whole[part]['n']} images{note}{f', {len(first)} seeds' * several}")
        print(f"  {'':{width}}" + "".join(f"{key:>19}" for key in shown))
        for name, of_seeds in results.items():
            values = [[scores[part][key] for scores in of_seeds] for key in shown]
            cells = [number.format(np.mean(v), np.std(v, ddof=int(several))) for v in values]
            print(f"  {name:{width}}" + "".join(f"{cell:>19}" for cell in cells))


def main():
    parser = cli.Parser(__doc__)
    add, default = parser.add_argument, "default: ensemble_NAME_NAME beside the first run"
    add("runs", metavar="RUN", nargs="+", help="output folder of finetune.py")
    add("--out", metavar="DIR", help=f"output folder ({default})")
    add("--overwrite", action="store_true", help="replace an earlier ensemble")
    args = parser.parse_args()
    if len({os.path.realpath(run) for run in args.runs}) < max(2, len(args.runs)):
        parser.error("give two or more runs, each once")
    runs = [Path(os.path.abspath(run)) for run in args.runs]
    name = "_".join(["ensemble", *(run.name.removeprefix("finetune_") for run in runs)])
    out = Path(args.out or runs[0].parent / name)
    cli.refuse_overwrite(out, ("ensemble.json",), args.overwrite)
    folders = [folders_of(run) for run in runs]
    if any(f.keys() != folders[0].keys() for f in folders):
        held = [f"{r} has {', '.join(f) or 'one seed'}" for r, f in zip(args.runs, folders)]
        raise UserError(f"{'; '.join(held)}: fine-tune all with the same --seeds")
    tests = {seed: read_equal([f[seed] for f in folders], args.runs) for seed in folders[0]}
    by_seed = []
    for seed, of_runs in tests.items():
        results, mean, copied, seen = score(of_runs)
        by_seed.append(results)
        first = of_runs[0]
        what = (first.classes, first.multilabel, first.labels, copied, seen)
        (out / seed).mkdir(parents=True, exist_ok=True)
        table = prediction_table(first.names, mean, *what)
        write_csv(out / seed / "ensemble_predictions.csv", *table)
    by_run = list(zip(*by_seed))
    entries = [{"results": r} | ({"summary": summarize(r)} if len(r) > 1 else {}) for r in by_run]
    result = {"classes": first.classes, "multilabel": first.multilabel, "n_test": len(mean)}
    result |= {"n_test_duplicates": int(copied.sum()), "n_test_seen": int(seen.sum()), "runs": []}
    for run, of_seeds, entry in zip(args.runs, zip(*tests.values()), entries):
        described = {"run": run} | {key: of_seeds[0].metrics[key] for key in ("arch", "frac")}
        described["seeds"] = [test.metrics["seed"] for test in of_seeds]
        result["runs"].append(described | entry)
    write_json(out / "ensemble.json", result | {"mean": entries[-1]})
    print_table(dict(zip([*args.runs, f"mean of the {len(runs)}"], by_run)))
    print(f"wrote {out / 'ensemble.json'}")


if __name__ == "__main__":
    cli.run(main)
