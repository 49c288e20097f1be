"""What weights files and last.pt must hold, whoever made them, and how a run resumes."""

import sys
from contextlib import suppress
from math import isfinite
from pathlib import Path

import timm
import torch

from common import checkpoint, distributed
from common.arms import is_shape_argument
from common.cli import UserError, preview

TENSOR, NONE = torch.Tensor, type(None)
HISTORY = {"seen": (TENSOR, NONE), "split": (TENSOR, NONE)}  # of what weights were trained on
WEIGHTS = {"arch": str, "arm": str, "model_kwargs": dict, "num_classes": int, "img_size": int}
WEIGHTS |= {"mean": list, "std": list, "seed": int, "data": dict, "state_dict": dict}
WEIGHTS |= {"class_names": (list, NONE), **HISTORY}
FINISHED = {"log": list, "best_epoch": int, "best_loss": float, "best_val": dict, "digest": int}
TRAINING = {"args": dict, "epoch": int, "batch": int, "iteration": int, "loss": list, "log": list}
TRAINING |= {"seconds": float, "rng": dict}
PRETRAINING = {**TRAINING, "processes": int, "seen": TENSOR, "initial": TENSOR}
LAST = {"pretrain.py": PRETRAINING, "tools.dino": {**PRETRAINING, "phase": int}}
LAST["finetune.py"] = {**TRAINING, "seed": int, "digest": int, "best": dict}
RULES = {  # for values of the right type
    "arch": timm.is_model,
    "model_kwargs": lambda x: all(is_shape_argument(k, x[k]) for k in x.keys() - {"img_size"}),
    "img_size": lambda x: 0 < x <= 8192,
    "mean": lambda x: len(x) == 3 and all(map(isfinite, x)),
    "std": lambda x: len(x) == 3 and all(map(isfinite, x)) and min(x) >= 1e-6,
    "state_dict": lambda x: all(torch.isfinite(value).all() for value in x.values()),
    "class_names": lambda x: all(isinstance(name, str) for name in x),
    "seen": lambda x: x.dtype == torch.int64 and x.ndim == 1,
    "split": lambda x: x.dtype == torch.int64 and len(x) == 2 and set(x[1].tolist()) <= {0, 1, 2},
    "data": lambda x: all(isinstance(value, (str, bool, list, NONE)) for value in x.values()),
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
    if (n := state.get("processes", 1)) != distributed.world_size():
        raise UserError(f"{last}: resume with as many processes: torchrun --nproc-per-node {n}")
    several = len(state["args"].get("seeds") or ()) > 1  # of finetune.py: a folder for each
    parser.set_defaults(out=str(last.parent.parent if several else last.parent))
    return parse_again(parser, state["args"], may_change, last), state


def parse_again(parser, saved, may_change, path):
    """Parse {name: value} as saved in a file, then the command line. UserError where they clash."""
    flags = [k for k in vars(parser.parse_args()) if k not in may_change - {"epochs", "seeds"}]
    words = []
    for key in [key for key in saved if key in flags]:
        flag, value = f"--{key.replace('_', '-')}", saved[key]
        value = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
        if isinstance(value, list):
            words += [flag, *map(str, value)] if value else []
        elif value is not None and value is not False:
            words.append(flag if value is True else f"{flag}={value}")
    try:
        before = vars(parser.parse_args(words))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    args = parser.parse_args(words + sys.argv[1:])
    changed = [k for k in flags if k not in may_change and getattr(args, k) != before[k]]
    what = [f"--{k.replace('_', '-')} {before[k]} (not {getattr(args, k)})" for k in changed]
    if what:
        raise UserError(f"{path}: was made with {preview(what, 9)}; omit these or change --out")
    return args
