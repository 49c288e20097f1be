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

from common import cli
from common.checkpoint import write_csv, write_json
from common.cli import UserError
from common.metrics import label_text, prediction_table, summarize
from common.metrics import score as score_part

PARTS = {
    "test": "",
    "test_without_duplicates": " without exact duplicates of training or validation images",
    "test_without_seen": " without those that pre-training saw",
}
SHOWN = ("macro_f1", "micro_f1", "balanced_accuracy", "exact_match", "auroc")


def folders_of(run):
    """{"seed0": folder, ...} of the finished seeds of a run; {"": run} where it had only one."""
    if (run / "metrics.json").exists():
        return {"": run}
    found = {file.parent.name: file.parent for file in sorted(run.glob("seed*/metrics.json"))}
    if not found:
        raise UserError(f"{run}: holds no finished run of finetune.py (no metrics.json)")
    return found


def read_run(folder, run):
    """What finetune.py wrote of the N test images: metrics, classes, multilabel, names, true (as
    text), labels (N, C) bool, probabilities (N, C) float32, copied, seen (N,) bool."""
    file = folder / "predictions.csv"
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        with open(file, encoding="utf-8", newline="", errors="surrogateescape") as f:
            rows = list(csv.DictReader(f))
        classes, multilabel = metrics["classes"], metrics["multilabel"]
        true = [row["true"] for row in rows]
        has = [text.split("|") if multilabel else [text] for text in true]
        tested = SimpleNamespace(
            metrics=metrics,
            classes=classes,
            multilabel=multilabel,
            true=true,
            names=[row["path"] for row in rows],
            labels=np.array([[c in texts for c in classes] for texts in has]),
            probabilities=np.array(
                [[row[f"prob_{c}"] for c in classes] for row in rows], np.float32
            ),
            copied=np.array([row.get("duplicate") == "1" for row in rows]),
            seen=np.array([row.get("seen") == "1" for row in rows]),
        )
        fits = [len(rows), tested.copied.sum(), tested.seen.sum()] == [
            metrics[key] for key in ("n_test", "n_test_duplicates", "n_test_seen")
        ]
        fits &= true == [label_text(classes, row) for row in tested.labels]
    except (OSError, KeyError, ValueError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UserError(
            f"{file}: is missing or does not fit the metrics.json beside it (changed, "
            f"or of an earlier version); delete it, and finetune.py --resume --out "
            f"{run} writes it anew"
        )
    return tested


def read_equal(folders, runs):
    """read_run() of each folder. Raises UserError unless all tested the same images."""
    tests = [read_run(folder, run) for folder, run in zip(folders, runs)]
    for run, test in zip(runs, tests):
        for key, what in (
            ("classes", "classes"),
            ("multilabel", "kinds of labels"),
            ("names", "test images"),
            ("true", "true labels"),
        ):
            if getattr(test, key) != getattr(tests[0], key):
                raise UserError(
                    f"{run}: its {what} are not those of {runs[0]}; fine-tune both on "
                    f"the same data and split"
                )
    return tests


def score(tests):
    """[{part of the test split: scores}] of each run and, last, of their mean; the mean (N, C); and
    (N,) bool: the images that are copied, or seen, for any of the runs."""
    copied, seen = (np.any([getattr(t, key) for t in tests], axis=0) for key in ("copied", "seen"))
    each = [t.probabilities for t in tests]
    mean = np.mean(each, axis=0)
    masks = dict(zip(PARTS, (np.ones(len(mean), bool), ~copied, ~seen)))
    return (
        [
            {
                part: score_part(
                    tests[0].labels[mask], p[mask], tests[0].classes, tests[0].multilabel
                )
                if mask.any()
                else None
                for part, mask in masks.items()
            }
            for p in (*each, mean)
        ],
        mean,
        copied,
        seen,
    )


def print_table(results):
    """results: {name: [{part: scores} of each seed]}."""
    width, first = max(map(len, results)), next(iter(results.values()))
    whole, seeds = first[0], f", {len(first)} seeds" * (len(first) > 1)
    for part, note in PARTS.items():
        if whole[part] is None or part != "test" and whole[part]["n"] == whole["test"]["n"]:
            continue
        shown = [key for key in SHOWN if whole[part].get(key) is not None]
        print(
            f"test, {whole[part]['n']} images{note}{seeds}\n  {'':{width}}"
            + "".join(f"{key:>19}" for key in shown)
        )
        for name, of_seeds in results.items():
            values = [[seed[part][key] for seed in of_seeds] for key in shown]
            cells = [
                f"{np.mean(v):.4f}" + (f" ± {np.std(v, ddof=1):.4f}" if len(v) > 1 else "")
                for v in values
            ]
            print(f"  {name:{width}}" + "".join(f"{cell:>19}" for cell in cells))


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="output folder of finetune.py")
    parser.add_argument("--out", metavar="DIR", help="output folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier ensemble")
    args = parser.parse_args()
    if len({os.path.realpath(run) for run in args.runs}) < max(2, len(args.runs)):
        parser.error("give two or more runs, each once")
    runs = [Path(os.path.abspath(run)) for run in args.runs]
    names = [run.name.removeprefix("finetune_") for run in runs]
    out = Path(args.out or runs[0].parent / "_".join(["ensemble", *names]))
    cli.refuse_overwrite(out, ("ensemble.json",), args.overwrite)
    folders = [folders_of(run) for run in runs]
    if any(f.keys() != folders[0].keys() for f in folders):
        held = [
            f"{run} has {', '.join(f)}" if "" not in f else f"{run} has one seed"
            for run, f in zip(args.runs, folders)
        ]
        raise UserError(f"{'; '.join(held)}: fine-tune all with the same --seeds")

    tests = {
        seed: read_equal([folder[seed] for folder in folders], args.runs) for seed in folders[0]
    }
    of_seeds = []
    for seed, of_runs in tests.items():
        results, mean, copied, seen = score(of_runs)
        of_seeds.append(results)
        first = of_runs[0]
        (out / seed).mkdir(parents=True, exist_ok=True)
        write_csv(
            out / seed / "ensemble_predictions.csv",
            *prediction_table(
                first.names, mean, first.classes, first.multilabel, first.labels, copied, seen
            ),
        )
    by_run = list(zip(*of_seeds))

    def entry(results):
        return {"results": results} | ({"summary": summarize(results)} if len(results) > 1 else {})

    write_json(
        out / "ensemble.json",
        {
            "classes": first.classes,
            "multilabel": first.multilabel,
            "n_test": len(mean),
            "n_test_duplicates": int(copied.sum()),
            "n_test_seen": int(seen.sum()),
            "runs": [
                {
                    "run": run,
                    "arch": of[0].metrics["arch"],
                    "frac": of[0].metrics["frac"],
                    "seeds": [test.metrics["seed"] for test in of],
                    **entry(results),
                }
                for run, of, results in zip(args.runs, zip(*tests.values()), by_run)
            ],
            "mean": entry(by_run[-1]),
        },
    )
    print_table(dict(zip([*args.runs, f"mean of the {len(runs)}"], by_run)))
    print(f"wrote {out / 'ensemble.json'}")


if __name__ == "__main__":
    cli.run(main)
