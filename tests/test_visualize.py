"""Maps against models built by hand and slow loops; the script from end to end."""

import csv
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, one_line, picture, run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from sklearn.calibration import calibration_curve
from torch import nn

import finetune
from common.pixels import decode
from tools import visualize
from tools.introspect import attention, attention_map, feature_maps, mean_attention

SMALL = dict(img_size=48, patch_size=8, embed_dim=24, depth=2, num_heads=2)  # a grid of 6 x 6
KINDS = {
    "class token": lambda: timm.create_model("vit_tiny_patch16_224", **SMALL),
    "class and distillation token": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", **SMALL
    ),
    "no class token": lambda: timm.create_model(
        "vit_tiny_patch16_224", class_token=False, reg_tokens=1, global_pool="avg", **SMALL
    ),
}


@torch.no_grad()
def look_at_bright(model):
    """All tokens of all blocks look at bright patches alone, and all alike where they see none."""
    for name, parameter in model.named_parameters():
        parameter.fill_("norm" in name and name.endswith("weight"))
    dim = model.patch_embed.proj.weight.shape[0]
    model.patch_embed.proj.weight[0], model.patch_embed.proj.weight[1] = 1, -1
    for name, module in model.named_modules():
        if name.endswith("attn") and module.qkv.in_features == dim:
            for head in range(0, dim, dim // module.num_heads):
                module.qkv.bias[head], module.qkv.bias[head + 1] = 20, -20  # the query
                module.qkv.weight[dim + head, 0] = 1  # the key
                module.qkv.weight[dim + head + 1, 1] = 1
    return model.eval()


def bright(size, patch, places):
    """Black images, each with one white patch at (row, column)."""
    images = torch.zeros(len(places), 3, size, size)
    for image, (r, c) in zip(images, places):
        image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = 1
    return images


# attention


@pytest.mark.parametrize("build", KINDS.values())
def test_rows_of_the_attention_sum_to_one_and_the_model_stays_as_it_is(build):
    torch.manual_seed(0)
    model = build().eval()
    size = model.patch_embed.img_size[0]
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        before = model(images)
    for block in (1, 2):
        rows = attention(model, images, block)
        assert rows.ndim == 4 and len(rows) % 3 == 0
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
    with torch.no_grad():
        torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_lands_on_the_patch_that_is_looked_at(kind):
    model, places = look_at_bright(KINDS[kind]()), [(1, 4), (5, 0), (2, 2)]
    images = bright(48, 8, places)
    for block in (1, 2):
        maps = attention_map(model, images, block)
        expected = torch.zeros(3, 6, 6)
        for one, place in zip(expected, places):
            one[place] = 1
        torch.testing.assert_close(maps, expected)


def test_class_token_s_row_and_mean_attention_received():
    """Against the softmax of the queries and keys, written out."""
    torch.manual_seed(0)
    for build in KINDS.values():
        model, images = build().eval(), torch.randn(2, 3, 48, 48)
        block, prefix = model.blocks[0], model.num_prefix_tokens
        seen = []
        handle = block.norm1.register_forward_hook(
            lambda _, __, output, seen=seen: seen.append(output)
        )
        with torch.no_grad():
            model(images)
        handle.remove()
        q, k, _ = block.attn.qkv(seen[0]).reshape(2, -1, 3, 2, 12).unbind(2)
        for n in range(2):
            heads = [(q[n, :, h] @ k[n, :, h].T / 12**0.5).softmax(1) for h in range(2)]
            mean = (heads[0] + heads[1]) / 2
            row = mean[0] if model.cls_token is not None else mean[prefix:].mean(0)
            expected = row[prefix:].reshape(6, 6).detach()
            torch.testing.assert_close(attention_map(model, images)[n], expected)


def test_the_mean_map_is_the_mean_of_single_maps():
    torch.manual_seed(0)
    for model in (KINDS["class token"](), KINDS["no class token"]()):
        images = torch.randn(5, 3, 48, 48)
        single = [attention_map(model, image[None], 2)[0] for image in images]
        mean = mean_attention(model, images.split([2, 2, 1]), 2)  # batches of unequal size
        torch.testing.assert_close(mean, sum(single) / 5)


# feature maps and similarity


def test_feature_maps_are_the_outputs_of_the_first_convolutions_that_run():
    torch.manual_seed(0)
    model, images = timm.create_model("resnet18").eval(), torch.randn(2, 3, 32, 32)
    maps = feature_maps(model, images, 5)
    assert [name for name, _ in maps] == [
        "conv1",
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer1.1.conv1",
        "layer1.1.conv2",
    ]
    with torch.no_grad():
        x = model.conv1(images)
        torch.testing.assert_close(maps[0][1], x)
        x = model.maxpool(model.act1(model.bn1(x)))
        torch.testing.assert_close(maps[1][1], model.layer1[0].conv1(x))
    in_place = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    assert feature_maps(in_place, images)[0][1].min() < 0


# pictures


@pytest.fixture
def texts(monkeypatch):
    """texts() -> [(text, its box)] of what was drawn last, after a check that no two overlap and
    none is cut off."""
    boxes, real = {}, Text.draw

    def draw(self, renderer):
        if self.get_visible() and self.get_text().strip():
            boxes[self] = self.get_window_extent(renderer), renderer
        real(self, renderer)

    def check():
        found = [(text.get_text(), box) for text, (box, _) in boxes.items()]
        for (one, a), (other, b) in itertools.combinations(found, 2):
            both = Bbox.intersection(a, b)
            assert both is None or min(both.size) < 1, f"{one!r} overlaps {other!r}"
        for text, (box, renderer) in boxes.items():
            width, height = renderer.width, renderer.height
            within = box.min.min() > -1 and box.x1 < width + 1 and box.y1 < height + 1
            assert within, f"{text.get_text()!r} is cut off"
        boxes.clear()
        return found

    monkeypatch.setattr(Text, "draw", draw)
    return check


def rendered(figure):
    """(H, W, 3) uint8 of a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def start(model, label):
    """What visualize.load gives of a weights file; pixels from 0 to 1."""
    metadata = {"mean": [0] * 3, "std": [1] * 3}
    device = torch.device("cpu")
    return SimpleNamespace(model=model, size=48, label=label, device=device, metadata=metadata)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """drawn(figure, starts, image (3, 48, 48), **args) -> the matplotlib figure."""

    def draw(figure, starts, image, **args):
        found = iter(starts)
        monkeypatch.setattr(visualize, "load", lambda *_: next(found))
        path = str(tmp_path / "a.png")
        Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()).save(path)
        args = SimpleNamespace(ckpt="a", compare="b", image=path, **args)
        return figure(args)[0]

    return draw


@pytest.mark.parametrize("place", [(1, 4), (5, 0), (2, 2)])
def test_the_map_is_drawn_over_the_patch_that_is_looked_at(place, drawn):
    torch.manual_seed(0)
    models = look_at_bright(KINDS["class token"]()), KINDS["class token"]().eval()
    (image,), starts = bright(48, 8, [place]), [start(model, "vit") for model in models]
    figure = drawn(visualize.attention, starts, image, block=1, n=None)
    light = rendered(figure) @ (0.299, 0.587, 0.114)
    *panels, bar = figure.axes
    assert len(panels) == 6  # a row to a model: the image, the map over it, the map
    for ax in panels[:3]:
        (x0, y0), (x1, y1) = ax.get_window_extent().get_points().round().astype(int)
        shown = light[len(light) - y1 : len(light) - y0, x0:x1]
        at = np.argwhere(shown > shown.max() - 1).mean(0)  # the middle of what is brightest
        assert tuple((6 * at / shown.shape).astype(int)) == place
    scales = [panels[i].images[-1].get_clim() for i in (1, 2, 4, 5)]
    assert scales == [scales[0]] * 4 and scales[0] == pytest.approx((0, 36))  # of equal shares


def test_compared_feature_maps_share_a_scale_in_each_layer(drawn):
    torch.manual_seed(0)
    models = [timm.create_model("test_resnet").eval() for _ in range(2)]
    starts, image = [start(model, "cnn") for model in models], torch.rand(3, 48, 48)
    figure = drawn(visualize.features, starts, image, layers=2)
    panels = figure.axes[:6]
    images = (255 * image).byte()[None] / 255
    for layer in (0, 1):
        maps = [feature_maps(model, images, 2)[layer][1][0, :16] for model in models]
        ends = min(m.min() for m in maps).item(), max(m.max() for m in maps).item()
        for i, channels in enumerate(maps):
            (shown,) = panels[3 * i + 1 + layer].images
            assert shown.get_clim() == pytest.approx(ends, abs=1e-6)
            values = np.ma.getdata(shown.get_array())[~np.ma.getmaskarray(shown.get_array())]
            np.testing.assert_allclose(np.sort(values), channels.flatten().sort()[0], atol=1e-6)


def test_confusion_is_coloured_from_0_to_1_and_grey_where_there_is_no_image(texts, tmp_path):
    names = ["W" * 60, "$x_$ and $y$", "b\udcff"]
    cells = [[99999, 0, 0], [12345, 12345, 0], [0, 0, 0]]
    with open(tmp_path / "confusion.csv", "w", newline="", errors="surrogateescape") as file:
        rows = [[name, *row] for name, row in zip(names, cells)]
        csv.writer(file).writerows([["true", *names], *rows])
    with visualize.matplotlib.rc_context(visualize.STYLE):
        figure, note = visualize.confusion(SimpleNamespace(run=tmp_path))
        picture = rendered(figure)
    words = {text.replace("\n", "") for text, _ in texts()}
    assert {"W" * 60, "$x_$ and $y$", "b?", "99999", "12345"} <= words and "124689 test" in note
    ends = (0, 0, (253, 231, 37)), (1, 0, (68, 1, 84)), (0, 2, (211, 211, 211))
    for c, r, colour in ends:  # of viridis, and light grey
        x, y = figure.axes[0].transData.transform((c - 0.4, r + 0.4)).astype(int)
        assert np.abs(picture[len(picture) - y, x] - np.array(colour)).max() <= 1


def test_reliability_shows_means_and_shares_of_each_bin(tmp_path, script, monkeypatch):
    """Against scikit-learn's calibration curve."""
    rng = np.random.default_rng(0)
    labels, p = rng.random((300, 3)) < 0.4, rng.random((300, 3)).astype("f4")
    test = SimpleNamespace(names=["x"] * 300, arrays=lambda: (None, labels, p, p**2, True))
    found = {f"{k}{x}": 0.5 for k in ("ece", "brier") for x in ("", "_uncalibrated")}
    monkeypatch.setattr(visualize, "read_test", lambda run: (test, {"test": found}))
    figure, _ = visualize.reliability(SimpleNamespace(run=tmp_path))
    for ax, q in zip(figure.axes[:2], (p, p**2)):
        share, mean = calibration_curve(labels.ravel(), q.ravel(), n_bins=15)
        x, y = ax.lines[1].get_data()
        np.testing.assert_allclose(x, mean, atol=1e-5)
        np.testing.assert_allclose(y, share, atol=1e-5)


def test_text_is_folded_to_its_width():
    for text in ("a few words that need several lines", "/a/long/path" * 9, "Ödem 浮腫", ""):
        folded = visualize.fold(text, 2)
        assert max(map(len, folded.split("\n"))) <= 22
        assert folded.replace("\n", "").replace(" ", "") == text.replace(" ", "")
    assert visualize.fold("a\udcffb\nc", 2) == "a?b\nc"


def test_curves_of_long_names_and_of_one_epoch_do_not_overlap(tmp_path, script, texts):
    runs = [tmp_path / f"{i} {'a_long_name' * 9}" for i in range(7)]
    for i, folder in enumerate(runs):
        folder.mkdir()
        row = {"epoch": 1, "train_loss": i, "val_loss": 1e9, "a_measure" * 9: 1e-9}
        (folder / "log.jsonl").write_text(json.dumps(row))
    out = tmp_path / "a.png"
    for shown in (runs[:1], runs[:6]):
        assert script(visualize, "curves", *shown, "--out", out)[0] == 0
        words = [text.replace("\n", "") for text, _ in texts()]
        assert words.count("a_measure" * 9) == 1
        legend = map(str, shown) if len(shown) > 1 else ["train", "val"]
        assert all(word.replace(" ", "") in [w.replace(" ", "") for w in words] for word in legend)
    status, _, err = script(visualize, "curves", *runs, "--out", out)
    assert status == 2 and "7 runs: only 6 can be told apart" in one_line(err)


def test_curves_put_train_and_val_and_both_arms_together():
    rows = [
        {"epoch": 1, "iteration": 9, "train_loss": 2.0, "val_loss": 3, "lr": 0.1, "note": "x"},
        {"epoch": 2, "train_loss": 1.0, "val_loss": None, "health": {"cnn_rank": 4, "vit_rank": 5}},
    ]
    assert visualize.series(rows) == {
        "loss": {"train": [(1, 2.0), (2, 1.0)], "val": [(1, 3)]},
        "lr": {"": [(1, 0.1)]},
        "health_rank": {"cnn": [(2, 4)], "vit": [(2, 5)]},
    }


def test_curves_of_several_runs_have_a_panel_to_an_arm_and_dino_s_arms_are_apart():
    rows = [{"arms": "cnn+vit", "epoch": 1, "loss": 2.0, "cnn_rank": 4, "vit_rank": 5}]
    assert visualize.series(rows, parted=True) == {
        "loss": {"": [(1, 2.0)]},
        "cnn_rank": {"": [(1, 4)]},
        "vit_rank": {"": [(1, 5)]},
    }
    dino = [{"arms": "cnn", "epoch": 1, "loss": 3.0}, {"arms": "vit", "epoch": 1, "loss": 4.0}]
    assert visualize.series(dino) == {"loss": {"cnn": [(1, 3.0)], "vit": [(1, 4.0)]}}
    assert visualize.series(dino, parted=True) == {
        "cnn_loss": {"": [(1, 3.0)]},
        "vit_loss": {"": [(1, 4.0)]},
    }


# the script


def test_the_sample_holds_every_class_and_keeps_the_proportions():
    labels = np.repeat(np.eye(3, dtype=bool), (60, 30, 2), axis=0)
    index = visualize.sample(labels, 30, seed=0)
    assert len(set(index)) == 30 and labels[index].sum(0).tolist() in ([19, 10, 1], [20, 9, 1])
    assert (index == visualize.sample(labels, 30, seed=0)).all()
    assert (index != visualize.sample(labels, 30, seed=1)).any()
    assert len(visualize.sample(labels[:, :0], 5, seed=0)) == 5  # without labels
    assert len(visualize.sample(labels, 200, seed=0)) == 92


def test_images_that_a_model_has_seen_are_avoided_while_there_are_others(pretrained, monkeypatch):
    monkeypatch.setattr("sys.argv", ["visualize.py", "attention", "--ckpt", "a"])
    args = visualize.parse_arguments()
    first = visualize.load(args, str(pretrained / "vit.pt"), attention_map)
    every = list(map(str, (pretrained.parent / "images").rglob("*.png")))

    def seen(sources):
        hashes = np.array([decode(source, 32)[1]["hash"] for source in sources], "u8").view("i8")
        carried = torch.stack([torch.from_numpy(hashes), torch.zeros(len(hashes), dtype=int)])
        return SimpleNamespace(**vars(first) | {"carried": carried})

    for args.split in (None, str(pretrained / "split.csv")):  # drawn, or given
        sources, _ = visualize.choose(args, [first], 100)
        others, what = visualize.choose(args, [first, seen(sources[:3])], 100)
        assert others and not set(others) & set(sources[:3]) and "of the test split" in what
        assert visualize.choose(args, [first, seen(every)], 100)[0]


def size_of(path):
    with Image.open(path) as image:
        image.load()
        return image.format, image.size


def test_every_figure_of_a_run(pretrained, tmp_path, script, monkeypatch, texts):
    monkeypatch.chdir(tmp_path)
    assert script(finetune, "--ckpt", pretrained / "vit.pt", "--epochs", 2, "--out", "fine")[0] == 0
    with open(pretrained / "split.csv", newline="") as file:
        test = {row["path"] for row in csv.DictReader(file) if row["split"] == "test"}
    chosen, real = [], visualize.choose
    monkeypatch.setattr(visualize, "choose", lambda *args: chosen.append(real(*args)) or chosen[-1])
    for command, images in (
        (["attention", "--ckpt", pretrained / "vit.pt"], 6),
        (
            [
                "attention",
                "--ckpt",
                pretrained / "vit.pt",
                "--compare",
                "fine/best.pt",
                "--n",
                2,
                "--block",
                3,
            ],
            2,
        ),
        (["features", "--ckpt", pretrained / "cnn.pt", "--compare", pretrained / "cnn.pt"], 1),
        (["features", "--ckpt", pretrained / "cnn.pt", "--layers", 5], 1),
        (["curves", pretrained], 0),
        (["curves", "fine"], 0),
        (["confusion", "fine"], 0),
        (["reliability", "fine"], 0),
        (["curves", pretrained, "fine", "--only", "loss", "spread"], 0),
    ):
        status, out, err = script(visualize, *command, "--out", "out/figure.png")
        assert status == 0 and "wrote out/figure.png" in out, err
        kind, (width, height) = size_of("out/figure.png")
        assert kind == "PNG" and min(width, height) > 150
        words = "".join("".join(text for text, _ in texts()).split())
        sources, what = chosen.pop() if images else ([], "")
        assert len(sources) == images and {"/".join(s.split("/")[-2:]) for s in sources} <= test
        assert "test split" in what or not images
        assert "".join(what.split()) in words
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["figure.png"]  # nothing half written


def test_one_image_needs_no_data_and_the_default_name_is_the_figure_s(
    pretrained, folder, tmp_path, script, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(7)).save("mine.png")
    folder.rename(tmp_path / "elsewhere")
    status, _, err = script(
        visualize, "attention", "--ckpt", pretrained / "vit.pt", "--image", "mine.png"
    )
    assert status == 0 and size_of("attention.png")[0] == "PNG", err
    status, _, err = script(visualize, "features", "--ckpt", pretrained / "cnn.pt")
    assert status == 2 and "no such file or folder" in one_line(err)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path):
    code = "import sys, runpy; sys.modules['matplotlib'] = None; sys.argv[0] = 'visualize.py';"
    code += "runpy.run_module('tools.visualize', run_name='__main__')"
    done = run("-c", code, "curves", "anywhere", "--out", tmp_path / "a.png", cwd=ROOT)
    assert done.returncode == 2
    assert "pip install -r requirements-extra.txt" in one_line(done.stderr)


def test_bad_input_gives_one_line_and_status_2(pretrained, folder, tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(7)).save("mine.png")
    (tmp_path / "text.jpg").write_text("no image")
    for name, log, confusion in (
        ("empty", "", ""),
        ("odd", "{", "a,b\nc,d\n"),
        ("list", "[1]\n", "x,a,b\na,1,2,3\nb,1,2\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(log)
        (tmp_path / name / "confusion.csv").write_text(confusion)
    cnn, vit = pretrained / "cnn.pt", pretrained / "vit.pt"
    for command, said in (
        (["attention", "--ckpt", "none.pt"], "none.pt: there is no such file"),
        (["attention", "--ckpt", vit, "--compare", "none.pt"], "none.pt: there is no such"),
        (["attention", "--ckpt", cnn], "cnn.pt: test_resnet has no attention"),
        (["attention", "--ckpt", vit, "--compare", cnn], "test_resnet has no attention"),
        (["attention", "--ckpt", vit, "--block", 7], "no attention block 7; there are 6"),
        (["attention", "--ckpt", vit, "--image", "none.png"], "none.png: cannot be read"),
        (["attention", "--ckpt", vit, "--image", "text.jpg"], "not an image"),
        (
            ["attention", "--ckpt", vit, "--image", "mine.png", "--out", "mine.png"],
            "mine.png: is read, and would be replaced",
        ),
        (["attention", "--ckpt", vit, "--out", "a.jpg"], "a.jpg: is no name for a .png file"),
        (["attention", "--ckpt", vit, "--out", "mine.png/a.png"], "mine.png: is not a folder"),
        (["attention", "--ckpt", vit, "--n", 0], "--n: 0 is not at least 1"),
        (["attention"], "--ckpt"),
        (["features", "--ckpt", vit, "--layers", 5], "test_vit has 1 convolutions, not 5"),
        (["curves", "nowhere"], "nowhere/log.jsonl: No such file"),
        (["curves", "mine.png"], "log.jsonl: Not a directory"),
        (["curves", "empty"], "holds no finished epoch"),
        (["curves", "odd"], "log.jsonl: is not as"),
        (["curves", pretrained, "--only", "beauty"], "nothing is called beauty"),
        (["curves", "list"], "log.jsonl: is not as"),
        (["confusion", pretrained], "confusion.csv: No such file"),
        (["confusion", "empty"], "confusion.csv: is not as"),
        (["confusion", "odd"], "confusion.csv: is not as"),
        (["confusion", "list"], "confusion.csv: is not as"),
        (["reliability", "empty"], "empty/metrics.json"),
        (["pictures"], "invalid choice"),
        ([], "WHAT"),
    ):
        status, out, err = script(visualize, *command)
        assert status == 2 and said in one_line(err), (command, err)
    assert size_of("mine.png")[1] == (40, 36) and not list(tmp_path.glob("*.png"))[1:]


def test_what_cannot_be_laid_over_an_image_is_refused():
    images = torch.zeros(1, 3, 32, 32)
    for name, kwargs in (
        ("xcit_nano_12_p16_224", {}),
        ("test_resnet", {}),
        ("pvt_v2_b0", {}),
        ("maxvit_rmlp_pico_rw_256", {"img_size": 32}),
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4}),
    ):
        with pytest.raises(ValueError, match="something else|no attention"):
            attention_map(timm.create_model(name, **kwargs), images)
