"""What goes on inside a model: attention maps and feature maps.

images: (N, 3, H, W) float, normalized, on the model's device. The models are left in eval mode.
"""

import math
from contextlib import ExitStack

import torch
from torch import nn


@torch.no_grad()
def _outputs(model, images, names):
    """One forward pass: [(name, output), ...] of the named modules, in running order."""
    found = []
    with ExitStack() as hooks:
        for name in names:
            hook = model.get_submodule(name).register_forward_hook
            note = lambda *x, name=name: found.append((name, x[-1].clone()))  # noqa: E731
            hooks.enter_context(hook(note))  # a copy: activations may work in place
        model.eval()(images)
    return found


def attention(model, images, block=1):
    """The softmax of one block's attention, the first is 1: (N, heads, T, T). A row, for the token
    that looks, sums to one. Raises ValueError."""
    names = [name for name, m in model.named_modules() if "attn_drop" in dict(m.named_children())]
    if not 1 <= block <= len(names):
        raise ValueError(f"has no attention block {block}; there are {len(names)} (in a CNN, none)")
    name = names[block - 1]
    model.get_submodule(name).fused_attn = False  # for good: fused, it never shows its softmax
    found = _outputs(model, images, [f"{name}.attn_drop"])
    if not found:
        raise ValueError(f"never shows the softmax of block {block}")
    return found[-1][1]


def attention_map(model, images, block=1):
    """How one block's attention, mean over its heads, falls on the patches: (N, h, w) float32.
    With a class token, its row, which sums to one less what falls on tokens that are no patches.
    Without (pooled ViTs), the mean over the rows of all patches: the attention that each
    receives. Raises ValueError where the tokens cannot be laid over the square images."""
    attn = attention(model, images, block).mean(1)
    prefix = getattr(model, "num_prefix_tokens", 0)
    side = math.isqrt(max(attn.shape[-1] - prefix, 0))
    if attn.shape[0] != len(images) or attn.shape[1:] != (prefix + side**2,) * 2:
        raise ValueError(f"attends in block {block} to something else than the image's patches")
    pooled = getattr(model, "cls_token", None) is None
    row = attn[:, prefix:].mean(1) if pooled else attn[:, 0]
    return row[:, prefix:].reshape(-1, side, side).float()


def mean_attention(model, batches, block=1):
    """(h, w): the mean of attention_map over all images of some batches."""
    return torch.cat([attention_map(model, images, block).cpu() for images in batches]).mean(0)


def feature_maps(model, images, layers=1):
    """[(name, (N, C, h, w)), ...] of the first convolutions that run. ValueError where fewer do."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    found = _outputs(model, images, names)
    if len(found) < layers:
        raise ValueError(f"has {len(found)} convolutions, not {layers}; is it a Transformer?")
    return found[:layers]
