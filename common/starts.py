"""What a fine-tuning starts from: a checkpoint or a timm model, and what was seen before."""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

from common import checkpoint
from common.arms import make_arm, rebuild_kwargs
from common.decode import IMAGENET_MEAN, IMAGENET_STD, digest


def from_checkpoint(path):
    """A weights file as a start: make() builds the model anew; metadata, {arch, arm, model_kwargs,
    img_size, mean, std}; seen, hashes of the images it was trained on, or None; data, its data
    flags; seed, of its split. Raises UserError."""
    weights = checkpoint.load_weights(path)
    make = partial(checkpoint.build, weights, path)
    make()  # weights that do not fit are better known before the images are read
    keys = ("arch", "arm", "model_kwargs", "img_size", "mean", "std")
    metadata = {key: weights[key] for key in keys}
    history = {key: weights.get(key) for key in ("seen", "data", "seed")}
    return SimpleNamespace(make=make, metadata=metadata, **history)


def from_name(arch, init, img_size, model_kwargs):
    """A timm model as a start; init: imagenet, random or a weights file. Raises UserError."""
    anew = partial(make_arm, "--arch", arch, init, img_size, **model_kwargs)
    model = anew()
    make = anew if init == "random" else partial(copy.deepcopy, model)  # a seed, its own weights
    metadata = {"arch": arch, "arm": arch.split(".")[0], "img_size": img_size}
    metadata["model_kwargs"] = rebuild_kwargs(arch, img_size, model_kwargs)
    metadata |= {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    seen = None if init in ("imagenet", "random") else checkpoint.seen_by(init)
    return SimpleNamespace(make=make, metadata=metadata, data={}, seen=seen)


def fill_in(args, saved):
    """Where the data flags name no data: the data of a checkpoint, read as then where no flag says
    otherwise."""
    if args.data is None:
        unlabelled = saved.get("unlabelled") and not args.label_col  # a flag of earlier versions
        given = vars(args)
        given |= {key: given[key] or value for key, value in saved.items() if key in given}
        if unlabelled:
            args.label_col = ["none"]


def seen_in_pretraining(seen, images):
    """(N,) bool: images whose pixels pre-training saw; None where there was no pre-training."""
    return None if seen is None else np.isin(images.table["hash"].view("int64"), seen.numpy())


def data_digest(images, split, used):
    """A number that stands for the pixels, labels, split and used labels of a run."""
    hashes, labels = map(np.ascontiguousarray, (images.table["hash"], images.labels))
    return digest(hashes, labels, "".join(split), used)


def all_seen(images, split, seen):
    """(M,) int64: hashes of what a fine-tuned model has seen, its start's images included."""
    hashes = torch.from_numpy(images.table["hash"][split != "test"].view("int64"))
    return (hashes if seen is None else torch.cat([hashes, seen])).unique()
