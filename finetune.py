"""Fine-tune one arm on a fraction of the labels (sections 4.2 and F.3), test it once.

    python finetune.py --ckpt cnn.pt --frac 0.01
    python finetune.py --arch resnet50 --data /path          (supervised baseline, no pre-training)
    python finetune.py --ckpt cnn.pt --frac 0.01 --resume    (resumes an interrupted run)
    python finetune.py --ckpt cnn.pt --mode knn              (nothing is trained; or: --mode linear)

writes to --out (default: finetune_ARM_FRAC beside the checkpoint): best.pt, metrics.json,
predictions.csv, confusion.csv, log.jsonl, split.csv, config.json; with several --seeds a folder each
and summary.json. Image size, normalization, data and split come from the checkpoint.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import data
from common import checkpoint, cli, collapse, distributed, starts, testing
from common.arms import KeyValues
from common.cli import UserError
from common.metrics import score, summarize
from common.readers import read
from common.report import class_counts
from common.run import Run, half_cycle, on_device
from common.splits import label_fraction
from losses import class_weights, focal_loss

OUTPUTS = (
    "best.pt",
    "metrics.json",
    "predictions.csv",
    "confusion.csv",
    "log.jsonl",
    "split.csv",
    "duplicates.csv",
    "config.json",
    "last.pt",
)
MAY_CHANGE = {"workers", "device", "out", "overwrite", "resume", "cache", "save_every"}


def add_arguments(parser):
    """The flags of fine-tuning, besides those of the data and of every run."""
    add = parser.add_argument
    add("--ckpt", metavar="FILE", help="cnn.pt or vit.pt of pretrain.py")
    add("--arch", metavar="NAME", help="timm model to start from instead, the supervised baseline")
    add(
        "--arch-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="arguments for timm.create_model, with --arch",
    )
    add("--init", metavar="WHAT", help="with --arch: imagenet (default), random or a weights file")
    add("--img-size", type=cli.positive, help="with --arch: side of the images (default: 384)")
    add(
        "--allow-seen",
        action="store_true",
        help="test on images that pre-training saw, where there are no others",
    )
    add("--frac", type=cli.fraction, default=1.0, help="share of the training labels used (4.2)")
    add(
        "--mode",
        default="e2e",
        choices=["e2e", "linear", "knn"],
        help="e2e: all weights (4.2); linear: the head alone; knn: nothing is trained, an image gets "
        "the labels of the 20 labelled ones with the nearest features",
    )
    add("--epochs", type=cli.positive, default=50, help="at most (F.3.2)")
    add(
        "--patience",
        type=cli.positive,
        default=5,
        help="epochs without a lower validation loss before it stops (F.3.2)",
    )
    add("--bs", "--batch-size", type=cli.positive, default=16, help="images per step")
    add("--lr", type=cli.rate, default=3e-4, help="Adam's learning rate (F.3.2)")
    add("--min-lr", type=cli.rate, default=1e-6, help="the minimum of its cosine")
    add(
        "--t-max",
        type=cli.t_max,
        default=16,
        metavar="N",
        help="iterations from --lr down to --min-lr, and up again, or: run, one descent",
    )
    add(
        "--class-weights",
        default="minmax",
        choices=["minmax", "inverse", "none"],
        help="minmax: the paper's, favors the majority; inverse: favors the rare",
    )
    add("--seed", type=cli.count, help="with --arch: of the split (default: 0)")
    add(
        "--seeds",
        type=cli.count,
        nargs="+",
        metavar="N",
        help="one run each, with its own label draw, head, order and augmentation; same split "
        "(default: the split's seed)",
    )
    add("--out", metavar="DIR", help="output folder")


def parse_arguments():
    """The arguments, and the state of --resume FILE or None."""
    parser = cli.Parser(__doc__)
    data.add_arguments(parser)
    add_arguments(parser)
    cli.add_run_arguments(parser)
    args, state = parser.parse_args(), None
    if args.ckpt and (args.img_size or args.arch_kwargs or args.init or args.seed is not None):
        parser.error(
            "--img-size, --arch-kwargs, --init and --seed go with --arch; the checkpoint has "
            "its own (--seeds varies all but the split)"
        )
    if args.resume:
        if args.resume is True:
            origin = next(output_folder(args).glob("**/config.json"), None)
            saved = json.loads(origin.read_text())["arguments"] if origin else {}
        else:
            origin, state = args.resume, checkpoint.load_training(args.resume, "finetune.py")
            saved, folder = state["args"], Path(origin).parent
            several = len(saved["seeds"] or ()) > 1  # a folder each
            parser.set_defaults(out=str(folder.parent if several else folder))
        args = cli.parse_again(parser, saved, MAY_CHANGE, origin)
    if (args.ckpt is None) == (args.arch is None):
        parser.error("give either --ckpt FILE or --arch NAME")
    if args.arch and not args.data:
        parser.error("--arch needs --data PATH")
    if args.ckpt:
        args.ckpt = os.path.abspath(args.ckpt)
    data.make_absolute(args)
    return args, state


def output_folder(args):
    """--out, or finetune_ARM_FRAC beside the checkpoint."""
    if args.out:
        return Path(args.out)
    arm = checkpoint.load_weights(args.ckpt)["arm"] if args.ckpt else str(args.arch).split(".")[0]
    name = f"finetune_{arm}_{args.frac:g}" + ("" if args.mode == "e2e" else f"_{args.mode}")
    return (Path(args.ckpt).parent if args.ckpt else Path(".")) / name


def main():
    if distributed.world_size() > 1:
        raise UserError(
            "finetune.py runs in one process, without torchrun: few labels need one GPU"
        )
    args, given_state = parse_arguments()
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    if args.ckpt:
        start = starts.from_checkpoint(args.ckpt)
        starts.fill_in(args, start.data)
        args.seed = start.seed
    else:
        args.init, args.seed = args.init or "imagenet", args.seed or 0
        start = starts.from_name(args.arch, args.init, args.img_size or 384, args.arch_kwargs)
    seeds, out = args.seeds or [args.seed], output_folder(args)
    args.out = os.path.abspath(out)
    folders = {seed: out / f"seed{seed}" if len(seeds) > 1 else out for seed in seeds}
    for folder in folders.values():
        if not args.resume:
            cli.refuse_overwrite(folder, ("metrics.json", "best.pt", "last.pt"), args.overwrite)

    images = read(args.data, **data.options(args))
    testing.refuse_unlabelled(images)
    images.decode(start.metadata["img_size"], data.cache_dir(args.cache), args.skip_bad)
    split = data.split_and_report(
        images,
        args.seed,
        args.dedup,
        starts.seen_in_pretraining(start.seen, images),
        args.allow_seen,
    )
    seen = starts.seen_in_pretraining(start.seen, images)  # --dedup may have left some out
    testing.refuse_untestable(images, split, seen, args.allow_seen)
    used = {seed: label_fraction(images, split == "train", args.frac, seed) for seed in seeds}

    results, needed = (
        [],
        set(OUTPUTS) - {"last.pt"} - ({"best.pt", "log.jsonl"} if args.mode == "knn" else set()),
    )
    for seed, folder in folders.items():
        if args.resume and all((folder / name).exists() for name in needed):
            print(f"seed {seed}: {folder} is finished")
            results.append(json.loads((folder / "metrics.json").read_text()))
            continue
        digest = starts.data_digest(images, split, used[seed])
        state = given_state if given_state and given_state["seed"] == seed else None
        if args.resume and state is None:
            state = saved_state(folder)
        if state is not None and state["digest"] != digest:
            raise UserError(
                f"{images.path}: the images, their split or their labels are not those "
                f"that the run in {folder} began with"
            )
        checkpoint.start_folder(folder, OUTPUTS, OUTPUTS if state is None else ())
        counts = ", ".join(f"{c} {n}" for c, n in class_counts(images, used[seed]).items())
        print(
            f"seed {seed}: labels of {used[seed].sum()} of {(split == 'train').sum()} training "
            f"images: {counts}"
        )
        checkpoint.write_json(
            folder / "config.json", {"command": sys.argv, "arguments": vars(args)}
        )
        data.write_split(folder, images, split, used[seed])
        job = SimpleNamespace(
            start=start,
            images=images,
            split=split,
            used=used[seed],
            seen=seen,
            seed=seed,
            digest=digest,
            device=device,
            amp=amp,
            out=folder,
        )
        probabilities, facts = (
            nearest(job, args.bs, args.workers)
            if args.mode == "knn"
            else finetune(job, state, args)
        )
        results.append(
            testing.write_results(
                job,
                probabilities,
                {"ckpt": args.ckpt, "mode": args.mode, "frac": args.frac, "split_seed": args.seed},
                facts,
            )
        )
        (folder / "last.pt").unlink(missing_ok=True)
    if len(results) > 1:
        summary = summarize(results)
        checkpoint.write_json(out / "summary.json", {"seeds": seeds, "metrics": summary})
        print(
            f"{len(seeds)} seeds: "
            + ", ".join(
                f"{key} {value['mean']:.4f} ± {value['std']:.4f}" for key, value in summary.items()
            )
        )
    print(f"wrote {out}")
    if args.mode != "knn":
        print(
            f"next: python predict.py --ckpt {folder / 'best.pt'} --data new_images/ "
            f"--out predictions.csv"
        )


def saved_state(folder):
    """What a run in this folder left to resume from: last.pt, or best.pt where it was trained and only
    files are missing; None."""
    if (folder / "last.pt").exists():
        return checkpoint.load_training(folder / "last.pt", "finetune.py")
    if (folder / "best.pt").exists():
        best = checkpoint.load_weights(folder / "best.pt")
        return {**best["training"], "best_state": best["state_dict"]}
    print(f"{folder}: holds no last.pt, so the run starts from the beginning")
    return None


class EarlyStopping:
    """The epoch of the lowest validation loss, its scores and weights (F.3.2)."""

    def __init__(self, patience):
        self.patience, self.loss, self.epoch = patience, math.inf, 0
        self.scores, self.weights = None, None

    def update(self, epoch, loss, scores, model):
        """epoch: from 1."""
        if loss < self.loss:
            self.loss, self.epoch, self.scores = loss, epoch, scores
            self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def state_dict(self):
        """Plain numbers and tensors, to resume from."""
        return {
            "best_loss": self.loss,
            "best_epoch": self.epoch,
            "best_val": self.scores,
            "best_state": self.weights,
        }

    def load_state_dict(self, state):
        """The counterpart of state_dict()."""
        self.loss, self.epoch, self.scores, self.weights = (
            state[key] for key in ("best_loss", "best_epoch", "best_val", "best_state")
        )


def batches_of(job, mask, bs, workers, transform=None):
    """A loader of (images, targets) of the masked images, shuffled where they are augmented."""
    index, labels = mask.nonzero()[0], job.images.labels
    targets = torch.from_numpy(
        labels.astype("float32") if job.images.multilabel else labels.argmax(1)
    )
    dataset = data.AugmentedImages(job.images.images, index, transform, targets[index], job.seed)
    batches = data.EpochBatches(
        len(index), bs, None if transform is None else job.seed, drop_single=transform is not None
    )
    return data.loader(dataset, batches, job.device, workers)


@torch.no_grad()
def evaluate(job, model, loader, weights):
    """Mean focal loss, and probabilities (N, C): one sigmoid per class."""
    model.eval()
    logits, true = [], []
    for images, target in on_device(
        loader, job.device, job.start.metadata["mean"], job.start.metadata["std"]
    ):
        with torch.autocast(job.device.type, job.amp, enabled=job.amp is not None):
            logits.append(model(images).float())
        true.append(target)
    logits = torch.cat(logits)
    return focal_loss(logits, torch.cat(true), weights).item(), logits.sigmoid().cpu().numpy()


def finetune(job, state, args):
    """Train on the used labels, keep the epoch of the lowest validation loss, write best.pt.

    job: what main() settled; state: of a last.pt or best.pt to resume from. Returns the test
    probabilities (N, C) and what metrics.json says of the training.
    """
    images, device, amp, metadata = job.images, job.device, job.amp, job.start.metadata
    torch.manual_seed(job.seed)
    model = job.start.make()
    model.reset_classifier(len(images.classes))
    if args.mode == "linear":
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    model.to(device, memory_format=torch.channels_last).train(args.mode == "e2e")
    train_loader = batches_of(
        job, job.used, args.bs, args.workers, data.augmentation(metadata["img_size"])
    )
    val_loader = batches_of(job, job.split == "val", args.bs, args.workers)
    weights = class_weights(images.labels[job.used].sum(0), args.class_weights).to(device)
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], args.lr, fused=True
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, half_cycle(args.t_max, args.epochs * len(train_loader)), args.min_lr
    )
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    best = EarlyStopping(args.patience)
    run = Run(
        job.out,
        device,
        {"script": "finetune.py", "args": vars(args), "seed": job.seed, "digest": job.digest},
        state,
        save_every=args.save_every,
        save_epochs=False,
        mean=metadata["mean"],
        std=metadata["std"],
    )
    if state is None or "rng" in state:
        run.announce(
            lambda batch: focal_loss(model(batch[0]), batch[1], weights),
            amp,
            model,
            train_loader,
            args.epochs,
            also=int((job.split == "val").sum()),
        )
        run.track(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, best=best)
    else:
        best.load_state_dict(state)  # of best.pt, which keeps only the end
    for _ in run.epochs(
        args.epochs, train_loader, done=lambda: run.epoch >= best.epoch + args.patience
    ):
        model.train(args.mode == "e2e")  # linear: batch-norm stays as pre-training left it
        for batch, target in run.batches():
            optimizer.zero_grad()
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model(batch)
            loss = focal_loss(logits, target, weights)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            run.note(loss)
        val_loss, probabilities = evaluate(job, model, val_loader, weights)
        run.check_finite(val_loss)
        val = score(
            images.labels[job.split == "val"], probabilities, images.classes, images.multilabel
        )
        best.update(run.epoch + 1, val_loss, val, model)
        run.show(f"val loss {val_loss:.3g}, val F1 {val['macro_f1']:.3f}")
        run.end_epoch(
            train_loss=run.mean_loss(),
            val_loss=val_loss,
            val_macro_f1=val["macro_f1"],
            lr=scheduler.get_last_lr()[0],
        )

    model.load_state_dict(best.weights)
    log = run.progress["log"]
    testing.write_best(
        job,
        model,
        best.epoch,
        args.seed,
        data.options(args, data.OPTIONS),
        vars(args),
        {**run.progress, **best.state_dict(), "best_state": None, "digest": job.digest},
    )
    checkpoint.write_json_lines(job.out / "log.jsonl", log)
    _, probabilities = evaluate(
        job, model, batches_of(job, job.split == "test", args.bs, args.workers), weights
    )
    return probabilities, {
        "best_epoch": best.epoch,
        "epochs": len(log),
        "val_loss": best.loss,
        "val": best.scores,
        "seconds": round(sum(row["seconds"] for row in log), 2),
        "class_weights": weights.tolist(),
    }


def nearest(job, bs, workers):
    """--mode knn: label the test images by the used ones (collapse.knn). Returns as finetune()."""
    began = time.perf_counter()
    torch.manual_seed(job.seed)
    model, metadata = job.start.make(), job.start.metadata
    model.to(job.device, memory_format=torch.channels_last)

    def features(mask):
        loader = on_device(
            batches_of(job, mask, bs, workers), job.device, metadata["mean"], metadata["std"]
        )
        with torch.autocast(job.device.type, job.amp, enabled=job.amp is not None):
            return collapse.embed(model, (images for images, _ in loader))[0].cpu()

    images = job.images
    known, labels = features(job.used), torch.from_numpy(images.labels[job.used]).float()
    found = {
        part: collapse.knn(known, labels, features(job.split == part)).numpy()
        for part in ("val", "test")
    }
    return found["test"], {
        "neighbours": min(20, len(known)),
        "val": score(
            images.labels[job.split == "val"], found["val"], images.classes, images.multilabel
        ),
        "seconds": round(time.perf_counter() - began, 2),
    }


if __name__ == "__main__":
    cli.run(main)
