"""A whole experiment in folds, for sets that are too small for one split: every labelled image is
tested once, by arms that were neither pre-trained nor fine-tuned on it.

    python -m tools.folds --data /path --folds 5 --epochs 100 --bs 16 --finetune "--frac 0.1"

draws folds of whole patients (--group-by) and duplicates, stratified; in each, pretrain.py trains
on what is neither test nor validation, finetune.py fine-tunes both arms and scores their mean.
Besides, the baseline: the same arms without pre-training (--epochs 0). Flags that are not listed
here go to pretrain.py; those in --finetune, one text, to finetune.py. Says how long all takes;
called again, it goes on where it was. Writes to --out predictions.csv, all out-of-fold predictions,
and summary.json: scores with 95 % intervals and the difference to the baseline. The models of the
folds share training images, so the intervals come from resampling the patients or images tested.
"""

import re
import shlex
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

import data
from common import checkpoint, cli, results, splits
from common.decode import digest
from common.readers import read
from tools import compare
from tools.experiments import call, data_flags, run_script

METHODS, ARMS = ("baseline", "cass"), ("cnn", "vit", "mean")


def parse_arguments():
    """The arguments; pretrain: the words for pretrain.py alone."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    data.add_arguments(parser)
    add("--folds", type=cli.positive, default=5, metavar="K", help="how many (default: 5)")
    add("--seed", type=cli.count, default=0, help="of the folds and of all that follows")
    add("--img-size", type=cli.positive, default=384, help="side of the images")
    add("--finetune", default="", metavar="FLAGS", help="for finetune.py, in quotes")
    add("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    add("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"], help="autocast precision")
    add("--dry-run", action="store_true", help="say how long it takes, and stop")
    add("--out", default="folds", metavar="DIR", help="output folder (default: folds)")
    args, args.pretrain = parser.parse_known_args()
    if args.split or args.data is None or args.folds < 2 or "--seeds" in args.finetune:
        parser.error("give --data, at least --folds 2, no --split (it is drawn) and no --seeds")
    return args


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
    lacks = [
        c for c, has in zip(images.classes, images.labels.T) if not has[split == "train"].any()
    ]
    lacks += [f"{side} images" for side in splits.SIDES if side not in split]
    if lacks:
        what = f"fold {number} of {fold.max() + 1} leaves no {cli.preview(lacks)}"
        raise cli.UserError(f"{images.path}: {what} to train; too few patients or images: --folds")
    return split


def commands_of(args, out, method):
    """The runs of a method in a fold's folder, as call() takes them: pre-training, fine-tuning."""
    folder, anywhere = out / method, ["--device", args.device, "--amp", args.amp]
    words = ["pretrain.py", *args.pretrain, *data_flags(args), "--split", str(out / "split.csv")]
    words += ["--seed", str(args.seed), "--img-size", str(args.img_size), *anywhere]
    words += ["--epochs", "0"] if method == "baseline" else []
    files = [str(folder / f"{arm}.pt") for arm in ("cnn", "vit")]
    tuning = ["finetune.py", "--ckpt", *files, *shlex.split(args.finetune), *anywhere]
    return [(words, folder), (tuning, folder / "finetune")]


def seconds_of(words, folder):
    """What a run says that it will take. Raises UserError where it refuses its flags."""
    with tempfile.TemporaryFile("w+") as output:
        status = run_script([*words, "--dry-run", "--out", f"{folder}_dry_run"], output)
        output.seek(0)
        said = output.read()
    if status:
        raise cli.UserError(said.strip().splitlines()[-1].removeprefix("error: "))
    times = [re.findall(r"\d+", text)[::-1] for text in re.findall(r": about (.*) on this", said)]
    return sum(int(n) * unit for time in times for n, unit in zip(time, (1, 60, 3600, 86400)))


def estimate(args, first):
    """Print how long all folds take, by what those of the `first` fold say."""
    (begin, _), (pretraining, tuning) = first["baseline"], first["cass"]
    if error := call(*begin, {}):
        raise cli.UserError(error)
    tuning = [word.replace(str(pretraining[1]), str(begin[1])) for word in tuning[0]]
    seconds = seconds_of(*pretraining), seconds_of(tuning, first["cass"][1][1])
    hours = [x / 3600 for x in (args.folds * (seconds[0] + 2 * seconds[1]), *seconds)]
    each = "{:.1f} h: in each {:.2f} h of pre-training and twice {:.2f} h of fine-tuning".format(
        *hours
    )
    print(f"{args.folds} folds, at most {each} both arms, less what is finished", flush=True)


def pooled(folders, unit):
    """The out-of-fold Predictions of finetune.py in these folders, a fold each. unit: {name: of
    whole images}, the same number for images of one patient or with equal pixels."""
    tests = [results.read_test(folder)[0] for folder in folders]
    lists = {key: sum((getattr(x, key) for x in tests), []) for key in ("names", "true")}
    arrays = {key: [getattr(x, key) for x in tests] for key in ("probabilities", "distribution")}
    arrays = {key: np.concatenate(x) for key, x in arrays.items()}
    flags = np.concatenate([x.flags for x in tests], 1)
    units = [str(unit[name]) for name in lists["names"]]
    return replace(tests[0], flags=flags, units=units, **lists, **arrays)


def main():
    args = parse_arguments()
    out = Path(args.out).absolute()
    cli.claim(out)
    images = read(args.data, **{**data.options(args), "split": "none"})
    args.split = None
    results.refuse_unlabelled(images)
    images.decode(args.img_size, data.cache_dir(args.cache), args.skip_bad)
    unit = splits.indivisible_units(images)
    fold = draw_folds(images.labels, images.labelled, unit, args.folds, args.seed)
    divided = [split_of(images, fold, k, args.seed) for k in range(args.folds)]
    config = {k: v for k, v in vars(args).items() if k not in ("dry_run", "out", "device")}
    config["digest"] = digest("".join(images.names), "".join(np.concatenate(divided)))
    if (out / "config.json").exists() and checkpoint.read_json(out / "config.json") != config:
        raise cli.UserError(f"{out}: has folds of other flags or images; give another --out")
    checkpoint.write_json(out / "config.json", config)
    jobs = []
    for k, split in enumerate(divided):
        (out / f"fold{k}").mkdir(exist_ok=True)
        checkpoint.write_csv(
            out / f"fold{k}/split.csv", ("path", "split"), zip(images.names, split)
        )
        jobs.append({method: commands_of(args, out / f"fold{k}", method) for method in METHODS})
    estimate(args, jobs[0])
    if args.dry_run:
        return
    for runs in cli.progress([job[method] for method in METHODS for job in jobs], "run"):
        if error := next(filter(None, (call(*run, {}) for run in runs)), None):
            what = f"{runs[0][1]}: {error}"
            raise cli.Stopped(1, f"{what}; to go on, give the command again")
    units, rows, summary, tests = dict(zip(images.names, unit)), [], {}, {}
    for method, arm in product(METHODS, ARMS):
        folders = [job[method][1][1] / arm for job in jobs]
        test = tests[method, arm] = pooled(folders, units)
        header, lines = test.table()
        numbers = dict(zip(images.names, fold.tolist()))
        rows += [[method, arm, numbers[line[0]], *line] for line in lines]
        parts = [checkpoint.read_json(folder / "metrics.json")["test"] for folder in folders]
        by_fold = {key: [x.get(key) for x in parts] for key in results.SHOWN if key in parts[0]}
        summary.setdefault(method, {})[arm] = {**test.scores(), "folds": by_fold}
        results.show(f"{method}, {arm}: {len(test.names)} images", summary[method][arm]["test"])
    for arm in ARMS:
        found = compare.compare(*([tests[method, arm]] for method in METHODS))
        compare.show(found, [f"{method}, {arm}" for method in METHODS])
        summary.setdefault("cass - baseline", {})[arm] = found
    checkpoint.write_csv(out / "predictions.csv", ["method", "arm", "fold", *header], rows)
    checkpoint.write_json(out / "summary.json", summary)
    print(f"wrote {out / 'predictions.csv'} and {out / 'summary.json'}")


if __name__ == "__main__":
    cli.run(main)
