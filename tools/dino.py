"""DINO (Caron et al., arXiv 2104.14294v2), what the CASS paper compares with: one arm at a time learns
to predict, from small crops, what its own running average says of large ones.

    python -m tools.dino --data /path           (the CNN first, then the Transformer)
    python -m tools.dino --out DIR --resume

writes what pretrain.py writes: cnn.pt and vit.pt are the teachers.

The constants are the original's for Transformers and a run of 100 epochs, its spans given as shares of
the run. Differs from it: CNNs get the same (its own ResNet-50 had SGD, less decay and smaller crops),
and batch-norm looks at one process's images. Needs torch, torchvision, and `over_all` and `world` of
distributed.py.
"""

import copy
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import InterpolationMode, v2

import data
from common import arms, checkpoint, cli, collapse, distributed
from common.arms import KeyValues, make_arm, output_shape
from common.cli import UserError
from common.decode import IMAGENET_MEAN, IMAGENET_STD
from common.distributed import all_reduce, world_size
from common.readers import read
from common.run import Run
from pretrain import MAY_CHANGE, OUTPUTS, VERSIONS

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
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(0.5),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], blur),
                v2.RandomSolarize(128, solarize),
            ]
        )

    views = [view(img_size, (0.4, 1.0), 1.0), view(img_size, (0.4, 1.0), 0.1, 0.2)]
    local = view(local_size, (0.05, 0.4), 0.5)
    return lambda image: [v(image) for v in views] + [local(image) for _ in range(local_crops)]


class Head(nn.Module):
    """Features (N, D) -> logits (N, out_dim): three layers, an L2 norm, and a last layer whose rows
    have norm 1 (weight normalization with its gain fixed, section 3.1 and appendix C)."""

    def __init__(self, dim, out_dim, hidden=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
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

    def __init__(
        self,
        arm,
        backbone,
        dim,
        out_dim=65536,
        student_temp=0.1,
        teacher_temp=(0.04, 0.07),
        center_momentum=0.9,
        teacher_momentum=0.996,
    ):
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
        student = [
            self._logits(self.student, x) for x in ([large, torch.cat(small)] if small else [large])
        ]
        student = torch.cat(student).unflatten(0, (len(views), -1))
        loss = dino_loss(student, teacher, self.center, self.student_temp, self.teacher_temp)
        mean = all_reduce(teacher.mean((0, 1))) / world_size()
        self.center.mul_(self.center_momentum).add_(mean, alpha=1 - self.center_momentum)
        return loss

    @staticmethod
    def _logits(network, images):
        return network["head"](network["backbone"](images)).float()

    def optimizer(self, lr):
        """AdamW; biases and norms are not decayed."""
        trained = list(self.student.parameters())
        return torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1]},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=lr,
            weight_decay=0.04,
            fused=True,
        )

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
        torch._foreach_lerp_(
            list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum
        )
        low, high = self.teacher_temps
        self.teacher_temp.fill_(low + (high - low) * min(progress / TEMP_WARMUP, 1))


def train(model, loader, run, device, amp, epochs, lr, min_lr, monitor=None):
    """One arm's training; run: a common.run.Run. The teacher is an average already: no SWA."""
    iterations = epochs * len(loader)
    optimizer = model.optimizer(lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    run.track(method=model, optimizer=optimizer, scaler=scaler)
    forward = distributed.wrap(model)
    for _ in run.epochs(epochs, loader):
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
        run.end_epoch(
            monitor,
            model.arms,
            loss=run.mean_loss(),
            lr=optimizer.param_groups[0]["lr"],
            swa_snapshots=0,
        )


def make_backbone(flag, name, init, img_size, **kwargs):
    """make_arm without a head, and, where timm has it, for images of several sizes and with the
    original's stochastic depth. Returns (model, the arguments that rebuild it)."""
    kwargs = {**kwargs, "num_classes": 0}
    try:
        extra = {"dynamic_img_size": True, "drop_path_rate": 0.1}
        return make_arm(flag, name, init, img_size, **{**extra, **kwargs}), (
            arms.rebuild_kwargs(name, img_size, kwargs)
        )
    except UserError as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        return make_arm(flag, name, init, img_size, **kwargs), (
            arms.rebuild_kwargs(name, img_size, kwargs)
        )


def local_size(model, img_size):
    """Side of DINO's local crops: 96 to 224 pixels, in whole patches; of a CNN at least 24, since its
    stages shrink 16 to one pixel too early; the full size where the model accepts no other."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
    size = max(24 if patch == 1 else patch, round(img_size * 96 / 224 / patch) * patch)
    size = min(size, img_size)
    try:
        output_shape(model, size)
    except ValueError:
        print(
            f"{type(model).__name__} accepts images of {img_size} pixels alone: local crops are "
            f"resized to that"
        )
        return img_size
    return size


def build(arm, name, kwargs, init, img_size, outputs, crops):
    """A DINO of one arm, the arguments that rebuild its backbone, and its transform."""
    backbone, rebuild = make_backbone(f"--{arm}", name, init, img_size, **kwargs)
    try:
        features = output_shape(backbone, img_size)
    except ValueError as error:
        raise UserError(f"--{arm} {name}: takes no images of {img_size} pixels: {error}") from error
    size = local_size(backbone, img_size)
    return DINO(arm, backbone, features[1], outputs), rebuild, multi_crop(img_size, size, crops)


def parse_arguments():
    """The arguments, and the state to resume from or None."""
    parser = cli.Parser(__doc__)
    data.add_arguments(parser)
    add = parser.add_argument
    add("--cnn", default="resnet50.a1_in1k", metavar="NAME", help="first arm, any timm model")
    add(
        "--vit",
        default="vit_base_patch16_384.augreg_in21k_ft_in1k",
        metavar="NAME",
        help="second arm, any timm model",
    )
    for arm in ("cnn", "vit"):
        add(
            f"--{arm}-kwargs",
            nargs="*",
            default={},
            action=KeyValues,
            metavar="KEY=VALUE",
            help="arguments for timm.create_model, such as patch_size=8",
        )
        add(f"--init-{arm}", metavar="WHAT", help="imagenet, random or a weights file")
    add("--img-size", type=cli.positive, default=384, help="side of the images in pixels")
    add("--init", default="imagenet", choices=["imagenet", "random"], help="of both arms")
    add(
        "--epochs", type=cli.positive, default=100, help="passes over the training images, each arm"
    )
    add("--bs", "--batch-size", type=cli.positive, default=16, help="images per step")
    add("--lr", type=cli.rate, help="peak learning rate (default: 5e-4 * bs / 256)")
    add("--min-lr", type=cli.rate, default=1e-6, help="its minimum")
    add("--outputs", type=cli.positive, default=65536, metavar="K", help="of the head")
    add("--crops", type=cli.count, default=8, metavar="N", help="local crops")
    add("--seed", type=cli.count, default=0, help="determines the split and everything after it")
    add("--out", default=".", metavar="DIR", help="output folder")
    cli.add_run_arguments(parser)
    args, state = parser.parse_args(), None
    if args.resume:
        last = Path(args.out) / "last.pt" if args.resume is True else Path(args.resume)
        if last.exists() or args.resume is not True:
            state = checkpoint.load_training(last, "tools.dino")
            parser.set_defaults(out=str(last.parent))
            args = cli.parse_again(parser, state["args"], MAY_CHANGE - {"epochs"}, last)
            if state["processes"] != world_size():
                raise UserError(f"{last}: was made by {state['processes']} processes")
    if args.data is None:
        parser.error("--data PATH is missing")
    args.lr = 5e-4 * args.bs * world_size() / 256 if args.lr is None else args.lr
    data.make_absolute(args)
    return args, state


def main():
    args, state = parse_arguments()
    device = cli.pick_device(args.device)
    distributed.start(device)
    amp, out = cli.pick_amp(args.amp, device), Path(args.out)
    if state is None:
        cli.refuse_overwrite(out, ("cnn.pt", "vit.pt", "last.pt"), args.overwrite)
    elif (
        state["epoch"] >= args.epochs
        and state["phase"] == 1
        and all((out / name).exists() for name in OUTPUTS)
    ):
        print(f"{out}: the run is finished")
        return
    images = read(args.data, **data.options(args))
    first, models = 0 if state is None else state["phase"], {}
    for phase, arm in list(enumerate(("cnn", "vit")))[first:]:
        torch.manual_seed(args.seed)
        init = (
            "random"
            if state is not None and phase == first
            else (getattr(args, f"init_{arm}") or args.init)
        )
        models[phase] = build(
            arm,
            getattr(args, arm),
            getattr(args, f"{arm}_kwargs"),
            init,
            args.img_size,
            args.outputs,
            args.crops,
        )
    with distributed.process_0_first():
        images.decode(args.img_size, data.cache_dir(args.cache), args.skip_bad)
    split = data.split_and_report(images, args.seed, args.dedup)
    index = (split == "train").nonzero()[0]
    if len(index) < 2 * world_size():
        raise UserError(f"{images.path}: {len(index)} training images are too few")
    seen = torch.from_numpy(images.table["hash"][index].view("int64"))
    if state is not None and not torch.equal(state["seen"], seen):
        raise UserError(f"{args.data}: the training images are not those that the run began with")
    if distributed.rank() == 0:
        checkpoint.start_folder(out, OUTPUTS, OUTPUTS if state is None else ())
        data.write_split(out, images, split)
        checkpoint.write_json(
            out / "config.json",
            {
                "command": sys.argv,
                "arguments": vars(args),
                "device": str(device),
                "amp": str(amp),
                "processes": world_size(),
                "versions": VERSIONS,
            },
        )
    monitor = collapse.Monitor(
        images.images,
        index,
        (split == "val").nonzero()[0],
        images.labels if images.classes else None,
        images.multilabel,
        args.seed,
    )
    log = []
    for phase in list(models):
        model, rebuild, transform = models.pop(phase)
        model.to(device, memory_format=torch.channels_last)
        dataset = data.AugmentedImages(images.images, index, transform, seed=args.seed)
        loader = data.loader(
            dataset,
            data.EpochBatches(
                len(dataset), args.bs, args.seed, rank=distributed.rank(), world_size=world_size()
            ),
            device,
            args.workers,
        )
        run = Run(
            out,
            device,
            {
                "script": "tools.dino",
                "args": vars(args),
                "seen": seen,
                "processes": world_size(),
                "phase": phase,
            },
            state,
            log,
            args.save_every,
        )
        run.announce(model, amp, model, loader, args.epochs)
        train(model, loader, run, device, amp, args.epochs, args.lr, args.min_lr, monitor)
        state, log = None, run.progress["log"]
        if distributed.rank() == 0:
            save_arm(args, model, rebuild, seen, out)
    print(f"wrote {out / 'cnn.pt'} and {out / 'vit.pt'}: the teachers")


def save_arm(args, model, rebuild, seen, out):
    """cnn.pt or vit.pt, which knows what its initial weights saw."""
    file = getattr(args, f"init_{model.arm}")
    if file not in (None, "imagenet", "random"):
        seen = torch.cat([seen, checkpoint.seen_by(file)]).unique()
    checkpoint.save(
        out / f"{model.arm}.pt",
        checkpoint.weights_file(
            model.teacher["backbone"],
            arch=getattr(args, model.arm),
            arm=model.arm,
            model_kwargs=rebuild,
            img_size=args.img_size,
            mean=list(IMAGENET_MEAN),
            std=list(IMAGENET_STD),
            epoch=args.epochs,
            swa_snapshots=0,
            seed=args.seed,
            seen=seen,
            data=data.options(args, data.OPTIONS),
            config=vars(args),
        ),
    )


if __name__ == "__main__":
    cli.run(main)
