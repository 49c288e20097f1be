"""What results/pretrained says: its cells with read-outs and measures, its tables, its claims.

    python tests/evidence.py collect CELLS RUNS    (adds to the cells what readouts.py left)
    python tests/evidence.py report                (writes results/pretrained/README.md from them)

Label-free measures of features (N, D), candidates for a monitor; views (n, V, D): of augmented
images. Each says what it promises to order, from its source.
"""

import re
import sys
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
FRACS, ARMS = ("0.01", "0.1"), ("cnn", "vit")


def cells_of(folder):
    """{row: {seed: cell}} of the finished cells in a folder of results/pretrained."""
    found = {}
    for file in sorted((RESULTS / folder / "cells").glob("*.json")):
        cell = read_json(file)
        if cell["status"] == "done":
            found.setdefault(cell["row"], {})[cell["seed"]] = cell
    return found


def score(cell, arm, frac):
    """The macro F1 of an arm fine-tuned on this fraction of the labels."""
    return cell["scores"][f"{arm}|{frac}"]["test"]["macro_f1"]


def read_out(cell, arm, kind, frac):
    return cell["readouts"][arm][f"{kind}|{frac}"]["test"]


def table(header, rows):
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def trial_score(cell):
    """By which the trials choose: the mean over both arms and both fractions."""
    return np.mean([score(cell, arm, frac) for frac in FRACS for arm in ARMS])


def trials_table():
    rows = []
    for row, seeds in cells_of("trials").items():
        for cell in seeds.values():
            each = [score(cell, arm, frac) for frac in FRACS for arm in ARMS]
            probe = (
                [read_out(cell, arm, "linear", "1") for arm in ARMS] if "readouts" in cell else []
            )
            rows.append([trial_score(cell), row, *each, *probe])
    rows.sort(key=lambda row: -row[0])
    header = ["trial", "score", "CNN, 1 %", "ViT, 1 %", "CNN, 10 %", "ViT, 10 %", "probe, CNN"]
    lines = [[row, *(f"{x:.3f}" for x in (first, *rest))] for first, row, *rest in rows]
    return table([*header, "probe, ViT"], lines)


def report():
    """The text of results/pretrained/README.md."""
    parts = [
        "# What pre-training is worth from pre-trained arms",
        "Made by `python tests/evidence.py report` from the cells; how it was planned: "
        "[protocol.md](protocol.md).",
        "## Trials",
        "Macro F1 on the trial images (validation images that fine-tuning does not see), brain "
        "MRI, seed 100. Score: the mean of the next four columns, by which the trials choose. "
        "Probe: ridge regression on the features with all labels.",
        trials_table(),
    ]
    return "\n\n".join(parts) + "\n"


def write_report():
    (RESULTS / "README.md").write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    {"collect": collect, "report": write_report}[sys.argv[1]](*sys.argv[2:])
