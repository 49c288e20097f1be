"""Predict images that need no labels, with one weights file or the mean of several.

    python predict.py --ckpt best.pt --data new_images/ --out predictions.csv
    python predict.py --ckpt CNN_RUN/best.pt VIT_RUN/best.pt --data new_images/ --out both.csv
    python predict.py --ckpt cnn.pt --data new_images/ --embeddings features.npz

--out gets a row per image, in the order of the folder or file: path, predicted, and a probability
per class, one sigmoid each, so that rows need not sum to one (as finetune.py's predictions.csv).
Several files are averaged in probability: nobody knows beforehand which arm to pick. --embeddings
gets the features before the head: `embeddings`, (N, D) float32, and `paths`, (N,) str; of several
files `embeddings_1`, `embeddings_2`, ... in the order of `files`. Labels are never looked at.

In Python:

    arm = predict.load("best.pt")
    image = arm.transform(PIL.Image.open("scan.png"))
    with torch.no_grad():
        print(dict(zip(arm.class_names, arm.model(image[None]).sigmoid()[0].tolist())))
"""

import functools
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import ImageOps

import data
from common import checkpoint, cli
from common.cli import UserError, preview
from common.decode import default_dir, normalize, square, to_rgb
from common.metrics import label_text, predicted_labels
from common.readers import read
from common.run import on_device


def load(path):
    """What is needed to predict with a weights file of finetune.py or pretrain.py.

    Returns model (timm's, in eval mode, on the CPU), transform (a Pillow image -> (3, S, S)
    float32, normalized: to the bit what validation saw of the file), class_names (None for a cnn.pt
    or vit.pt of pretrain.py), multilabel, img_size, mean, std and path. Raises UserError.
    """
    weights = checkpoint.load_weights(path, way_out="")
    size, mean, std = weights["img_size"], weights["mean"], weights["std"]
    return SimpleNamespace(
        model=checkpoint.build(weights, path).eval(),
        class_names=weights.get("class_names"),
        transform=functools.partial(transform, size=size, mean=mean, std=std),
        multilabel=weights.get("multilabel", False),
        img_size=size,
        mean=mean,
        std=std,
        path=str(path),
    )


def transform(image, size, mean, std):
    """A Pillow image of any mode -> (3, size, size) float32, made as common.decode makes files."""
    pixels = square(to_rgb(ImageOps.exif_transpose(image)), size)
    return normalize(torch.from_numpy(pixels), mean, std)


def parse_arguments():
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
    add(
        "--amp",
        default="off",
        choices=["off", "auto", "bf16", "fp16"],
        help="autocast precision; off: float32, so that a prediction does not depend on the batch "
        "that it came in; auto: faster, as finetune.py has it",
    )
    add(
        "--workers",
        type=cli.count,
        metavar="N",
        help="loader processes (default: 0 on a CPU, up to 8 beside a GPU)",
    )
    add("--cache", metavar="DIR", help=f"folder of the decoded images (default: {default_dir()})")
    add(
        "--no-cache",
        dest="cache",
        action="store_const",
        const="none",
        help="keep nothing there: every image is decoded twice, to check and to predict it",
    )
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
        raise UserError(
            f"{path}: "
            + ("is a folder" if path.is_dir() else "is there already")
            + f"; name another file with {flag}, or replace a file with --overwrite"
        )
    try:
        checkpoint.start_folder(path.parent, (path.name,))
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{path.parent}: is not a folder ({flag})") from error


def refuse_unequal(arms):
    """Raise UserError unless all have classes, and the same ones."""
    first = arms[0]
    for arm in arms:
        if arm.class_names is None:
            raise UserError(
                f"{arm.path}: has no classes to predict, since it comes from "
                f"pretrain.py; fine-tune it (finetune.py --ckpt {arm.path}), or leave "
                f"out --out and write its features with --embeddings FILE"
            )
        if arm.class_names != first.class_names:
            raise UserError(
                f"{arm.path}: has the classes {preview(arm.class_names, 9)}, but "
                f"{first.path} has {preview(first.class_names, 9)}; only files with the "
                f"same classes in the same order can be averaged (--ckpt)"
            )
        if arm.multilabel != first.multilabel:
            several, one = (arm, first) if arm.multilabel else (first, arm)
            raise UserError(
                f"{several.path}: predicts several labels to an image, but {one.path} "
                f"exactly one; they cannot be averaged (--ckpt)"
            )


@torch.inference_mode()
def forward(arm, pixels, device, amp, with_features):
    """Probabilities (n, C) and, if asked for, features (n, D), float32 in numpy, of pixels
    (n, 3, S, S) uint8."""
    (images,) = on_device([pixels], device, arm.mean, arm.std)
    features = None
    with torch.autocast(device.type, amp, enabled=amp is not None):
        if with_features:
            hidden = arm.model.forward_features(images)
            features = arm.model.forward_head(hidden, pre_logits=True).flatten(1)
            features = features.float().cpu().numpy()
            logits = arm.model.forward_head(hidden)
        else:
            logits = arm.model(images)
    return logits.float().sigmoid().cpu().numpy(), features


def forward_all(arms, pixels, bs, workers, device, amp, with_features):
    """For each batch a list of what forward() gives for each arm. pixels: {size: DecodedImages}."""
    n = len(next(iter(pixels.values())))
    batches = data.EpochBatches(n, bs, drop_single=False)
    loaders = [
        data.loader(data.AugmentedImages(decoded, np.arange(n)), batches, device, workers)
        for decoded in pixels.values()
    ]
    with cli.Signals() as signals, cli.progress(total=n, desc="predicting") as bar:
        for batch in zip(*loaders):
            batch = dict(zip(pixels, batch))
            yield [forward(arm, batch[arm.img_size], device, amp, with_features) for arm in arms]
            bar.update(len(next(iter(batch.values()))))
            if signals.number:
                signals.leave("nothing was written")


def main():
    args = parse_arguments()
    for path, flag in ((args.out, "--out"), (args.embeddings, "--embeddings")):
        if path:
            prepare_file(path, flag, args.overwrite)
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    if amp is None:  # a GPU's TF32 would let a prediction vary with its batch
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    arms = [load(path) for path in args.ckpt]
    if args.out:
        refuse_unequal(arms)
    images, pixels = read(args.data, args.images, args.image_col, label_col=["none"]), {}
    for size in {arm.img_size for arm in arms}:
        images.decode(size, data.cache_dir(args.cache), args.skip_bad)
        pixels[size] = images.images
    for note in dict.fromkeys(images.notes):  # each once, though there are several sizes
        print(note)
    for arm in arms:
        arm.model.to(device, memory_format=torch.channels_last)
    classes, multilabel = arms[0].class_names, arms[0].multilabel
    features, done = [None] * len(arms), 0

    def rows():
        """Rows of --out, as the batches come; fills `features`."""
        nonlocal done
        for outputs in forward_all(
            arms, pixels, args.bs, args.workers, device, amp, bool(args.embeddings)
        ):
            part = slice(done, done + len(outputs[0][0]))
            done = part.stop
            for i, (_, feature) in enumerate(outputs if args.embeddings else ()):
                if features[i] is None:
                    features[i] = np.empty((len(images), feature.shape[1]), np.float32)
                features[i][part] = feature
            if args.out:
                mean = np.mean([p for p, _ in outputs], axis=0)
                for name, has, p in zip(
                    images.names[part], predicted_labels(mean, multilabel), mean
                ):
                    yield [name, label_text(classes, has), *map(str, p)]

    if args.out:
        header = ["path", "predicted", *(f"prob_{c}" for c in classes)]
        checkpoint.write_csv(args.out, header, rows())
        print(
            f"wrote {args.out}: {len(images)} images"
            + f", the mean of {len(arms)} files" * (len(arms) > 1)
        )
    else:
        list(rows())  # none: it fills `features`
    if args.embeddings:
        arrays = {
            "embeddings" if len(arms) == 1 else f"embeddings_{i}": feature
            for i, feature in enumerate(features, 1)
        }
        shapes = ", ".join(f"{name} {f.shape[0]} x {f.shape[1]}" for name, f in arrays.items())
        if len(arms) > 1:
            arrays["files"] = np.array([os.path.abspath(arm.path) for arm in arms])
        with checkpoint.atomic_open(args.embeddings, "wb") as file:
            np.savez(file, **arrays, paths=np.array(images.names))
        print(f"wrote {args.embeddings}: {shapes}")


if __name__ == "__main__":
    cli.run(main)
