"""Fine-tune one arm on a fraction of the labels (sections 4.2 and F.3), test it once.

    python finetune.py --ckpt cnn.pt --frac 0.01
    python finetune.py --ckpt cnn.pt vit.pt --frac 0.01      (each, and the mean of both)
    python finetune.py --arch resnet50 --data /path          (supervised baseline, no pre-training)
    python finetune.py --ckpt cnn.pt --frac 0.01 --resume    (resumes an interrupted run)
    python finetune.py --ckpt cnn.pt --mode knn              (nothing is trained; or: --mode linear)

writes to --out (default: finetune_ARM_FRAC beside the checkpoint): best.pt, metrics.json,
predictions.csv, confusion.csv, log.jsonl, split.csv, config.json; of several arms and --seeds a
folder each and summary.json. Image size, normalization, data and split come from the checkpoint.
"""

import os
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import data
from common import arms, checkpoint, cli, collapse, distributed, readers, results, splits, starts
from common.decode import digest
from common.metrics import fit_temperature, probabilities_of, score
from common.run import Run, half_cycle, on_device
from losses import class_weights, focal_loss

OUTPUTS = ("metrics.json", "predictions.csv", "confusion.csv", "split.csv", "duplicates.csv")
OUTPUTS += ("config.json", "best.pt", "log.jsonl", "last.pt")  # best.pt, log.jsonl: of training
MAY_CHANGE = {*cli.MAY_CHANGE, "seeds"}  # when a run is resumed


def parse_arguments():
    """The arguments; where a run is resumed, those that it began with."""
    parser = cli.Parser(__doc__)
    data.add_arguments(parser)
    add = parser.add_argument
    files = {"metavar": "FILE", "type": data.path, "nargs": "+"}
    add("--ckpt", **files, help="cnn.pt or vit.pt of pretrain.py; both: each, and their mean")
    add("--arch", metavar="NAME", help="timm model to start from instead, the supervised baseline")
    add("--arch-kwargs", **arms.KWARGS, help="arguments for timm.create_model, with --arch")
    add("--init", metavar="WHAT", help="with --arch: imagenet (default), random or a weights file")
    add("--img-size", type=cli.positive, help="with --arch: side of the images (default: 384)")
    add("--allow-seen", action="store_true", help="test on images of pre-training if need be")
    add("--frac", type=cli.fraction, default=1.0, help="share of the training labels used (4.2)")
    modes = "train all weights (4.2), the head alone, or nothing: 20 nearest features"
    add("--mode", default="e2e", choices=["e2e", "linear", "knn"], help=modes)
    patience = "stop after N epochs without a lower validation loss (F.3.2)"
    add("--patience", type=cli.positive, default=5, metavar="N", help=patience)
    kinds = {"choices": ["minmax", "inverse", "none"], "default": "minmax"}
    add("--class-weights", **kinds, help="minmax: the paper's, favors the majority; inverse: rare")
    add("--seed", type=cli.count, help="with --arch: of the split (default: 0)")
    seeds = "a run each: its own labels, head, order, augmentation; the same split"
    add("--seeds", type=cli.count, nargs="+", metavar="N", help=seeds)
    add("--out", metavar="DIR", help="output folder (default: finetune_ARM_FRAC by the checkpoint)")
    cli.add_run_arguments(parser, epochs=50, lr=3e-4)  # F.3.2
    args = parser.parse_args()
    if args.ckpt and (args.img_size or args.arch_kwargs or args.init or args.seed is not None):
        parser.error("--img-size, --arch-kwargs, --init and --seed go with --arch, not with --ckpt")
    if args.resume is True:
        found = output_folder(args).glob("**/config.json")
        if newest := max(found, key=os.path.getmtime, default=None):
            saved = checkpoint.read_json(newest, "arguments")
            starts.check(newest, saved, {"arguments": dict})
            args = starts.parse_again(parser, saved["arguments"], MAY_CHANGE, newest)
    elif args.resume:
        args, _ = starts.resumed(parser, args, "finetune.py", MAY_CHANGE)
    if (args.ckpt is None) == (args.arch is None):
        parser.error("give either --ckpt FILE or --arch NAME")
    if args.arch and not args.data:
        parser.error("--arch needs --data PATH")
    return args


def output_folder(args):
    """--out, or finetune_ARM_FRAC beside the checkpoint; of both arms finetune_ARM_ARM_FRAC."""
    if args.out:
        return Path(args.out)
    arm_names = [starts.load_weights(path)["arm"] for path in args.ckpt or []] or [str(args.arch)]
    name = "_".join(["finetune", *(x.split(".")[0] for x in arm_names), f"{args.frac:g}"])
    name += f"_{args.mode}" * (args.mode != "e2e")
    return (Path(args.ckpt[0]).parent if args.ckpt else Path()) / name


def begin(args):
    """What each arm starts from; fills in the data flags and the seed of the split."""
    if args.arch:
        args.init, args.seed = args.init or "imagenet", args.seed or 0
        return [starts.from_name(args.arch, args.init, args.img_size or 384, args.arch_kwargs)]
    arms = [starts.from_checkpoint(path) for path in args.ckpt]
    alike = {(x.seed, x.metadata["img_size"], x.carried.numpy().tobytes()) for x in arms}
    if len(alike) > 1 or len({x.metadata["arm"] for x in arms}) < len(arms):
        fix = "fine-tune each alone; python -m tools.compare scores their mean"
        raise cli.UserError(f"{' '.join(args.ckpt)}: are not the arms of one pre-training; {fix}")
    if args.data is None:  # the flags of the checkpoint, where none was given
        vars(args).update({k: getattr(args, k) or x for k, x in arms[0].data.items() if k in args})
    if not isinstance(args.data, str):
        raise cli.UserError(f"{args.ckpt[0]}: names no data; give --data PATH")
    args.seed = arms[0].seed
    return arms


def main():
    if distributed.WORLD_SIZE > 1:
        raise cli.UserError("finetune.py runs in one process, without torchrun: one GPU is enough")
    args = parse_arguments()
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    out, arms = output_folder(args), begin(args)
    args.out, seeds = os.path.abspath(out), [*dict.fromkeys(args.seeds or [args.seed])]
    names = [start.metadata["arm"] for start in arms]
    parts = [*names, "mean"] if len(arms) > 1 else [""]
    inner = [f"seed{seed}" for seed in seeds] if len(seeds) > 1 else [""]
    folders = {part: [out / part / name for name in inner] for part in parts}
    every = sum(folders.values(), [])
    files = [folder / name for folder in every for name in OUTPUTS]
    cli.refuse_inputs(files, args.data, *(args.ckpt or ()), args.init)
    cli.claim(out)
    others = {file.parent for part in parts for file in (out / part).glob("seed*/config.json")}
    if others := others - {*every}:
        fix = "name these seeds too, with --resume, or give another --out"
        raise cli.UserError(f"{out}: has {cli.preview(sorted(others))} of an earlier run; {fix}")
    for folder in {out, *every} if not args.resume else ():
        cli.refuse_overwrite(folder, args.overwrite)

    images = readers.read(args.data, **data.options(args))
    results.refuse_unlabelled(images)
    cache = data.cache_dir(args.cache)
    images.decode(arms[0].metadata["img_size"], cache, args.skip_bad, args.dry_run)
    split = data.split_and_report(images, args.seed, args.dedup, arms[0].carried, args.allow_seen)
    hashes = images.table["hash"].view("int64")  # of the pixels
    seen = np.isin(hashes, torch.cat([start.seen for start in arms]))
    if none := [side for side in splits.SIDES if side not in split]:
        what = f"{len(images)} images leave none for the {none[0]} split"
        raise cli.UserError(f"{images.path}: {what}")
    if seen[split == "test"].all() and not args.allow_seen:
        what = "pre-training saw all test images; add new or --allow-seen"
        raise cli.UserError(f"{images.path}: {what}")
    job = SimpleNamespace(images=images, split=split, hashes=hashes, seen=seen, bs=args.bs)
    job.device, job.amp, job.workers, job.linear = device, amp, args.workers, args.mode == "linear"
    for part, job.start, job.ckpt in zip(parts, arms, args.ckpt or [None]):
        job.normalization = job.start.metadata["mean"], job.start.metadata["std"]
        found = [run_seed(job, args, *x) for x in zip(seeds, folders[part])]
        if None not in found:
            results.write_summary(out / part, seeds, found)
    if args.dry_run:
        return
    if len(arms) > 1:
        runs = zip(*(folders[name] for name in names))
        found = [results.write_mean(*x) for x in zip(folders["mean"], runs)]
        results.write_summary(out / "mean", seeds, found)
    print(f"wrote {out}")
    if args.mode != "knn":
        best = " ".join(str(folders[part][-1] / "best.pt") for part in parts[: len(arms)])
        print(f"next: python predict.py --ckpt {best} --data new_images/ --out predictions.csv")


def run_seed(job, args, seed, out):
    """Fine-tune with a seed and test, unless it is done. Returns metrics.json; None: a dry run."""
    images, split, job.seed, job.out = job.images, job.split, seed, out
    name, knn = f"{job.start.metadata['arm']}, seed {seed}", args.mode == "knn"
    if args.resume and all((out / name).exists() for name in OUTPUTS[: -3 if knn else -1]):
        print(f"{name}: {out} is finished")
        return checkpoint.read_json(out / "metrics.json", *results.PARTS)
    job.used = splits.label_fraction(images, split == "train", args.frac, seed)
    counts = images.labels[job.used].sum(0)
    job.weights = class_weights(counts, args.class_weights).to(job.device)
    by_image = args.class_weights == "inverse" and not images.multilabel  # a column: of all images
    job.weigh = lambda target: job.weights[target][:, None] if by_image else job.weights
    job.digest = digest(job.hashes.tobytes(), images.labels.tobytes(), "".join(split), job.used)
    state = saved_state(out) if args.resume else None
    if state is not None and state["digest"] != job.digest:
        what = "the images, their split or their labels are not those that the run"
        raise cli.UserError(f"{images.path}: {what} in {out} began with")
    shown = ", ".join(f"{c} {n}" for c, n in zip(images.classes, counts.tolist()))
    of = f"{job.used.sum()} of {(split == 'train').sum()} training images"
    print(f"{name}: labels of {of}: {shown}")
    if args.dry_run and knn:
        return None
    start_folder = partial(write, job, args, OUTPUTS if state is None else ())
    if not knn and (state is None or "rng" in state):
        metadata = {"script": "finetune.py", "args": vars(args), "seed": seed, "digest": job.digest}
        run = Run(out, job.device, job.amp, metadata, state, save_every=args.save_every)
        run.seconds_between_saves, run.normalization = 30, job.normalization
        run.write = start_folder
        model, schedule = build(job), (args.patience, args.lr, args.min_lr, args.t_max)
        training = finetune(job, model, run, args.epochs, *schedule)
        if training is None:
            return None
        save_best(job, args, model, training)
    elif not args.dry_run:
        start_folder()
    test, training = nearest(job) if knn else tested(job)
    settings = {"ckpt": job.ckpt, "mode": args.mode, "frac": args.frac, "split_seed": args.seed}
    found = results.report(job, *test, settings | training)
    (out / "last.pt").unlink(missing_ok=True)
    return found


def write(job, args, stale):
    """Clear the folder of stale files; write what is known from the start."""
    checkpoint.start_folder(job.out, OUTPUTS, stale)
    checkpoint.write_json(job.out / "config.json", checkpoint.configuration(args))
    data.write_split(job.out, job.images, job.split, job.used)


def save_best(job, args, model, training):
    """Write best.pt, which tells what it was trained on and how."""
    images, start, trained = job.images, job.start, job.hashes[job.split != "test"]
    saved = {**start.metadata, "epoch": training["best_epoch"], "seed": args.seed}
    saved |= {"class_names": images.classes, "multilabel": images.multilabel, "training": training}
    saved |= {"temperature": training["temperature"], "data": data.options(args, data.OPTIONS)}
    saved["seen"] = torch.cat([start.seen, torch.from_numpy(trained)]).unique()
    saved["split"] = splits.carried(images, job.split, start.carried)
    saved["config"] = vars(args) | {"ckpt": job.ckpt}
    checkpoint.save(job.out / "best.pt", checkpoint.weights_file(model, **saved))


def saved_state(folder):
    """What a run left here to resume from: last.pt, the training that best.pt ended, or None."""
    best, last = folder / "best.pt", folder / "last.pt"
    if best.exists():
        training = starts.load_weights(best).get("training")
        starts.check(best, training, starts.BEST)
        return training
    if last.exists():
        return starts.load_last(last, "finetune.py")
    print(f"{folder}: holds no last.pt, so the run starts from the beginning")
    return None


def batches_of(job, mask, transform=None):
    """A loader of (images, targets), shuffled to train, in batches of 4 --bs to evaluate."""
    index, train = mask.nonzero()[0], transform is not None
    labels, seed = job.images.labels[index], job.seed if train else None
    targets = torch.from_numpy(labels.astype("f4") if job.images.multilabel else labels.argmax(1))
    dataset = data.AugmentedImages(job.images.images, index, transform, targets, job.seed)
    batches = data.EpochBatches(len(index), job.bs * (1 if train else 4), seed, drop_single=train)
    return data.loader(dataset, batches, job.device, job.workers)


@torch.inference_mode()
def evaluate(job, model, loader):
    """Mean focal loss, and logits (N, C) on the CPU."""
    model.eval()
    outputs = []
    for images, target in on_device(loader, job.device, *job.normalization):
        with torch.autocast(job.device.type, job.amp, enabled=job.amp is not None):
            outputs.append((model(images).float(), target))
    logits, true = map(torch.cat, zip(*outputs))
    return focal_loss(logits, true, job.weigh(true)).item(), logits.cpu()


def validate(job, logits):
    """The temperature that fits validation logits (N, C) best, and their scores."""
    labels, multilabel = job.images.labels[job.split == "val"], job.images.multilabel
    T = fit_temperature(logits, labels, multilabel)
    both = probabilities_of(logits, T, multilabel)
    return T, score(None, labels, *both, multilabel, job.images.classes)


def build(job):
    """The model with a new head of a logit per class; linear: only the head is trained."""
    torch.manual_seed(job.seed)
    model = job.start.make()
    model.reset_classifier(len(job.images.classes))
    starts.refuse_odd_head(model, job.start.metadata, job.linear)
    if job.linear:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    return model.to(job.device).train(not job.linear)


def finetune(job, model, run, epochs, patience, lr, min_lr, t_max):
    """Train on the used labels; the model ends with the weights of the lowest validation loss.
    Returns how training went; None where it is a dry run."""
    device, amp, val_mask = job.device, job.amp, job.split == "val"
    train_loader = batches_of(job, job.used, data.augmentation(job.start.metadata["img_size"]))
    val_loader = batches_of(job, val_mask)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr, fused=True)
    scheduler = CosineAnnealingLR(optimizer, half_cycle(t_max, epochs * len(train_loader)), min_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    step = lambda x: focal_loss(model(x[0]), x[1])  # noqa: E731
    if not run.announce(step, model, train_loader, epochs, val_mask):
        return None
    run.track(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    best = run.progress.setdefault("best", {"best_loss": float("inf"), "best_epoch": 0})
    if val_mask.sum() < splits.TOO_FEW:
        print(f"--patience is ignored: {val_mask.sum()} validation images are too few to stop on")
        patience = epochs
    for _ in run.epochs(epochs, train_loader, lambda epoch: epoch >= best["best_epoch"] + patience):
        model.train(not job.linear)  # linear: batch-norm stays as pre-training left it
        for batch, target in run.batches():
            optimizer.zero_grad()
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model(batch)
            loss = focal_loss(logits, target, job.weigh(target))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            run.note(loss)
        val_loss, logits = evaluate(job, model, val_loader)
        run.check_finite(val_loss)
        T, val = validate(job, logits)
        if val_loss < best["best_loss"]:
            best.update(best_loss=val_loss, best_epoch=run.epoch + 1, temperature=T, best_val=val)
            best["best_state"] = {key: x.clone() for key, x in model.state_dict().items()}
        f1, lr = val["macro_f1"], scheduler.get_last_lr()[0]
        run.show(f"val loss {val_loss:.3g}, val F1 {f1:.3f}")
        run.end_epoch(train_loss=run.mean_loss(), val_loss=val_loss, val_macro_f1=f1, lr=lr)
    model.load_state_dict(best.pop("best_state"))
    return {**run.progress, **best, "digest": job.digest}


def tested(job):
    """Two (N, C) arrays, the test probabilities of best.pt, and what metrics.json says of it."""
    best = starts.load_weights(job.out / "best.pt")
    model = starts.build(best, job.out / "best.pt").to(job.device)
    _, logits = evaluate(job, model, batches_of(job, job.split == "test"))
    training, log, T = best["training"], best["training"]["log"], best["temperature"]
    checkpoint.write_json_lines(job.out / "log.jsonl", log)
    summary = {"best_epoch": training["best_epoch"], "epochs": len(log)}
    summary |= {"val_loss": training["best_loss"], "val": training["best_val"]}
    summary |= {"temperature": T, "class_weights": job.weights.tolist()}
    summary["seconds"] = round(sum(row["seconds"] for row in log), 2)
    return probabilities_of(logits, T, job.images.multilabel), summary


def nearest(job):
    """--mode knn: label the test images by the used ones (collapse.knn), whose votes sum to 1.
    Returns as tested()."""
    began, images, features = time.perf_counter(), job.images, []
    torch.manual_seed(job.seed)
    model = job.start.make().to(job.device)
    for mask in (job.used, job.split == "val", job.split == "test"):
        loader = on_device(batches_of(job, mask), job.device, *job.normalization)
        with torch.autocast(job.device.type, job.amp, enabled=job.amp is not None):
            features.append(collapse.embed(model, (batch for batch, _ in loader))[0].cpu())
    labels = torch.from_numpy(images.labels[job.used]).float()
    val, test = (collapse.knn(features[0], labels, x).numpy() for x in features[1:])
    true = images.labels[job.split == "val"]
    summary = {"neighbours": min(20, len(labels))}
    summary["val"] = score(None, true, val, val, images.multilabel, images.classes)
    return (test, test), summary | {"seconds": round(time.perf_counter() - began, 2)}


if __name__ == "__main__":
    cli.run(main)
