"""What goes on inside a model: attention maps, feature maps, and how alike the layers of two models
are. Needs torch and timm.

    maps = attention_map(vit, images, block=1)               (N, h, w)
    [(name, maps), ...] = feature_maps(cnn, images, 5)       (N, C, h, w) each
    similarity = minibatch_cka((layer_grams(cnn, x, layer_names(cnn)),
                                layer_grams(vit, x, layer_names(vit))) for x in batches)

images: (N, 3, H, W) float, normalized, on the model's device. The models are left in eval mode.
"""

import math

import torch
from timm.models.swin_transformer import window_partition, window_reverse
from timm.utils import AttentionExtract
from torch import nn
from torch.nn.functional import pad


def attention_names(model):
    """Names of the attention modules, one to a block, in order."""
    names = [name for name, _ in model.named_modules() if name.endswith(".attn_drop")]
    return [name.rpartition(".")[0] for name in names]


@torch.no_grad()
def attention(model, images, block=1):
    """The softmax of one block's attention, by timm's extraction.

    block: counted from 1. Returns (N, heads, T, T), or of windows (N * windows, heads, T, T): a row
    for the token that looks, a column for the one looked at; rows sum to one. Fused attention never
    shows its softmax: it is switched off in this block for good. Raises ValueError where there is
    no such block.
    """
    names = attention_names(model)
    if not 1 <= block <= len(names):
        raise ValueError(
            f"has no attention block {block}; there are {len(names)}"
            if names
            else "has no attention to show; is it a CNN?"
        )
    name = names[block - 1]
    model.get_submodule(name).fused_attn = False
    extract = AttentionExtract(model, [f"{name}.attn_drop"], method="hook")
    try:
        return extract(images)[f"{name}.attn_drop"]
    except KeyError:
        raise ValueError(f"never shows the softmax of block {block}") from None
    finally:
        for handle in extract.hooks._handles:  # timm would leave them on the model
            handle.remove()


def has_class_token(model):
    return getattr(model, "cls_token", None) is not None


def attention_map(model, images, block=1):
    """How one block's attention, the mean over its heads, falls on the patches: (N, h, w) float32.

    With a class token, its row; a map sums to one, less what falls on tokens that are no patches
    (class, distillation, register). Without one (Swin, pooled ViTs), the mean over the rows of all
    patches, which is the attention that each receives; Swin's windows, shifted or not, are put back
    where they came from, without padding. images: square. Raises ValueError where the tokens cannot
    be laid over the image.
    """
    attn = attention(model, images, block)
    owner = model.get_submodule(attention_names(model)[block - 1].rpartition(".")[0])
    if hasattr(owner, "shift_size"):
        return _put_back(attn.mean(1), owner).float()
    prefix = getattr(model, "num_prefix_tokens", 0)
    side = math.isqrt(max(attn.shape[-1] - prefix, 0))
    if attn.shape[0] != len(images) or attn.shape[2:] != (prefix + side**2,) * 2:
        raise ValueError(
            f"attends in block {block} over something else than the patches of the "
            f"image; ViT, DeiT and Swin can be shown"
        )
    attn = attn.mean(1)
    row = attn[:, 0] if has_class_token(model) else attn[:, prefix:].mean(1)
    return row[:, prefix:].reshape(-1, side, side).float()


def _put_back(attn, block):
    """Attention in Swin's windows, (N * windows, T, T) -> (N, H, W): the mean over all rows."""
    (h, w), (H, W) = block.window_size, block.input_resolution
    down, across = math.ceil(H / h), math.ceil(W / w)
    real = pad(attn.new_ones(1, H, W, 1), (0, 0, 0, across * w - W, 0, down * h - H))
    real = window_partition(real, (h, w)).reshape(-1, h * w).repeat(len(attn) // (down * across), 1)
    attn = attn * real[:, None]  # padding is not looked at,
    attn = attn / attn.sum(2, keepdim=True).clamp_min(1e-12) * real[:, :, None]  # nor does it look
    maps = window_reverse(attn.sum(1).reshape(-1, h, w, 1), (h, w), down * h, across * w)
    return maps[:, :H, :W, 0].roll(tuple(block.shift_size), (1, 2)) / (H * W)


def mean_attention(model, batches, block=1):
    """(h, w): the mean of attention_map over all images of some batches."""
    return torch.cat([attention_map(model, images, block).cpu() for images in batches]).mean(0)


@torch.no_grad()
def _hooked(model, images, names, see):
    """One pass in which see(name, output) is called for each of the named modules."""
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: see(name, output)
        )
        for name in names
    ]
    try:
        model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()


def feature_maps(model, images, layers=1):
    """The outputs of the first convolutions, in the order in which they run: a list of `layers`
    pairs (name, (N, C, h, w)). Raises ValueError where there are fewer."""
    found = []

    def see(name, output):
        if len(found) < layers:
            found.append((name, output.clone()))  # activations may work in place

    _hooked(model, images, [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)], see)
    if len(found) < layers:
        raise ValueError(f"has {len(found)} convolutions, not {layers}; is it a Transformer?")
    return found


def layer_names(model):
    """The blocks of a timm model: the stages that its feature_info names, each taken apart where it
    is a chain. Raises ValueError where timm names none."""
    names = []
    for name in [info["module"] for info in getattr(model, "feature_info", ())]:
        if isinstance(getattr(model.get_submodule(name), "blocks", None), nn.Sequential):
            name = f"{name}.blocks"
        stage = model.get_submodule(name)
        chain = stage.named_children() if isinstance(stage, nn.Sequential) else ()
        names += [f"{name}.{child}" for child, _ in chain] or [name]
    if not names:
        raise ValueError("has no feature_info in timm to tell its layers")
    return names


def gram(features):
    """(n, ...) -> (n, n) float64 on the CPU: inner products of the features less their mean, which
    HSIC does not see. Zero where they vary by a millionth of their size or less: by rounding."""
    features = features.flatten(1).cpu().double()
    centred = features - features.mean(0)
    return centred @ centred.T * (centred.norm() > 1e-6 * features.norm())


def layer_grams(model, images, names):
    """gram() of the outputs of the named layers: (L, N, N)."""
    grams = {}
    _hooked(model, images, names, lambda name, output: grams.update({name: gram(output)}))
    return torch.stack([grams[name] for name in names])


def hsic(K, L):
    """The unbiased estimator of HSIC (Nguyen et al., arXiv 2010.15327v2) for every pair.

    K: (A, n, n), L: (B, n, n), symmetric. Returns (A, B). Raises ValueError for n below 4.
    """
    n = K.shape[-1]
    if n < 4:
        raise ValueError(f"HSIC needs at least 4 images in a batch, not {n}")
    K, L = (x - torch.diag_embed(x.diagonal(dim1=1, dim2=2)) for x in (K, L))
    trace = torch.einsum("aij,bij->ab", K, L)
    sums = K.sum((1, 2))[:, None] * L.sum((1, 2)) / ((n - 1) * (n - 2))
    cross = K.sum(1) @ L.sum(1).T * 2 / (n - 2)
    return (trace + sums - cross) / (n * (n - 3))


def minibatch_cka(batches):
    """Linear CKA between layers, over minibatches (Nguyen et al., arXiv 2010.15327v2).

    batches: an iterable of pairs of gram() matrices, (A, n, n) and (B, n, n). Returns (A, B)
    float64: 1 for features that are the same up to rotation and scale, 0 for unrelated ones; being
    an estimate, it may lie a little outside. nan where a layer gives the same for every image.
    """
    terms = [(hsic(K, L), hsic(K, K).diagonal(), hsic(L, L).diagonal()) for K, L in batches]
    between, of_k, of_l = (torch.stack(parts).mean(0) for parts in zip(*terms))
    of_k, of_l = (torch.where(own > 0, own, torch.nan) for own in (of_k, of_l))
    return between / (of_k[:, None] * of_l).sqrt()
