"""Where in an image the evidence for a prediction lies, and a test whether it does.

    python -m tools.maps --ckpt best.pt --image FILE     (a picture of the likeliest class)

Needs matplotlib and, for CNNs, captum: pip install -r requirements-extra.txt
images: (N, 3, S, S) float, normalized, on the model's device; targets: N classes; maps: (N, h, w)
float32, of patches or of a convolution's cells. Models are those of predict.load(), in eval mode.
"""

import math
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import predict
from common import cli
from common.checkpoint import atomic_open
from common.cli import UserError, refusing
from common.decode import normalize
from common.metrics import probabilities_of
from common.pixels import decode

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None  # main() says so

LEAST = 3  # cells to a side of a Grad-CAM, chosen on validation images: results/evidence
RANDOM, STEPS = 19, 10  # maps that a map must all beat, p = 0.05; masks of each


def on_patches(model, attention, images):
    """Attention (N, T, T) on the patches: the class token's row or, where all tokens are pooled,
    the mean over the rows of all patches. ValueError where they do not lie over square images."""
    prefix = getattr(model, "num_prefix_tokens", 0)
    side = math.isqrt(max(attention.shape[-1] - prefix, 0))
    if attention.shape != (len(images), *(prefix + side**2,) * 2):
        raise ValueError(f"attention of shape {tuple(attention.shape)}")
    rows = slice(1) if getattr(model, "global_pool", "") == "token" else slice(prefix, None)
    return attention[:, rows, prefix:].mean(1).reshape(-1, side, side).detach().float()


def relevance(model, images, targets):
    """Gradient-weighted attention (Chefer et al., arXiv 2103.15679, equations 5 and 6): over the
    blocks R = R + mean over the heads of (gradient * attention)+ @ R, from the identity."""
    found, parts = [], [m for name, m in model.named_modules() if name.endswith("attn_drop")]
    hooks = [m.register_forward_hook(lambda *x: found.append(x[-1])) for m in parts]
    logit = model(images)[range(len(images)), targets].sum()  # found: (N, heads, T, T) of a block
    for hook in hooks:
        hook.remove()
    R = one = torch.eye(found[0].shape[-1]).to(found[0])
    for attention, gradient in zip(found, torch.autograd.grad(logit, found)):
        R = R + (gradient * attention).clamp(min=0).mean(1) @ R
    return on_patches(model, R - one, images)


def explainer(model, size):
    """images, targets -> maps: for a ViT relevance(); else Grad-CAM (Selvaraju et al., arXiv
    1610.02391, by captum) of the last stage with LEAST cells to a side. ValueError for others."""
    if any(name.endswith("attn_drop") for name, _ in model.named_modules()):
        for module in model.modules():
            module.fused_attn = False  # fused, it never shows its softmax
        explain = partial(relevance, model)
    else:
        with refusing("Grad-CAM needs captum: pip install -r requirements-extra.txt", ImportError):
            from captum.attr import LayerGradCam
        stages = [x["module"] for x in model.feature_info if -(-size // x["reduction"]) >= LEAST]
        stage = model.get_submodule([model.feature_info[0]["module"], *stages][-1])
        cam = LayerGradCam(model, stage)
        explain = lambda *x: cam.attribute(*x, relu_attributions=True)[:, 0].detach().float()  # noqa: E731
    heat = explain(torch.zeros(1, 3, size, size, device=next(model.parameters()).device), [0])
    if heat.ndim != 3 or heat.shape[1] != heat.shape[2]:
        raise ValueError(f"a map of shape {tuple(heat.shape)}")
    return explain


def load(path, device="cpu"):
    """predict.load() on a device, with `explain`, an explainer(). Raises UserError."""
    arm = predict.load(path)
    arm.device = device
    if arm.class_names is None:
        raise UserError(f"{path}: predicts no classes; fine-tune it, and give its best.pt")
    kinds = ValueError, RuntimeError, AttributeError
    with refusing(f"{path}: this model has no map over the image:", kinds):
        arm.explain = explainer(arm.model.to(device), arm.img_size)
    return arm


def deletion(probability, image, maps):
    """(M,) areas under the probability of an image (3, S, S), as STEPS times an equal share of its
    pixels, the highest of each of M maps first, ties by lot, becomes its mean colour: less is
    better (RISE, Petsiuk et al., arXiv 1806.07421). probability: images -> (N,)."""
    size = image.shape[1:]
    values = F.interpolate(maps[:, None], size, mode="bilinear").flatten(1)
    ties = torch.randperm(size.numel(), generator=torch.Generator().manual_seed(0))
    order = values[:, ties].argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1)[:, ties.argsort()].view(-1, 1, *size)
    mean, counts = image.mean((1, 2), keepdim=True), torch.linspace(0, size.numel(), STEPS + 1)
    curves = [probability(torch.where(rank < n, mean, image)) for n in counts.tolist()]
    return torch.trapezoid(torch.stack(curves), dx=1 / STEPS, dim=0)


@torch.no_grad()
def distribution(arm, images):
    """Calibrated probabilities (N, C)."""
    return torch.from_numpy(probabilities_of(arm.model(images), arm.temperature, arm.multilabel)[1])


def explain(arm, pixels, target=None):
    """What speaks for a class (None: the likeliest one) in pixels (3, S, S) uint8, by arm.explain,
    an explainer(): target, its p, heat (h, w), areas by deletion() of it and of RANDOM maps with as
    many cells, and in words whether the first is the least."""
    image = normalize(torch.from_numpy(pixels.copy())[None].to(arm.device), arm.mean, arm.std)
    p = distribution(arm, image)[0]
    target = p.argmax().item() if target is None else target
    heat = arm.explain(image, [target])
    noise = torch.rand(RANDOM, *heat.shape[1:], generator=torch.Generator().manual_seed(0))
    what = image[0], torch.cat([heat, noise.to(arm.device)])
    areas = deletion(lambda x: distribution(arm, x)[:, target], *what)
    beaten = int((areas[0] < areas[1:]).sum())
    words = f"no better than random: beats {beaten} of {RANDOM} random maps"
    words = f"better than all {RANDOM} random maps" if beaten == RANDOM else words
    found = {"p": p[target].item(), "heat": heat[0].cpu().numpy(), "areas": areas.numpy()}
    return SimpleNamespace(target=target, words=words, **found)


def beside(images, heat=None, title=""):
    """A figure of images (3, S, S) uint8 side by side; a map (h, w) over the last one again."""
    n, bare = len(images) + (heat is not None), {"frame_on": False, "xticks": [], "yticks": []}
    figure = Figure((2.5 * n, 2.5), layout="compressed")
    figure.suptitle(textwrap.fill(title, 20 * n), fontsize=9, parse_math=False)
    axes = figure.subplots(1, n, squeeze=False, subplot_kw=bare)[0]
    for ax, image in zip(axes, images):
        drawn = ax.imshow(image.transpose(1, 2, 0))
    if heat is not None:
        axes[-1].imshow(images[-1].mean(0), cmap="gray", vmin=0, vmax=255)
        axes[-1].imshow(heat, alpha=0.55, interpolation="bilinear", extent=drawn.get_extent())
    return figure


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="best.pt of finetune.py")
    parser.add_argument("--image", required=True, metavar="FILE", help="image to explain")
    parser.add_argument("--out", default="map.png", metavar="FILE", help="PNG to write")
    parser.add_argument("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    args = parser.parse_args()
    if Figure is None:
        raise UserError("needs matplotlib: pip install -r requirements-extra.txt")
    if Path(args.out).suffix.lower() != ".png":
        raise UserError(f"{args.out}: is no name for a .png file (--out)")
    predict.prepare_file(args.out, "--out", True)
    cli.refuse_inputs([args.out], args.image)
    arm = load(args.ckpt, cli.pick_device(args.device))
    with refusing(f"{args.image}: cannot be read:", ValueError):
        pixels = decode(args.image, arm.img_size)[0]
    found = explain(arm, pixels)
    said = f"{arm.class_names[found.target]}, probability {found.p:.2f}; its map: {found.words}"
    figure = beside([pixels], found.heat, said)
    with atomic_open(args.out, "wb") as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    print(f"{said}\nwrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
