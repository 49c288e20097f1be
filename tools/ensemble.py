"""Score finished fine-tuning runs beside their mean: nobody knows beforehand which arm to pick.

    python -m tools.ensemble finetune_cnn_0.1 finetune_vit_0.1

averages the probabilities that two or more runs of finetune.py gave for the same test images, and
scores each run and the mean; nothing is trained or chosen. Of runs with several --seeds, equal
seeds are averaged, and the table shows mean ± standard deviation (n - 1). An image that one of the
runs counts as a duplicate, or as seen, is left out of all scores without such images. Writes to
--out ensemble.json and, in a folder for each of several seeds, ensemble_predictions.csv.
"""

import csv
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common import checkpoint, cli, metrics

EQUAL = {"classes": "classes", "multilabel": "kinds of labels", "names": "test images"}
EQUAL["true"] = "true labels"  # what runs must share to be averaged, and its name in an error


def folders_of(run):
    """{seed0: folder, ...} of the seeds of a run; {.: run} where it had only one."""
    folders = [run] * (run / "metrics.json").exists()
    folders += sorted(file.parent for file in run.glob("seed*/config.json"))
    unfinished = [folder.name for folder in folders if not (folder / "metrics.json").exists()]
    if not folders or unfinished or len(folders) > 1 and run in folders:
        what = f"{run}: holds no finished run of finetune.py (no metrics.json), or several"
        raise cli.UserError(f"{what}; unfinished: {cli.preview(unfinished) or 'none'}")
    return {folder.relative_to(run): folder for folder in folders}


def read_run(folder):
    """What finetune.py wrote: the keys of metrics.json and, of N test images, names, true (text),
    labels (N, C) bool, probabilities (N, C) float32, flags (3, N) bool."""
    run = SimpleNamespace(**checkpoint.read_json(folder / "metrics.json"))
    with open(folder / "predictions.csv", **checkpoint.TEXT) as file:
        rows = list(csv.DictReader(file))
    run.names, run.true = ([row[key] for row in rows] for key in ("path", "true"))
    has = [text.split("|") if run.multilabel else [text] for text in run.true]
    run.labels = np.array([[c in x for c in run.classes] for x in has])
    run.probabilities = np.array([[row[f"prob_{c}"] for c in run.classes] for row in rows], "f4")
    run.flags = np.array([[row[flag] == "1" for row in rows] for flag in metrics.FLAGS])
    counts = [getattr(run, name) for name in ("n_test", *metrics.COUNTS)]
    if counts != [len(rows), *run.flags.sum(1)]:
        raise ValueError("predictions.csv and metrics.json are of different runs")
    return run


def read_equal(folders, runs):
    """read_run() of each folder and, last, their mean, all with the flags of any of them, and with
    scores: {part of the test split: dict}. Raises UserError unless all tested the same images."""
    tests = []
    for folder, run in zip(folders, runs):
        try:
            tests.append(read_run(folder))
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            fix = f"delete it, and finetune.py --resume --out {run} writes it anew"
            problem = "is missing or does not fit the metrics.json beside it"
            raise cli.UserError(f"{folder / 'predictions.csv'}: {problem}; {fix}") from error
        for key, what in EQUAL.items():
            if getattr(tests[-1], key) != getattr(tests[0], key):
                fix = "fine-tune both on the same data and split"
                raise cli.UserError(f"{run}: its {what} are not those of {runs[0]}; {fix}")
    flags = np.any([test.flags for test in tests], axis=0)
    mean = np.mean([test.probabilities for test in tests], axis=0)
    tests.append(SimpleNamespace(**{**vars(tests[0]), "probabilities": mean}))
    for test in tests:
        test.flags, what = flags, (flags, test.classes, test.multilabel)
        test.scores = metrics.score_parts(test.labels, test.probabilities, *what)
    return tests


def mean_and_std(values):
    """As text; with the standard deviation (n - 1) of two or more."""
    std = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{std}"


def print_scores(names, entries):
    """The scores of each run and of the mean, as ensemble.json holds them."""
    width, first = max(map(len, names)), entries[0]["results"][0]
    for part, whole in first.items():
        if whole is None or part != "test" and whole["n"] == first["test"]["n"]:
            continue
        print(f"test, {whole['n']} images{part.removeprefix('test').replace('_', ' ')}:")
        for name, entry in zip(names, entries):
            values = {key: [x[part].get(key) for x in entry["results"]] for key in metrics.SHOWN}
            shown = [f"{k} {mean_and_std(v)}" for k, v in values.items() if None not in v]
            print(f"  {name:{width}}  {', '.join(shown)}")


def main():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="output folder of finetune.py")
    add("--out", metavar="DIR", help="output folder (default: ensemble_NAME_NAME by the first run)")
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
        raise cli.UserError(f"{', '.join(args.runs)}: fine-tune all with the same --seeds")
    tests = {seed: read_equal([f[seed] for f in folders], args.runs) for seed in folders[0]}
    for seed, (*_, mean) in tests.items():
        (out / seed).mkdir(parents=True, exist_ok=True)
        what = mean.classes, mean.multilabel, mean.labels, mean.flags
        table = metrics.prediction_table(mean.names, mean.probabilities, *what)
        checkpoint.write_csv(out / seed / "ensemble_predictions.csv", *table)
    entries = [{"results": [test.scores for test in of_seeds]} for of_seeds in zip(*tests.values())]
    for entry in entries if len(tests) > 1 else ():
        entry["summary"] = metrics.summarize(entry["results"])
    for entry, run, of_seeds in zip(entries, args.runs, zip(*tests.values())):
        entry |= {"run": run, "arch": of_seeds[0].arch, "frac": of_seeds[0].frac}
        entry["seeds"] = [test.seed for test in of_seeds]
    result = {"classes": mean.classes, "multilabel": mean.multilabel, "n_test": mean.n_test}
    result |= dict(zip(metrics.COUNTS, mean.flags.sum(1).tolist()))
    result |= {"runs": entries[:-1], "mean": entries[-1]}
    checkpoint.write_json(out / "ensemble.json", result)
    print_scores([*args.runs, f"mean of the {len(runs)}"], entries)
    print(f"wrote {out / 'ensemble.json'}")


if __name__ == "__main__":
    cli.run(main)
