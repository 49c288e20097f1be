"""CASS pre-training (arXiv 2206.04170v6, Algorithm 1): a CNN and a Transformer, no labels.

    python pretrain.py --data /path --epochs 100 --bs 16
    python pretrain.py --data FOLDER --labels few.csv  (holds out some of these images for testing)
    python pretrain.py --out DIR --resume              (resumes from DIR/last.pt, to the last bit)
    torchrun --nproc-per-node 4 pretrain.py --data /path         (four GPUs; --bs is per GPU)

writes to --out: cnn.pt and vit.pt (the averaged weights, for finetune.py and timm), last.pt (all of
the training state), log.jsonl (a line per epoch), config.json, split.csv, duplicates.csv. The
defaults are the paper's run; docs/differences.md lists what the paper leaves open.
"""

from pathlib import Path

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import data
import losses
from cass import CASS
from common import arms, checkpoint, cli, collapse, distributed, readers, splits
from common.cli import UserError
from common.run import Run, half_cycle, on_device
from swa import SWA

OUTPUTS = ("cnn.pt", "vit.pt", "last.pt", "log.jsonl", "config.json", "split.csv", "duplicates.csv")
MAY_CHANGE = {*cli.MAY_CHANGE, "epochs", "fail_on_collapse"}  # when a run is resumed
ABLATIONS = ("blur", "solarize", "sgd", "sigmoid", "softmax")


def prepare(parser, script, may_change=cli.MAY_CHANGE, **defaults):
    """The arguments of a script that pre-trains; its Run, on a device and in the folder --out, for
    itself alone; and {"cnn" or "vit": (name, init, kwargs)}. parser: with the flags of its method;
    defaults: its own, where they are not those of CASS."""
    data.add_arguments(parser)
    arms.add_arguments(parser)
    parser.add_argument("--seed", type=cli.count, default=0, help="of the split and all after it")
    parser.add_argument("--out", metavar="DIR", default=".", help="output folder (default: here)")
    cli.add_run_arguments(parser, epochs=100, lr=1e-3, least=cli.count)  # F.2.3
    parser.set_defaults(**defaults)
    args, state = parser.parse_args(), None
    if args.resume:
        from common.starts import resumed

        args, state = resumed(parser, args, script, may_change)
        if state is None:
            print(f"{args.out}: holds no last.pt, so the run starts from the beginning", flush=True)
    if args.data is None:
        parser.error("--data PATH is missing (without images, try docs/demo.npz)")
    device, out = cli.pick_device(args.device), Path(args.out)
    distributed.start(device)
    cli.refuse_inputs([out / name for name in OUTPUTS], args.data)
    cli.claim(out)
    if state is None:
        cli.refuse_overwrite(out, args.overwrite)
    amp = cli.pick_amp(args.amp, device)
    run = Run(out, device, amp, {"script": script}, state, save_every=args.save_every)
    specs = {"cnn": (args.cnn, args.init_cnn or args.init, args.cnn_kwargs)}
    specs["vit"] = args.vit, args.init_vit or args.init, args.vit_kwargs
    return args, run, specs


def train(model, loader, run, epochs, lr=1e-3, min_lr=1e-6, t_max=16, swa_start=0.75, sgd=False):
    """Algorithm 1: every batch, augmented once, goes through both arms. Returns the SWA.

    model: a CASS; loader: batches of (N, 3, H, W) uint8; run: a common.run.Run, which resumes,
    saves and logs; t_max: iterations, or "run"; sgd: for the CNN (Table 9).
    """
    device, amp, iterations = run.device, run.amp, epochs * len(loader)
    t_max = half_cycle(t_max, iterations)
    optimizer_cnn = torch.optim.Adam(model.cnn.parameters(), lr, fused=True)
    optimizer_vit = torch.optim.Adam(model.vit.parameters(), lr, fused=True)
    if sgd:
        optimizer_cnn = torch.optim.SGD(model.cnn.parameters(), lr, momentum=0.9, fused=True)
    scheduler_cnn = CosineAnnealingLR(optimizer_cnn, t_max, min_lr)
    scheduler_vit = CosineAnnealingLR(optimizer_vit, t_max, min_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    swa = SWA(model.arms, swa_start, iterations, t_max)
    run.track(method=model, scaler=scaler, swa=swa)
    run.track(optimizer_cnn=optimizer_cnn, scheduler_cnn=scheduler_cnn)
    run.track(optimizer_vit=optimizer_vit, scheduler_vit=scheduler_vit)
    forward = distributed.wrap(model)
    for _ in run.epochs(epochs, loader, models=model.arms):
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
        lr = scheduler_cnn.get_last_lr()[0]
        run.end_epoch(loss=run.mean_loss(), swa_snapshots=swa.snapshots, lr=lr)
    return swa


def build_model(specs, img_size, objective, head_act, grad_checkpointing):
    """CASS on two arms. specs: as of prepare. Raises UserError."""
    models = {}
    for arm, (name, init, kwargs) in specs.items():
        models[arm] = arms.make_arm(f"--{arm}", name, init, img_size, **kwargs)
        if grad_checkpointing:
            arms.enable_grad_checkpointing(models[arm], name)
    arms.check_pair(**models, img_size=img_size)
    loss, gather = losses.OBJECTIVES[objective], distributed.gather
    if objective != "cosine":  # it looks at the batch of all processes as a whole
        return CASS(**models, head_act=head_act, objective=lambda R, T: loss(gather(R), gather(T)))
    return CASS(**models, head_act=head_act, objective=loss)


def begin(run, args, specs, images, stale=()):
    """Decode and split the images. Returns the indices of the training images and the {key: value}
    of the weights files that come of them; last.pt's go to the run, and how to clear --out, of
    `stale` files alone where a run is resumed, and to write split.csv and config.json."""
    state, processes = run.state, distributed.WORLD_SIZE
    if state is None:  # what the initial weights saw counts too; read before anything is removed
        from common.starts import carried_by

        inits = dict.fromkeys(init for _, init, _ in specs.values())
    initial = state["initial"] if state else torch.cat([carried_by(init) for init in inits], 1)
    with distributed.one_first():
        images.decode(args.img_size, data.cache_dir(args.cache), args.skip_bad, args.dry_run)
    split = data.split_and_report(images, args.seed, args.dedup, initial, allow_seen=True)
    run.monitor = None if distributed.RANK else collapse.Monitor(images, split, args.seed)
    index = (split == "train").nonzero()[0]
    if len(index) < 2 * processes:
        raise UserError(f"{images.path}: {len(index)} training images are too few")
    seen = torch.from_numpy(images.table["hash"][index].view("int64"))
    if state is not None and not torch.equal(state["seen"], seen):
        raise UserError(f"{images.path}: its training images are not those that the run began with")
    if not distributed.agree([seen.sum().item(), run.iteration], run.device):
        way_out = "copy the data and last.pt to every machine"
        raise UserError(f"{images.path}: the processes found other images or states; {way_out}")
    run.metadata |= {"args": vars(args), "processes": processes, "seen": seen, "initial": initial}

    def write():
        if distributed.RANK == 0:
            checkpoint.start_folder(run.out, OUTPUTS, OUTPUTS if state is None else stale)
            data.write_split(run.out, images, split)
            config = checkpoint.configuration(args) | {"device": str(run.device)}
            config |= {"amp": str(run.amp), "processes": processes}
            checkpoint.write_json(run.out / "config.json", config)

    run.write = write
    if not images.classes and not (split == "test").any():
        print("without --labels FILE no image is held out: none can be tested on later")
    saved = {"epoch": args.epochs, "seed": args.seed, "data": data.options(args, data.OPTIONS)}
    saved["split"] = known = splits.carried(images, split, initial)
    return index, {**saved, "seen": known[0, known[1] == 0], "config": vars(args)}


def main():
    parser, flag = cli.Parser(__doc__), {"action": "store_true"}
    add = parser.add_argument
    objectives = {"default": "cosine", "choices": list(losses.OBJECTIVES)}
    add("--objective", **objectives, help="equation 1, or one that keeps the arms from collapse")
    add("--fail-on-collapse", **flag, help="stop, status 1, after an epoch of collapsed logits")
    ablation = "more augmentation (Table 8), SGD for the CNN (9), an activation on the logits (21)"
    add("--ablation", nargs="+", default=[], choices=ABLATIONS, help=ablation)
    swa = "share of the run before weight averaging begins; 1: no averaging"
    add("--swa-start", type=cli.share, default=0.75, metavar="SHARE", help=swa)
    add("--grad-checkpointing", **flag, help="recompute activations: less memory, more time")
    args, run, specs = prepare(parser, "pretrain.py", MAY_CHANGE)
    device, out, state = run.device, run.out, run.state
    if args.objective != "cosine" and args.bs * distributed.WORLD_SIZE == 1:
        raise UserError(f"--objective {args.objective} compares images of a batch: --bs 2 or more")
    if {"sigmoid", "softmax"} <= set(args.ablation):
        raise UserError("--ablation takes sigmoid or softmax, not both")
    if state is not None:
        before = state["args"]["epochs"]
        if args.epochs != before and (args.epochs < before or state["swa"] or args.t_max == "run"):
            rule = "it may only grow, before a snapshot was averaged, and not with --t-max run"
            raise UserError(f"{out}: its run was made with --epochs {before}; {rule}")
        if state["epoch"] >= args.epochs and all((out / name).exists() for name in OUTPUTS):
            print(f"{out}: the run is finished")
            return
        specs = {arm: (x[0], "random", x[2]) for arm, x in specs.items()}  # last.pt follows
    images = readers.read(args.data, **data.options(args))
    torch.manual_seed(args.seed)
    head_act = next((x for x in args.ablation if x in ("sigmoid", "softmax")), "none")
    model = build_model(specs, args.img_size, args.objective, head_act, args.grad_checkpointing)
    train_index, saved = begin(run, args, specs, images, stale=("cnn.pt", "vit.pt"))
    augment = (name in args.ablation for name in ("blur", "solarize"))
    transform = data.augmentation(args.img_size, *augment)
    dataset = data.AugmentedImages(images.images, train_index, transform, seed=args.seed)
    share = distributed.RANK, distributed.WORLD_SIZE
    batches = data.EpochBatches(len(dataset), args.bs, args.seed, True, *share)
    loader = data.loader(dataset, batches, device, args.workers)
    run.react = lambda row: collapse.react(row, args.objective, args.fail_on_collapse)
    if not run.announce(model.to(device), model, loader, args.epochs):
        return
    schedule = (args.lr, args.min_lr, args.t_max, args.swa_start, "sgd" in args.ablation)
    swa = train(model, loader, run, args.epochs, *schedule)
    if distributed.RANK == 0:
        batches = data.EpochBatches(len(dataset), args.bs, args.seed)  # all, in this process
        batches.epoch = args.epochs
        loader = data.loader(dataset, batches, device, args.workers)
        with torch.autocast(device.type, run.amp, enabled=run.amp is not None):
            averaged = swa.finish(lambda: on_device(loader, device))
        saved["swa_snapshots"] = swa.snapshots
        for arm, (name, _, kwargs) in specs.items():
            arms.save(out, arm, averaged[arm], name, kwargs, args.img_size, saved)
        none = "the last weights; no weights averaged: no end of a cycle after --swa-start"
        what = f"the mean of {swa.snapshots} snapshots" if swa.snapshots else none
        print(f"wrote {out / 'cnn.pt'} and {out / 'vit.pt'}: {what}")
        if images.classes:
            print(f"next: python finetune.py --ckpt {out / 'cnn.pt'}")


if __name__ == "__main__":
    cli.run(main)
