"""A whole experiment in folds, for sets that are too small for one split: every labelled image is
tested once, by arms that were neither pre-trained nor fine-tuned on it.

    python -m tools.folds --data /path --folds 5 --epochs 100 --bs 16 --finetune="--frac 0.1"

draws folds of whole patients (--group-by) and duplicates, stratified. In each, pretrain.py trains
on what is neither test nor validation, and finetune.py tunes both arms and scores their mean; and
the same without pre-training, the baseline. Flags that are not listed go to pretrain.py, those in
--finetune to finetune.py. First says how long all takes; called again, it goes on where it was. To
--out: predictions.csv, of all folds, and summary.json: scores, and what pre-training gains, with
95 % intervals over the patients or images tested, not over folds, which share training images.
"""

import re
import shlex
import tempfile
from dataclasses import replace
from itertools import compress, product
from pathlib import Path

import numpy as np

import data
from common import checkpoint, cli, readers, results, splits, tables
from tools import compare
from tools.experiments import call, data_flags

METHODS, ARMS = ("baseline", "cass"), ("cnn", "vit", "mean")


def draw_folds(labels, labelled, unit, k, seed):
    """(N,) int in 0..k-1, or -1 in units without a labelled image. Whole units, the largest first,
    go to the fold with the fewest images of their rarest class. labels: (N, C) bool; unit: (N,)."""
    U, C = unit.max() + 1, labels.shape[1]
    counts, held = np.zeros((U, C + 1), int), np.zeros((k, C + 1), int)
    np.add.at(counts, unit, np.c_[labels, labelled])
    order = np.append(np.argsort(labels.sum(0), kind="stable"), C)
    rarest = order[(counts[:, order] > 0).argmax(1)]
    shuffled, fold = np.random.default_rng([seed, 4]).permutation(U), np.full(U, -1)
    for u in sorted(shuffled[counts[shuffled, C] > 0], key=lambda u: -counts[u, C]):
        fold[u] = min(range(k), key=lambda f: (held[f, rarest[u]], held[f, C]))
        held[fold[u]] += counts[u]
    return fold[unit]


def split_of(images, fold, number, seed):
    """The split, (N,) str, that tests a fold: validation is drawn from the rest. UserError."""
    images.given = np.where(fold == number, "test", "").astype("U5")
    split = splits.make_split(images, seed)
    lacks = [f"{side} image" for side in splits.SIDES if side not in split]
    lacks += compress(images.classes, ~images.labels[split == "train"].any(0))
    if lacks:
        what = f"too few patients or images: fold {number} is left without {cli.preview(lacks)}"
        raise cli.UserError(f"{images.path}: {what}; --folds")
    return split


def commands_of(args, out, method):
    """The runs of a method in a fold's folder, as call() takes them: pre-training, fine-tuning."""
    folder, anywhere = out / method, ["--device", args.device, "--amp", args.amp]
    words = ["pretrain.py", *args.pretrain, *data_flags(args), "--split", str(out / "split.csv")]
    words += ["--seed", str(args.seed), "--img-size", str(args.img_size), *anywhere]
    words += ["--epochs", "0"] * (method == "baseline")
    tuning = ["finetune.py", "--ckpt", *(str(folder / f"{arm}.pt") for arm in ARMS[:2])]
    tuning += shlex.split(args.finetune) + anywhere
    return [(words, folder), (tuning, folder / "finetune")]


def hours_of(words):
    """How long a run says that it will take. Raises UserError where it refuses its flags."""
    with tempfile.TemporaryDirectory() as folder:
        if error := call([*words, "--dry-run"], Path(folder)):
            raise cli.UserError(error.removeprefix("error: "))
        said = Path(folder, "output.txt").read_text()
    times = re.findall(r": about (?:(\d+) days?, )?(\d+):(\d+):(\d+) on this", said)
    return sum(np.dot((24, 1, 1 / 60, 1 / 3600), [int(n or 0) for n in time]) for time in times)


def pooled(folders, unit):
    """The out-of-fold Predictions of finetune.py in these folders, a fold each, and the scores of
    each. unit: {name: a number}, equal for images of one patient and for exact duplicates."""
    tests, found = zip(*map(results.read_test, folders))
    names, keys = sum((x.names for x in tests), []), ("labels", *results.KINDS)
    arrays = {key: np.concatenate([getattr(x, key) for x in tests]) for key in keys}
    arrays["flags"] = np.hstack([x.flags for x in tests])
    arrays["units"] = np.array([str(unit[x]) for x in names])
    return replace(tests[0], names=names, **arrays), [x["test"] for x in found]


def without_auroc(found):
    """Areas that rank images by different models mean little, and their intervals hold the truth
    too seldom (results/intervals): those of each fold stay."""
    if isinstance(found, dict):
        return {key: without_auroc(x) for key, x in found.items() if key != "auroc"}
    return [without_auroc(x) for x in found] if isinstance(found, list) else found


def main():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    data.add_arguments(parser)
    add("--folds", type=cli.positive, default=5, metavar="K", help="how many")
    add("--seed", type=cli.count, default=0, help="of the folds and of all that follows")
    add("--img-size", type=cli.positive, default=384, help="side of the images")
    add("--finetune", default="", metavar="FLAGS", help="for finetune.py, in quotes")
    add("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    add("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"], help="autocast precision")
    add("--dry-run", action="store_true", help="say how long it takes, and stop")
    add("--out", default="folds", metavar="DIR", help="output folder")
    args, args.pretrain = parser.parse_known_args()
    if args.split or args.data is None or args.folds < 2 or "--seeds" in args.finetune:
        parser.error("give --data, 2 --folds or more, no --split, which is drawn, and no --seeds")
    spare = tempfile.TemporaryDirectory()  # of a dry run nothing stays
    out = Path(spare.name if args.dry_run else args.out).absolute()
    cli.claim(out)
    images = readers.read(args.data, **data.options(args) | {"split": "none"})
    results.refuse_unlabelled(images)
    images.decode(args.img_size, data.cache_dir(args.cache), args.skip_bad)
    unit = splits.indivisible_units(images)
    fold = draw_folds(images.labels, images.labelled, unit, args.folds, args.seed)
    divided = [split_of(images, fold, k, args.seed) for k in range(args.folds)]
    begun, jobs = any(out.glob("fold*/*/finished")), {method: [] for method in METHODS}
    for k, split in enumerate(divided):
        file = out / f"fold{k}/split.csv"
        file.parent.mkdir(exist_ok=True)
        if begun and any(tables.read_split(file, images.names) != split):
            raise cli.UserError(f"{file}: is of other images or flags; give another --out")
        checkpoint.write_csv(file, ("path", "split"), zip(images.names, split))
        for method in METHODS:
            jobs[method] += commands_of(args, out / f"fold{k}", method)
    for number, (words, folder) in enumerate(cli.progress(sum(jobs.values(), []), "run")):
        if error := call(words, folder):
            what, again = f"{folder}: {error.removeprefix('error: ')}", "give the command again"
            raise cli.Stopped(1, f"{what}; to go on, {again}") if number else cli.UserError(what)
        if number == 0:  # the baseline's weights are there: its fine-tuning can be timed
            train, tune = hours_of(jobs["cass"][0][0]), hours_of(jobs["baseline"][1][0])
            total = f"{args.folds} folds take about {args.folds * (train + 2 * tune):.2f} h, each"
            each = f"{train:.2f} h of pre-training and twice {tune:.2f} h of fine-tuning"
            cli.tqdm.write(f"{total} with {each}")
        if args.dry_run:
            return
    number, unit = (dict(zip(images.names, x.tolist())) for x in (fold, unit))
    rows, summary, tests = [], {}, {}
    for method, arm in product(METHODS, ARMS):
        tuned = [folder / arm for _, folder in jobs[method] if folder.name == "finetune"]
        name = f"{method} {arm}"
        tests[name], parts = pooled(tuned, unit)
        header, lines = tests[name].table()
        rows += [[method, arm, number[line[0]], *line] for line in lines]
        by_fold = {key: [x[key] for x in parts] for key in results.SHOWN if key in parts[0]}
        summary[name] = {**without_auroc(tests[name].scores()), "folds": by_fold}
        results.show(f"{name}, {len(tests[name].names)} images", summary[name]["test"])
    for arm in ARMS:
        pair = [f"{method} {arm}" for method in METHODS]
        found = without_auroc(compare.compare(*([tests[name]] for name in pair)))
        compare.show(found, pair)
        summary[" - ".join(pair[::-1])] = found
    checkpoint.write_csv(out / "predictions.csv", ["method", "arm", "fold", *header], rows)
    checkpoint.write_json(out / "summary.json", summary)
    print(f"wrote {out / 'predictions.csv'} and {out / 'summary.json'}")


if __name__ == "__main__":
    cli.run(main)
