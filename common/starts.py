"""What a fine-tuning starts from: a checkpoint or a timm model, and what was seen before."""

import copy
from types import SimpleNamespace

import numpy as np
import torch

from common import checkpoint
from common.arms import make_arm, rebuild_kwargs
from common.decode import IMAGENET_MEAN, IMAGENET_STD, digest


def from_checkpoint(path):
    """A weights file as a start: make() builds the model anew; metadata, {arch, arm, model_kwargs,
    img_size, mean, std}; seen, hashes of the images it was trained on, or None; data, its data flags;
    seed, of its split. Raises UserError."""
    weights = checkpoint.load_weights(path)

    def make():
        return checkpoint.build(weights, path)

    make()  # weights that do not fit are better known before the images are read
    metadata = {
        key: weights[key] for key in ("arch", "arm", "model_kwargs", "img_size", "mean", "std")
    }
    return SimpleNamespace(
        make=make,
        metadata=metadata,
        seen=weights.get("seen"),
        data=weights["data"],
        seed=weights["seed"],
    )


def from_name(arch, init, img_size, model_kwargs):
    """A timm model as a start; init: imagenet, random or a weights file. Raises UserError."""
    model = make_arm("--arch", arch, init, img_size, **model_kwargs)

    def make():  # another seed draws other random weights
        if init == "random":
            return make_arm("--arch", arch, "random", img_size, **model_kwargs)
        return copy.deepcopy(model)

    metadata = {
        "arch": arch,
        "arm": arch.split(".")[0],
        "img_size": img_size,
        "model_kwargs": rebuild_kwargs(arch, img_size, model_kwargs),
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
    from_file = init not in ("imagenet", "random")
    return SimpleNamespace(
        make=make, metadata=metadata, data={}, seen=checkpoint.seen_by(init) if from_file else None
    )


def fill_in(args, saved):
    """Where the data flags name no data: the data of a checkpoint, read as then where no flag says
    otherwise."""
    if args.data is None:
        unlabelled = saved.get("unlabelled") and not args.label_col  # a flag of earlier versions
        for key, value in saved.items():
            if hasattr(args, key):
                setattr(args, key, getattr(args, key) or value)
        if unlabelled:
            args.label_col = ["none"]


def seen_in_pretraining(seen, images):
    """(N,) bool: images whose pixels pre-training saw; None where there was no pre-training."""
    if seen is None:
        return None
    return np.isin(np.ascontiguousarray(images.table["hash"]).view("int64"), seen.numpy())


def data_digest(images, split, used):
    """A number that stands for the pixels, labels, split and used labels of a run."""
    return digest(
        np.ascontiguousarray(images.table["hash"]),
        np.ascontiguousarray(images.labels),
        "".join(split),
        used,
    )


def all_seen(images, split, seen):
    """(M,) int64: hashes of what a fine-tuned model has seen, its start's images included."""
    hashes = torch.from_numpy(images.table["hash"][split != "test"].view("int64"))
    return (hashes if seen is None else torch.cat([hashes, seen])).unique()
