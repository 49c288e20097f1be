"""The two arms from what a user typed: timm models, initial weights, and one-line errors."""

import difflib
import logging

import timm
import torch
from timm.utils import ParseKwargs

from cass import build_arm, size_argument
from common import checkpoint
from common.cli import UserError, checked, positive, refusing
from common.decode import IMAGENET_MEAN, IMAGENET_STD

NORMALIZATION = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
# arguments of timm.create_model that load files, ask the network, or have flags of their own
NOT_SHAPE = {"img_size", "init", "name", "model_name", "checkpoint_path", "cache_dir"}
NOT_SHAPE |= {"features_only", "scriptable", "exportable", "no_jit"}


def is_shape_argument(key, value=None):
    """Whether key=value only shapes a model of timm: plain data that makes it load nothing."""
    items = value if isinstance(value, (list, tuple)) else [value]
    plain = all(isinstance(x, (int, float, str, type(None))) for x in items)
    return key not in NOT_SHAPE and not str(key).startswith("pretrained") and plain


_other = "no KEY=VALUE that shapes a model; size, weights: flags of their own"
key_value = checked(str, lambda x: "=" in x and is_shape_argument(x.partition("=")[0]), _other)
KWARGS = dict(nargs="*", type=key_value, action=ParseKwargs, metavar="KEY=VALUE", default={})


def add_arguments(parser):
    """The flags of the two arms."""
    add, vit = parser.add_argument, "vit_base_patch16_384.augreg_in21k_ft_in1k"
    for arm, name in (("cnn", "resnet50.a1_in1k"), ("vit", vit)):
        add(f"--{arm}", default=name, metavar="NAME", help=f"the {arm} arm, any timm model")
        add(f"--{arm}-kwargs", **KWARGS, help="for timm.create_model, such as patch_size=8")
        add(f"--init-{arm}", metavar="WHAT", help="imagenet, random or a weights file, for one arm")
    add("--init", default="imagenet", choices=["imagenet", "random"], help="both arms (Table 20)")
    add("--img-size", type=positive, default=384, help="side of the images in pixels (F.2.2)")


def make_arm(flag, name, init, img_size, /, **model_kwargs):
    """cass.build_arm, where init may also be a weights file. Raises UserError, naming the flag."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3)
        raise UserError(f"{flag}: no model {name!r}; close names: {', '.join(close) or 'none'}")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # one line is enough
    if init not in ("imagenet", "random"):
        file, init = init, checkpoint.load(init)  # ours, or another with timm's keys
        for key in ("state_dict", "model"):
            init = init[key] if isinstance(init.get(key), dict) else init
        if not all(map(torch.is_tensor, init.values())):
            raise UserError(f"{file}: holds no state dict")
    try:
        return channels_last(build_arm(name, img_size, init=init, **model_kwargs))
    except (TypeError, AssertionError, RuntimeError, KeyError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{flag} {name}: cannot be built with these arguments: {reason}") from error
    except Exception as error:  # the download raises errors of many kinds
        fix = f"give --init random, or --init{'' if flag == '--arch' else flag[1:]} FILE"
        raise UserError(f"{flag} {name}: no ImageNet weights downloaded; {fix}") from error


def channels_last(model):
    """The model in the memory format that is faster, unless some weights have five dimensions."""
    plain = all(x.ndim < 5 for x in model.state_dict().values())
    return model.to(memory_format=torch.channels_last) if plain else model


def rebuild_kwargs(name, img_size, kwargs):
    """What timm.create_model needs to rebuild an arm, besides its name and num_classes."""
    return size_argument(name, img_size) | {k: v for k, v in kwargs.items() if k != "num_classes"}


@torch.no_grad()
def output_shape(model, img_size, name):
    """Shape of the output for one image. Raises UserError where the model takes no such images."""
    with refusing(f"{name} accepts no images of 3x{img_size}x{img_size}:"):
        output = model.eval()(torch.zeros(1, 3, img_size, img_size))
    model.train()  # as timm makes it
    return tuple(output.shape)


def check_pair(cnn, vit, img_size):
    """Raise UserError unless both arms map images to logits of one shape."""
    R, T = output_shape(cnn, img_size, "--cnn"), output_shape(vit, img_size, "--vit")
    if R != T or len(R) != 2:
        raise UserError(f"--cnn, --vit: cannot be paired: their logits have shapes {R} and {T}")


def save(out, arm, model, name, kwargs, img_size, metadata):
    """cnn.pt or vit.pt, for finetune.py and timm. name, kwargs: as the user typed them."""
    metadata = {**metadata, **NORMALIZATION, "arch": name, "arm": arm, "img_size": img_size}
    metadata["model_kwargs"] = rebuild_kwargs(name, img_size, kwargs)
    checkpoint.save(out / f"{arm}.pt", checkpoint.weights_file(model, **metadata))


def enable_grad_checkpointing(model, name):
    """Recompute activations in the backward pass; batch-norm counts both. Raises UserError."""
    with refusing(f"--grad-checkpointing: timm has none for {name}"):
        model.set_grad_checkpointing()
