"""Do the arms learn or collapse? Measures of (N, D) floats, a row an image, for log.jsonl; k-NN."""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.cli import Stopped
from common.decode import normalize

COLLAPSED_SPREAD, COLLAPSED_AGREEMENT = 0.1, 0.25  # calibration: docs/collapse.md
SHOWN = {f"{arm}_features_effective_rank": f"{arm} rank" for arm in ("cnn", "vit")}  # in progress
SHOWN |= {"cnn_knn_readout": "cnn k-NN", "vit_knn_readout": "vit k-NN", "agreement": "agreement"}


def measures(x):
    """{name: number}. spread: mean std of the L2-normalized rows times sqrt(D), 0 for one vector, 1
    for random ones; effective_rank: exp of the entropy of singular values, as RankMe (arXiv
    2210.02885) but of centred rows: a common offset hides the rest."""
    spread = F.normalize(x, dim=1).std(0).mean() * x.shape[1] ** 0.5
    p = F.normalize(torch.linalg.svdvals(x - x.mean(0)), p=1, dim=0)
    return {"spread": spread.item(), "effective_rank": torch.special.entr(p).sum().exp().item()}


def agreement(a, b):
    """Mean cosine of the rows of both arms for the same image, columns standardized; and how often
    an image's row in `a` is nearest to its own in `b` (chance: 1 / N)."""
    a, b = ((x - x.mean(0)) / x.std(0).clamp(min=1e-12) for x in (a, b))  # constants: 0
    cosines = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    own = cosines.argmax(1).cpu() == torch.arange(len(a))
    return cosines.diagonal().mean().item(), own.float().mean().item()


def knn(features, labels, queries, k=20, temperature=0.07):
    """Weighted k-NN (Wu et al., arXiv 1805.01978, section 3.4): cosines s, weights exp(s / t).
    features: (N, D); labels: (N, C) float 0/1; queries: (M, D). Returns (M, C), 0 to 1."""
    cosines = F.normalize(queries, dim=1) @ F.normalize(features, dim=1).T
    near = cosines.topk(min(k, len(features)))
    return (F.softmax(near.values / temperature, dim=1)[..., None] * labels[near.indices]).sum(1)


@torch.no_grad()
def embed(model, batches):
    """Features (N, D) before the head and logits (N, C), float32, of normalized (n, 3, H, W). The
    model is left in eval mode."""
    maps = map(model.eval().forward_features, batches)  # one batch at a time
    outputs = [[model.forward_head(x, pre_logits=p).float() for p in (True, False)] for x in maps]
    return [torch.cat(parts) for parts in zip(*outputs)]


class Monitor:
    """Measures the arms on a fortieth of the training images, 32 to 512, unaugmented; with labels,
    also by k-NN from these on as many validation images. images: an ImageSet; split: (N,) str."""

    def __init__(self, images, split, seed):
        self.data, draw = images, torch.Generator().manual_seed(seed)
        train, val = (np.flatnonzero(split == part) for part in ("train", "val"))
        n = min(len(train), max(32, min(512, len(train) // 40)))
        orders = (torch.randperm(len(x), generator=draw).numpy() for x in (train, val))
        self.train, self.val = (np.sort(x[i[:n]]) for x, i in zip((train, val), orders))

    def __call__(self, arms, device):
        """{name: timm model} -> {measure: number}, in float32: bfloat16 would hide a collapse."""
        row, logits = {}, {}
        for name, model in arms.items():
            features, logits[name] = embed(model, self._batches(self.train, device))
            row |= {f"{name}_features_{key}": x for key, x in measures(features).items()}
            if len(self.val) and (known := self.data.labelled[self.train]).any():
                queries, _ = embed(model, self._batches(self.val, device))
                labels = torch.from_numpy(self.data.labels).float()
                p = knn(features.cpu()[known], labels[self.train[known]], queries.cpu())
                y = labels[self.val]
                right = (p >= 0.5) == y if self.data.multilabel else p.argmax(1) == y.argmax(1)
                row[f"{name}_knn_readout"] = right.float().mean().item()
        if len(arms) == 2:
            row["agreement"], row["retrieval"] = agreement(*logits.values())
            for name, x in logits.items():
                row |= {f"{name}_logits_{key}": x for key, x in measures(x).items()}
        return {key: round(x, 5) for key, x in row.items()}

    def _batches(self, index, device):
        pixels = torch.from_numpy(np.stack([self.data.images[i] for i in index]))
        return map(normalize, pixels.to(device).split(64))


def flags(start, row):
    """{"ARM_logits_collapsed": bool}: narrow, narrower than before the first step, not agreeing."""
    low = row.get("agreement", 1) < COLLAPSED_AGREEMENT
    limits = {x: min(COLLAPSED_SPREAD, start.get(x, 1)) for x in row if x.endswith("logits_spread")}
    return {x.replace("spread", "collapsed"): low and row[x] < y for x, y in limits.items()}


def change(start, row):
    """For the progress line: measures before the first step and now."""
    both = [(name, start.get(x, row[x]), row[x]) for x, name in SHOWN.items() if x in row]
    return "".join(f", {name} {before:.3g} to {now:.3g}" for name, before, now in both)


def react(row, objective, fail):
    """Warn of collapsed logits in a row of the log, or, where `fail`, stop with exit status 1."""
    arms = [arm for arm in row["arms"].split("+") if row.get(f"{arm}_logits_collapsed")]
    text = f"epoch {row['epoch']}: logits of {' and '.join(arms)} collapsed to nearly one vector"
    text += "; see docs/collapse.md, or try --objective vicreg --lr 3e-4" * (objective == "cosine")
    if arms and fail:
        raise Stopped(1, f"{text} (--fail-on-collapse)")
    if arms:
        tqdm.write(text, file=sys.stderr)
