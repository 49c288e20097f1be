"""CASS pre-training (arXiv 2206.04170v6, Algorithm 1): a CNN and a Transformer, no labels.

    python pretrain.py --data /path --epochs 100 --bs 16
    python pretrain.py --demo                       (draws its own images; two minutes on a CPU)
    python pretrain.py --out DIR --resume           (goes on from DIR/last.pt, to the last bit)
    torchrun --nproc-per-node 4 pretrain.py --data /path        (four GPUs; --bs is per GPU)

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

import checkpoint
import cli
import data
import demo
import health
import losses
import parallel
from cass import CASS, build_arm
from checkpoint import load_state_dict, save, weights_file, write_csv, write_json
from cli import UserError
from dino import DINO, multi_crop
from swa import SWA

METHODS = {"cass": (("cnn", "vit"),), "dino": (("cnn",), ("vit",))}  # arms that train together
CASS_ONLY = ("head_act", "objective", "fail_on_collapse", "t_max", "cnn_optimizer", "momentum",
             "swa_start", "no_swa", "blur", "solarize")
DINO_ONLY = ("dino_outputs", "dino_crops")
OUTPUTS = ("cnn.pt", "vit.pt", "last.pt", "log.jsonl", "config.json", "split.csv", "duplicates.csv")
MAY_CHANGE = {"workers", "device", "out", "overwrite", "resume", "cache", "save_every", "epochs",
              "fail_on_collapse"}


class KeyValues(ParseKwargs):
    """timm's KEY=VALUE arguments, with one line for what is none."""

    def __call__(self, parser, namespace, values, option_string=None):
        wrong = [v for v in values if "=" not in v or v.split("=")[0] in ("img_size", "init", "name")]
        if wrong:
            parser.error(f"{option_string}: {wrong[0]} is no KEY=VALUE argument for timm.create_model "
                         f"(image size and initialisation have flags of their own)")
        super().__call__(parser, namespace, values, option_string)


def parse_arguments():
    """The arguments, and the state to resume from or None."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    data.add_arguments(parser)
    add("--demo", action="store_true", help="draw labelled images to OUT/demo_images; small arms")
    add("--method", default="cass", choices=list(METHODS),
        help="dino: what the paper compares with, one arm after the other (dino.py)")
    add("--cnn", default="resnet50.a1_in1k", metavar="NAME", help="first arm, any timm model")
    add("--vit", default="vit_base_patch16_384.augreg_in21k_ft_in1k", metavar="NAME",
        help="second arm, any timm model")
    for arm in ("cnn", "vit"):
        add(f"--{arm}-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE",
            help="arguments for timm.create_model, such as patch_size=8")
    add("--img-size", type=cli.positive, default=384, help="side of the images in pixels (F.2.2)")
    add("--init", default="imagenet", choices=["imagenet", "random"],
        help="of both arms (Table 20); imagenet: timm's download")
    for arm in ("cnn", "vit"):
        add(f"--init-{arm}", metavar="WHAT", help="imagenet, random or a weights file, for one arm")
    add("--objective", default="cosine", choices=list(losses.OBJECTIVES),
        help="cosine: equation 1; vicreg: does not let the arms collapse (README)")
    add("--fail-on-collapse", action="store_true",
        help="stop with status 1 after an epoch whose logits have collapsed")
    add("--head-act", default="none", choices=["none", "sigmoid", "softmax"],
        help="on the logits before the loss (Table 21)")
    add("--epochs", type=cli.positive, default=100, help="passes over the training images")
    add("--bs", "--batch-size", type=cli.positive, default=16, help="images in a step")
    add("--lr", type=cli.rate,
        help="learning rate of both arms (default: 1e-3, F.2.3; dino: 5e-4 · bs / 256)")
    add("--min-lr", type=cli.rate, default=1e-6, help="its minimum (F.2.3)")
    add("--t-max", type=cli.t_max, default=16, metavar="N",
        help="iterations from --lr down to --min-lr, and up again (F.2.3), or: run, one descent")
    add("--cnn-optimizer", default="adam", choices=["adam", "sgd"], help="Table 9")
    add("--momentum", type=cli.rate, default=0.9, help="of SGD")
    add("--swa-start", type=cli.rate, default=0.75, help="share of the run before averaging begins")
    add("--no-swa", action="store_true", help="save the last weights, not averaged ones")
    add("--blur", action="store_true", help="add Gaussian blur (Table 8)")
    add("--solarize", action="store_true", help="add solarization (Table 8)")
    add("--seed", type=cli.count, default=0, help="decides the split and everything after it")
    add("--out", default=".", metavar="DIR", help="output folder")
    add("--compile", action="store_true", help="torch.compile the step")
    add("--grad-checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory, more time")
    add("--dino-outputs", type=cli.positive, default=65536, metavar="K", help="of DINO's head")
    add("--dino-crops", type=cli.count, default=8, metavar="N", help="DINO's local crops")
    cli.add_run_arguments(parser)
    args = parser.parse_args()
    state = None
    if args.demo and args.data:
        parser.error("--demo draws its own images; leave out --data")
    if args.resume:
        last = Path(args.out) / "last.pt" if args.resume is True else Path(args.resume)
        if last.exists() or args.resume is not True:
            state = checkpoint.load_training(last, "pretrain.py")
            parser.set_defaults(out=str(last.parent))
            args = cli.parse_again(parser, state["args"], MAY_CHANGE, last)
            check_resumable(args, state, last)
        elif args.data or args.demo:
            print(f"{last}: not there, so the run starts from the beginning")
    if args.demo and state is None:
        parser.set_defaults(data=str(Path(args.out) / "demo_images"), **demo.DEFAULTS)
        args = parser.parse_args()
    elif args.data is None:
        parser.error("--data PATH is missing (or --demo, to try it without images)")
    other, names = ("cass", CASS_ONLY) if args.method == "dino" else ("dino", DINO_ONLY)
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} goes with --method {other}")
    if args.objective != "cosine" and args.bs * parallel.world() == 1:
        parser.error(f"--objective {args.objective} compares the images of a batch: --bs 2 or more")
    if args.lr is None:
        args.lr = 1e-3 if args.method == "cass" else 5e-4 * args.bs * parallel.world() / 256
    data.make_absolute(args)
    return args, state


def check_resumable(args, state, last):
    """--epochs may grow on resuming, unless that would change what was already done; the number of
    processes may not change, since the batches would."""
    if state["processes"] != parallel.world():
        raise UserError(f"{last}: was made by {state['processes']} processes, not {parallel.world()}: "
                        f"torchrun --nproc-per-node {state['processes']}")
    before = state["args"]["epochs"]
    if args.epochs != before and (args.epochs < before or state["swa"] or args.t_max == "run"
                                  or args.method == "dino"):
        raise UserError(f"{last}: was made with --epochs {before}; it may only be lengthened, and "
                        f"neither after a snapshot was averaged, with --t-max run nor with DINO")


def main():
    args, state = parse_arguments()
    device = cli.pick_device(args.device)
    parallel.start(device)
    amp = cli.pick_amp(args.amp, device)
    out = Path(args.out)
    if state is None:
        cli.refuse_overwrite(out, ("cnn.pt", "vit.pt", "last.pt"), args.overwrite)
        with parallel.process_0_first():
            if args.demo and parallel.rank() == 0:
                demo.draw(Path(args.data), args.seed)
    elif (state["epoch"] >= args.epochs and state["phase"] == len(METHODS[args.method]) - 1
          and all((out / name).exists() for name in OUTPUTS)):
        print(f"{out}: the run is finished")
        return
    images = data.read(args)

    first = 0 if state is None else state["phase"]
    methods = {}
    for phase, arms in list(enumerate(METHODS[args.method]))[first:]:
        torch.manual_seed(args.seed)
        methods[phase] = build_method(args, arms, resuming=state is not None and phase == first)

    with parallel.process_0_first():
        data.decode(images, args.img_size, args.cache, args.skip_bad)
    split = data.split_and_report(images, args, args.seed)
    seen = split == "train"
    if seen.sum() < 2 * parallel.world():
        raise UserError(f"{images.path}: {seen.sum()} training images are too few")
    hashes = torch.from_numpy(images.table["hash"][seen].view("int64"))
    if state is not None and not torch.equal(state["seen"], hashes):
        raise UserError(f"{args.data}: the training images are not those that the run began with")

    if parallel.rank() == 0:
        checkpoint.start_folder(out, OUTPUTS, fresh=state is None)
        if state is not None and state["epoch"] < args.epochs:  # weights of a shorter run
            left = [f"{arm}.pt" for arms in METHODS[args.method][first:] for arm in arms]
            checkpoint.start_folder(out, left, fresh=True)
        write_csv(out / "split.csv", data.SPLIT_HEADER, data.split_rows(images, split))
        write_csv(out / "duplicates.csv", data.DUPLICATES_HEADER, data.duplicate_rows(images, split))
        write_json(out / "config.json", {
            "command": sys.argv, "arguments": vars(args), "device": str(device), "amp": str(amp),
            "processes": parallel.world(), "versions": {
                "python": platform.python_version(), "torch": torch.__version__,
                "torchvision": torchvision.__version__, "timm": timm.__version__}})

    monitor = health.Monitor(images.images, seen.nonzero()[0], (split == "val").nonzero()[0],
                             images.labels if images.classes else None, images.multilabel, args.seed)
    facts = {"script": "pretrain.py", "args": vars(args), "seen": hashes,
             "processes": parallel.world()}
    for file in (args.init_cnn, args.init_vit):  # what the initial weights saw counts too
        if file not in (None, "imagenet", "random"):
            hashes = torch.cat([hashes, checkpoint.seen_by(file)]).unique()
    log = []
    for phase in list(methods):
        method, kwargs, transform = methods.pop(phase)
        method.to(device, memory_format=torch.channels_last)
        views = data.Views(images.images, seen.nonzero()[0], transform, seed=args.seed)
        batches = data.Batches(len(views), args.bs, args.seed, rank=parallel.rank(),
                               world=parallel.world())
        swa, log = train(method, data.loader(views, batches, device, args.workers), args, device, amp,
                         out, {**facts, "phase": phase}, state, monitor, log)
        state = None
        if parallel.rank() == 0:
            batches = data.Batches(len(views), args.bs, args.seed)  # all images, in this process
            batches.epoch = args.epochs
            all_images = data.loader(views, batches, device, args.workers)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                trained = swa.finish(lambda: on_device(all_images, device))
            for arm, model in trained.items():
                save(out / f"{arm}.pt", weights_file(
                    model, arch=getattr(args, arm), arm=arm, model_kwargs=kwargs[arm],
                    img_size=args.img_size, mean=list(data.IMAGENET_MEAN),
                    std=list(data.IMAGENET_STD), epoch=args.epochs, swa_snapshots=swa.snapshots,
                    seed=args.seed, seen=hashes, data=data.flags(args), config=vars(args)))
    print(f"wrote {out / 'cnn.pt'} and {out / 'vit.pt'}: " +
          ("the teachers" if args.method == "dino" else
           f"the mean of {swa.snapshots} snapshots" if swa.snapshots else
           "the last weights, since --no-swa was given" if args.no_swa else
           "the last weights; no weights averaged, since the run ends before the first minimum of "
           "the learning rate after --swa-start"))


def build_method(args, arms, resuming):
    """The method that trains these arms, {arm: the arguments that rebuild it}, and its transform."""
    models, kwargs = {}, {}
    for arm in arms:
        init = "random" if resuming else getattr(args, f"init_{arm}") or args.init
        make = make_backbone if args.method == "dino" else make_arm
        models[arm], kwargs[arm] = make(f"--{arm}", getattr(args, arm), init, args.img_size,
                                        **getattr(args, f"{arm}_kwargs"))
        if args.grad_checkpointing:
            try:
                models[arm].set_grad_checkpointing()
            except (AssertionError, AttributeError) as error:
                raise UserError(f"--grad-checkpointing: timm has none for "
                                f"{getattr(args, arm)}") from error
    if args.method == "dino":
        try:
            with torch.no_grad():
                features = models[arm].eval()(torch.zeros(1, 3, args.img_size, args.img_size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"--{arm} {getattr(args, arm)}: takes no images of {args.img_size} pixels: "
                            f"{str(error).splitlines()[0]}") from error
        size = local_size(models[arm], args.img_size)
        return (DINO(arm, models[arm], features.shape[1], args.dino_outputs), kwargs,
                multi_crop(args.img_size, size, args.dino_crops))
    objective = losses.OBJECTIVES[args.objective]
    if args.objective != "cosine":  # it looks at the batch as a whole
        alone, objective = objective, lambda R, T: alone(parallel.gather(R), parallel.gather(T))
    method = CASS(**models, head_act=args.head_act, objective=objective)
    try:
        method.check_pair(args.img_size)
    except ValueError as error:
        raise UserError(f"{error} (--cnn {args.cnn}, --vit {args.vit})") from error
    return method, kwargs, data.augmentation(args.img_size, args.blur, args.solarize)


def make_backbone(flag, name, init, img_size, **kwargs):
    """make_arm for DINO: without a head, and, where timm has it, for images of several sizes and with
    the original's stochastic depth."""
    kwargs = {**kwargs, "num_classes": 0}
    extra = {"dynamic_img_size": True, "drop_path_rate": 0.1}
    try:
        model, built = make_arm(flag, name, init, img_size, **{**extra, **kwargs})
    except UserError as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        return make_arm(flag, name, init, img_size, **kwargs)
    return model, {key: value for key, value in built.items() if key not in extra.keys() - kwargs}


def local_size(model, img_size):
    """Side of DINO's local crops: 96 to 224 pixels, in whole patches; of a CNN at least 24, since its
    stages shrink 16 to one pixel too early; the full size where the model takes no other."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
    size = max(24 if patch == 1 else patch, round(img_size * 96 / 224 / patch) * patch)
    size = min(size, img_size)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError):
        print(f"{type(model).__name__} takes images of {img_size} pixels alone: local crops are "
              f"resized to that")
        return img_size
    return size


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


def on_device(loader, device):
    """Normalized float batches on the device, from a loader of uint8 ones: a tensor of one view of
    each image, or a list of several views."""
    for images in loader:
        views = [data.normalize(view.to(device, non_blocking=True)) for view in
                 (images if isinstance(images, list) else [images])]
        yield views if isinstance(images, list) else views[0]


def half_cycle(t_max, iterations):
    """--t-max in iterations: "run" is one descent that ends with the last of them."""
    return max(iterations - 1, 1) if t_max == "run" else t_max


def make_optimizers(method, args, t_max):
    """{arm: optimizer}, {arm: scheduler}; DINO anneals its learning rate by itself."""
    if isinstance(method, DINO):
        return {method.arm: method.optimizer(args.lr)}, {}
    optimizers = {arm: torch.optim.SGD(model.parameters(), args.lr, args.momentum, fused=True)
                  if arm == "cnn" and args.cnn_optimizer == "sgd"
                  else torch.optim.Adam(model.parameters(), args.lr, fused=True)
                  for arm, model in method.arms.items()}
    return optimizers, {
        arm: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, t_max, args.min_lr)
        for arm, optimizer in optimizers.items()}


def train(method, loader, args, device, amp, out, facts, state=None, monitor=None, log=()):
    """Algorithm 1, from the beginning or from the state of a last.pt. Returns the SWA and the log.

    method: a module that gives the loss of a batch, and its `arms`, {name: model}; DINO also has
    something to do before and after a step. loader: of uint8 batches, its batch_sampler a
    data.Batches; facts: what last.pt holds besides the training state; monitor: a health.Monitor;
    log: of what was trained before, which log.jsonl begins with.
    """
    batches, dino = loader.batch_sampler, isinstance(method, DINO)
    iterations = args.epochs * len(batches)
    t_max = half_cycle(args.t_max, iterations)
    optimizers, schedulers = make_optimizers(method, args, t_max)
    any_optimizer = next(iter(optimizers.values()))  # their learning rates are the same
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    swa = SWA(method.arms, math.inf if args.no_swa or dino else args.swa_start, iterations, t_max)
    parts = {"method": method, "scaler": scaler, "swa": swa,
             **{f"optimizer_{arm}": optimizer for arm, optimizer in optimizers.items()},
             **{f"scheduler_{arm}": scheduler for arm, scheduler in schedulers.items()}}
    at = {"epoch": 0, "batch": 0, "iteration": 0, "loss": 0.0, "seconds": 0.0,
          "log": list(log)}
    if state is not None:
        at = {key: state[key] for key in at}
        checkpoint.restore(parts, state)
        if parallel.rank() == 0:
            checkpoint.write_json_lines(out / "log.jsonl", at["log"])

    def stop_if_collapsed():
        collapsed = health.warning(at["log"][-1], args.objective) if at["log"] else None
        if collapsed and args.fail_on_collapse:
            raise FloatingPointError(f"epoch {at['epoch']}: {collapsed} (--fail-on-collapse)")
        if collapsed:
            bar.write(f"epoch {at['epoch']}: {collapsed}", file=sys.stderr)
    step = method
    if args.compile:
        step = torch.compile(step)
    if parallel.world() > 1:
        step = torch.nn.parallel.DistributedDataParallel(step)

    def write(**progress):
        at.update(progress)
        if parallel.rank() == 0:
            save(out / "last.pt", {**facts, **at, "rng": checkpoint.random_state(),
                                   **{name: part.state_dict() for name, part in parts.items()}})
            checkpoint.write_json_lines(out / "log.jsonl", at["log"])

    iteration, saved, shown = at["iteration"], time.perf_counter(), ""
    with cli.Signals() as signals, cli.progress(
            total=args.epochs * batches.n, initial=at["epoch"] * batches.n) as bar:
        if at["batch"] == 0:
            stop_if_collapsed()  # in the epoch that an earlier run ended with
        for epoch in range(at["epoch"], args.epochs):
            batches.epoch, batches.start = epoch, at["batch"]
            method.train()
            loss_sum = torch.tensor(at["loss"], device=device)
            began = time.perf_counter() - at["seconds"]
            for batch, images in enumerate(on_device(loader, device), batches.start + 1):
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    loss = step(images)
                scaler.scale(loss).backward()
                if dino:
                    scaler.unscale_(optimizers[method.arm])
                    method.before_step(optimizers[method.arm], args.lr, args.min_lr,
                                       iteration / iterations)
                for optimizer in optimizers.values():
                    scaler.step(optimizer)
                scaler.update()
                if dino:
                    method.after_step(iteration / iterations)
                for scheduler in schedulers.values():
                    scheduler.step()
                swa.after_step(iteration)

                iteration += 1
                loss_sum += loss.detach()
                bar.update(len(images[0] if dino else images) * parallel.world())
                if iteration % 20 == 0:  # the one wait for the device
                    stop_if_not_finite(loss_sum, epoch)
                    bar.set_postfix_str(f"epoch {epoch + 1}/{args.epochs}, loss {loss.item():.3g}, "
                                        f"lr {any_optimizer.param_groups[0]['lr']:.1e}{shown}",
                                        refresh=False)
                stop = signals.noted(device, iteration)
                if stop or cli.is_due(args.save_every, iteration, saved):
                    stop_if_not_finite(loss_sum, epoch)
                    write(epoch=epoch, batch=batch, iteration=iteration, loss=loss_sum.item(),
                          seconds=time.perf_counter() - began)
                    saved = time.perf_counter()
                if stop:
                    signals.leave(f"{out / 'last.pt'} holds iteration {iteration}; --resume goes on")
            stop_if_not_finite(loss_sum, epoch)
            mean_loss = parallel.over_all(loss_sum).item() / (len(batches) * parallel.world())
            seconds = time.perf_counter() - began
            row = {"arms": "+".join(method.arms), "epoch": epoch + 1, "iteration": iteration,
                   "loss": mean_loss, "lr": any_optimizer.param_groups[0]["lr"],
                   "seconds": round(seconds, 3), "images_per_second": round(batches.n / seconds, 2),
                   "swa_snapshots": swa.snapshots}
            if monitor is not None and parallel.rank() == 0:
                row |= monitor(method.arms, device)
                row["monitor_seconds"] = round(time.perf_counter() - began - seconds, 3)
                shown = health.in_brief(row)
            write(epoch=epoch + 1, batch=0, iteration=iteration, loss=0.0, seconds=0.0,
                  log=[*at["log"], row])
            saved = time.perf_counter()
            stop_if_collapsed()
    return swa, at["log"]


def stop_if_not_finite(loss, epoch):
    """Raise FloatingPointError (exit status 1) on a loss that is no number."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch + 1}; what was saved "
                                 f"before stays; try a smaller --lr, or --amp off")


if __name__ == "__main__":
    cli.run(main)
