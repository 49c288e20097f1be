"""What results/pretrained says: its cells with read-outs and measures, its tables, its claims.

    python tests/evidence.py collect CELLS RUNS    (adds to the cells what readouts.py left)
    python tests/evidence.py report                (writes results/pretrained/README.md from them)

Label-free measures of features (N, D), candidates for a monitor; views (n, V, D): of augmented
images. Each says what it promises to order, from its source.
"""

import re
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import collapse
from common.checkpoint import read_json, write_json


def entropy_rank(values):
    """exp of the entropy of what sums to one once divided by its sum."""
    p = values.clamp(min=0) / values.clamp(min=0).sum()
    return torch.special.entr(p).sum().exp().item()


def rankme(x):
    """Garrido et al., arXiv 2210.02885: more is better."""
    return entropy_rank(torch.linalg.svdvals(x))


def effective_rank(x):
    """As RankMe, of centred features: more is better."""
    return collapse.measures(x)["effective_rank"]


def alpha_req(x, first=3, last=100):
    """Agrawal et al., 2022: the exponent of the eigenvalues' decay; minus its distance from 1, so
    that more is better."""
    values = torch.linalg.svdvals(x - x.mean(0)).square()[first - 1 : last]
    slope = stats.linregress(np.log(np.arange(first, first + len(values))), values.log()).slope
    return -abs(-slope - 1)


def lidar(views, delta=1e-4):
    """Thilak et al., arXiv 2312.04000: the effective rank of what tells images apart, in units of
    what augmentation changes: more is better."""
    means = views.mean(1)
    inner = (views - means[:, None]).flatten(0, 1)
    within = inner.T @ inner / (len(views) * (views.shape[1] - 1))
    outer = means - means.mean(0)
    between = outer.T @ outer / (len(views) - 1)
    scale = within.diagonal().mean()
    values, vectors = torch.linalg.eigh(within + delta * scale * torch.eye(len(within)))
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    return entropy_rank(torch.linalg.eigvalsh(root @ between @ root))


def cluster_learnability(x, clusters=50, k=20):
    """Lu et al., arXiv 2206.01251: how often k nearest neighbours tell an image's cluster of
    k-means: more is better."""
    from sklearn.cluster import KMeans
    from sklearn.neighbors import KNeighborsClassifier

    x = torch.nn.functional.normalize(x, dim=1).numpy()
    y = KMeans(clusters, n_init=1, random_state=0).fit(x).labels_
    half = len(x) // 2
    return float(KNeighborsClassifier(k).fit(x[:half], y[:half]).score(x[half:], y[half:]))


def intrinsic_dimension(x):
    """Facco et al., 2017 (TwoNN), without exact duplicates: more is better in Lu et al."""
    distance = torch.cdist(x, x).sort(dim=1).values[:, 1:3]
    first, second = distance[distance[:, 0] > 1e-3 * distance.mean()].T
    return 1 / (second / first).log().mean().item()


def uniformity(x):
    """Wang and Isola, arXiv 2005.10242, with the sign turned: more is better."""
    x = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    return -torch.pdist(x).square().mul(-2).exp().mean().log().item()


def label_free(file):
    """{arm: {measure: number}} of a features.npz."""
    found, arrays = {}, np.load(file)
    for arm in ("cnn", "vit"):
        x, views = (torch.from_numpy(arrays[f"{arm}_{k}"]).float() for k in ("train", "views"))
        whole = (rankme, effective_rank, alpha_req, cluster_learnability, intrinsic_dimension)
        found[arm] = {f.__name__: round(f(x), 5) for f in (*whole, uniformity)}
        found[arm]["lidar"] = round(lidar(views), 5)
    return found


def collect(cells, runs):
    """Add to each cell, a file, what readouts.py left in the folder of its pre-training."""
    for file in sorted(Path(cells).glob("*.json")):
        cell = read_json(file)
        folder = Path(runs) / Path(re.search(r"--out (\S+)", cell["commands"][0])[1]).name
        if "readouts" not in cell and (folder / "readouts.json").exists():
            cell["readouts"] = read_json(folder / "readouts.json")
            cell["label_free"] = label_free(folder / "features.npz")
            write_json(file, cell)
            print(file.name)


def paired(a, b):
    """b - a of equal seeds: mean, the ends of its 95 % interval of the t distribution, p."""
    test = stats.ttest_rel(b, a)
    low, high = test.confidence_interval(0.95)
    return float(np.mean(np.subtract(b, a))), float(low), float(high), float(test.pvalue)


def holm(p):
    """Holm's corrected p-values, in the order given."""
    order, found, largest = np.argsort(p), np.empty(len(p)), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        found[i] = largest
    return found.tolist()


RESULTS = Path(__file__).parents[1] / "results/pretrained"
PROTOCOL = read_json(Path(__file__).parents[1] / "tools/protocol.json")
FRACS, ARMS = ("0.01", "0.1"), ("cnn", "vit")
SETS = {"brain_mri": "Brain MRI", "ham10000": "HAM10000"}
BASE, PAPERS = "direct use", "equation 1, 1e-3"
LN_K = np.log(4096)  # DINO's loss where it tells nothing apart
NAMES = {"cnn": "CNN", "vit": "ViT", "knn": "k-NN", "linear": "probe"}
VIEWS = ("CNN", "ViT", "mean of arms", "better arm", "ensemble")


def cells_of(folder):
    """{row: {seed: cell}} of the finished cells in a folder of results/pretrained."""
    found = {}
    for file in sorted((RESULTS / folder / "cells").glob("*.json")):
        cell = read_json(file)
        if cell["status"] == "done":
            found.setdefault(cell["row"], {})[cell["seed"]] = cell
    return found


def score(cell, arm, frac, side="test"):
    """The macro F1 of an arm fine-tuned on this fraction of the labels."""
    return cell["scores"][f"{arm}|{frac}"][side]["macro_f1"]


def views(cells, frac):
    """{column: {seed: macro F1}} of a row, fine-tuned end to end. Better arm: by the validation
    score, in each run."""
    found = {name: {} for name in VIEWS}
    for seed, cell in cells.items():
        each = {arm: score(cell, arm, frac) for arm in ARMS}
        better = max(ARMS, key=lambda arm: score(cell, arm, frac, "val"))  # noqa: B023
        values = *each.values(), np.mean([*each.values()]), each[better], score(cell, "mean", frac)
        for name, x in zip(VIEWS, values):
            found[name][seed] = float(x)
    return found


def read_outs(cells, frac):
    """As views(), of k-NN and the linear probe."""
    found = {}
    for arm, kind in product(ARMS, ("knn", "linear")):
        column = found.setdefault(f"{NAMES[arm]}, {NAMES[kind]}", {})
        for seed, cell in cells.items():
            if "readouts" in cell:
                column[seed] = read_out(cell, arm, kind, frac)
    return found


def read_out(cell, arm, kind, frac):
    return cell["readouts"][arm][f"{kind}|{frac}"]["test"]


def trial_score(cell):
    """By which the trials choose: the mean over both arms and both fractions."""
    return np.mean([score(cell, arm, frac) for frac in FRACS for arm in ARMS])


def last_losses(cell):
    """Of the last epoch; DINO trains one arm after the other."""
    return [{row["arms"]: row["loss"] for row in cell["log"]}[x] for x in ("cnn", "vit")]


def best(method):
    """The row of a method, whose name (or one of several) its rows begin with, that its trials
    chose; None before."""
    tried = cells_of("trials") | cells_of("search")
    found = [(row, cell) for row, seeds in tried.items() for cell in seeds.values()]
    found = [x for x in found if x[0].startswith(method)]
    learned = [x for x in found if method == "DINO" and max(last_losses(x[1])) <= 0.9 * LN_K]
    return max(learned or found, key=lambda x: trial_score(x[1]), default=(None,))[0]


def chosen():
    """{role in the protocol: row}."""
    roles = {"equation 1, best rate": "equation 1", "chosen objective": ("VICReg", "recipe")}
    found = {role: best(method) for role, method in roles.items()}
    return found | {"DINO": f"{best('DINO')}, 1 epoch"}  # in the trials: 2, see the protocol


def against(base, values):
    """paired() of {seed: number} and another, of the seeds of both, and how many; None of fewer
    than two."""
    seeds = sorted(base.keys() & values.keys())
    if len(seeds) < 2:
        return None
    return *paired(*([x[seed] for seed in seeds] for x in (base, values))), len(seeds)


def signed(x):
    return f"{x:+.3f}".replace("-", "−")


def shown(difference):
    """A difference and its interval, in bold where that excludes zero."""
    if difference is None:
        return ""
    mean, low, high, *_ = difference
    text = f"{signed(mean)} ({signed(low)} to {signed(high)})"
    return f"**{text}**" if low > 0 or high < 0 else text


def table(header, rows):
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def percent(frac):
    return f"{100 * float(frac):g} %"


def trials_table(folder):
    rows = []
    for row, seeds in cells_of(folder).items():
        for cell in seeds.values():
            each = [score(cell, arm, frac) for frac in FRACS for arm in ARMS]
            probe = [read_out(cell, arm, "linear", "1") for arm in ARMS]
            rows.append([trial_score(cell), row, *each, *probe])
            if row.startswith("DINO"):
                rows[-1][1] += "; loss {:.2f}, {:.2f}".format(*last_losses(cell))
    rows.sort(key=lambda row: -row[0])
    header = ["trial", "score", "CNN, 1 %", "ViT, 1 %", "CNN, 10 %", "ViT, 10 %"]
    header += ["probe, CNN", "probe, ViT"]
    lines = [[row, *(f"{x:.3f}" for x in (first, *rest))] for first, row, *rest in rows]
    planned = PROTOCOL["tables"].get(folder, {"rows": ()})["rows"]
    missing = [row for row in planned if row not in cells_of(folder)]
    return table(header, lines + [[row, "not run", *[""] * 6] for row in missing])


def primary(row):
    """[(set, fraction, means of both, difference and n, Holm's p, verdict)] of the primary
    comparisons, `row` minus direct use."""
    found = []
    for folder, frac in product(SETS, FRACS):
        a, b = (views(cells_of(folder).get(x, {}), frac)["mean of arms"] for x in (BASE, row))
        if difference := against(a, b):
            means = [np.mean([x[seed] for seed in a.keys() & b.keys()]) for x in (a, b)]
            found.append((folder, frac, means, difference))
    corrected = holm([x[-1][3] for x in found])
    for i, (_, _, _, (mean, low, high, *_)) in enumerate(found):
        clear = corrected[i] < 0.05 and (low > 0 or high < 0)
        verdict = ("better" if mean > 0 else "worse") if clear else "no difference shown"
        found[i] = *found[i], corrected[i], verdict
    return found


def primary_table(row, found):
    """found: primary(row)."""
    lines = []
    for folder, frac, means, difference, p, verdict in found:
        first = f"{SETS[folder]}, {percent(frac)}", difference[4], *(f"{x:.3f}" for x in means)
        lines.append([*first, shown(difference), f"{difference[3]:.3f}", f"{p:.3f}", verdict])
    header = ["set, labels", "seeds", BASE, row, "difference (95 % interval)", "p"]
    return table([*header, "Holm's p", "verdict"], lines)


def differences_table(columns, fracs, cells, rows, first=BASE):
    """Means of the row `first` and, below, the differences of the others from it, for each
    fraction. columns: views or read_outs; cells: as cells_of()."""
    lines, header = [], []
    for frac in fracs:
        base = columns(cells[first], frac)
        header, n = [*base], len(next(iter(base.values())))
        means = [f"{np.mean([*x.values()]):.3f}" for x in base.values()]
        lines.append([percent(frac), first, n, *means])
        for row in rows:
            values = columns(cells[row], frac)
            found = [against(base[name], values[name]) for name in header]
            if found[0]:
                lines.append([percent(frac), row, found[0][4], *map(shown, found)])
    return table(["labels", "method", "seeds", *header], lines)


def label_free_of(cell, arm):
    """{measure: number} of an arm of a cell: of all training images, and of the monitor."""
    found = dict(cell["label_free"][arm])
    if cell["log"] and cell["log"][-1]["arms"] == "cnn+vit":
        row = cell["log"][-1]
        found |= {key: row[key] for key in ("agreement", "retrieval")} | {
            "minus loss": -row["loss"]
        }
        found["logits spread"] = row[f"{arm}_logits_spread"]
    return found


def correlations(cells, arm, seeds):
    """{measure: Spearman's correlation with the fine-tuned score, the mean of both fractions}, over
    all cells of these seeds, which may repeat, that have it."""
    each = {}
    for seed in seeds:
        for runs in cells.values():
            if seed in runs and "label_free" in runs[seed]:
                y = np.mean([score(runs[seed], arm, frac) for frac in FRACS])
                for key, x in label_free_of(runs[seed], arm).items():
                    each.setdefault(key, []).append((x, y))
    whole = {key: np.transpose(x) for key, x in each.items() if len(x) > 4}
    return {key: stats.spearmanr(*x).statistic for key, x in whole.items() if np.ptp(x[0]) > 0}


def correlation_rows(draws=2000):
    """[(measure, correlation on the first set: CNN, ViT, mean; on the second: mean, ends of its
    95 % interval from seeds drawn again)], the best on the first set first."""
    rng, found = np.random.default_rng(0), []
    first, second = (cells_of(folder) for folder in SETS)
    seeds = [
        sorted({seed for runs in cells.values() for seed in runs}) for cells in (first, second)
    ]
    a, b = ({arm: correlations(x, arm, s) for arm in ARMS} for x, s in zip((first, second), seeds))
    drawn = [rng.choice(seeds[1], len(seeds[1])).tolist() for _ in range(draws * bool(seeds[1]))]
    drawn = [{arm: correlations(second, arm, s) for arm in ARMS} for s in drawn]
    for key in a["cnn"].keys() & a["vit"].keys() & b["cnn"].keys() & b["vit"].keys():
        each = [np.mean([x[arm].get(key, np.nan) for arm in ARMS]) for x in drawn]
        both = [a[arm][key] for arm in ARMS]
        ends = np.nanquantile(each, (0.025, 0.975)).tolist()
        found.append((key, *both, np.mean(both), np.mean([b[arm][key] for arm in ARMS]), *ends))
    return sorted(found, key=lambda x: -x[3])


def correlations_table():
    header = ["measure", "brain MRI: CNN", "ViT", "mean", "HAM10000: mean", "95 % interval"]
    rows = [
        [k, *map(signed, x[:4]), f"{signed(x[4])} to {signed(x[5])}"]
        for k, *x in correlation_rows()
    ]
    return table(header, rows)


def times_table(rows):
    """Seconds of pre-training both arms, beside another run."""
    lines = []
    for folder, row in ((x, row) for x in SETS for row in rows):
        seconds = [cell["pretrain_seconds"] for cell in cells_of(folder).get(row, {}).values()]
        if len(seconds) > 1:
            each = f"{np.mean(seconds):.0f} ± {np.std(seconds, ddof=1):.0f} s"
            lines.append([SETS[folder], row, len(seconds), each])
    return table(["set", "method", "seeds", "pre-training, mean ± standard deviation"], lines)


def report():
    """The text of results/pretrained/README.md."""
    roles, cells = chosen(), {x: cells_of(x) for x in (*SETS, "controls", "random")}
    rows = [row for row in dict.fromkeys([PAPERS, *roles.values()]) if row]
    chosen_row, best_row = roles["chosen objective"], roles["equation 1, best rate"]
    ready = [folder for folder in SETS if len(cells[folder].get(chosen_row, {})) > 1]
    parts = [
        "# What pre-training is worth from pre-trained arms",
        "Made by `python tests/evidence.py report` from the cells; how it was planned: "
        "[protocol.md](../protocol.md). Macro F1; differences are from direct use of the arms, "
        "paired by seed, with 95 % intervals of the t distribution; in bold where that excludes "
        "zero. They are conditional on the one split of each set and on these two arms.",
    ]
    if found := primary(chosen_row):
        parts += [
            "## Primary comparisons",
            f"Test images, the mean of both arms' scores: {chosen_row} minus {BASE}, p of the "
            "paired t test and with Holm's correction. Better or worse: the interval excludes zero "
            "and the corrected p is below 0.05.",
            primary_table(chosen_row, found),
        ]
    for folder in ready:
        if have := [row for row in rows if row in cells[folder]]:
            parts += [
                f"## {SETS[folder]}, all methods (exploratory)",
                "Fine-tuned end to end. Better arm: the one with the higher validation score, in "
                "each run. Ensemble: the mean of both arms' probabilities.",
                differences_table(views, FRACS, cells[folder], have),
                "Read-outs of the features, the mean of 20 draws of labels a seed:",
                differences_table(read_outs, (*FRACS, "1"), cells[folder], have),
            ]
    if cells["controls"] and best_row:
        controls = {x: cells["brain_mri"].get(x, {}) for x in (BASE, best_row)} | cells["controls"]
        have = [row for row in controls if row != BASE]
        parts += [
            "## Controls, brain MRI (exploratory)",
            "What a control gains is not the method's gain.",
            differences_table(views, FRACS, controls, have),
            differences_table(read_outs, (*FRACS, "1"), controls, have),
        ]
    if cells["random"] and ready:
        parts.append("## From random weights, brain MRI (exploratory)")
        for row in (BASE, PAPERS):
            alike = {row: cells["brain_mri"][row], "random weights": cells["random"].get(row, {})}
            parts.append(differences_table(views, FRACS, alike, ["random weights"], row))
    if ready:
        parts += ["## Time", times_table(rows)]
    if len(ready) == len(SETS):
        parts += [
            "## Which label-free measure orders runs as the fine-tuned score does?",
            "Spearman's correlation over all runs of a set, with the mean of the scores at 1 and "
            "10 %.",
            correlations_table(),
        ]
    parts += [
        "## Trials",
        "Macro F1 on the trial images (validation images that fine-tuning does not see), brain "
        "MRI, seed 100. Score: the mean of the next four columns, by which the trials choose. "
        "Probe: ridge regression on the features with all labels. DINO's losses: of the last "
        f"epoch, CNN and ViT; it counts only if both are at most {0.9 * LN_K:.2f}, unless none is.",
        trials_table("trials"),
        "Search for a recipe, same images and score; the flags of each are in "
        "[protocol.json](../../tools/protocol.json), the variants in "
        "[variants.py](../../tests/variants.py):",
        trials_table("search"),
        "The first trials, with a patience of 5, which do not count:",
        trials_table("trials_patience5"),
    ]
    return "\n\n".join(parts) + "\n"


def write_report():
    (RESULTS / "README.md").write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    {"collect": collect, "report": write_report}[sys.argv[1]](*sys.argv[2:])
