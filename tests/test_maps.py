"""Maps of evidence against plain formulas and slow loops; the deletion test against pixels that are
known to matter."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import one_line, picture
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import nn

import finetune
from common.cli import UserError
from tools import maps

SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3)
KINDS = {
    "class token": dict(model_name="vit_tiny_patch16_224", **SMALL),
    "distillation token": dict(model_name="deit_tiny_distilled_patch16_224", **SMALL),
    "no class token": dict(
        model_name="vit_tiny_patch16_224",
        class_token=False,
        reg_tokens=1,
        global_pool="avg",
        **SMALL,
    ),
}


def attention_by_hand(model, image):
    """Logits (C,) and, of each block, the softmax (heads, T, T), from the weights, in loops."""
    x, found = model.patch_embed(image[None]), []
    x = model.norm_pre(model._pos_embed(x))
    for block in model.blocks:
        y, heads = block.norm1(x), []
        q, k, v = block.attn.qkv(y)[0].reshape(-1, 3, 2, 12).unbind(1)
        found.append([(q[:, h] @ k[:, h].T / 12**0.5).softmax(1) for h in range(2)])
        heads = [a @ v[:, h] for h, a in enumerate(found[-1])]
        x = x + block.attn.proj(torch.cat(heads, 1))[None]
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))[0], found


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_weighted_attention_against_a_slow_loop(kind):
    torch.manual_seed(0)
    model = timm.create_model(**KINDS[kind]).eval()
    explain = maps.explainer(model, 32)
    model.double()
    images, targets = torch.randn(2, 3, 32, 32).double(), [2, 0]
    shown = explain(images, targets)
    assert shown.shape == (2, 4, 4)
    prefix = model.num_prefix_tokens
    for image, target, heat in zip(images, targets, shown):
        logits, blocks = attention_by_hand(model, image)
        torch.testing.assert_close(logits, model(image[None])[0])
        R = np.eye(16 + prefix)
        for heads in blocks:
            mean = np.zeros_like(R)
            for a in heads:
                (g,) = torch.autograd.grad(logits[target], a, retain_graph=True)
                mean += np.maximum((g * a).detach().numpy(), 0) / 2
            R = R + mean @ R
        R -= np.eye(len(R))
        row = R[0] if model.cls_token is not None else R[prefix:].mean(0)
        np.testing.assert_allclose(heat.ravel(), row[prefix:], rtol=1e-5, atol=1e-12)


class TinyCNN(nn.Module):
    """Two stages; feature_info as timm writes it."""

    feature_info = [{"module": "first", "reduction": 2}, {"module": "last", "reduction": 4}]

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(4, 5, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.last(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize("size", [8, 10])
def test_grad_cam_against_its_formula(size):
    """Of the last stage with 3 cells to a side: at 8 px the first one, at 10 px the last."""
    torch.manual_seed(0)
    model, images, targets = TinyCNN().eval(), torch.randn(2, 3, size, size), [2, 1]
    shown = maps.explainer(model, size)(images, targets)
    stage = model.first if size == 8 else lambda x: model.last(model.first(x))
    for image, target, heat in zip(images, targets, shown):
        A = stage(image[None]).detach().requires_grad_()
        logits = model.head((model.last(A) if size == 8 else A).mean((2, 3)))
        (gradient,) = torch.autograd.grad(logits[0, target], A)
        cam = sum(gradient[0, k].mean() * A[0, k] for k in range(A.shape[1])).relu()
        torch.testing.assert_close(heat, cam.detach())


def test_masking_what_matters_lowers_the_area():
    """A model that sees one quarter of the image alone; areas by hand."""
    image = torch.zeros(3, 20, 20)
    image[:, :10, :10] = 4  # its mean is 1
    corner = torch.zeros(2, 2)
    corner[0, 0] = 1
    areas = maps.deletion(
        lambda x: x[:, 0, :10, :10].mean((1, 2)) / 4,
        image,
        torch.stack([corner, 1 - corner]).repeat_interleave(10, 1).repeat_interleave(10, 2),
    )
    p = [4, 4 - 3 * 0.4, 4 - 3 * 0.8, *[1] * 8]  # 40 pixels a step, of 100 that matter
    assert areas[0] == pytest.approx((sum(p) - 2.5) / 10 / 4)
    p = [*[4] * 8, 4 - 3 * 0.2, 4 - 3 * 0.6, 1]
    assert areas[1] == pytest.approx((sum(p) - 2.5) / 10 / 4)


class Corner(nn.Module):
    def forward(self, x):  # logits of two classes: is the upper left corner bright?
        bright = 8 * x[:, 0, :8, :8].mean((1, 2)) - 4
        return torch.stack([bright, -bright], 1)


def arm(model, explain):
    return SimpleNamespace(
        model=model,
        explain=explain,
        device=torch.device("cpu"),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        temperature=1.0,
        multilabel=False,
    )


@pytest.mark.parametrize(("inside", "beaten"), [(True, maps.RANDOM), (False, 0)])
def test_a_map_is_called_better_only_where_it_is(inside, beaten):
    pixels = np.zeros((3, 32, 32), np.uint8)
    pixels[:, :8, :8] = 255
    heat = torch.full((1, 8, 8), float(not inside))
    heat[:, :2, :2] = inside
    found = maps.explain(arm(Corner(), lambda images, targets: heat), pixels)
    assert found.target == 0 and found.p == pytest.approx(1 / (1 + np.exp(-8)), abs=1e-6)
    assert (found.areas[0] < found.areas[1:]).sum() == beaten
    better = found.words == f"better than all {maps.RANDOM} random maps"
    assert better == inside and ("no better than random" in found.words) != inside


def test_the_map_of_another_class_is_asked_for():
    asked = []
    explain = lambda images, targets: asked.append(targets) or torch.ones(1, 4, 4)  # noqa: E731
    pixels = np.full((3, 32, 32), 255, np.uint8)
    assert maps.explain(arm(Corner(), explain), pixels).target == 0
    found = maps.explain(arm(Corner(), explain), pixels, 1)
    assert asked == [[0], [1]] and found.p < 0.01


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "swin_tiny_patch4_window7_224"])
def test_what_cannot_be_laid_over_an_image_is_refused(name, monkeypatch):
    kwargs = {"img_size": 64, "window_size": 4} if "swin" in name else {}
    made = SimpleNamespace(model=timm.create_model(name, **kwargs).eval(), img_size=64)
    made.class_names = ["a"]
    monkeypatch.setattr(maps.predict, "load", lambda path: made)
    with pytest.raises(UserError, match="best.pt: this model has no map"):
        maps.load("best.pt")


def test_real_cnns_of_the_paper_have_maps():
    torch.manual_seed(0)
    for name in ("resnet18", "densenet161"):
        model = timm.create_model(name, num_classes=3).eval()
        shown = maps.explainer(model, 64)(
            torch.randn(1, 3, 64, 64).expand(3, -1, -1, -1), [0, 1, 2]
        )
        assert shown.shape == (3, 4, 4) and shown.min() >= 0 and shown.max() > 0


@pytest.mark.parametrize("place", [(1, 4), (5, 0), (2, 2)])
def test_the_map_is_drawn_over_its_place(place):
    heat, image = np.zeros((6, 6), "f4"), np.full((3, 48, 48), 90, np.uint8)
    heat[place] = 1
    figure = maps.beside([image], heat)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    light = np.asarray(canvas.buffer_rgba())[..., :3] @ (0.299, 0.587, 0.114)
    plain, over = figure.axes
    assert len(plain.images) == 1 and len(over.images) == 2
    (x0, y0), (x1, y1) = over.get_window_extent().get_points().round().astype(int)
    shown = light[len(light) - y1 : len(light) - y0, x0:x1]
    at = np.argwhere(shown > shown.max() - 1).mean(0)  # the middle of what is brightest
    assert tuple((6 * at / shown.shape).astype(int)) == place


def test_the_command_draws_both_arms_and_refuses_bad_input(pretrained, tmp_path, script):
    arms = [pretrained / f"{arm}.pt" for arm in ("cnn", "vit")]
    fine, mine = tmp_path / "fine", tmp_path / "mine.png"
    assert script(finetune, "--ckpt", *arms, "--epochs", 1, "--out", fine)[0] == 0
    Image.fromarray(picture(7)).save(mine)
    before = mine.read_bytes()
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cnn", "vit"):
        words = ["--ckpt", fine / name / "best.pt", "--image", mine, "--out", tmp_path / "map.png"]
        status, out, err = script(maps, *words)
        assert status == 0 and "probability 0." in out and "random maps" in out, err
        with Image.open(tmp_path / "map.png") as image:
            assert image.format == "PNG" and min(image.size) > 150
    best, out = ["--ckpt", fine / "cnn/best.pt"], ["--out", tmp_path / "b.png"]
    for words, said in (
        (["--ckpt", "none.pt", "--image", mine, *out], "none.pt: there is no such"),
        (["--ckpt", pretrained / "cnn.pt", "--image", mine, *out], "no classes"),
        ([*best, "--image", "none.png", *out], "none.png: cannot be read"),
        ([*best, "--image", tmp_path / "text.jpg", *out], "not an image"),
        ([*best, "--image", mine, "--out", mine], "would be replaced"),
        (best, "--image"),
    ):
        status, _, err = script(maps, *words)
        assert status == 2 and said in one_line(err), (words, err)
    assert mine.read_bytes() == before and not (tmp_path / "b.png").exists()


def test_an_empty_map_is_no_better_than_random():
    """As Grad-CAM's is where nothing speaks for a class; the model looks at the upper rows."""
    pixels = np.zeros((3, 32, 32), np.uint8)
    pixels[:, :8, :8] = 255
    found = maps.explain(arm(Corner(), lambda images, targets: torch.zeros(1, 8, 8)), pixels)
    assert "no better than random" in found.words


def test_a_class_token_that_is_not_read_out_has_no_say():
    """Where all tokens are pooled, the map is that of the patches' rows."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", global_pool="avg", **SMALL).eval()
    heat = maps.explainer(model, 32)(torch.randn(1, 3, 32, 32), [1])
    assert heat.shape == (1, 4, 4) and heat.max() > 0


@pytest.mark.parametrize("name", ["mixer_s32_224", "mambaout_femto"])
def test_maps_that_are_no_maps_are_refused(name):
    model = timm.create_model(name, num_classes=2).eval()
    with pytest.raises((ValueError, AttributeError)):
        maps.explainer(model, 224)
