"""Maps and similarities against models built by hand and slow loops; the script from end to end."""

import csv
import itertools

import numpy as np
import pytest
import timm
import torch
from conftest import one_line, picture
from PIL import Image
from torch import nn

import finetune
from tools import plotting as drawing
from tools import visualize
from tools.introspect import (
    attention,
    attention_map,
    feature_maps,
    gram,
    hsic,
    layer_grams,
    layer_names,
    mean_attention,
    minibatch_cka,
)

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


def swin(size, window):
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=size,
        window_size=window,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 2),
    )


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


@pytest.mark.parametrize("build", [*KINDS.values(), lambda: swin(48, 4), lambda: swin(64, 7)])
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
        for one, image in zip(maps, images):  # and, resized, on its pixels
            over = visualize.resized(one, 48)
            assert image[0].flatten()[over.argmax()] == 1
            assert over.reshape(6, 8, 6, 8).mean((1, 3)).argmax() == one.argmax()


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


@pytest.mark.parametrize(
    "size, window, place", [(48, 4, (3, 9)), (48, 4, (0, 1)), (64, 7, (1, 15)), (64, 7, (14, 2))]
)
def test_swin_s_windows_come_back_to_their_places(size, window, place):
    """(64, 7) pads its grid of 16 to 21. A slow loop over pairs of patches says who sees whom."""
    model, n, images = look_at_bright(swin(size, window)), size // 4, bright(size, 4, [place])
    padded = -(-n // window) * window
    for block, shift in ((1, 0), (2, window // 2)):

        def corner(
            i, shift=shift
        ):  # the window, and in shifted blocks the part of it that is masked apart
            i = (i - shift) % n
            return i // window, shift and (i >= padded - window) + (i >= padded - shift)

        expected = torch.zeros(n, n)
        for i, j in np.ndindex(n, n):
            seen = [
                (a, b)
                for a, b in np.ndindex(n, n)
                if corner(a) == corner(i) and corner(b) == corner(j)
            ]
            seen = [place] if place in seen else seen
            for a, b in seen:
                expected[a, b] += 1 / len(seen) / n**2
        torch.testing.assert_close(attention_map(model, images, block)[0], expected)


def test_the_mean_map_is_the_mean_of_single_maps():
    torch.manual_seed(0)
    for model in (KINDS["class token"](), swin(48, 4)):
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


def test_layer_grams_are_those_of_the_layers():
    torch.manual_seed(0)
    images = torch.randn(6, 3, 48, 48)
    cnn, vit = timm.create_model("resnet18").eval(), KINDS["class token"]().eval()
    assert layer_names(cnn) == ["act1", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))]
    assert layer_names(vit) == ["blocks.0", "blocks.1"]
    assert layer_names(swin(48, 4))[-1] == "layers.1.blocks.1"
    with torch.no_grad():
        stem = cnn.act1(cnn.bn1(cnn.conv1(images)))
        block = cnn.layer1[0](cnn.maxpool(stem))
    for ours, features in zip(layer_grams(cnn, images, ["act1", "layer1.0"]), (stem, block)):
        x = features.reshape(6, -1).numpy().astype(float)
        x = x - x.mean(0)
        np.testing.assert_allclose(ours.numpy(), x @ x.T, rtol=1e-5, atol=1e-6 * abs(x @ x.T).max())


def hsic_by_hand(K, L):
    """The U-statistic: a mean over all ordered fours of different images."""
    fours = list(itertools.permutations(range(len(K)), 4))
    return sum(K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q]) for i, j, q, r in fours) / len(fours)


def features(n, seed=0):
    """Two sets of features of n images, with something in common."""
    rng = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 8, generator=rng)
    return (
        torch.cat([common, torch.randn(n, 6, generator=rng)], 1),
        torch.cat([2 * common[:, :5], torch.randn(n, 9, generator=rng)], 1),
    )


def cka_of(x, y, size):
    pairs = zip(x.split(size), y.split(size))
    return minibatch_cka((gram(a)[None], gram(b)[None]) for a, b in pairs)


def test_minibatch_cka_is_the_closed_form_in_one_batch_and_near_it_in_several():
    x, y = features(7)
    K, L = x.double() @ x.double().T, y.double() @ y.double().T  # uncentred: it must not matter
    by_hand = hsic_by_hand(K, L)
    assert hsic(gram(x)[None], gram(y)[None]).item() == pytest.approx(by_hand.item())
    closed = by_hand / (hsic_by_hand(K, K) * hsic_by_hand(L, L)).sqrt()
    assert cka_of(x, y, 7).item() == pytest.approx(closed.item())

    x, y = features(512)
    whole = cka_of(x, y, 512).item()
    assert cka_of(x, y, 16).item() == pytest.approx(whole, abs=0.03)
    assert cka_of(x, y, 64).item() == pytest.approx(whole, abs=0.02)
    x, y = x - x.mean(0), y - y.mean(0)  # Kornblith et al.'s form, biased by about 1 / n
    biased = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert whole == pytest.approx(biased.item(), abs=0.03)


def test_cka_of_several_layers_is_that_of_each_pair():
    x, y = features(24)
    stack = torch.stack([gram(x), gram(y), gram(x[:, :3])])
    values = minibatch_cka([(stack, stack[:2])])
    assert values.shape == (3, 2)
    for i, a in enumerate((x, y, x[:, :3])):
        for j, b in enumerate((x, y)):
            assert values[i, j].item() == pytest.approx(cka_of(a, b, 24).item())


def test_cka_ignores_rotation_scale_and_shift_and_knows_what_is_unrelated_or_constant():
    x, _ = features(32)
    rng = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(14, 14, generator=rng))[0]
    assert cka_of(x, 3 * x @ rotation + 5, 16).item() == pytest.approx(1, abs=1e-5)
    assert cka_of(features(512)[0], features(512, seed=2)[0], 32).abs().item() < 0.03
    assert cka_of(x, 1 + 1e-7 * torch.rand(32, 9, generator=rng), 16).isnan().item()
    with pytest.raises(ValueError, match="at least 4"):
        cka_of(x[:3], x[:3], 3)


# pictures


def test_the_colours_grow_lighter_and_ticks_can_be_told_apart():
    rgb = drawing.colours(np.append(np.linspace(-1, 3, 200), np.nan), -1, 3)
    assert (np.diff(rgb[:200] @ (0.299, 0.587, 0.114)) > -0.5).all()  # but for rounding
    assert tuple(rgb[0]) == tuple(drawing.SCALE[0]) and tuple(rgb[199]) == tuple(drawing.SCALE[-1])
    assert tuple(rgb[200]) == drawing.UNKNOWN
    for low, high in ((0, 1), (0.693146, 0.693149), (-1e-9, 1e9), (5, 5)):
        marks = drawing.ticks(low, high)
        assert marks[0][0] == low and marks[-1][0] == high
        assert len({mark for _, mark in marks}) == len(marks) == (3 if high > low else 1)


def test_text_keeps_to_its_width_and_tables_to_their_cells():
    for string in ("a few words that need several lines", "/a/long/path" * 9, "Ödem 浮腫", ""):
        assert drawing.text(string, 100).width <= 101
    assert drawing.plain("Ödem é 浮") == "Odem e ?"
    values = np.array([[0.0, 1.0, np.nan]])
    table, side = drawing.matrix(values, ["a long name"], ["x", "y", "z"], [["0", "1", "-"]], 0, 1)
    corners = [(table.width - cells * side + 1, table.height - 1) for cells in (3, 2, 1)]
    assert [table.getpixel(corner) for corner in corners] == [
        tuple(drawing.SCALE[0]),
        tuple(drawing.SCALE[-1]),
        drawing.UNKNOWN,
    ]


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


def size_of(path):
    with Image.open(path) as image:
        image.load()
        return image.format, image.size


def test_every_figure_of_a_run(pretrained, tmp_path, script, monkeypatch):
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
        (["cka", "--cnn", pretrained / "cnn.pt", "--vit", "fine/best.pt", "--bs", 4], 6),
        (["curves", pretrained], 0),
        (["curves", "fine"], 0),
        (["confusion", "fine"], 0),
        (["curves", pretrained, "fine", "--only", "loss", "spread"], 0),
    ):
        status, out, err = script(visualize, *command, "--out", "out/figure.png")
        assert status == 0 and "wrote out/figure.png" in out, err
        kind, (width, height) = size_of("out/figure.png")
        assert kind == "PNG" and min(width, height) > 150
        sources, what = chosen.pop() if images else ([], "")
        assert len(sources) == images and {"/".join(s.split("/")[-2:]) for s in sources} <= test
        assert "test split" in what or not images
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
    cka = ["cka", "--cnn", cnn, "--vit", vit]
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
            "mine.png: is the image to look at",
        ),
        (["attention", "--ckpt", vit, "--out", "a.jpg"], "a.jpg: is no name for a .png file"),
        (["attention", "--ckpt", vit, "--out", "mine.png/a.png"], "mine.png: is not a folder"),
        (["attention", "--ckpt", vit, "--n", 0], "--n: 0 is not at least 1"),
        (["attention"], "--ckpt"),
        (["features", "--ckpt", vit, "--layers", 5], "test_vit has 1 convolutions, not 5"),
        ([*cka, "--n", 3], "CKA needs 4 images"),
        ([*cka, "--bs", 3], "CKA needs 4 images"),
        ([*cka, "--before-cnn", "imagenet"], "--before-cnn FILE, or --before-cnn random"),
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
    ):
        with pytest.raises(ValueError, match="something else|no attention"):
            attention_map(timm.create_model(name, **kwargs), images)


def test_before_training_is_what_training_began_with(pretrained, tmp_path, script, monkeypatch):
    """Of a fine-tuned file its checkpoint; else what --init said."""
    assert (
        script(
            finetune, "--ckpt", pretrained / "cnn.pt", "--epochs", 1, "--out", tmp_path / "fine"
        )[0]
        == 0
    )
    monkeypatch.setattr("sys.argv", ["visualize.py", "cka", "--cnn", "a", "--vit", "b"])
    args = visualize.parse_arguments()
    for file, expected in (("fine/best.pt", "run/cnn.pt"), ("run/cnn.pt", "random")):
        start = visualize.load(args, str(tmp_path / file))
        before, what = visualize.before_training(args, "cnn", start)
        assert what == expected
        if expected != "random":
            kept = torch.load(tmp_path / expected, weights_only=True)["state_dict"]
            assert all(torch.equal(v.cpu(), kept[k]) for k, v in before.model.state_dict().items())
