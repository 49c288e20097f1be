"""The two arms from what a user typed: timm models, initial weights, and one-line errors."""

import difflib
import logging

import timm
import torch
from timm.utils import ParseKwargs

from cass import build_arm, size_argument
from common.checkpoint import load_state_dict
from common.cli import UserError


class KeyValues(ParseKwargs):
    """timm's KEY=VALUE arguments, with a one-line error for anything else."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            key, equals, _ = value.partition("=")
            if not equals or key in ("img_size", "init", "name"):
                advice = "image size and initialization have flags of their own"
                parser.error(f"{option_string}: {value} is no KEY=VALUE for timm ({advice})")
        super().__call__(parser, namespace, values, option_string)


def make_arm(flag, name, init, img_size, **model_kwargs):
    """cass.build_arm, where init may also be a weights file. Raises UserError, naming the flag."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise UserError(f"{flag}: timm has no model {name!r}{hint}")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # one line is enough
    if init not in ("imagenet", "random"):
        init = load_state_dict(init)
    try:
        return build_arm(name, img_size, init=init, **model_kwargs)
    except (TypeError, AssertionError, RuntimeError, KeyError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{flag} {name}: cannot be built with these arguments: {reason}") from error
    except Exception as error:  # the download raises errors of many kinds
        init_flag = "--init" if flag == "--arch" else f"--init-{flag[2:]}"
        problem = "its ImageNet weights could not be downloaded"
        fix = f"start with --init random, or with {init_flag} FILE"
        raise UserError(f"{flag} {name}: {problem}; {fix}") from error


def rebuild_kwargs(name, img_size, model_kwargs):
    """What timm.create_model needs to rebuild an arm, besides its name and num_classes."""
    kwargs = {key: value for key, value in model_kwargs.items() if key != "num_classes"}
    return {**size_argument(name, img_size), **kwargs}


@torch.no_grad()
def output_shape(model, img_size):
    """Shape of the model's output for one image. Raises ValueError, in one line, where it accepts
    no such images."""
    was_training = model.training
    try:
        return tuple(model.eval()(torch.zeros(1, 3, img_size, img_size)).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"accepts no images of 3x{img_size}x{img_size}: {reason}") from error
    finally:
        model.train(was_training)


def check_pair(cnn, vit, img_size):
    """Raise ValueError, in one line, unless both arms map images to logits of one shape."""
    shapes = {}
    for arm, model in (("cnn", cnn), ("vit", vit)):
        try:
            shapes[arm] = output_shape(model, img_size)
        except ValueError as error:
            raise ValueError(f"the {arm} arm {error}") from error
    if shapes["cnn"] != shapes["vit"] or len(shapes["cnn"]) != 2:
        found = f"shape {shapes['cnn']} (cnn) and {shapes['vit']} (vit)"
        raise ValueError(f"the arms cannot be paired: for one image their logits have {found}")


def enable_grad_checkpointing(model, name):
    """Recompute activations in the backward pass; the hooks keep batch-norm from counting that
    second forward pass in its running statistics. Raises UserError."""
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError) as error:
        raise UserError(f"--grad-checkpointing: timm has none for {name}") from error

    def recomputing():
        return torch._C._current_graph_task_id() != -1  # inside a backward pass

    def hold(module, _):
        if recomputing():
            module.held = module.momentum, module.num_batches_tracked.clone()
            module.momentum = 0.0

    def release(module, *_):
        if recomputing():
            module.momentum, count = module.held
            module.num_batches_tracked.copy_(count)

    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(hold)
            module.register_forward_hook(release, always_call=True)  # recomputation may stop early
