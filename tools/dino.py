"""DINO (Caron et al., arXiv 2104.14294v2), what the CASS paper compares with: one arm at a time
learns to predict, from small crops, what its own running average says of large ones.

    python -m tools.dino --data /path           (the CNN first, then the Transformer)
    python -m tools.dino --out DIR --resume

writes what pretrain.py writes; cnn.pt and vit.pt are the teachers. Without --lr, the learning rate
peaks at 5e-4 * images per step / 256. The constants are the original's for Transformers and a run
of 100 epochs, its spans given as shares of the run. Differs from it: CNNs get the same (its own
ResNet-50 had SGD, less decay and smaller crops), and batch-norm looks at one process's images.
"""

import copy
import math
from collections import OrderedDict
from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import nn
from torchvision.transforms import InterpolationMode, v2

import data
import pretrain
from common import arms, cli, distributed, readers

WARMUP, TEMP_WARMUP, FREEZE = 0.1, 0.3, 0.01  # shares of the run: 10, 30 and 1 of 100 epochs
STUDENT_TEMP, TEACHER_TEMP, CENTER_MOMENTUM = 0.1, 0.04, 0.9
MOMENTUM, LAST_TEMP = 0.996, 0.07  # the teacher's: momentum at first, temperature after the warm-up


def cosine(start, end, share):
    """From start to end on half a cosine; share of the way, 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def learning_rate(peak, end, progress):
    """Linear from 0 over the first tenth of the run, then a cosine down to `end`."""
    share = max(progress - WARMUP, 0) / (1 - WARMUP)
    return min(progress / WARMUP, 1) * cosine(peak, end, share)


def multi_crop(img_size, local_size, local_crops=8):
    """Views of one (3, H, W) uint8 image: [2 global of img_size, local_crops of local_size].
    BYOL's augmentations with DINO's parameters: global crops cover 40 to 100 % of the image, local
    ones 5 to 40 %; blur (kernel: a tenth of a view) on the first global crop always, on local ones
    with p = 0.5, on the second global one with p = 0.1, as there alone solarization, p = 0.2."""

    def view(size, scale, blur, solarize=0.0):
        kernel = max(3, size // 10 // 2 * 2 + 1)
        crop = v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC)
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
        blurred = v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], blur)
        color = [jitter, v2.RandomGrayscale(0.2), blurred, v2.RandomSolarize(128, solarize)]
        return v2.Compose([crop, v2.RandomHorizontalFlip(0.5), *color])

    views = [view(img_size, (0.4, 1.0), 1.0), view(img_size, (0.4, 1.0), 0.1, 0.2)]
    views += [view(local_size, (0.05, 0.4), 0.5)] * local_crops
    return lambda image: [v(image) for v in views]


class Head(nn.Module):
    """Features (N, D) -> logits (N, out_dim): three layers, an L2 norm, and a last layer whose rows
    have norm 1 (weight normalization with its gain fixed, section 3.1 and appendix C)."""

    def __init__(self, dim, out_dim):
        super().__init__()
        first = nn.Linear(dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU()
        self.mlp = nn.Sequential(*first, nn.Linear(2048, 256))
        self.last = nn.Linear(256, out_dim, bias=False)
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, features):
        z = F.normalize(self.mlp(features), dim=1)
        return F.linear(z, F.normalize(self.last.weight, dim=1))


def dino_loss(student, teacher, center, student_temp, teacher_temp):
    """Equation 3, its cross-entropy averaged over the batch and over all pairs of two views.
    student: logits (V, N, K) of all views, the global ones first; teacher: (2, N, K) of the global
    ones; center: (K,). Float32. Returns a scalar."""
    p = F.softmax((teacher - center) / teacher_temp, dim=-1)
    log_q = F.log_softmax(student / student_temp, dim=-1)
    others = log_q.sum(0) - log_q[:2]  # a view does not predict itself
    return -(p * others).sum(-1).mean() / (len(student) - 1)


class DINO(nn.Module):
    """Student and teacher of one arm, "cnn" or "vit", each a backbone and a head.
    backbone: images -> features (N, dim), such as a timm model without head."""

    def __init__(self, arm, backbone, dim, out_dim, momentum=MOMENTUM, temp=LAST_TEMP):
        super().__init__()
        self.momentum, self.temp = momentum, temp
        self.student = nn.Sequential(OrderedDict(backbone=backbone, head=Head(dim, out_dim)))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for module in self.teacher.modules():
            if hasattr(module, "drop_prob"):  # stochastic depth is for the student
                module.drop_prob = 0.0
        self.arms = {arm: self.teacher.backbone}  # what is saved: an average already
        self.register_buffer("center", torch.zeros(out_dim))
        self.register_buffer("teacher_temp", torch.tensor(TEACHER_TEMP))

    def forward(self, views):
        """views: of multi_crop, batched and normalized, (N, 3, H, W) each. Returns the loss."""
        sizes = [torch.cat(part) for part in (views[:2], views[2:]) if part]
        with torch.no_grad():
            teacher = self.teacher(sizes[0]).float().unflatten(0, (2, -1))
        student = torch.cat([self.student(x).float() for x in sizes]).unflatten(0, (len(views), -1))
        loss = dino_loss(student, teacher, self.center, STUDENT_TEMP, self.teacher_temp)
        mean = distributed.all_reduce(teacher.mean((0, 1))) / distributed.WORLD_SIZE
        self.center.mul_(CENTER_MOMENTUM).add_(mean, alpha=1 - CENTER_MOMENTUM)
        return loss

    def optimizer(self, lr):
        """AdamW; biases and norms, the second group, are not decayed."""
        plain, decayed = param_groups_weight_decay(self.student, 0.04)
        return torch.optim.AdamW([decayed, plain], lr, fused=True)

    def before_step(self, optimizer, lr, min_lr, progress):
        """After the backward pass: learning rate, weight decay 0.04 -> 0.4, gradients clipped to
        norm 3 each, the last layer held in the first hundredth of the run."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, min_lr, progress)
        optimizer.param_groups[0]["weight_decay"] = cosine(0.04, 0.4, progress)
        for p in self.student.parameters():
            nn.utils.clip_grad_norm_(p, 3.0)
        if progress < FREEZE:
            self.student.head.last.weight.grad = None

    @torch.no_grad()
    def after_step(self, progress):
        """The teacher follows the student, momentum -> 1; its temperature, 0.04 -> temp."""
        weight = 1 - cosine(self.momentum, 1.0, progress)
        torch._foreach_lerp_([*self.teacher.parameters()], [*self.student.parameters()], weight)
        rise = (self.temp - TEACHER_TEMP) * min(progress / TEMP_WARMUP, 1)
        self.teacher_temp.fill_(TEACHER_TEMP + rise)


def train(model, loader, run, epochs, lr, min_lr):
    """One arm's training; run: a common.run.Run. The teacher is an average already: no SWA."""
    device, amp, iterations = run.device, run.amp, epochs * len(loader)
    optimizer = model.optimizer(lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    run.track(method=model, optimizer=optimizer, scaler=scaler)
    forward = distributed.wrap(model)
    for _ in run.epochs(epochs, loader, models=model.arms):
        model.train()
        for views in run.batches():
            progress = run.iteration / iterations
            optimizer.zero_grad()
            with torch.autocast(device.type, amp, enabled=amp is not None):
                loss = forward(views)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            model.before_step(optimizer, lr, min_lr, progress)
            scaler.step(optimizer)
            scaler.update()
            model.after_step(progress)
            run.note(loss)
        run.end_epoch(loss=run.mean_loss(), lr=optimizer.param_groups[0]["lr"])


def make_backbone(flag, name, init, img_size, /, **kwargs):
    """make_arm without a head and, where timm has it, for images of several sizes and with the
    original's stochastic depth. Returns the model and the number of its features."""
    kwargs["num_classes"] = 0
    extra = {"dynamic_img_size": True, "drop_path_rate": 0.1, **kwargs}
    try:
        model = arms.make_arm(flag, name, init, img_size, **extra)
    except cli.UserError as error:
        if not isinstance(error.__cause__, TypeError):  # no argument that it lacks
            raise
        model = arms.make_arm(flag, name, init, img_size, **kwargs)
    return model, arms.output_shape(model, img_size, f"{flag} {name}")[1]


def local_size(model, img_size):
    """Side of DINO's local crops: 96 to 224 pixels, in whole patches; of a CNN at least 24, since
    its stages shrink 16 to one pixel too early; the full size where the model accepts no other."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
    whole_patches = max(round(img_size * 96 / 224 / patch), 1) * patch
    size = min(img_size, max(whole_patches, 24 * (patch == 1)))
    try:
        arms.output_shape(model, size, "local crops")
    except cli.UserError:
        size, name = img_size, type(model).__name__
        print(f"{name} accepts images of {img_size} pixels alone: local crops are resized to that")
    return size


def main():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--outputs", type=cli.positive, default=65536, help="of the head")
    add("--crops", type=cli.count, default=8, help="local crops")
    add("--momentum", type=cli.fraction, default=MOMENTUM, help="the teacher's, at first")
    add("--teacher-temp", type=cli.fraction, default=LAST_TEMP, help="the teacher's, in the end")
    args, run, specs = pretrain.prepare(parser, "tools.dino", lr=None, t_max="run")
    if args.t_max != "run":
        raise cli.UserError("--t-max: DINO's learning rate has one descent; leave the flag out")
    args.lr = 5e-4 * args.bs * distributed.WORLD_SIZE / 256 if args.lr is None else args.lr
    device, out, state, size = run.device, run.out, run.state, args.img_size
    images = readers.read(args.data, **data.options(args))
    first = 0 if state is None else state["phase"]
    todo, models = list(specs.items())[first:], {}
    for arm, (name, init, kwargs) in todo:  # a wrong --vit is an error before any training
        torch.manual_seed(args.seed)
        init = init if state is None or models else "random"  # the weights of last.pt follow
        backbone, dim = make_backbone(f"--{arm}", name, init, size, **kwargs)
        models[arm] = DINO(arm, backbone, dim, args.outputs, args.momentum, args.teacher_temp)
    train_index, saved = pretrain.begin(run, args, specs, images)
    share = distributed.RANK, distributed.WORLD_SIZE
    for run.metadata["phase"], (arm, (name, _, kwargs)) in enumerate(todo, first):
        model = models.pop(arm)
        transform = multi_crop(size, local_size(model.arms[arm], size), args.crops)
        dataset = data.AugmentedImages(images.images, train_index, transform, seed=args.seed)
        batches = data.EpochBatches(len(dataset), args.bs, args.seed, True, *share)
        loader = data.loader(dataset, batches, device, args.workers)
        if not run.announce(model.to(device), model, loader, args.epochs):
            return
        train(model, loader, run, args.epochs, args.lr, args.min_lr)
        if distributed.RANK == 0:
            arms.save(out, arm, model.arms[arm], name, kwargs, size, saved)
        run = replace(run, state=None, log=run.progress["log"], write=lambda: None)
    print(f"wrote {out / 'cnn.pt'} and {out / 'vit.pt'}: the teachers")
    if images.classes:
        print(f"next: python finetune.py --ckpt {out / 'cnn.pt'}")


if __name__ == "__main__":
    cli.run(main)
