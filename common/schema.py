"""What a weights file and a last.pt must hold: they may come from anybody, and be damaged."""

import math

import timm
import torch

from common.arms import is_shape_argument
from common.cli import UserError


def _is(kind):
    return lambda x: isinstance(x, kind)


def _number(low=-math.inf, high=math.inf, kinds=(int, float)):
    return lambda x: type(x) in kinds and low <= x <= high and math.isfinite(x)


def _list(good, n=None):
    return lambda x: isinstance(x, list) and n in (None, len(x)) and all(map(good, x))


def _tensor(dtype, ndim=1):
    return lambda x: (
        torch.is_tensor(x) and (x.dtype, x.ndim, x.layout) == (dtype, ndim, torch.strided)
    )


def _optional(good):
    return lambda x: x is None or good(x)


def _finite(state):
    tensors = state.values() if isinstance(state, dict) else [None]
    return all(torch.is_tensor(x) and torch.isfinite(x).all() for x in tensors)


def _shape(kwargs):  # of a model
    plain = isinstance(kwargs, dict) and type(kwargs.get("img_size", 1)) is int
    return plain and all(k == "img_size" or is_shape_argument(k, x) for k, x in kwargs.items())


def _split(x):  # splits.carried
    return _tensor(torch.int64, 2)(x) and len(x) == 2 and ((x[1] >= 0) & (x[1] <= 2)).all()


_whole, _log, _hashes = _number(0, kinds=(int,)), _list(_is(dict)), _tensor(torch.int64)
HISTORY = {
    "seen": _optional(_hashes),
    "split": _optional(_split),
}  # of what weights were trained on
WEIGHTS = {**HISTORY, "arch": lambda x: isinstance(x, str) and timm.is_model(x), "arm": _is(str)}
WEIGHTS |= {"model_kwargs": _shape, "num_classes": _whole, "img_size": _number(1, 8192, (int,))}
WEIGHTS |= {"mean": _list(_number(), 3), "std": _list(_number(1e-6), 3), "seed": _whole}
WEIGHTS |= {"data": _is(dict), "state_dict": _finite, "class_names": _optional(_list(_is(str)))}
FINISHED = {"log": _log, "best_epoch": _whole, "best_loss": _number(), "best_val": _is(dict)}
FINISHED |= {"digest": _is(int)}  # best.pt's record of its training
TRAINING = {"args": _is(dict), "epoch": _whole, "batch": _whole, "iteration": _whole, "log": _log}
TRAINING |= {"loss": _list(_number()), "seconds": _number(0), "rng": _is(dict)}
PRETRAINING = {**TRAINING, "processes": _whole, "seen": _hashes, "initial": _split}
LAST = {  # of each script's last.pt
    "finetune.py": {**TRAINING, "seed": _whole, "digest": _is(int), "best": _is(dict)},
    "pretrain.py": PRETRAINING,
    "tools.dino": {**PRETRAINING, "phase": _number(0, 1, (int,))},
}


def check(path, content, fields):
    """Raise UserError, naming the fields of this dict that are missing or not as described."""
    content = content if isinstance(content, dict) else {}
    wrong = ", ".join(key for key, good in fields.items() if not good(content.get(key)))
    if wrong:
        raise UserError(f"{path}: is damaged, or of another version: {wrong} missing or not valid")
