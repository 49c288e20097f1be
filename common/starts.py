"""What a command starts from: weights files, a last.pt or a timm model, and what they must hold."""

import copy
import sys
from contextlib import suppress
from functools import partial
from math import isfinite
from pathlib import Path
from types import SimpleNamespace

import timm
import torch

from common import arms, checkpoint, distributed
from common.cli import UserError, preview, refusing

HISTORY = dict.fromkeys(("seen", "split"), torch.Tensor | None)  # ours: what they were trained on
WEIGHTS = dict(arch=str, arm=str, model_kwargs=dict, num_classes=int, img_size=int, mean=list)
WEIGHTS |= dict(std=list, seed=int, data=dict, state_dict=dict, class_names=list | None)
WEIGHTS |= dict(seen=torch.Tensor, split=torch.Tensor, temperature=float | None)
BEST = dict(log=list, best_epoch=int, best_loss=float, best_val=dict, digest=int, temperature=float)
TRAINING = {"args": dict, "epoch": int, "batch": int, "iteration": int, "loss": list, "log": list}
TRAINING |= {"seconds": float, "rng": dict}
PRETRAINING = {**TRAINING, "processes": int, "seen": torch.Tensor, "initial": torch.Tensor}
LAST = {"pretrain.py": PRETRAINING, "tools.dino": {**PRETRAINING, "phase": int}}
LAST["finetune.py"] = {**TRAINING, "seed": int, "digest": int, "best": dict}
RULES = {  # for values of the right type
    "arch": timm.is_model,
    "model_kwargs": lambda x: all(arms.is_shape_argument(k, x[k]) for k in x.keys() - {"img_size"}),
    "img_size": lambda x: 0 < x <= 8192,
    "mean": lambda x: len(x) == 3 and all(map(isfinite, x)),
    "std": lambda x: len(x) == 3 and all(map(isfinite, x)) and min(x) >= 1e-6,
    "state_dict": lambda x: all(torch.isfinite(value).all() for value in x.values()),
    "temperature": lambda x: 0.01 <= x <= 100,
    "class_names": lambda x: all(isinstance(name, str) for name in x),
    "seen": lambda x: x.dtype == torch.int64 and x.ndim == 1,
    "split": lambda x: x.dtype == torch.int64 and len(x) == 2 and set(x[1].tolist()) <= {0, 1, 2},
    "data": lambda x: all(isinstance(value, str | bool | list | None) for value in x.values()),
    "loss": lambda x: x and all(map(isfinite, x)),
    "log": lambda x: all(isinstance(row, dict) for row in x),
    "best": lambda x: isinstance(x["best_epoch"], int) and isinstance(x["best_loss"], float),
}
RULES["initial"] = RULES["split"]  # of splits.carried
for _key in "num_classes seed epoch batch iteration processes phase seconds best_epoch".split():
    RULES[_key] = lambda x: 0 <= x < 2**40


def check(path, content, fields):
    """Raise UserError, naming the fields of this dict that are missing or not as described."""
    wrong = list(fields)
    for key, kind in fields.items():
        with suppress(Exception):  # what is damaged raises all kinds
            value, rule = content.get(key), RULES.get(key, lambda x: True)
            if isinstance(value, kind) and (value is None or rule(value)):
                wrong.remove(key)
    if wrong:
        raise UserError(f"{path}: damaged or outdated: {', '.join(wrong)} missing or not valid")


def load_last(path, script):
    """The dict of a last.pt that this script wrote. Raises UserError."""
    state = checkpoint.load(path)
    if state.get("script") != script:
        raise UserError(f"{path}: holds no training state of {script}")
    check(path, state, LAST[script])
    return state


def resumed(parser, args, script, may_change):
    """For --resume: the arguments that the run began with, and its last.pt or None. UserError."""
    last = Path(args.out or ".") / "last.pt" if args.resume is True else Path(args.resume)
    if args.resume is True and not last.exists():
        return args, None
    state = load_last(last, script)
    if (n := state.get("processes", 1)) != distributed.WORLD_SIZE:
        raise UserError(f"{last}: resume with as many processes: torchrun --nproc-per-node {n}")
    deep = sum(len(state["args"].get(x) or ()) > 1 for x in ("seeds", "ckpt"))  # a folder each
    parser.set_defaults(out=str(last.absolute().parents[deep]))
    return parse_again(parser, state["args"], may_change, last), state


def words_of(values):
    """{name: value} of flags as they were parsed -> the words that give them."""
    words = []
    for key, value in values.items():
        flag = f"--{key.replace('_', '-')}"
        value = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
        if isinstance(value, list):
            words += [flag, *map(str, value)] if value else []
        elif value is not None and value is not False:
            words.append(flag if value is True else f"{flag}={value}")
    return words


def parse_again(parser, saved, may_change, path):
    """Parse {name: value} as saved in a file, then the command line. UserError where they clash."""
    flags = [k for k in vars(parser.parse_args()) if k not in may_change - {"epochs", "seeds"}]
    words = words_of({key: value for key, value in saved.items() if key in flags})
    with refusing(f"{path}:", UserError):
        before = vars(parser.parse_args(words))
    args = parser.parse_args(words + sys.argv[1:])
    changed = [k for k in flags if k not in may_change and getattr(args, k) != before[k]]
    what = [f"--{k.replace('_', '-')} {before[k]} (not {getattr(args, k)})" for k in changed]
    if what:
        raise UserError(f"{path}: was made with {preview(what, 9)}; omit these or change --out")
    return args


def load_weights(path, way_out="; for other weights, give --arch NAME --init FILE"):
    """The dict of a weights file that pretrain.py or finetune.py wrote. Raises UserError."""
    weights = checkpoint.load(path)
    if not {"arch", "state_dict", "model_kwargs"} <= weights.keys():
        raise UserError(f"{path}: is no weights file of pretrain.py or finetune.py{way_out}")
    check(path, weights, WEIGHTS)
    if (names := weights.get("class_names")) and len(names) != weights["num_classes"]:
        raise UserError(f"{path}: class_names does not name each of num_classes")
    return weights


def build(weights, path):
    """The timm model of a weights file's dict. Raises UserError where it does not fit."""
    arch, kwargs = weights["arch"], weights["model_kwargs"]
    with refusing(f"{path}: its weights do not fit {arch} of this timm:"):
        model = timm.create_model(arch, num_classes=weights["num_classes"], **kwargs)
        model.load_state_dict(weights["state_dict"])
    return arms.channels_last(model)


def from_checkpoint(path):
    """A weights file as a start: make() builds its model, metadata says how; seen: hashes of its
    training images; carried: its split by content; data flags; seed. Raises UserError."""
    weights = load_weights(path)
    build(weights, path)  # weights that do not fit are better known before the images are read
    start = SimpleNamespace(make=partial(build, weights, path), carried=carried_by(path, weights))
    start.seen, start.data, start.seed = map(weights.get, ("seen", "data", "seed"))
    start.metadata = {k: weights[k] for k in "arch arm model_kwargs img_size mean std".split()}
    return start


def carried_by(init, weights=None):
    """splits.carried() of what our weights files saw; empty for other weights. Raises UserError."""
    weights = weights or ({} if init in ("imagenet", "random") else checkpoint.load(init))
    check(init, weights, HISTORY)
    return torch.zeros(2, 0, dtype=torch.int64) if (x := weights.get("split")) is None else x


def from_name(arch, init, img_size, model_kwargs):
    """A timm model as a start; init: imagenet, random or a weights file. Raises UserError."""
    anew = partial(arms.make_arm, "--arch", arch, init, img_size, **model_kwargs)
    model = anew()
    if len(shape := arms.output_shape(model, img_size, f"--arch {arch}")) != 2:
        raise UserError(f"--arch {arch}: gives outputs of shape {shape}, not logits (N, C)")
    make = anew if init == "random" else partial(copy.deepcopy, model)  # a seed, its own weights
    metadata = {"arch": arch, "arm": arch.split(".")[0], "img_size": img_size, **arms.NORMALIZATION}
    metadata["model_kwargs"] = arms.rebuild_kwargs(arch, img_size, model_kwargs)
    past = carried_by(init)
    return SimpleNamespace(make=make, metadata=metadata, carried=past, seen=past[0, past[1] == 0])


def refuse_odd_head(model, metadata, linear):
    """Raise UserError where timm builds another head than the reset one or, if linear, several."""
    name, odd = metadata["arch"], "its head changes when it is reset; take another model"
    with torch.random.fork_rng([]), refusing(f"{name}: {odd}", RuntimeError):
        again = timm.create_model(name, num_classes=model.num_classes, **metadata["model_kwargs"])
        again.load_state_dict(model.state_dict())
    if linear and not isinstance(model.get_classifier(), torch.nn.Module):
        raise UserError(f"{name}: has more than one head; leave out --mode linear")
