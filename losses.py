"""Losses of CASS (Singh & Cirrone, arXiv 2206.04170v6): equation 1 and the focal loss of F.3.2; and
an objective that, unlike equation 1, does not let both arms collapse to one constant vector."""

import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss


def _check(logits_cnn, logits_vit):
    if logits_cnn.ndim != 2 or logits_cnn.shape != logits_vit.shape:
        shapes = f"{tuple(logits_cnn.shape)} and {tuple(logits_vit.shape)}"
        raise ValueError(f"both arms must give logits of one shape (N, C), not {shapes}")


def cosine_loss(logits_cnn, logits_vit, eps=1e-12):
    """Equation 1: 2 - 2 F(R) F(T), with F(x) = x / max(||x||, eps), averaged over the batch.

    logits_cnn, logits_vit: (N, C) float of any precision, unnormalized; computed in float32.
    Returns a float32 scalar from 0 (aligned) to 4 (opposed). Raises ValueError for other shapes.
    The paper prints a product of two sums; we read one dot product per image, as its code does.
    """
    _check(logits_cnn, logits_vit)
    R = F.normalize(logits_cnn.float(), dim=1, eps=eps)
    T = F.normalize(logits_vit.float(), dim=1, eps=eps)
    return (2 - 2 * (R * T).sum(dim=1)).mean()


def vicreg(logits_cnn, logits_vit, sim=25.0, std=25.0, cov=1.0):
    """VICReg between the arms, not in the CASS paper (Bardes et al., arXiv 2105.04906v3, its
    algorithm 1): the logits of an image agree, every logit varies over the batch (standard
    deviation of at least 1), and no two vary together.

    Arguments and result as of cosine_loss; N of at least 2, and the whole batch at once: gather it
    across processes.
    """
    _check(logits_cnn, logits_vit)
    N, C = logits_cnn.shape
    with torch.autocast(logits_cnn.device.type, enabled=False):
        R, T = logits_cnn.float(), logits_vit.float()
        loss = sim * F.mse_loss(R, T)
        for x in (R - R.mean(0), T - T.mean(0)):
            covariance = x.T @ x / (N - 1)
            variance = covariance.diagonal()
            loss = loss + std * F.relu(1 - (variance + 1e-4).sqrt()).mean()
            loss = loss + cov * (covariance.square().sum() - variance.square().sum()) / C
    return loss


OBJECTIVES = {"cosine": cosine_loss, "vicreg": vicreg}


def focal_loss(logits, targets, weights=None, alpha=1.0, gamma=2.0):
    """Focal loss (Lin et al., arXiv 1708.02002v2, equation 4): -alpha (1 - p_t)^gamma log(p_t).
    One sigmoid per class, also for multi-class targets: each class against all others.

    logits: (N, C) float of any precision, unnormalized; computed in float32.
    targets: (N,) int64 class indices, or (N, C) matrix of 0 and 1 (multi-label).
    weights: (C,) float, multiplies the columns of the classes; or (N, 1), the images; None for 1.
    alpha: scales the whole loss (torchvision's alpha would balance positives and negatives).
    gamma: 0 (binary cross-entropy) or at least 1; in between, the gradient has a pole at p_t = 1.
    Returns a float32 scalar, the mean over all N * C terms. Raises ValueError for other shapes.
    """
    if gamma < 1 and gamma != 0:
        raise ValueError(f"gamma must be 0 or at least 1, not {gamma}")
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    if logits.ndim != 2 or targets.shape != logits.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"needs logits (N, C) and targets (N,) or (N, C), not {shapes}")
    loss = alpha * sigmoid_focal_loss(logits.float(), targets.float(), alpha=-1, gamma=gamma)
    return (loss if weights is None else loss * weights.to(loss)).mean()


def class_weights(counts, kind="minmax"):
    """Weight of each class from its number of labelled images (F.3.2).

    counts: (C,) numbers, at least 0. Returns (C,) float32.
    "minmax": the counts themselves, scaled linearly to [0.2, 1], which is what the paper says and
        its code does. It FAVOURS THE MAJORITY: the most frequent class gets 1, the rarest 0.2.
        Equal counts give 1 for every class.
    "inverse": 1 / count, scaled to mean 1; an absent class counts as one. For images, not columns.
    "none": 1 for every class.
    """
    counts = torch.as_tensor(counts, dtype=torch.float32)
    if kind not in ("minmax", "inverse", "none"):
        raise ValueError(f"kind must be minmax, inverse or none, not {kind!r}")
    if kind == "none" or counts.min() == counts.max():
        return torch.ones_like(counts)
    if kind == "minmax":
        return 0.2 + 0.8 * (counts - counts.min()) / (counts.max() - counts.min())
    inverse = 1 / counts.clamp(min=1)
    return inverse / inverse.mean()
