"""Do the arms learn or collapse? Measures of (N, D) floats, a row an image, for log.jsonl; k-NN."""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.decode import normalize

COLLAPSED_SPREAD, COLLAPSED_AGREEMENT = 0.1, 0.25  # calibration: docs/collapse.md


def spread(x):
    """Mean std of the L2-normalized rows times sqrt(D): 0 for one vector, 1 for random ones."""
    return (F.normalize(x, dim=1).std(0).mean() * x.shape[1] ** 0.5).item()


def mean_cosine(x):
    """Mean cosine between different rows, -1 to 1."""
    total = F.normalize(x, dim=1).sum(0).square().sum()
    return ((total - len(x)) / (len(x) * (len(x) - 1))).item()


def effective_rank(x):
    """RankMe (Garrido et al., arXiv 2210.02885), 1 to min(N, D): exp of the entropy of the singular
    values. Differs from it: of centred rows, since a common offset hides the rest."""
    values = torch.linalg.svdvals(x - x.mean(0))
    p = values / values.sum().clamp(min=1e-30)
    return torch.exp(-(p * (p + 1e-30).log()).sum()).item()


def measures(x, name):
    """{name_MEASURE: number} of the three above."""
    return {f"{name}_{f.__name__}": f(x) for f in (spread, mean_cosine, effective_rank)}


def agreement(a, b):
    """Mean cosines of the rows of both arms, columns standardized, for the same image and different
    ones; and how often an image's row in `a` is nearest to its own in `b` (chance: 1 / N)."""
    a, b = (x - x.mean(0) for x in (a, b))
    a, b = (F.normalize(x / x.std(0).clamp(min=1e-12), dim=1) for x in (a, b))  # constants: 0
    cosines, n = a @ b.T, len(a)
    same = cosines.diagonal().mean()
    others = (cosines.sum() - cosines.trace()) / (n * (n - 1))
    own = cosines.argmax(1) == torch.arange(n, device=cosines.device)
    return same.item(), others.item(), own.float().mean().item()


def knn(features, labels, queries, k=20, temperature=0.07):
    """Weighted k-NN (Wu et al., arXiv 1805.01978, section 3.4): cosines s, weights exp(s / t).
    features: (N, D); labels: (N, C) float 0/1; queries: (M, D). Returns (M, C), 0 to 1."""
    cosines = F.normalize(queries, dim=1) @ F.normalize(features, dim=1).T
    near = cosines.topk(min(k, len(features)))
    weights = F.softmax(near.values / temperature, dim=1)
    return (weights.unsqueeze(-1) * labels[near.indices]).sum(1)


@torch.no_grad()
def embed(model, batches):
    """Features (N, D) before the head and logits (N, C), float32, in evaluation mode. batches: of
    (N, 3, H, W), normalized."""
    was_training, outputs = model.training, []
    model.eval()
    for images in batches:
        maps = model.forward_features(images)
        outputs.append([model.forward_head(maps, pre_logits=x).float() for x in (True, False)])
    model.train(was_training)
    return [torch.cat(parts) for parts in zip(*outputs)]


class Monitor:
    """Measures the arms on a fortieth of the training images, 32 to 512, unaugmented; with labels,
    also by k-NN from these on as many validation images. Training sees nothing of it.

    images: an ImageSet, decoded; split: (N,) "train", "val" or "test".
    """

    def __init__(self, images, split, seed):
        train, val = (np.flatnonzero(split == part) for part in ("train", "val"))
        n = min(len(train), max(32, min(512, len(train) // 40)))
        draw = torch.Generator().manual_seed(seed)
        chosen = (torch.randperm(len(x), generator=draw)[:n].sort().values for x in (train, val))
        self.train, self.val = (x[i.numpy()] for x, i in zip((train, val), chosen))
        self.data = images

    def __call__(self, arms, device):
        """arms: {name: timm model}. Returns {measure: number}, in float32: bfloat16 would round
        away what nearly equal rows differ by."""
        result, logits = {}, {}
        for name, model in arms.items():
            features, logits[name] = embed(model, self._batches(self.train, device))
            result |= measures(features, f"{name}_features")
            if self.data.classes and len(self.val):
                queries, _ = embed(model, self._batches(self.val, device))
                result[f"{name}_knn_readout"] = self._accuracy(features.cpu(), queries.cpu())
        if len(arms) == 2:
            numbers = agreement(*logits.values())
            result |= zip(("agreement", "agreement_others", "retrieval"), numbers)
            for name, x in logits.items():
                result |= measures(x, f"{name}_logits")
                narrow = result[f"{name}_logits_spread"] < COLLAPSED_SPREAD
                result[f"{name}_logits_collapsed"] = narrow and numbers[0] < COLLAPSED_AGREEMENT
        return {key: x if isinstance(x, bool) else round(x, 5) for key, x in result.items()}

    def _batches(self, index, device):
        for start in range(0, len(index), 64):
            part = np.stack([self.data.images[i] for i in index[start : start + 64]])
            yield normalize(torch.from_numpy(part).to(device))

    def _accuracy(self, features, queries):
        labels = torch.from_numpy(self.data.labels).float()
        found, true = knn(features, labels[self.train], queries), labels[self.val]
        if self.data.multilabel:
            return ((found >= 0.5) == true.bool()).float().mean().item()
        return (found.argmax(1) == true.argmax(1)).float().mean().item()


def in_brief(row):
    """What the progress line shows of a log row."""
    arms = row["arms"].split("+")
    parts = [f"{arm} rank {row[f'{arm}_features_effective_rank']:.0f}" for arm in arms]
    if "agreement" in row:
        parts.append(f"agreement {row['agreement']:.2f}")
    if f"{arms[0]}_knn_readout" in row:
        parts.append("k-NN: " + " ".join(f"{arm} {row[f'{arm}_knn_readout']:.2f}" for arm in arms))
    return ", " + ", ".join(parts)


def react(row, objective, fail):
    """Warn of collapsed logits in a row of the log, or, where `fail`, raise FloatingPointError."""
    arms = [arm for arm in row["arms"].split("+") if row.get(f"{arm}_logits_collapsed")]
    if not arms:
        return
    spreads = ", ".join(f"{row[f'{arm}_logits_spread']:.2g}" for arm in arms)
    detail = f"spread {spreads}; agreement {row['agreement']:.2f}"
    what = f"the logits of {' and '.join(arms)} have collapsed to nearly one vector ({detail})"
    text = f"epoch {row['epoch']}: {what}, which a low loss does not show"
    if objective == "cosine":
        text += "; see docs/collapse.md, or try --objective vicreg --lr 3e-4"
    if fail:
        raise FloatingPointError(f"{text} (--fail-on-collapse)")
    tqdm.write(text, file=sys.stderr)
