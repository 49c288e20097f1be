"""DINO (Caron et al., arXiv 2104.14294v2), what the CASS paper compares with: one arm at a time learns
to predict, from small crops, what its own running average says of large ones.

    python pretrain.py --method dino --data /path        (the CNN first, then the Transformer)

The constants are the original's for Transformers and a run of 100 epochs, its spans given as shares of
the run. Differs from it: CNNs get the same (its own ResNet-50 had SGD, less decay and smaller crops),
and batch-norm looks at one process's images. Needs torch, torchvision, and `over_all` and `world` of
parallel.py.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from parallel import over_all, world

WARMUP, TEMP_WARMUP, FREEZE = 0.1, 0.3, 0.01  # shares of the run: 10, 30 and 1 of 100 epochs


def cosine(start, end, share):
    """From start to end on half a cosine; share of the way, 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def learning_rate(peak, end, progress):
    """Linear from 0 over the first tenth of the run, then a cosine down to `end`."""
    if progress < WARMUP:
        return peak * progress / WARMUP
    return cosine(peak, end, (progress - WARMUP) / (1 - WARMUP))


def multi_crop(img_size, local_size, local_crops=8):
    """Views of one (3, H, W) uint8 image: [2 global of img_size, local_crops of local_size].

    BYOL's augmentations with DINO's parameters: global crops cover 40 to 100 % of the image, local
    ones 5 to 40 %; blur on the first global crop always, on the second with p = 0.1 and, there alone,
    solarization with p = 0.2; on local ones blur with p = 0.5. Blur's kernel: a tenth of the view.
    """
    def view(size, scale, blur, solarize=0.0):
        kernel = max(3, size // 10 // 2 * 2 + 1)
        return v2.Compose([
            v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], blur),
            v2.RandomSolarize(128, solarize)])

    views = [view(img_size, (0.4, 1.0), 1.0), view(img_size, (0.4, 1.0), 0.1, 0.2)]
    local = view(local_size, (0.05, 0.4), 0.5)
    return lambda image: [v(image) for v in views] + [local(image) for _ in range(local_crops)]


class Head(nn.Module):
    """Features (N, D) -> logits (N, out_dim): three layers, an L2 norm, and a last layer whose rows
    have norm 1 (weight normalization with its gain fixed, section 3.1 and appendix C)."""

    def __init__(self, dim, out_dim, hidden=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                 nn.GELU(), nn.Linear(hidden, bottleneck))
        self.last = nn.Linear(bottleneck, out_dim, bias=False)
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, features):
        z = F.normalize(self.mlp(features), dim=1)
        return F.linear(z, F.normalize(self.last.weight, dim=1))


def dino_loss(student, teacher, center, student_temp, teacher_temp):
    """Equation 3, its cross-entropy averaged over the batch and over all pairs of two views.

    student: logits (V, N, K) of all views, the global ones first; teacher: (2, N, K) of the global
    ones; center: (K,). Float32. Returns a scalar.
    """
    p = F.softmax((teacher - center) / teacher_temp, dim=-1)
    log_q = F.log_softmax(student / student_temp, dim=-1)
    others = log_q.sum(0) - log_q[:2]  # a view does not predict itself
    return -(p * others).sum(-1).mean() / (len(student) - 1)


class DINO(nn.Module):
    """Student and teacher of one arm, each a backbone and a head.

    arm: "cnn" or "vit"; backbone: images -> features (N, dim), such as a timm model of num_classes=0.
    """

    def __init__(self, arm, backbone, dim, out_dim=65536, student_temp=0.1, teacher_temp=(0.04, 0.07),
                 center_momentum=0.9, teacher_momentum=0.996):
        super().__init__()
        self.arm = arm
        self.student = nn.ModuleDict({"backbone": backbone, "head": Head(dim, out_dim)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for module in self.teacher.modules():
            if hasattr(module, "drop_prob"):  # stochastic depth is for the student
                module.drop_prob = 0.0
        self.student_temp, self.teacher_temps = student_temp, teacher_temp
        self.center_momentum, self.teacher_momentum = center_momentum, teacher_momentum
        self.register_buffer("center", torch.zeros(out_dim))
        self.register_buffer("teacher_temp", torch.tensor(teacher_temp[0]))

    @property
    def arms(self):
        """{arm: the teacher's backbone}: what is saved. The teacher is an average already."""
        return {self.arm: self.teacher["backbone"]}

    def forward(self, views):
        """views: as multi_crop makes them, batched, (N, 3, H, W) each, normalized. Returns the loss."""
        large, small = torch.cat(views[:2]), views[2:]
        with torch.no_grad():
            teacher = self._logits(self.teacher, large).unflatten(0, (2, -1))
        student = [self._logits(self.student, x) for x in ([large, torch.cat(small)] if small
                                                           else [large])]
        student = torch.cat(student).unflatten(0, (len(views), -1))
        loss = dino_loss(student, teacher, self.center, self.student_temp, self.teacher_temp)
        mean = over_all(teacher.mean((0, 1))) / world()
        self.center.mul_(self.center_momentum).add_(mean, alpha=1 - self.center_momentum)
        return loss

    @staticmethod
    def _logits(network, images):
        return network["head"](network["backbone"](images)).float()

    def optimizer(self, lr):
        """AdamW; biases and norms are not decayed."""
        trained = list(self.student.parameters())
        return torch.optim.AdamW([
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}],
            lr=lr, weight_decay=0.04, fused=True)

    def before_step(self, optimizer, lr, min_lr, progress):
        """Between the backward pass and the step: learning rate, weight decay 0.04 -> 0.4, gradients
        clipped to norm 3 each, the last layer held in the first hundredth of the run."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, min_lr, progress)
        optimizer.param_groups[0]["weight_decay"] = cosine(0.04, 0.4, progress)
        for p in self.student.parameters():
            nn.utils.clip_grad_norm_(p, 3.0)
        if progress < FREEZE:
            self.student["head"].last.weight.grad = None

    @torch.no_grad()
    def after_step(self, progress):
        """The teacher follows the student, momentum 0.996 -> 1; its next temperature."""
        momentum = cosine(self.teacher_momentum, 1.0, progress)
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()),
                             1 - momentum)
        low, high = self.teacher_temps
        self.teacher_temp.fill_(low + (high - low) * min(progress / TEMP_WARMUP, 1))
