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
        wrong = [
            v for v in values if "=" not in v or v.split("=")[0] in ("img_size", "init", "name")
        ]
        if wrong:
            parser.error(
                f"{option_string}: {wrong[0]} is no KEY=VALUE argument for timm.create_model "
                f"(image size and initialization have flags of their own)"
            )
        super().__call__(parser, namespace, values, option_string)


def make_arm(flag, name, init, img_size, **model_kwargs):
    """cass.build_arm, where init may also be a weights file. Raises UserError, naming the flag."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3)
        raise UserError(
            f"{flag}: timm has no model {name!r}"
            + (f"; close names: {', '.join(close)}" if close else "")
        )
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # one line is enough
    if init not in ("imagenet", "random"):
        init = load_state_dict(init)
    try:
        return build_arm(name, img_size, init=init, **model_kwargs)
    except (TypeError, AssertionError, RuntimeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(
            f"{flag} {name}: cannot be built with these arguments: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    except Exception as error:  # the download raises errors of many kinds
        raise UserError(
            f"{flag} {name}: its ImageNet weights could not be downloaded; start with "
            f"--init random, or from a weights file with "
            f"{'--init' if flag == '--arch' else '--init-' + flag[2:]} FILE"
        ) from error


def rebuild_kwargs(name, img_size, model_kwargs):
    """The arguments with which timm.create_model rebuilds an arm, besides its name and num_classes."""
    kwargs = {key: value for key, value in model_kwargs.items() if key != "num_classes"}
    return {**size_argument(name, img_size), **kwargs}


@torch.no_grad()
def output_shape(model, img_size):
    """Shape of the model's output for one image. Raises ValueError, in one line, where it accepts no
    such images."""
    was_training = model.training
    try:
        return tuple(model.eval()(torch.zeros(1, 3, img_size, img_size)).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"accepts no images of 3x{img_size}x{img_size}: {str(error).splitlines()[0]}"
        ) from error
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
        raise ValueError(
            f"the arms cannot be paired: for one image the cnn arm gives logits of "
            f"shape {shapes['cnn']}, the vit arm {shapes['vit']}"
        )


def enable_grad_checkpointing(model, name):
    """Recompute activations in the backward pass. Batch-norm must not count that second forward pass:
    without the hooks its running statistics would be updated twice per step. Raises UserError."""
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError) as error:
        raise UserError(f"--grad-checkpointing: timm has none for {name}") from error

    def recomputing():
        return torch._C._current_graph_task_id() != -1  # inside a backward pass

    def hold(module, _):
        if recomputing():
            module.momentum, module.held = (
                0.0,
                (module.momentum, module.num_batches_tracked.clone()),
            )

    def release(module, *_):
        if recomputing():
            module.momentum = module.held[0]
            module.num_batches_tracked.copy_(module.held[1])

    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(hold)
            module.register_forward_hook(release, always_call=True)  # recomputation may stop early
