"""CASS pre-training (arXiv 2206.04170v6, Algorithm 1): a CNN and a Transformer, no labels.

    python pretrain.py --data /path --epochs 100 --bs 16
    python pretrain.py --demo                          (draws its own images; a minute on a CPU)
    python pretrain.py --out DIR --resume              (resumes from DIR/last.pt, to the last bit)
    torchrun --nproc-per-node 4 pretrain.py --data /path         (four GPUs; --bs is per GPU)

writes to --out: cnn.pt and vit.pt (the averaged weights, for finetune.py and timm), last.pt (all of
the training state), log.jsonl (a line per epoch), config.json, split.csv, duplicates.csv. The
defaults are the paper's run; docs/differences.md lists what the paper leaves open.
"""

import platform
import sys
from pathlib import Path

import timm
import torch
import torchvision
from torch.optim.lr_scheduler import CosineAnnealingLR

import data
import losses
from cass import CASS
from common import arms, checkpoint, cli, collapse, distributed
from common.arms import KeyValues
from common.cli import UserError
from common.decode import IMAGENET_MEAN, IMAGENET_STD
from common.readers import read
from common.run import Run, half_cycle, on_device
from swa import SWA

OUTPUTS = ("cnn.pt", "vit.pt", "last.pt", "log.jsonl", "config.json", "split.csv", "duplicates.csv")
VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "torchvision": torchvision.__version__,
    "timm": timm.__version__,
}
MAY_CHANGE = {
    "workers",
    "device",
    "out",
    "overwrite",
    "resume",
    "cache",
    "save_every",
    "epochs",
    "fail_on_collapse",
}


def add_arguments(parser):
    """The flags of pre-training, besides those of the data and of every run."""
    add = parser.add_argument
    add("--demo", action="store_true", help="draw labelled images to OUT/images; small arms")
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
    add("--img-size", type=cli.positive, default=384, help="side of the images in pixels (F.2.2)")
    add(
        "--init",
        default="imagenet",
        choices=["imagenet", "random"],
        help="of both arms (Table 20); imagenet: timm's download",
    )
    for arm in ("cnn", "vit"):
        add(f"--init-{arm}", metavar="WHAT", help="imagenet, random or a weights file, for one arm")
    add(
        "--objective",
        default="cosine",
        choices=list(losses.OBJECTIVES),
        help="cosine: equation 1; vicreg: does not let the arms collapse (docs/collapse.md)",
    )
    add(
        "--fail-on-collapse",
        action="store_true",
        help="stop with status 1 after an epoch whose logits have collapsed",
    )
    add(
        "--ablation",
        nargs="+",
        default=[],
        metavar="NAME",
        choices=["blur", "solarize", "sgd", "sigmoid", "softmax"],
        help="blur, solarize: more augmentation (Table 8); sgd: for the CNN, momentum 0.9 (Table 9);"
        " sigmoid or softmax on the logits before the loss (Table 21)",
    )
    add("--epochs", type=cli.positive, default=100, help="passes over the training images")
    add("--bs", "--batch-size", type=cli.positive, default=16, help="images per step")
    add("--lr", type=cli.rate, default=1e-3, help="learning rate of both arms (F.2.3)")
    add("--min-lr", type=cli.rate, default=1e-6, help="its minimum (F.2.3)")
    add(
        "--t-max",
        type=cli.t_max,
        default=16,
        metavar="N",
        help="iterations from --lr down to --min-lr, and up again (F.2.3), or: run, one descent",
    )
    add(
        "--swa-start",
        type=cli.rate,
        default=0.75,
        help="share of the run before weight averaging begins; 1: no averaging",
    )
    add("--seed", type=cli.count, default=0, help="determines the split and everything after it")
    add("--out", metavar="DIR", help="output folder (default: here; with --demo: demo)")
    add("--compile", action="store_true", help="torch.compile the step")
    add(
        "--grad-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, more time",
    )


def parse_arguments():
    """The arguments, and the state to resume from or None."""
    parser = cli.Parser(__doc__)
    data.add_arguments(parser)
    add_arguments(parser)
    cli.add_run_arguments(parser)
    args = parser.parse_args()
    state = None
    if args.demo and args.data:
        parser.error("--demo draws its own images; leave out --data")
    parser.set_defaults(out="demo" if args.demo else ".")
    args = parser.parse_args()
    if args.resume:
        last = Path(args.out) / "last.pt" if args.resume is True else Path(args.resume)
        if last.exists() or args.resume is not True:
            state = checkpoint.load_training(last, "pretrain.py")
            parser.set_defaults(out=str(last.parent))
            args = cli.parse_again(parser, state["args"], MAY_CHANGE, last)
            check_resumable(state, args.epochs, args.t_max, last)
        elif args.data or args.demo:
            print(f"{last}: not there, so the run starts from the beginning")
    if args.demo and state is None:
        from common import toy_data

        parser.set_defaults(
            data=str(Path(args.out) / "images"),
            cache=str(Path(args.out) / "cache"),
            **toy_data.DEFAULTS,
        )
        args = parser.parse_args()
    elif args.data is None:
        parser.error("--data PATH is missing (or --demo, to try it without images)")
    if args.objective != "cosine" and args.bs * distributed.world_size() == 1:
        parser.error(f"--objective {args.objective} compares the images of a batch: --bs 2 or more")
    if {"sigmoid", "softmax"} <= set(args.ablation):
        parser.error("--ablation takes sigmoid or softmax, not both")
    data.make_absolute(args)
    return args, state


def check_resumable(state, epochs, t_max, last):
    """--epochs may grow on resuming, unless that would change what was already done; the number of
    processes may not change, since the batches would."""
    if state["processes"] != distributed.world_size():
        raise UserError(
            f"{last}: was made by {state['processes']} processes, not "
            f"{distributed.world_size()}: torchrun --nproc-per-node {state['processes']}"
        )
    before = state["args"]["epochs"]
    if epochs != before and (epochs < before or state["swa"] or t_max == "run"):
        raise UserError(
            f"{last}: was made with --epochs {before}; it may only be lengthened, and "
            f"neither after a snapshot was averaged nor with --t-max run"
        )


def train(
    model,
    loader,
    run,
    device,
    amp,
    epochs,
    lr=1e-3,
    min_lr=1e-6,
    t_max=16,
    swa_start=0.75,
    sgd=False,
    compiled=False,
    monitor=None,
    react=lambda row: None,
):
    """Algorithm 1: every batch, augmented once, goes through both arms. Returns the SWA.

    model: a CASS; loader: batches of (N, 3, H, W) uint8; run: a common.run.Run, which resumes, saves
    and logs; t_max: iterations, or "run"; react: called with each epoch's row of the log.
    """
    iterations = epochs * len(loader)
    t_max = half_cycle(t_max, iterations)
    optimizer_cnn = (
        torch.optim.SGD(model.cnn.parameters(), lr, momentum=0.9, fused=True)
        if sgd
        else torch.optim.Adam(model.cnn.parameters(), lr, fused=True)
    )
    optimizer_vit = torch.optim.Adam(model.vit.parameters(), lr, fused=True)
    scheduler_cnn = CosineAnnealingLR(optimizer_cnn, t_max, min_lr)
    scheduler_vit = CosineAnnealingLR(optimizer_vit, t_max, min_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    swa = SWA(model.arms, swa_start, iterations, t_max)
    run.track(
        method=model,
        optimizer_cnn=optimizer_cnn,
        optimizer_vit=optimizer_vit,
        scheduler_cnn=scheduler_cnn,
        scheduler_vit=scheduler_vit,
        scaler=scaler,
        swa=swa,
    )
    forward = distributed.wrap(torch.compile(model) if compiled else model)
    for _ in run.epochs(epochs, loader):
        model.train()
        for images in run.batches():
            optimizer_cnn.zero_grad()
            optimizer_vit.zero_grad()
            with torch.autocast(device.type, amp, enabled=amp is not None):
                loss = forward(images)
            scaler.scale(loss).backward()
            scaler.step(optimizer_cnn)
            scaler.step(optimizer_vit)
            scaler.update()
            scheduler_cnn.step()
            scheduler_vit.step()
            swa.after_step(run.iteration)
            run.note(loss)
        react(
            run.end_epoch(
                monitor,
                model.arms,
                loss=run.mean_loss(),
                swa_snapshots=swa.snapshots,
                lr=scheduler_cnn.get_last_lr()[0],
            )
        )
    return swa


def build_model(args, resuming):
    """CASS on the arms that the flags name. Raises UserError."""
    models = {}
    for arm in ("cnn", "vit"):
        init = "random" if resuming else getattr(args, f"init_{arm}") or args.init
        models[arm] = arms.make_arm(
            f"--{arm}", getattr(args, arm), init, args.img_size, **getattr(args, f"{arm}_kwargs")
        )
        if args.grad_checkpointing:
            arms.enable_grad_checkpointing(models[arm], getattr(args, arm))
    try:
        arms.check_pair(**models, img_size=args.img_size)
    except ValueError as error:
        raise UserError(f"{error} (--cnn {args.cnn}, --vit {args.vit})") from error
    objective = losses.OBJECTIVES[args.objective]
    if args.objective != "cosine":  # it looks at the batch as a whole
        alone, objective = (
            objective,
            lambda R, T: alone(distributed.gather(R), distributed.gather(T)),
        )
    head_act = next((x for x in args.ablation if x in ("sigmoid", "softmax")), "none")
    return CASS(**models, head_act=head_act, objective=objective)


def main():
    args, state = parse_arguments()
    device = cli.pick_device(args.device)
    distributed.start(device)
    amp = cli.pick_amp(args.amp, device)
    out = Path(args.out)
    if state is None:
        cli.refuse_overwrite(out, ("cnn.pt", "vit.pt", "last.pt"), args.overwrite)
        with distributed.process_0_first():
            if args.demo and distributed.rank() == 0:
                from common import toy_data

                toy_data.draw(Path(args.data), args.seed)
    elif state["epoch"] >= args.epochs and all((out / name).exists() for name in OUTPUTS):
        print(f"{out}: the run is finished")
        return
    images = read(args.data, **data.options(args))
    torch.manual_seed(args.seed)
    model = build_model(args, resuming=state is not None)

    with distributed.process_0_first():
        images.decode(args.img_size, data.cache_dir(args.cache), args.skip_bad)
    split = data.split_and_report(images, args.seed, args.dedup)
    train_index = (split == "train").nonzero()[0]
    if len(train_index) < 2 * distributed.world_size():
        raise UserError(f"{images.path}: {len(train_index)} training images are too few")
    seen = torch.from_numpy(images.table["hash"][train_index].view("int64"))
    if state is not None and not torch.equal(state["seen"], seen):
        raise UserError(f"{args.data}: the training images are not those that the run began with")
    if distributed.rank() == 0:
        fresh = (
            OUTPUTS
            if state is None
            else ("cnn.pt", "vit.pt")
            if state["epoch"] < args.epochs
            else ()
        )
        checkpoint.start_folder(out, OUTPUTS, fresh)
        data.write_split(out, images, split)
        checkpoint.write_json(
            out / "config.json",
            {
                "command": sys.argv,
                "arguments": vars(args),
                "device": str(device),
                "amp": str(amp),
                "processes": distributed.world_size(),
                "versions": VERSIONS,
            },
        )

    def react(row):
        collapse.react(row, args.objective, args.fail_on_collapse)

    if state is not None and state["batch"] == 0 and state["log"]:
        react(state["log"][-1])  # the epoch that the run ended with
    model.to(device, memory_format=torch.channels_last)
    transform = data.augmentation(
        args.img_size, "blur" in args.ablation, "solarize" in args.ablation
    )
    dataset = data.AugmentedImages(images.images, train_index, transform, seed=args.seed)
    loader = data.loader(
        dataset,
        data.EpochBatches(
            len(dataset),
            args.bs,
            args.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        ),
        device,
        args.workers,
    )
    monitor = collapse.Monitor(
        images.images,
        train_index,
        (split == "val").nonzero()[0],
        images.labels if images.classes else None,
        images.multilabel,
        args.seed,
    )
    run = Run(
        out,
        device,
        {
            "script": "pretrain.py",
            "args": vars(args),
            "seen": seen,
            "processes": distributed.world_size(),
        },
        state,
        save_every=args.save_every,
    )
    run.announce(model, amp, model, loader, args.epochs)
    swa = train(
        model,
        loader,
        run,
        device,
        amp,
        args.epochs,
        args.lr,
        args.min_lr,
        args.t_max,
        args.swa_start,
        "sgd" in args.ablation,
        args.compile,
        monitor,
        react,
    )
    if distributed.rank() == 0:
        save_arms(args, swa, dataset, device, amp, seen, out)


def save_arms(args, swa, dataset, device, amp, seen, out):
    """cnn.pt and vit.pt: the averaged weights, with batch-norm statistics of the training images."""
    batches = data.EpochBatches(len(dataset), args.bs, args.seed)  # all images, in this process
    batches.epoch = args.epochs
    loader = data.loader(dataset, batches, device, args.workers)
    with torch.autocast(device.type, amp, enabled=amp is not None):
        averaged = swa.finish(lambda: on_device(loader, device))
    for file in (args.init_cnn, args.init_vit):  # what the initial weights saw counts too
        if file not in (None, "imagenet", "random"):
            seen = torch.cat([seen, checkpoint.seen_by(file)]).unique()
    for arm, model in averaged.items():
        name, kwargs = getattr(args, arm), getattr(args, f"{arm}_kwargs")
        checkpoint.save(
            out / f"{arm}.pt",
            checkpoint.weights_file(
                model,
                arch=name,
                arm=arm,
                img_size=args.img_size,
                mean=list(IMAGENET_MEAN),
                model_kwargs=arms.rebuild_kwargs(name, args.img_size, kwargs),
                std=list(IMAGENET_STD),
                epoch=args.epochs,
                swa_snapshots=swa.snapshots,
                seed=args.seed,
                seen=seen,
                data=data.options(args, data.OPTIONS),
                config=vars(args),
            ),
        )
    print(
        f"wrote {out / 'cnn.pt'} and {out / 'vit.pt'}: "
        + (
            f"the mean of {swa.snapshots} snapshots"
            if swa.snapshots
            else "the last weights; no weights averaged, since the run has no minimum of the learning rate "
            "after --swa-start"
        )
    )
    print(f"next: python finetune.py --ckpt {out / 'cnn.pt'} --frac {0.1 if args.demo else 0.01}")
    if args.demo:
        print(
            f"compare: python finetune.py --arch {args.cnn} --init random --img-size "
            f"{args.img_size} --data {out / 'images'} --cache {out / 'cache'} --frac 0.1 --out "
            f"{out / 'baseline'}"
        )


if __name__ == "__main__":
    cli.run(main)
