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
    x = torch.nn.functional.normalize(x - x.mean(0), dim=1)  # centred, which theirs is not
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
    p = np.nan_to_num(test.pvalue, nan=1)  # of scores that are all equal
    return float(np.mean(np.subtract(b, a))), float(low), float(high), float(p)


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
    return f"**{text}**" if low < high and (low > 0 or high < 0) else text


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
    comparisons, `row` minus direct use. One that has not run counts as p = 1 in Holm's correction,
    and while there is one, there is no verdict."""
    found = []
    for folder, frac in product(SETS, FRACS):
        a, b = (views(cells_of(folder).get(x, {}), frac)["mean of arms"] for x in (BASE, row))
        if difference := against(a, b):
            means = [np.mean([x[seed] for seed in a.keys() & b.keys()]) for x in (a, b)]
            found.append((folder, frac, means, difference))
    planned = len(SETS) * len(FRACS)
    corrected = holm([x[-1][3] for x in found] + [1.0] * (planned - len(found)))
    for i, (_, _, _, (mean, low, high, *_)) in enumerate(found):
        clear = corrected[i] < 0.05 and (low > 0 or high < 0)
        verdict = ("better" if mean > 0 else "worse") if clear else "no difference shown"
        verdict = verdict if len(found) == planned else "not all have run"
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


def monitored(cell, cells, arm):
    """{measure: number} of an arm of a cell: of the features of all training images, and what the
    monitor measured last; of direct use: before the first step of another of cells()."""
    log = cell["log"] or [next(iter(cells.values()))[cell["seed"]]["log"][0]["start"]]
    found = dict(cell["label_free"][arm])
    found |= {key: log[-1][key] for key in ("agreement", "retrieval")}
    return found | {"logits_spread": log[-1][f"{arm}_logits_spread"]}


def correlations(folder, rows):
    """{measure: (seeds, arms)}: Spearman's correlation with the fine-tuned score, the mean of both
    fractions, over the runs of each seed: direct use and `rows`. Of seeds that have all runs."""
    cells, found, runs = cells_of(folder), {}, {}
    for row in (*rows, BASE):
        runs[row] = {s: cell for s, cell in cells.get(row, {}).items() if "label_free" in cell}
    whole = sorted(set.intersection(*map(set, runs.values())))
    for seed, arm in product(whole, ARMS):
        each = [seeds[seed] for seeds in runs.values()]
        y = [np.mean([score(cell, arm, frac) for frac in FRACS]) for cell in each]
        x = [monitored(cell, runs, arm) for cell in each]
        for key in x[0]:
            values = [measures[key] for measures in x]
            same = np.ptp(values) == 0 or np.ptp(y) == 0  # it orders nothing
            found.setdefault(key, []).append(0 if same else stats.spearmanr(values, y).statistic)
    return {key: np.reshape(x, (-1, len(ARMS))) for key, x in found.items()}


def correlation_rows(rows):
    """[(measure, mean correlation on the first set: CNN, ViT, both; on the second: both, ends of
    its 95 % interval of the t distribution over seeds)], the best on the first set first."""
    first, second = (correlations(folder, rows) for folder in SETS)
    found = []
    enough = min(map(len, second.values()), default=0) > 3  # of fewer seeds, many are equal
    for key in first if enough else ():
        ends = stats.ttest_1samp(second[key].mean(1), 0).confidence_interval()
        found.append((key, *first[key].mean(0), first[key].mean(), second[key].mean(), *ends))
    return sorted(found, key=lambda x: -x[3])


def correlations_table(found):
    """found: correlation_rows(), not empty."""
    header = ["measure", "brain MRI: CNN", "ViT", "mean", "HAM10000: mean (95 % interval)"]
    lines = [[x.replace("_", " "), *map(signed, y[:3]), shown(y[3:])] for x, *y in found]
    lines[0][0] = f"**{lines[0][0]}**"
    return table(header, lines)


def lowest_recalls(cells):
    """Of any class, on validation images, after direct use with 10 % of the labels."""
    rows = []
    for seed, cell in cells[BASE].items():
        lowest = [min(cell["scores"][f"{arm}|0.1"]["val"]["recall"]) for arm in ARMS]
        rows.append([seed, *(f"{x:.2f}" for x in lowest)])
    return table(["seed", "CNN", "ViT"], rows)


def epochs_table(cells, rows):
    """The epoch that each fine-tuning chose and its last one, of every seed."""
    lines, pairs = [], [*product(FRACS, ARMS)]
    for row in (BASE, *rows):
        runs = [[c["scores"][f"{arm}|{frac}"] for c in cells[row].values()] for frac, arm in pairs]
        lines.append(
            [row, *(", ".join(f"{x['best_epoch']}/{x['epochs']}" for x in y) for y in runs)]
        )
    return table(["method", *(f"{NAMES[arm]}, {percent(frac)}" for frac, arm in pairs)], lines)


def report():
    """The text of results/pretrained/README.md."""
    roles, cells = chosen(), {x: cells_of(x) for x in (*SETS, "controls", "random")}
    rows = [row for row in dict.fromkeys([PAPERS, *roles.values()]) if row]
    chosen_row, best_row = roles["chosen objective"], roles["equation 1, best rate"]
    ready = [folder for folder in SETS if len(cells[folder].get(chosen_row, {})) > 1]
    own = [row for row in rows if row != roles["DINO"]]
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
            "paired t test and with Holm's correction over the four. Better or worse: the interval "
            "excludes zero and the corrected p is below 0.05. The trials chose this setting among "
            "more (all of VICReg and of the search) than any other method had.",
            primary_table(chosen_row, found),
        ]
    for folder in ready:
        if have := [row for row in rows if row in cells[folder]]:
            parts += [
                f"## {SETS[folder]}, all methods (exploratory)",
                "Fine-tuned end to end. Direct use: the mean of all its seeds; below it, the "
                "differences from it, of the seeds of both. Better arm: the one with the higher "
                "validation score, in each run. Ensemble: the mean of both arms' probabilities.",
                differences_table(views, FRACS, cells[folder], have),
                "Read-outs of the features, the mean of 20 draws of labels a seed:",
                differences_table(read_outs, (*FRACS, "1"), cells[folder], have),
                "The epoch with the lowest validation loss, whose weights are tested, and the last "
                "one, of each seed:",
                epochs_table(cells[folder], have),
            ]
        if folder == "ham10000":
            parts += [
                "The lowest recall of any class on the validation images, direct use with 10 % of "
                "the labels. The protocol wanted 0.1 and looked at seed 100 alone:",
                lowest_recalls(cells[folder]),
            ]
    if len(cells["brain_mri"].get(roles["DINO"], ())) > 1 and "brain_mri" in ready:
        parts += [
            f"## {chosen_row} against DINO, brain MRI (exploratory)",
            differences_table(views, FRACS, cells["brain_mri"], [chosen_row], roles["DINO"]),
        ]
    if cells["controls"] and best_row:
        controls = {x: cells["brain_mri"].get(x, {}) for x in (BASE, best_row)} | cells["controls"]
        have = [row for row in controls if row != BASE]
        parts += [
            "## Controls, brain MRI (exploratory)",
            "What a control gains is not the method's gain. Differences from direct use, of scores "
            f"and of read-outs; then {best_row} from each control. All at its rate: there is no "
            f"control of {chosen_row}.",
            differences_table(views, FRACS, controls, have),
            differences_table(read_outs, (*FRACS, "1"), controls, have),
        ]
        parts += [
            differences_table(views, FRACS, controls, [best_row], x) for x in cells["controls"]
        ]
    if cells["random"] and ready:
        parts.append("## From random weights, brain MRI (exploratory)")
        for row in (BASE, PAPERS):
            alike = {row: cells["brain_mri"][row], "random weights": cells["random"].get(row, {})}
            parts.append(differences_table(views, FRACS, alike, ["random weights"], row))
    if found := correlation_rows(own):
        parts += [
            "## Which label-free measure orders runs as the fine-tuned score does?",
            f"Spearman's correlation with the mean of the scores at 1 and 10 %, over the "
            f"{len(own) + 1} runs of a seed ({', '.join((BASE, *own))}), the mean of the seeds. "
            "So few runs of so few methods: the intervals say how it varies with seeds, not with "
            "other methods. In bold: the first on brain MRI, and intervals that exclude zero.",
            correlations_table(found),
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
