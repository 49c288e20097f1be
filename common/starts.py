"""What a command starts from: a weights file or a timm model, and the images it has seen."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import timm
import torch

from common import checkpoint
from common.arms import is_shape_argument, make_arm, output_shape, rebuild_kwargs
from common.cli import UserError
from common.decode import IMAGENET_MEAN, IMAGENET_STD, digest


def _is(kind, low=-math.inf, high=math.inf):
    """A check: a finite number of this kind, or whole, within limits."""
    return lambda x: type(x) in (int, kind) and low <= x <= high and math.isfinite(x)


def _three(good):
    return lambda x: isinstance(x, list) and len(x) == 3 and all(map(good, x))


def _finite(state_dict):
    tensors = state_dict.values() if isinstance(state_dict, dict) else [None]
    return all(torch.is_tensor(x) and torch.isfinite(x).all() for x in tensors)


def _shapes(kwargs):
    if not isinstance(kwargs, dict) or type(kwargs.get("img_size", 1)) is not int:
        return False
    return all(k == "img_size" or is_shape_argument(k, x) for k, x in kwargs.items())


FIELDS = {  # of a weights file, and what each must be
    "arch": ("the name of a model in timm", lambda x: isinstance(x, str) and timm.is_model(x)),
    "model_kwargs": ("arguments that shape a model", _shapes),
    "num_classes": ("a number of at least 0", _is(int, 0)),
    "img_size": ("a number from 1 to 8192", _is(int, 1, 8192)),
    "mean": ("three finite numbers", _three(_is(float))),
    "std": ("three finite numbers above 0", _three(_is(float, 1e-6))),
    "arm": ("a text", lambda x: isinstance(x, str)),
    "seed": ("a number of at least 0", _is(int, 0)),
    "data": ("a dict of data flags", lambda x: isinstance(x, dict)),
    "state_dict": ("finite tensors", _finite),
}


def load_weights(path, way_out="; for other weights, give --arch NAME --init FILE"):
    """The dict of a weights file that pretrain.py or finetune.py wrote. It may come from anybody:
    every field that is used later is checked here. Raises UserError."""
    weights = checkpoint.load(path)
    if not FIELDS.keys() <= weights.keys():
        raise UserError(f"{path}: is no weights file of pretrain.py or finetune.py{way_out}")
    wrong = [
        f"{key} is not {what}" for key, (what, good) in FIELDS.items() if not good(weights[key])
    ]
    names, seen = weights.get("class_names"), weights.get("seen")
    texts = names is None or isinstance(names, list) and all(isinstance(x, str) for x in names)
    if not texts or names and len(names) != weights["num_classes"]:
        wrong.append("class_names is not a text for each of num_classes")
    if seen is not None and not (torch.is_tensor(seen) and seen.dtype == torch.int64):
        wrong.append("seen is not a tensor of hashes")
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}")
    return weights


def build(weights, path):
    """The timm model of a weights file's dict. Raises UserError where it does not fit."""
    arch, kwargs = weights["arch"], weights["model_kwargs"]
    try:
        model = timm.create_model(arch, num_classes=weights["num_classes"], **kwargs)
        model.load_state_dict(weights["state_dict"])
    except Exception as error:  # timm's models raise all kinds on odd arguments
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
    shape = output_shape(model, img_size, f"--arch {arch}")
    if len(shape) != 2:
        raise UserError(f"--arch {arch}: gives outputs of shape {shape}, not logits (N, C)")
    make = anew if init == "random" else partial(copy.deepcopy, model)  # a seed, its own weights
    metadata = {"arch": arch, "arm": arch.split(".")[0], "img_size": img_size}
    metadata["model_kwargs"] = rebuild_kwargs(arch, img_size, model_kwargs)
    metadata |= {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    return SimpleNamespace(make=make, metadata=metadata, data={}, seen=checkpoint.seen_by(init))


def refuse_odd_head(model, metadata, linear):
    """Raise UserError where the reset head is not the one that timm builds, so that best.pt could
    not be loaded, or, for --mode linear, is not one module. Leaves torch's random state."""
    name = metadata["arch"]
    with torch.random.fork_rng([]):
        again = timm.create_model(name, num_classes=model.num_classes, **metadata["model_kwargs"])
    shapes = [{k: x.shape for k, x in m.state_dict().items()} for m in (model, again)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{name}: its head changes when it is reset; take another model")
    if linear and not isinstance(model.get_classifier(), torch.nn.Module):
        raise UserError(f"{name}: has more than one head; leave out --mode linear")


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
