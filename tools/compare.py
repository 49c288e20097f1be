"""Is run B better than run A? And what is the mean of both, since nobody knows which arm to pick?

    python -m tools.compare finetune_cnn_0.1 finetune_vit_0.1

scores two runs of finetune.py on the same test images, and the mean of their probabilities; shows
B - A with its 95 % interval, paired: by bootstrap over the images, over patients where they are
known. "better" or "worse" stands where it excludes zero, uncorrected for how many are looked at.
McNemar's exact test compares how many images are right; it takes images as independent. Of several
--seeds, equal ones are paired and averaged: the interval is about other images, not other seeds. An
image that one run counts as a duplicate, or as seen, is left out of all scores without such images.
"""

import math
from pathlib import Path

import numpy as np

from common import checkpoint, cli, metrics, results


def folders_of(run):
    """{seed0: folder, ...} of the seeds of a run; {.: run} where it had only one."""
    folders = [run] * (run / "metrics.json").exists()
    folders += sorted(file.parent for file in run.glob("seed*/config.json"))
    unfinished = [folder.name for folder in folders if not (folder / "metrics.json").exists()]
    if not folders or unfinished or len(folders) > 1 and run in folders:
        what = f"{run}: holds no finished run of finetune.py (no metrics.json), or several"
        raise cli.UserError(f"{what}; unfinished: {cli.preview(unfinished) or 'none'}")
    return {folder.relative_to(run): folder for folder in folders}


def mcnemar(labels, predicted_a, predicted_b):
    """How many images A alone and B alone has right, of (N, C) bool each, and the two-sided p:
    exact, by the binomial distribution (Dietterich, 1998)."""
    right_a, right_b = ((labels == x).all(1) for x in (predicted_a, predicted_b))
    a, b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p = 2 * sum(math.comb(a + b, i) for i in range(min(a, b) + 1)) / 2 ** (a + b)
    return {"only_a": a, "only_b": b, "p": min(p, 1.0)}


@np.errstate(invalid="ignore")  # 0 / 0 where a score is undefined
def compare(a, b):
    """Of lists of Predictions, a pair to a seed: {part: n, n_units, scores: {score: a, b, mean of
    both, difference b - a, ci95, verdict}, mcnemar: of each seed}. Scores: means of the seeds."""
    found, three = {}, (a, b, [results.mean_of(pair) for pair in zip(a, b)])
    for part, kept in results.mean_of(a + b).parts().items():
        if found and kept.all():  # as the first, "test"
            continue
        whats = [[test.arrays(kept) for test in tests] for tests in three]
        (units, labels, *_), ones = whats[0][0], np.ones((1, kept.sum()))
        points = [[metrics.measures(*x, ones)[0] for _, *x in seeds] for seeds in whats]
        drawn = [[metrics.bootstrap(*x)[0] for x in seeds] for seeds in whats[:2]]
        rows, few, U = {}, metrics.too_few(units, labels)[0], len(np.unique(units))
        for key in (key for key, x in points[0][0].items() if not np.isnan(x)):
            of_a, of_b, mean = (np.mean([x[key] for x in seeds]).item() for seeds in points)
            draws = [np.mean([x[key] for x in seeds], axis=0) for seeds in drawn]
            low, high = ends = metrics.limits(draws[1] - draws[0], U)
            ci95 = metrics.interval(few[key] or "ece" in key, ends)
            better = high < 0 if "brier" in key else low > 0
            verdict = "" if ci95 is None or low <= 0 <= high else "better" if better else "worse"
            row = {"a": of_a, "b": of_b, "mean": mean, "difference": of_b - of_a}
            rows[key] = row | {"ci95": ci95, "verdict": verdict}
        predicted = [[metrics.predicted_labels(x[2], x[-1]) for x in y] for y in whats[:2]]
        tests = [mcnemar(labels, *pair) for pair in zip(*predicted)]
        found[part] = {"n": int(kept.sum()), "n_units": U, "scores": rows, "mcnemar": tests}
    return found


def show(found, names):
    """Print what compare() found of a run A and a run B."""
    print("A: {}\nB: {}".format(*names))
    for part, x in found.items():
        units = f", {x['n_units']} patients or different images" * (x["n_units"] < x["n"])
        print(f"{part.replace('_', ' ')}, {x['n']} images{units}:")
        print(f"  {'':18} {'A':>7} {'B':>7} {'mean of both':>13} {'B - A':>8}  95 % interval")
        for key in (key for key in results.SHOWN if key in x["scores"]):
            a, b, mean, difference, limits, verdict = x["scores"][key].values()
            none = "not given" if key == "ece" else "none: too few, or too alike"
            limits = "{:+.4f} to {:+.4f}".format(*limits) if limits else none
            scores = f"{a:7.4f} {b:7.4f} {mean:13.4f} {difference:+8.4f}"
            print(f"  {key:18} {scores}  {limits}  {verdict}".rstrip())
        for test in x["mcnemar"]:
            alone = "right in {only_a} images by A alone, in {only_b} by B alone".format(**test)
            print(f"  {alone}: McNemar's p {test['p']:.3g}")


def main():
    parser = cli.Parser(__doc__)
    for name in ("RUN_A", "RUN_B"):
        parser.add_argument(name, type=Path, help="output folder of finetune.py")
    parser.add_argument("--out", metavar="FILE", type=Path, help="JSON file")
    parser.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    args = parser.parse_args()
    if args.out:
        cli.refuse_overwrite(args.out.parent, args.overwrite, [args.out.name])
    runs = [folders_of(run) for run in (args.RUN_A, args.RUN_B)]
    if runs[0].keys() != runs[1].keys():
        raise cli.UserError(f"{args.RUN_B}: its seeds are not those of {args.RUN_A}")
    tests = [{folder: results.read_test(folder)[0] for folder in run.values()} for run in runs]
    results.refuse_unequal(tests[0] | tests[1])
    found = compare(*(list(x.values()) for x in tests))
    show(found, (args.RUN_A, args.RUN_B))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(args.out, {"a": str(args.RUN_A), "b": str(args.RUN_B), **found})
        print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
