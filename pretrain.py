"""CASS pre-training (arXiv 2206.04170v6, Algorithm 1): a CNN and a Transformer, no labels.

    python pretrain.py --data /path --epochs 100 --bs 16
    python pretrain.py --demo                       (draws its own images; two minutes on a CPU)

writes to --out: cnn.pt and vit.pt (the averaged weights, for finetune.py and timm), last.pt (all of
the training state), log.jsonl (a line per epoch), config.json, split.csv, duplicates.csv. The defaults
are the paper's run; what it leaves open is in the README's table of differences.
"""

import logging
import math
import platform
import sys
import time
from pathlib import Path

import timm
import torch
import torchvision
from timm.utils import ParseKwargs

import cli
import data
import demo
from cass import CASS, build_arm
from checkpoint import append_json_line, load_state_dict, save, weights_file, write_csv, write_json
from cli import UserError
from swa import SWA

OUTPUTS = ("cnn.pt", "vit.pt", "last.pt", "log.jsonl", "config.json", "split.csv", "duplicates.csv")


def parse_arguments():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    data.add_arguments(parser)
    add("--demo", action="store_true", help="draw labelled images to OUT/demo_images; small arms")
    add("--cnn", default="resnet50.a1_in1k", metavar="NAME", help="first arm, any timm model")
    add("--vit", default="vit_base_patch16_384.augreg_in21k_ft_in1k", metavar="NAME",
        help="second arm, any timm model")
    for arm in ("cnn", "vit"):
        add(f"--{arm}-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE",
            help="arguments for timm.create_model, such as patch_size=8")
    add("--img-size", type=cli.positive, default=384, help="side of the images in pixels (F.2.2)")
    add("--init", default="imagenet", metavar="WHAT",
        help="imagenet (timm's download) or random, for both arms (Table 20)")
    for arm in ("cnn", "vit"):
        add(f"--init-{arm}", metavar="WHAT", help="imagenet, random or a weights file, for one arm")
    add("--head-act", default="none", choices=["none", "sigmoid", "softmax"],
        help="on the logits before the loss (Table 21)")
    add("--epochs", type=cli.positive, default=100, help="passes over the training images")
    add("--bs", "--batch-size", type=cli.positive, default=16, help="images in a step")
    add("--lr", type=float, default=1e-3, help="learning rate of both arms (F.2.3)")
    add("--min-lr", type=float, default=1e-6, help="its minimum (F.2.3)")
    add("--t-max", type=cli.t_max, default=16, metavar="N",
        help="iterations from --lr down to --min-lr, and up again (F.2.3), or: run, one descent")
    add("--cnn-optimizer", default="adam", choices=["adam", "sgd"], help="Table 9")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--swa-start", type=float, default=0.75, help="share of the run before averaging begins")
    add("--no-swa", action="store_true", help="save the last weights, not averaged ones")
    add("--blur", action="store_true", help="add Gaussian blur (Table 8)")
    add("--solarize", action="store_true", help="add solarization (Table 8)")
    add("--seed", type=int, default=0, help="decides the split and everything after it")
    add("--out", default=".", metavar="DIR", help="output folder")
    cli.add_run_arguments(parser)
    args = parser.parse_args()
    if args.demo:
        parser.set_defaults(data=str(Path(args.out) / "demo_images"), **demo.DEFAULTS)
        args = parser.parse_args()
    elif args.data is None:
        parser.error("--data PATH is missing (or --demo, to try it without images)")
    return args


def main():
    args = parse_arguments()
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    out = Path(args.out)
    cli.refuse_overwrite(out, ("cnn.pt", "vit.pt", "last.pt"), args.overwrite)
    if args.demo:
        demo.draw(Path(args.data), args.seed)
    images = data.read(args)

    torch.manual_seed(args.seed)
    arms, kwargs = {}, {}
    for arm, name in (("cnn", args.cnn), ("vit", args.vit)):
        arms[arm], kwargs[arm] = make_arm(
            f"--{arm}", name, getattr(args, f"init_{arm}") or args.init, args.img_size,
            **getattr(args, f"{arm}_kwargs"))
    method = CASS(**arms, head_act=args.head_act)
    try:
        method.check_pair(args.img_size)
    except ValueError as error:
        raise UserError(f"{error} (--cnn {args.cnn}, --vit {args.vit})") from error
    method.to(device, memory_format=torch.channels_last)

    data.decode(images, args.img_size, args.cache, args.skip_bad)
    split = data.split_and_report(images, args, args.seed)
    seen = split == "train"
    if seen.sum() < 2:
        raise UserError(f"{images.path}: {seen.sum()} training images are too few")

    out.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:
        (out / name).unlink(missing_ok=True)
    write_csv(out / "split.csv", data.SPLIT_HEADER, data.split_rows(images, split))
    write_csv(out / "duplicates.csv", data.DUPLICATES_HEADER, data.duplicate_rows(images, split))
    config = {key: value for key, value in vars(args).items()}
    write_json(out / "config.json", {
        "command": sys.argv, "arguments": config, "device": str(device), "amp": str(amp),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "torchvision": torchvision.__version__, "timm": timm.__version__}})

    views = data.Views(images.images, seen.nonzero()[0], seed=args.seed,
                       transform=data.augmentation(args.img_size, args.blur, args.solarize))
    trained, snapshots = train(method, views, args, device, amp, out)

    hashes = torch.from_numpy(images.table["hash"][seen].view("int64"))
    for arm, name in (("cnn", args.cnn), ("vit", args.vit)):
        save(out / f"{arm}.pt", weights_file(
            trained[arm], arch=name, arm=arm, model_kwargs=kwargs[arm], img_size=args.img_size,
            mean=list(data.IMAGENET_MEAN), std=list(data.IMAGENET_STD), epoch=args.epochs,
            swa_snapshots=snapshots, seed=args.seed, seen=hashes, data=data.flags(args),
            config=config))
    print(f"wrote {out / 'cnn.pt'} and {out / 'vit.pt'}: " +
          (f"the mean of {snapshots} snapshots" if snapshots else "the last weights"))


def make_arm(flag, name, init, img_size, **kwargs):
    """cass.build_arm for what a user typed: init may be a file; errors become UserError."""
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # our one line is enough
    if init not in ("imagenet", "random"):
        init = load_state_dict(init)
    try:
        return build_arm(name, img_size, init=init, **kwargs)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error
    except (TypeError, AssertionError, RuntimeError, KeyError, AttributeError) as error:
        raise UserError(f"{flag} {name}: cannot be built so: {' '.join(str(error).split())[:300]}") \
            from error
    except Exception as error:  # the download's errors are of many kinds
        raise UserError(f"{flag} {name}: its ImageNet weights could not be downloaded; start with "
                        f"--init random, or give weights from elsewhere with "
                        f"{'--init' if flag == '--arch' else '--init-' + flag[2:]} FILE") from error


def train(method, views, args, device, amp, out):
    """Algorithm 1. Returns ({arm: module to save}, number of snapshots averaged)."""
    batches = data.Batches(len(views), args.bs, args.seed)
    train_loader = data.loader(views, batches, device, args.workers)
    iterations = args.epochs * len(batches)
    t_max = max(iterations - 1, 1) if args.t_max == "run" else args.t_max

    optimizers = {arm: torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
                  if arm == "cnn" and args.cnn_optimizer == "sgd" else
                  torch.optim.Adam(model.parameters(), lr=args.lr)
                  for arm, model in method.arms.items()}
    schedulers = {arm: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, t_max, args.min_lr)
                  for arm, optimizer in optimizers.items()}
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    swa = SWA(method.arms, math.inf if args.no_swa else args.swa_start, iterations, t_max)

    def images_on_device():
        for images in train_loader:
            yield data.normalize(images.to(device, non_blocking=True))

    iteration = 0
    with cli.progress(total=args.epochs * len(views)) as bar:
        for epoch in range(args.epochs):
            batches.epoch = epoch
            method.train()
            began, running = time.perf_counter(), torch.zeros((), device=device)
            for images in images_on_device():
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    loss = method(images)
                scaler.scale(loss).backward()
                for optimizer in optimizers.values():
                    scaler.step(optimizer)
                scaler.update()
                for scheduler in schedulers.values():
                    scheduler.step()
                swa.after_step(iteration)

                running += loss.detach()
                iteration += 1
                bar.update(len(images))
                if iteration % 20 == 0 or iteration % len(batches) == 0:  # wait for the device
                    stop_if_not_finite(running, epoch)
                    bar.set_postfix_str(f"epoch {epoch + 1}/{args.epochs}, loss {loss.item():.3g}, "
                                        f"lr {schedulers['cnn'].get_last_lr()[0]:.1e}", refresh=False)
            seconds = time.perf_counter() - began
            append_json_line(out / "log.jsonl", {
                "epoch": epoch + 1, "iteration": iteration, "loss": running.item() / len(batches),
                "lr": schedulers["cnn"].get_last_lr()[0], "seconds": round(seconds, 3),
                "images_per_second": round(len(views) / seconds, 2),
                "swa_snapshots": swa.snapshots})
            save(out / "last.pt", {
                "epoch": epoch + 1, "iteration": iteration, "args": vars(args),
                "swa": swa.state_dict(), "scaler": scaler.state_dict(), "rng": torch.get_rng_state(),
                "arms": {arm: model.state_dict() for arm, model in method.arms.items()},
                "optimizers": {arm: o.state_dict() for arm, o in optimizers.items()},
                "schedulers": {arm: s.state_dict() for arm, s in schedulers.items()}})

    if not swa.snapshots and not args.no_swa:
        print(f"no weights averaged: the run of {iterations} iterations ends before the first "
              f"minimum of the learning rate after --swa-start; saving the last weights")
    batches.epoch = args.epochs
    with torch.autocast(device.type, amp, enabled=amp is not None):
        return swa.finish(images_on_device), swa.snapshots


def stop_if_not_finite(loss, epoch):
    """Raise FloatingPointError (exit status 1) on a loss that is no number."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch + 1}; what was saved "
                                 f"before stays; try a smaller --lr, or --amp off")


if __name__ == "__main__":
    cli.run(main)
