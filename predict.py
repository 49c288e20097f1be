"""Predict images that need no labels, with one weights file or the mean of several.

    python predict.py --ckpt best.pt --data new_images/ --out predictions.csv
    python predict.py --ckpt CNN_RUN/best.pt VIT_RUN/best.pt --data new_images/ --out both.csv
    python predict.py --ckpt cnn.pt --data new_images/ --embeddings features.npz

--out gets a row per image, in the order of the folder or file: path, predicted and, for each class,
prob_CLASS, a sigmoid, so that rows need not sum to one, and calibrated_CLASS, a distribution over
the classes with the temperature that fits the validation images (several labels: sigmoids, too).
Several files are averaged. --embeddings gets the features before the head: `embeddings`, (N, D)
float32, and `paths`, (N,) str; of several files `embeddings_1`, ... in the order of `files`.
"""

import functools
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
from common import checkpoint, cli, collapse, readers, results, starts
from common.cli import UserError, preview
from common.decode import default_dir, normalize
from common.metrics import probabilities_of
from common.pixels import square, to_rgb
from common.run import on_device


def load(path):
    """What is needed to predict with a weights file of finetune.py or pretrain.py.

    Returns model (timm's, in eval mode, on the CPU), transform (a Pillow image -> (3, S, S)
    float32, normalized: to the bit what validation saw of the file), class_names (None for a cnn.pt
    or vit.pt of pretrain.py), multilabel, img_size, mean, std, temperature (of
    metrics.probabilities_of) and path. Raises UserError.
    """
    weights = starts.load_weights(path, way_out="")
    size, mean, std = weights["img_size"], weights["mean"], weights["std"]
    arm = SimpleNamespace(path=str(path), img_size=size, mean=mean, std=std)
    arm.class_names, arm.multilabel = weights.get("class_names"), bool(weights.get("multilabel"))
    arm.temperature = weights.get("temperature", 1.0)
    arm.transform = functools.partial(transform, size=size, mean=mean, std=std)
    arm.model = starts.build(weights, path).eval()
    return arm


def transform(image, size, mean, std):
    """A Pillow image of any mode -> (3, size, size) float32, made as common.decode makes files."""
    pixels = square(to_rgb(image), size)
    return normalize(torch.from_numpy(pixels), mean, std)


def parse_arguments():
    """The arguments, of which --out or --embeddings is given."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", metavar="FILE", nargs="+", required=True, help="best.pt; several are averaged")
    add("--data", metavar="PATH", required=True, help="image folder, CSV file or .npz file")
    add("--images", metavar="DIR", help="folder of a CSV file's images")
    add("--image-col", metavar="NAME", help="CSV column of image names")
    add("--out", metavar="FILE", help="CSV file of predictions")
    add("--embeddings", metavar="FILE", help=".npz file of the features before the head")
    add("--bs", "--batch-size", type=cli.positive, default=32, help="images at once")
    add("--skip-bad", action="store_true", help="leave unreadable images out")
    add("--overwrite", action="store_true", help="replace --out and --embeddings where they exist")
    add("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    amp = "autocast; off: float32, where predictions do not depend on their batch; auto: faster"
    add("--amp", default="off", choices=["off", "auto", "bf16", "fp16"], help=amp)
    add("--workers", type=cli.count, metavar="N", help="loader processes (CPU: 0; GPU: up to 8)")
    add("--cache", metavar="DIR", help=f"folder of the decoded images (default: {default_dir()})")
    add("--no-cache", dest="cache", action="store_const", const="none", help="keep none on disk")
    args = parser.parse_args()
    if not args.out and not args.embeddings:
        parser.error("give --out FILE, --embeddings FILE or both")
    if args.out and args.out == args.embeddings:
        parser.error("--out and --embeddings name the same file")
    return args


def prepare_file(path, flag, overwrite):
    """Make the folder of an output file. Raises UserError where it may not be written."""
    path = Path(path)
    if path.is_dir() or path.exists() and not overwrite:
        there = "is a folder" if path.is_dir() else "is there already"
        raise UserError(f"{path}: {there}; name another file with {flag}, or give --overwrite")
    no_folder = FileExistsError, NotADirectoryError
    with cli.refusing(f"{path.parent}: cannot be written to ({flag}):", OSError):
        with cli.refusing(f"{path.parent}: is not a folder ({flag})", no_folder):
            checkpoint.start_folder(path.parent, (path.name,))
        tempfile.TemporaryFile(dir=path.parent).close()


def refuse_unequal(arms):
    """Raise UserError unless all have classes, and the same ones."""
    first, has = arms[0], ("has the classes", "predicts several labels, of")
    for arm in arms:
        if arm.class_names is None:
            what = f"{arm.path}: has no classes to predict, since it comes from pretrain.py"
            raise UserError(f"{what}; fine-tune it, or write its --embeddings without --out")
        if (arm.class_names, arm.multilabel) != (first.class_names, first.multilabel):
            this, other = (f"{has[a.multilabel]} {preview(a.class_names, 9)}" for a in (arm, first))
            what = f"{arm.path}: {this}, but {first.path} {other}"
            raise UserError(f"{what}; only equal classes in equal order can be averaged (--ckpt)")


@torch.inference_mode()
def outputs_of(arm, pixels, bs, workers, device, amp, with_features):
    """[probabilities (N, C), distributions (N, C)] of N DecodedImages and, if asked for, features
    (N, D)."""
    batches = data.EpochBatches(len(pixels), bs, drop_single=False)
    dataset, outputs = data.AugmentedImages(pixels, range(len(pixels))), []
    loader, bar = data.loader(dataset, batches, device, workers), cli.progress(total=len(pixels))
    for images in on_device(loader, device, arm.mean, arm.std):
        with torch.autocast(device.type, amp, enabled=amp is not None):
            features, logits = collapse.embed(arm.model, [images])
        if not (torch.isfinite(features).all() and torch.isfinite(logits).all()):
            raise UserError(f"{arm.path}: gives NaN or infinite outputs; try --amp off")
        both = probabilities_of(logits, arm.temperature, arm.multilabel)
        outputs.append([*both, features.flatten(1).cpu().numpy()][: 2 + with_features])
        bar.update(len(images))
    bar.close()
    return [np.concatenate(parts) for parts in zip(*outputs)]


def write_embeddings(path, names, features, files):
    """A .npz file of the features (N, D) that each of the weights files gives."""
    arrays = {f"embeddings_{i}": array for i, array in enumerate(features, 1)}
    arrays["files"] = np.array([os.path.abspath(file) for file in files])
    if len(files) == 1:
        arrays = {"embeddings": features[0]}
    with checkpoint.atomic_open(path, "wb") as file:
        np.savez(file, **arrays, paths=np.array(names))


def main():
    args = parse_arguments()
    for path, flag in ((args.out, "--out"), (args.embeddings, "--embeddings")):
        if path:
            prepare_file(path, flag, args.overwrite)
    cli.refuse_inputs([args.out, args.embeddings], args.data, *args.ckpt)
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    if amp is None:  # a GPU's TF32 would let a prediction vary with its batch
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    arms = [load(path) for path in args.ckpt]
    if args.out:
        refuse_unequal(arms)
    files = {"images": args.images, "image_col": args.image_col, "skip_bad": args.skip_bad}
    images = readers.read(args.data, label_col=["none"], split="none", **files)
    pixels, outputs = {}, []
    for size in dict.fromkeys(arm.img_size for arm in arms):
        images.decode(size, data.cache_dir(args.cache), args.skip_bad)
        pixels[size] = images.images
    run = args.bs, args.workers, device, amp, bool(args.embeddings)
    for arm in arms:
        arm.model.to(device)
        outputs.append(outputs_of(arm, pixels[arm.img_size], *run))
    for note in dict.fromkeys(images.notes):  # each once, though there are several sizes
        print(note)
    print(f"{len(images)} images" + f", the mean of {len(arms)} files" * (len(arms) > 1))
    if args.out:
        rows = range(len(images)) if images.rows is None else images.rows  # repeated ones too
        means = [np.mean(x, axis=0)[rows] for x in zip(*(found[:2] for found in outputs))]
        header, cells = results.predicted_cells(*means, arms[0].class_names, arms[0].multilabel)
        lines = ([images.names[i], *x] for i, x in zip(rows, cells))
        checkpoint.write_csv(args.out, ["path", *header], lines)
        print(f"wrote {args.out}")
    if args.embeddings:
        write_embeddings(args.embeddings, images.names, [f for *_, f in outputs], args.ckpt)
        print(f"wrote {args.embeddings}")


if __name__ == "__main__":
    cli.run(main)
