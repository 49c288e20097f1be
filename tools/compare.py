"""Is run B better than run A? And what is the mean of both, since nobody knows which arm to pick?

    python -m tools.compare finetune_cnn_0.1 finetune_vit_0.1

scores two runs of finetune.py on the same test images, and the mean of their probabilities; shows
B - A with its 95 % interval, paired: by bootstrap over the images, over patients where they are
known. "better" or "worse" stands where it excludes zero, and without correction for how many are
looked at. McNemar's exact test compares how many images are right; it takes images as independent.
Of runs with several --seeds, equal ones are paired and averaged: the interval is about other
images, not other seeds. An image that one run counts as a duplicate, or as seen, is left out of all
scores without such images. --out FILE gets all of it as JSON.
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


def mcnemar(right_a, right_b):
    """Images that A alone and B alone has right, of (N,) bool, and the two-sided p (Dietterich,
    1998; exact, by the binomial distribution)."""
    a, b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p = 2 * sum(math.comb(a + b, i) for i in range(min(a, b) + 1)) / 2 ** (a + b)
    return {"only_a": a, "only_b": b, "p": min(p, 1.0)}


def means_of(tests, kept):
    """{score: mean over the seeds}, and {score: (ROUNDS,) replicates of it}, of Predictions."""
    arrays = [test.arrays(kept) for test in tests]
    once = [metrics.measures(*x, np.ones((1, kept.sum())))[0] for _, *x in arrays]
    replicates = [metrics.bootstrap(*x)[0] for x in arrays]
    return [{k: np.mean([x[k] for x in xs], axis=0) for k in xs[0]} for xs in (once, replicates)]


@np.errstate(invalid="ignore")  # 0 / 0 where a score is undefined
def compare(a, b):
    """{part: {score: a, b, mean of both, difference b - a, its ci95 and verdict}} of lists of
    Predictions, a pair to a seed; and of each seed McNemar's test."""
    flags = np.any([test.flags for test in a + b], axis=0)
    for test in a + b:
        test.flags = flags
    both, found = [results.mean_of(pair) for pair in zip(a, b)], {}
    for part, kept in a[0].parts().items():
        if part != "test" and kept.all():
            continue
        (of_a, draws_a), (of_b, draws_b), (mean, _) = (means_of(x, kept) for x in (a, b, both))
        units, labels, *_ = a[0].arrays(kept)
        few, U = metrics.too_few(labels, units)[0], len(np.unique(units))
        found[part] = {"n": int(kept.sum()), "n_units": U, "scores": {}}
        for key in (key for key in of_a if not np.isnan(of_a[key][0])):
            row = {"a": of_a[key].item(), "b": of_b[key].item(), "mean": mean[key].item()}
            low, high = metrics.limits(draws_b[key] - draws_a[key], U).tolist()
            limits = None if few[key] or "ece" in key else [low, high]
            row |= {"difference": row["b"] - row["a"], "ci95": limits, "verdict": ""}
            if limits and not low <= 0 <= high:
                row["verdict"] = "better" if (low > 0) != key.startswith("brier") else "worse"
            found[part]["scores"][key] = row
        found[part]["mcnemar"] = [mcnemar(*(x.right()[kept] for x in pair)) for pair in zip(a, b)]
    return found


def show(found, names):
    """Print what compare() found of a run A and a run B."""
    print("A: {}\nB: {}".format(*names))
    for part, x in found.items():
        left_out = part.removeprefix("test").replace("_", " ")
        units = f", {x['n_units']} patients or sets of duplicates" * (x["n_units"] < x["n"])
        print(f"test{left_out}, {x['n']} images{units}:")
        print(f"  {'':18} {'A':>7} {'B':>7} {'mean of both':>13} {'B - A':>8}  95 % interval")
        for key, row in x["scores"].items():
            if key in results.SHOWN:
                limits = (
                    "too few" if row["ci95"] is None else "{:+.4f} to {:+.4f}".format(*row["ci95"])
                )
                limits = "none" if key == "ece" else f"{limits}  {row['verdict']}"
                scores = f"{row['a']:7.4f} {row['b']:7.4f} {row['mean']:13.4f}"
                print(f"  {key:18} {scores} {row['difference']:+8.4f}  {limits.strip()}")
        for test in x["mcnemar"]:
            alone = "right in {only_a} images by A alone, in {only_b} by B alone".format(**test)
            print(f"  {alone}: McNemar's p {test['p']:.3g}")


def main():
    parser = cli.Parser(__doc__)
    for name in ("RUN_A", "RUN_B"):
        parser.add_argument(name, type=Path, help="output folder of finetune.py")
    parser.add_argument("--out", metavar="FILE", help="JSON file")
    parser.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    args = parser.parse_args()
    if args.out:
        out = Path(args.out)
        cli.refuse_overwrite(out.parent, [out.name], args.overwrite)
    runs = [folders_of(run) for run in (args.RUN_A, args.RUN_B)]
    if runs[0].keys() != runs[1].keys():
        raise cli.UserError(
            f"{args.RUN_B}: its seeds are not those of {args.RUN_A}; give equal --seeds"
        )
    tests = [{folder: results.read_test(folder)[0] for folder in run.values()} for run in runs]
    results.refuse_unequal(tests[0] | tests[1])
    found = compare(*(list(x.values()) for x in tests))
    show(found, (args.RUN_A, args.RUN_B))
    if args.out:
        out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(out, {"a": str(args.RUN_A), "b": str(args.RUN_B), **found})
        print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
