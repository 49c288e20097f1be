"""Fine-tune one arm on a fraction of the labels (sections 4.2 and F.3), test it once.

    python finetune.py --ckpt cnn.pt --frac 0.01
    python finetune.py --arch resnet50 --data /path          (supervised baseline, no pre-training)
    python finetune.py --ckpt cnn.pt --frac 0.01 --resume    (goes on where it was cut)
    python finetune.py --ckpt cnn.pt --mode knn              (nothing is trained; or: --mode linear)

writes to --out (default: finetune_ARM_FRAC beside the checkpoint): best.pt, metrics.json,
predictions.csv, confusion.csv, log.jsonl, split.csv, config.json; with several --seeds a folder each
and summary.json. Image size, normalization, data and split come from the checkpoint.
"""

import copy
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import checkpoint
import cli
import data
import health
import parallel
from cache import digest
from checkpoint import load_weights, save, weights_file, write_csv, write_json
from cli import UserError
from losses import class_weights, focal_loss
from metrics import decide, multiclass_scores, multilabel_scores
from pretrain import KeyValues, half_cycle, make_arm, stop_if_not_finite
from splits import copies, label_fraction

OUTPUTS = ("best.pt", "metrics.json", "predictions.csv", "confusion.csv", "log.jsonl", "split.csv",
           "duplicates.csv", "config.json", "last.pt")
MAY_CHANGE = {"workers", "device", "out", "overwrite", "resume", "cache", "save_every"}


def parse_arguments():
    """The arguments, and the state of --resume FILE or None."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", metavar="FILE", help="cnn.pt or vit.pt of pretrain.py")
    add("--arch", metavar="NAME", help="timm model to start instead, the supervised baseline")
    add("--arch-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE",
        help="arguments for timm.create_model, with --arch")
    add("--init", metavar="WHAT", help="with --arch: imagenet (default), random or a weights file")
    add("--img-size", type=cli.positive, help="with --arch: side of the images (default: 384)")
    data.add_arguments(parser)
    add("--allow-seen", action="store_true",
        help="test on images that pre-training saw, where there are no others")
    add("--frac", type=cli.fraction, default=1.0, help="share of the training labels used (4.2)")
    add("--mode", default="e2e", choices=["e2e", "linear", "knn"],
        help="e2e: all weights (4.2); linear: the head alone; knn: nothing is trained, an image gets "
             "the labels of the 20 labelled ones that are nearest before the head")
    add("--epochs", type=cli.positive, default=50, help="at most (F.3.2)")
    add("--patience", type=cli.positive, default=5,
        help="epochs without a lower validation loss before it stops (F.3.2)")
    add("--bs", "--batch-size", type=cli.positive, default=16, help="images in a step")
    add("--lr", type=cli.rate, default=3e-4, help="Adam's learning rate (F.3.2)")
    add("--min-lr", type=cli.rate, default=1e-6, help="the minimum of its cosine")
    add("--t-max", type=cli.t_max, default=16, metavar="N",
        help="iterations from --lr down to --min-lr, and up again, or: run, one descent")
    add("--class-weights", default="minmax", choices=["minmax", "inverse", "none"],
        help="minmax: the paper's, favours the majority; inverse: favours the rare")
    add("--seed", type=cli.count, help="with --arch: of the split (default: 0)")
    add("--seeds", type=cli.count, nargs="+", metavar="N",
        help="one run each, with its own label draw, head, order and augmentation; same split "
             "(default: the split's seed)")
    add("--out", metavar="DIR", help="output folder")
    cli.add_run_arguments(parser)
    args = parser.parse_args()
    if args.ckpt and (args.img_size or args.arch_kwargs or args.init or args.seed is not None):
        parser.error("--img-size, --arch-kwargs, --init and --seed go with --arch; the checkpoint has "
                     "its own (--seeds varies all but the split)")
    state = None
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
    arm = load_weights(args.ckpt)["arm"] if args.ckpt else str(args.arch).split(".")[0]
    name = f"finetune_{arm}_{args.frac:g}" + ("" if args.mode == "e2e" else f"_{args.mode}")
    return (Path(args.ckpt).parent if args.ckpt else Path(".")) / name


def start_point(args):
    """What training starts from: the checkpoint's facts and a function that makes the model anew."""
    if args.ckpt:
        weights = load_weights(args.ckpt)
        if args.data is None:  # the same data, read as then where no flag says otherwise
            for key, value in weights["data"].items():
                setattr(args, key, getattr(args, key) or value)
        args.seed = weights["seed"]

        def make():
            return checkpoint.build(weights, args.ckpt)

        make()  # weights that do not fit are better known before the images are read
        facts = {key: weights[key] for key in
                 ("arch", "arm", "model_kwargs", "img_size", "mean", "std")}
        return SimpleNamespace(make=make, facts=facts, seen=weights.get("seen"))
    size, args.init, args.seed = args.img_size or 384, args.init or "imagenet", args.seed or 0
    model, kwargs = make_arm("--arch", args.arch, args.init, size, **args.arch_kwargs)

    def make():  # another seed draws other random weights
        if args.init == "random":
            return make_arm("--arch", args.arch, "random", size, **args.arch_kwargs)[0]
        return copy.deepcopy(model)

    facts = {"arch": args.arch, "arm": args.arch.split(".")[0], "model_kwargs": kwargs,
             "img_size": size, "mean": list(data.IMAGENET_MEAN), "std": list(data.IMAGENET_STD)}
    from_file = args.init not in ("imagenet", "random")
    return SimpleNamespace(make=make, facts=facts,
                           seen=checkpoint.seen_by(args.init) if from_file else None)


def main():
    if parallel.world() > 1:
        raise UserError("finetune.py runs in one process, without torchrun: few labels need one GPU")
    args, given_state = parse_arguments()
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    start = start_point(args)
    seeds = args.seeds or [args.seed]
    out = output_folder(args)
    args.out = os.path.abspath(out)
    folders = {seed: out / f"seed{seed}" if len(seeds) > 1 else out for seed in seeds}
    for folder in folders.values():
        if not args.resume:
            cli.refuse_overwrite(folder, ("metrics.json", "best.pt", "last.pt"), args.overwrite)

    images = data.read(args)
    if not images.classes:
        raise UserError(f"{images.path}: has no labels, or one class only; give each class a folder "
                        f"of its own directly below, or a CSV file: --data labels.csv --images DIR")
    if len(images.classes) == 1 and not images.multilabel:
        raise UserError(f"{images.path}: has one class only ({images.classes[0]})")
    data.decode(images, start.facts["img_size"], args.cache, args.skip_bad)
    split = data.split_and_report(images, args, args.seed, saw(start, images), args.allow_seen)
    seen = saw(start, images)  # --dedup may have left some out
    for part in ("train", "val", "test"):
        if not (split == part).any():
            raise UserError(f"{images.path}: {len(images)} images leave none for the {part} split")
    if seen is not None and seen[split == "test"].all() and not args.allow_seen:
        raise UserError(f"{images.path}: pre-training saw every test image, which leaves no honest "
                        f"test; add others, or give --allow-seen")
    used = {seed: label_fraction(images, split == "train", args.frac, seed) for seed in seeds}

    results, not_kept = [], ("last.pt", "best.pt", "log.jsonl") if args.mode == "knn" else ("last.pt",)
    for seed, folder in folders.items():
        if args.resume and all((folder / name).exists() for name in OUTPUTS if name not in not_kept):
            print(f"seed {seed}: {folder} is finished")
            results.append(json.loads((folder / "metrics.json").read_text()))
            continue
        state = given_state if given_state and given_state["seed"] == seed else None
        if state is None and args.resume and (folder / "last.pt").exists():
            state = checkpoint.load_training(folder / "last.pt", "finetune.py")
        if state is None and args.resume and (folder / "best.pt").exists():
            state = load_weights(folder / "best.pt")["training"]  # trained: only files are missing
        if state is None and args.resume:
            print(f"{folder}: holds no last.pt, so the run starts from the beginning")
        digest_now = data_digest(images, split, used[seed])
        if state is not None and state["digest"] != digest_now:
            raise UserError(f"{images.path}: the images, their split or their labels are not those that "
                            f"the run in {folder} began with")
        checkpoint.start_folder(folder, OUTPUTS, fresh=state is None)
        counts = ", ".join(f"{c} {n}" for c, n in data.class_counts(images, used[seed]).items())
        print(f"seed {seed}: labels of {used[seed].sum()} of {(split == 'train').sum()} training "
              f"images: {counts}")
        write_json(folder / "config.json", {"command": sys.argv, "arguments": vars(args)})
        write_csv(folder / "split.csv", data.SPLIT_HEADER, data.split_rows(images, split, used[seed]))
        write_csv(folder / "duplicates.csv", data.DUPLICATES_HEADER,
                  data.duplicate_rows(images, split))
        run = SimpleNamespace(
            start=start, images=images, split=split, used=used[seed], seen=seen, seed=seed, args=args,
            device=device, amp=amp, out=folder, digest=digest_now)
        results.append(nearest(run) if args.mode == "knn" else finetune(run, state))
    if len(results) > 1:
        summary = summarize(results)
        write_json(out / "summary.json", {"seeds": seeds, "metrics": summary})
        print(f"{len(seeds)} seeds: " + ", ".join(f"{key} {value['mean']:.4f} ± {value['std']:.4f}"
                                                  for key, value in summary.items()))


def data_digest(images, split, used):
    """A number that stands for the pixels, labels, split and used labels of a run."""
    return digest(np.ascontiguousarray(images.table["hash"]), np.ascontiguousarray(images.labels),
                  "".join(split), used)


def saw(start, images):
    """(N,) bool: images whose pixels pre-training saw; None where there was no pre-training."""
    if start.seen is None:
        return None
    return np.isin(np.ascontiguousarray(images.table["hash"]).view("int64"), start.seen.numpy())


def summarize(results):
    """{score: mean, standard deviation (n - 1) and values over the seeds} of metrics dicts."""
    summary = {}
    for part in ("test", "test_without_duplicates", "test_without_seen"):
        if any(r[part] is None for r in results):
            continue
        for key, value in results[0][part].items():
            values = [r[part][key] for r in results]
            if isinstance(value, float) and None not in values:
                name = key if part == "test" else f"{key}_{part[5:]}"
                summary[name] = {"mean": float(np.mean(values)),
                                 "std": float(np.std(values, ddof=1)), "values": values}
    return summary


def nearest(run):
    """--mode knn: label the test images by the used ones (health.knn). Returns the metrics."""
    start, images, began = run.start, run.images, time.perf_counter()
    torch.manual_seed(run.seed)
    model = start.make().to(run.device, memory_format=torch.channels_last)

    def features(mask):
        index = mask.nonzero()[0]
        loader = data.loader(data.Views(images.images, index), data.Batches(
            len(index), run.args.bs, drop_single=False), run.device, run.args.workers)
        with torch.autocast(run.device.type, run.amp, enabled=run.amp is not None):
            return health.embed(model, (data.normalize(
                pixels.to(run.device), start.facts["mean"], start.facts["std"])
                for pixels in loader))[0].cpu()

    known, labels = features(run.used), torch.from_numpy(images.labels[run.used]).float()
    found = {part: health.knn(known, labels, features(run.split == part)).numpy()
             for part in ("val", "test")}
    return write_results(run, found["test"], {
        "neighbours": min(20, len(known)), "val": scores(images, run.split == "val", found["val"]),
        "seconds": round(time.perf_counter() - began, 2)})


def finetune(run, state=None):
    """Train on the used labels, keep the epoch of the lowest validation loss, test once.

    run: what main() settled; state: of a last.pt or best.pt to go on from. Returns the metrics.
    """
    start, images, args, device, amp, out = (run.start, run.images, run.args, run.device, run.amp,
                                             run.out)
    torch.manual_seed(run.seed)
    model = start.make()
    model.reset_classifier(len(images.classes))
    if args.mode == "linear":
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    model.to(device, memory_format=torch.channels_last)

    targets = torch.from_numpy(images.labels.astype("float32") if images.multilabel
                               else images.labels.argmax(1))
    transform = data.augmentation(start.facts["img_size"])

    def batches_of(mask, transform=None):
        index = mask.nonzero()[0]
        views = data.Views(images.images, index, transform, targets[index], run.seed)
        batches = data.Batches(len(index), args.bs, None if transform is None else run.seed,
                               drop_single=transform is not None)
        return batches, data.loader(views, batches, device, args.workers)

    train_batches, train_loader = batches_of(run.used, transform)
    _, val_loader = batches_of(run.split == "val")
    _, test_loader = batches_of(run.split == "test")

    counts = images.labels[run.used].sum(0)
    weights = class_weights(counts, args.class_weights).to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr,
                                 fused=True)
    t_max = half_cycle(args.t_max, args.epochs * len(train_batches))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, t_max, args.min_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)

    def forward(batch):
        batch = data.normalize(batch.to(device, non_blocking=True), start.facts["mean"],
                               start.facts["std"])
        with torch.autocast(device.type, amp, enabled=amp is not None):
            return model(batch).float()

    @torch.no_grad()
    def evaluate(loader):
        """Mean focal loss, and probabilities (N, C): one sigmoid per class."""
        model.eval()
        logits, true = zip(*((forward(batch), target) for batch, target in loader))
        logits, true = torch.cat(logits), torch.cat(true).to(device)
        return focal_loss(logits, true, weights).item(), logits.sigmoid().cpu().numpy()

    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    at = {"epoch": 0, "batch": 0, "loss": 0.0, "seconds": 0.0, "log": [], "best_loss": math.inf,
          "best_epoch": 0, "best_val": None, "best_state": None}
    if state is not None:
        at = {key: state[key] for key in at}
    if state is not None and "rng" in state:  # of last.pt; best.pt keeps but the end
        checkpoint.restore(parts, state)

    def write(**progress):
        at.update(progress, seconds=time.perf_counter() - began)
        save(out / "last.pt", {"script": "finetune.py", "args": vars(args), "seed": run.seed,
                               "digest": run.digest, **at, "rng": checkpoint.random_state(),
                               **{name: part.state_dict() for name, part in parts.items()}})

    if state is not None and at["best_state"] is None and at["best_epoch"]:
        at["best_state"] = load_weights(out / "best.pt")["state_dict"]
    cost, began = 0.0, time.perf_counter() - at["seconds"]
    saved = time.perf_counter()
    with cli.Signals() as signals, cli.progress(
            total=args.epochs * train_batches.n, initial=at["epoch"] * train_batches.n) as bar:
        while at["epoch"] < args.epochs and at["epoch"] < at["best_epoch"] + args.patience:
            epoch = train_batches.epoch = at["epoch"]
            train_batches.start = at["batch"]
            model.train(args.mode == "e2e")  # linear: batch-norm stays as pre-training left it
            loss_sum = torch.tensor(at["loss"], device=device)
            for batch, (pixels, target) in enumerate(train_loader, train_batches.start + 1):
                optimizer.zero_grad()
                loss = focal_loss(forward(pixels), target.to(device), weights)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                loss_sum += loss.detach()
                bar.update(len(pixels))
                stop = signals.noted(device, batch)
                if stop or cli.is_due(args.save_every, epoch * len(train_batches) + batch, saved):
                    stop_if_not_finite(loss_sum, epoch)
                    write(batch=batch, loss=loss_sum.item())
                    saved = time.perf_counter()
                if stop:
                    signals.leave(f"{out / 'last.pt'} holds epoch {epoch + 1}; --resume goes on")
            val_loss, val_probabilities = evaluate(val_loader)
            stop_if_not_finite(loss_sum + val_loss, epoch)
            val = scores(images, run.split == "val", val_probabilities)
            if val_loss < at["best_loss"]:
                at.update(best_loss=val_loss, best_epoch=epoch + 1, best_val=val,
                          best_state=copy.deepcopy(model.state_dict()))
            bar.set_postfix_str(f"epoch {epoch + 1}/{args.epochs}, val loss {val_loss:.3g}, "
                                f"val F1 {val['macro_f1']:.3f}", refresh=False)
            at["log"].append({"epoch": epoch + 1, "train_loss": loss_sum.item() / len(train_batches),
                              "val_loss": val_loss, "val_macro_f1": val["macro_f1"],
                              "lr": scheduler.get_last_lr()[0]})
            at.update(epoch=epoch + 1, batch=0, loss=0.0)
            checkpoint.write_json_lines(out / "log.jsonl", at["log"])
            if time.perf_counter() - saved > 20 * cost:  # an epoch may be shorter than its checkpoint
                cost = -time.perf_counter()
                write()
                saved = time.perf_counter()
                cost += saved

    model.load_state_dict(at["best_state"])
    at.update(best_state=None, seconds=time.perf_counter() - began)
    write_best(run, model, at)
    _, probabilities = evaluate(test_loader)
    metrics = write_results(run, probabilities, {
        "best_epoch": at["best_epoch"], "epochs": at["epoch"], "val_loss": at["best_loss"],
        "val": at["best_val"], "seconds": round(at["seconds"], 2), "class_weights": weights.tolist()})
    (out / "last.pt").unlink(missing_ok=True)
    return metrics


def scores(images, mask, probabilities):
    """The scores of these probabilities, (n, C), on the n masked images."""
    if images.multilabel:
        return multilabel_scores(images.labels[mask], probabilities, images.classes)
    return multiclass_scores(images.labels[mask].argmax(1), probabilities, images.classes)


def write_best(run, model, at):
    """best.pt, which knows what the model saw and how training ended, and the last log.jsonl."""
    seen = torch.from_numpy(run.images.table["hash"][run.split != "test"].view("int64"))
    if run.start.seen is not None:
        seen = torch.cat([seen, run.start.seen])
    save(run.out / "best.pt", weights_file(
        model, **run.start.facts, class_names=run.images.classes, multilabel=run.images.multilabel,
        epoch=at["best_epoch"], seed=run.args.seed, seen=seen.unique(), data=data.flags(run.args),
        config=vars(run.args), training={**at, "digest": run.digest}))
    checkpoint.write_json_lines(run.out / "log.jsonl", at["log"])


def prediction_table(names, probabilities, classes, multilabel, true, copied, seen):
    """Header and rows of predictions.csv.

    probabilities: (N, C) float32, written to the last bit; true: (N, C) bool; copied, seen: (N,)
    bool, pixel-identical to an image of an earlier split, and seen by pre-training.
    """
    def rows():
        for n, t, p, q, *flags in zip(names, true, decide(probabilities, multilabel), probabilities,
                                      copied, seen):
            yield [n, data.text(classes, t), data.text(classes, p), *map(str, q), *map(int, flags)]

    header = ["path", "true", "predicted", *(f"prob_{c}" for c in classes), "duplicate", "seen"]
    return header, rows()


def write_results(run, probabilities, facts):
    """predictions.csv, confusion.csv and metrics.json, which is returned."""
    start, images, split, used, seen, args, out = (run.start, run.images, run.split, run.used,
                                                   run.seen, run.args, run.out)
    test, classes = split == "test", images.classes
    copied = copies(images, split)[test]
    unseen = np.ones(test.sum(), bool) if seen is None else ~seen[test]

    def part(mask):
        return scores(images, np.flatnonzero(test)[mask], probabilities[mask]) if mask.any() else None

    metrics = {
        "arch": start.facts["arch"], "arm": start.facts["arm"], "ckpt": args.ckpt, "mode": args.mode,
        "frac": args.frac, "seed": run.seed, "split_seed": args.seed, "classes": classes,
        "multilabel": images.multilabel, "n_train": int((split == "train").sum()),
        "n_labelled": int(used.sum()), "labelled": data.class_counts(images, used),
        "n_val": int((split == "val").sum()), "n_test": int(test.sum()),
        "n_test_duplicates": int(copied.sum()), "n_test_seen": int((~unseen).sum()), **facts,
        "test": part(np.ones(test.sum(), bool)), "test_without_duplicates": part(~copied),
        "test_without_seen": part(unseen)}
    names = [n for n, t in zip(images.names, test) if t]
    write_csv(out / "predictions.csv", *prediction_table(
        names, probabilities, classes, images.multilabel, images.labels[test], copied, ~unseen))
    header = ["label", "tp", "fp", "fn", "tn"] if images.multilabel else ["true \\ predicted", *classes]
    write_csv(out / "confusion.csv", header,
              ([c, *row] for c, row in zip(classes, metrics["test"]["confusion"])))
    write_json(out / "metrics.json", metrics)  # last: it says that the run is finished

    for key, note in (("test", ""), ("test_without_duplicates", f" without the {copied.sum()} that "
                      f"are pixel-identical to training or validation images"),
                      ("test_without_seen", f" without the {(~unseen).sum()} that pre-training saw")):
        part = metrics[key]
        if part and (key == "test" or part["n"] < metrics["n_test"]):
            shown = ("macro_f1", "micro_f1", "balanced_accuracy", "accuracy", "auroc")
            print(f"test, {part['n']} images{note}: " + ", ".join(
                f"{k} {part[k]:.4f}" for k in shown if part.get(k) is not None))
    return metrics


if __name__ == "__main__":
    cli.run(main)
