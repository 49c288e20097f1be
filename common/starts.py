"""What a command starts from: a weights file or a timm model, and the images it has seen."""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import timm
import torch

from common import checkpoint
from common.arms import make_arm, rebuild_kwargs
from common.cli import UserError
from common.decode import IMAGENET_MEAN, IMAGENET_STD, digest

KEYS = {"state_dict", "arch", "num_classes", "model_kwargs", "img_size", "arm", "seed", "data"}


def load_weights(path, way_out="; for other weights, give --arch NAME --init FILE"):
    """The dict of a weights file that pretrain.py or finetune.py wrote. Raises UserError."""
    weights = checkpoint.load(path)
    if not KEYS <= weights.keys():
        raise UserError(f"{path}: is no weights file of pretrain.py or finetune.py{way_out}")
    return weights


def build(weights, path):
    """The timm model of a weights file's dict. Raises UserError where it does not fit."""
    arch, kwargs = weights["arch"], weights["model_kwargs"]
    try:
        model = timm.create_model(arch, num_classes=weights["num_classes"], **kwargs)
        model.load_state_dict(weights["state_dict"])
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its weights do not fit {arch} of this timm ({reason})") from error
    return model


def from_checkpoint(path):
    """A weights file as a start: make() builds its model; metadata says how; seen, hashes of its
    training images, or None; data, its data flags; seed, of its split. Raises UserError."""
    weights = load_weights(path)
    make = partial(build, weights, path)
    make()  # weights that do not fit are better known before the images are read
    keys = ("arch", "arm", "model_kwargs", "img_size", "mean", "std")
    history = {key: weights.get(key) for key in ("seen", "data", "seed")}
    return SimpleNamespace(make=make, metadata={key: weights[key] for key in keys}, **history)


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
    """Without --data: the data flags of a checkpoint, where none was given."""
    given = vars(args)
    if args.data is None:
        if saved.get("unlabelled"):  # a flag of earlier versions
            saved = {**saved, "label_col": ["none"]}
        given |= {key: given[key] or value for key, value in saved.items() if key in given}


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
