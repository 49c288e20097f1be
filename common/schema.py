"""What a weights file and a last.pt must hold: they may come from anybody, and be damaged."""

from contextlib import suppress
from math import isfinite

import timm
import torch

from common.arms import is_shape_argument
from common.cli import UserError

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
    "model_kwargs": lambda x: all(
        type(v) is int if k == "img_size" else is_shape_argument(k, v) for k, v in x.items()
    ),
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
