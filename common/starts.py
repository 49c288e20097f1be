"""What a command starts from: a weights file or a timm model, and the images it has seen."""

import copy
from functools import partial
from types import SimpleNamespace

import timm
import torch

from common import checkpoint, schema
from common.arms import NORMALIZATION, channels_last, make_arm, output_shape, rebuild_kwargs
from common.cli import UserError


def load_weights(path, way_out="; for other weights, give --arch NAME --init FILE"):
    """The dict of a weights file that pretrain.py or finetune.py wrote. Raises UserError."""
    weights = checkpoint.load(path)
    if not {"arch", "state_dict", "model_kwargs"} <= weights.keys():
        raise UserError(f"{path}: is no weights file of pretrain.py or finetune.py{way_out}")
    schema.check(path, weights, schema.WEIGHTS)
    if (names := weights.get("class_names")) and len(names) != weights["num_classes"]:
        raise UserError(f"{path}: class_names does not name each of num_classes")
    return weights


def build(weights, path):
    """The timm model of a weights file's dict. Raises UserError where it does not fit."""
    arch, kwargs = weights["arch"], weights["model_kwargs"]
    try:
        model = timm.create_model(arch, num_classes=weights["num_classes"], **kwargs)
        model.load_state_dict(weights["state_dict"])
    except Exception as error:  # timm's models raise all kinds on odd arguments
        what = f"its weights do not fit {arch} of this timm ({' '.join(str(error).split())[:200]})"
        raise UserError(f"{path}: {what}") from error
    return channels_last(model)


def from_checkpoint(path):
    """A weights file as a start: make() builds its model, metadata says how; seen: hashes of its
    training images; carried: its split by content; data flags; seed. Raises UserError."""
    weights = load_weights(path)
    build(weights, path)  # weights that do not fit are better known before the images are read
    start = SimpleNamespace(make=partial(build, weights, path), carried=carried_by(path, weights))
    start.seen, start.data, start.seed = map(weights.get, ("seen", "data", "seed"))
    start.seen = start.carried[0, :0] if start.seen is None else start.seen
    start.metadata = {k: weights[k] for k in "arch arm model_kwargs img_size mean std".split()}
    return start


def carried_by(init, weights=None):
    """splits.carried() of what our weights files saw; empty for other weights. Raises UserError."""
    weights = weights or ({} if init in ("imagenet", "random") else checkpoint.load(init))
    schema.check(init, weights, schema.HISTORY)
    if weights.get("split") is not None:
        return weights["split"]
    if weights.get("seen") is None:
        return torch.zeros(2, 0, dtype=torch.int64)
    print(f"{init}: is of an earlier version and carries no split, which is drawn as before")
    return torch.stack([weights["seen"], torch.zeros_like(weights["seen"])])


def from_name(arch, init, img_size, model_kwargs):
    """A timm model as a start; init: imagenet, random or a weights file. Raises UserError."""
    anew = partial(make_arm, "--arch", arch, init, img_size, **model_kwargs)
    model = anew()
    if len(shape := output_shape(model, img_size, f"--arch {arch}")) != 2:
        raise UserError(f"--arch {arch}: gives outputs of shape {shape}, not logits (N, C)")
    make = anew if init == "random" else partial(copy.deepcopy, model)  # a seed, its own weights
    metadata = {"arch": arch, "arm": arch.split(".")[0], "img_size": img_size, **NORMALIZATION}
    metadata["model_kwargs"] = rebuild_kwargs(arch, img_size, model_kwargs)
    known = carried_by(init)
    seen = known[0, known[1] == 0]
    return SimpleNamespace(make=make, metadata=metadata, carried=known, seen=seen)


def refuse_odd_head(model, metadata, linear):
    """Raise UserError where timm builds another head than the reset one or, if linear, several."""
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
    if args.data is None:
        saved |= {"label_col": ["none"]} if saved.get("unlabelled") else {}  # an earlier version's
        vars(args).update({k: getattr(args, k) or x for k, x in saved.items() if k in args})
