"""What the scripts compute, pinned by loops written here: plain timm models, plain optimizers,
images noted from outside. A change of layout must leave all of it as it is."""

import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ARMS, ROOT, rows, torchrun
from PIL import Image

import data
import finetune
import pretrain
from cass import CASS
from common.metrics import predicted_labels
from common.readers import ImageSet
from common.splits import carried, label_fraction, make_split
from losses import class_weights, cosine_loss

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
LAST = torch.channels_last


def weights(path):
    return torch.load(path, weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def normalized(path, size=32):
    """The pixels of a file as a network should see them, by Pillow and torch alone."""
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - MEAN) / STD


def equal(ours, plain, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-6, **tolerance}
    for name, value in plain.items():
        if value.is_floating_point():
            torch.testing.assert_close(
                ours[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )


def moved(before, after):
    return any(not torch.equal(before[k], after[k]) for k in before if k.endswith("weight"))


def annealed(lr, min_lr, t_max, iteration):
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * iteration / t_max)) / 2


# pre-training


@pytest.fixture
def noted(monkeypatch):
    """The batches that CASS gets, in order."""
    batches, forward = [], CASS.forward

    def note(self, images):
        batches.append(images.detach().clone())
        return forward(self, images)

    monkeypatch.setattr(CASS, "forward", note)
    return batches


@pytest.mark.parametrize("amp, head", [("off", "none"), ("bf16", "none"), ("off", "sgd")])
def test_three_steps_of_pretraining_equal_a_plain_loop(folder, tmp_path, script, noted, amp, head):
    """Algorithm 1: zero_grad, one batch through both arms, equation 1, optimizers, schedulers."""
    torch.manual_seed(3)
    arms = {
        arm: timm.create_model(name, num_classes=1000)
        for arm, name in (("cnn", "test_resnet"), ("vit", "test_vit"))
    }
    for arm, model in arms.items():
        torch.save(model.state_dict(), tmp_path / f"start_{arm}.pt")
    arms["vit"] = timm.create_model(
        "test_vit", num_classes=1000, img_size=32
    )  # position embeddings resized
    status, _, err = script(
        pretrain,
        "--data",
        folder,
        *ARMS,
        "--init-cnn",
        tmp_path / "start_cnn.pt",
        "--init-vit",
        tmp_path / "start_vit.pt",
        "--epochs",
        1,
        "--bs",
        7,
        "--t-max",
        2,
        "--lr",
        3e-3,
        "--min-lr",
        7e-4,
        "--amp",
        amp,
        "--swa-start",
        1,
        *(["--ablation", "sgd"] if head == "sgd" else []),
        "--out",
        tmp_path / "run",
    )
    assert status == 0, err
    noted = noted[-3:]  # before them come the timed steps, which must leave no trace
    assert [len(batch) for batch in noted] == [7, 7, 7]

    start = timm.create_model(
        "test_vit",
        pretrained=True,
        img_size=32,
        pretrained_cfg_overlay={"state_dict": weights(tmp_path / "start_vit.pt")},
    )
    arms["vit"].load_state_dict(start.state_dict())
    before = {
        arm: {k: v.clone() for k, v in model.state_dict().items()} for arm, model in arms.items()
    }
    for model in arms.values():
        model.to(memory_format=LAST).train()
    optimizers = [
        torch.optim.SGD(arms["cnn"].parameters(), 3e-3, 0.9, fused=True)
        if head == "sgd"
        else torch.optim.Adam(arms["cnn"].parameters(), lr=3e-3, fused=True),
        torch.optim.Adam(arms["vit"].parameters(), lr=3e-3, fused=True),
    ]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 2, 7e-4) for o in optimizers]
    total = 0.0
    for images in noted:
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
            R, T = arms["cnn"](images), arms["vit"](images)
        R, T = R.float(), T.float()
        R, T = R / R.norm(dim=1, keepdim=True), T / T.norm(dim=1, keepdim=True)
        loss = (2 - 2 * (R * T).sum(1)).mean()
        loss.backward()
        for part in (*optimizers, *schedulers):
            part.step()
        total += loss.item()
    # a step of Adam is as long for a gradient of rounding errors as for any other
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if amp == "off" else {"atol": 2e-3, "rtol": 1e-2}
    for arm, model in arms.items():
        ours = weights(tmp_path / f"run/{arm}.pt")["state_dict"]
        equal(ours, model.state_dict(), **tolerance)
        assert moved(before[arm], ours)
    assert log_of(tmp_path / "run")[0]["loss"] == pytest.approx(
        total / 3, rel=1e-4 if amp == "off" else 0.05
    )


def test_autocast_is_on_where_it_is_asked_for_and_only_there(folder, tmp_path, script, monkeypatch):
    for amp in ("off", "bf16"):
        dtypes, forward = [], CASS.forward

        def note(self, images, dtypes=dtypes, forward=forward):
            dtypes.append((torch.is_autocast_enabled("cpu"), self.cnn(images).dtype))
            return forward(self, images)

        with monkeypatch.context() as patch:
            patch.setattr(CASS, "forward", note)
            assert (
                script(
                    pretrain,
                    "--data",
                    folder,
                    *ARMS,
                    "--epochs",
                    1,
                    "--amp",
                    amp,
                    "--out",
                    tmp_path / amp,
                )[0]
                == 0
            )
        expected = (amp == "bf16", torch.bfloat16 if amp == "bf16" else torch.float32)
        assert set(dtypes) == {expected}


def test_the_log_holds_the_learning_rate_of_the_closed_form(folder, tmp_path, script):
    assert (
        script(
            pretrain,
            "--data",
            folder,
            *ARMS,
            "--epochs",
            5,
            "--bs",
            8,
            "--t-max",
            4,
            "--lr",
            2e-3,
            "--min-lr",
            1e-5,
            "--out",
            tmp_path / "run",
        )[0]
        == 0
    )
    log = log_of(tmp_path / "run")
    assert [row["iteration"] for row in log] == [3, 6, 9, 12, 15]
    for row in log:
        assert row["lr"] == pytest.approx(annealed(2e-3, 1e-5, 4, row["iteration"]), rel=1e-6)
    assert (
        script(
            finetune,
            "--ckpt",
            tmp_path / "run/cnn.pt",
            "--epochs",
            4,
            "--bs",
            8,
            "--t-max",
            5,
            "--lr",
            1e-3,
            "--min-lr",
            1e-4,
            "--patience",
            9,
        )[0]
        == 0
    )
    tuned = log_of(tmp_path / "run/finetune_cnn_1")
    assert len(tuned) == 4
    for row in tuned:
        assert row["lr"] == pytest.approx(annealed(1e-3, 1e-4, 5, 3 * row["epoch"]), rel=1e-6)


def test_every_epoch_has_another_order_and_other_augmentations(folder, tmp_path, script, noted):
    assert (
        script(
            pretrain, "--data", folder, *ARMS, "--epochs", 2, "--bs", 21, "--out", tmp_path / "run"
        )[0]
        == 0
    )
    split = rows(tmp_path / "run/split.csv")
    plain = torch.stack([normalized(folder / r["path"]) for r in split if r["split"] == "train"])
    noted = noted[-2:]  # without the timed steps

    def nearest(batch):
        return [((plain - image).abs().mean((1, 2, 3))).argmin().item() for image in batch]

    assert nearest(noted[0]) != nearest(noted[1])
    untouched = sum(
        (plain - image).abs().amax((1, 2, 3)).min() < 1e-4 for batch in noted for image in batch
    )
    assert 1 <= untouched <= 22  # of 42, 0.7^4 = 24 % expected


def test_augmentations_come_at_the_expected_rate():
    """Four steps with p = 0.3 each leave 0.7^4 = 24 % of the images as they were, and change
    0.7^3 0.3 = 10 % by one flip alone."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (600, 3, 24, 24), dtype=np.uint8)
    views = data.AugmentedImages
    views = views(images, np.arange(600), data.augmentation(24), seed=1)
    epochs = [torch.stack([views[epoch, i] for i in range(600)]) for epoch in (0, 1)]
    plain = torch.from_numpy(images)
    for epoch in epochs:
        changed = (epoch != plain).flatten(1).any(1).float().mean().item()
        assert abs(changed - (1 - 0.7**4)) < 4 * math.sqrt(0.24 * 0.76 / 600)
    for axis in (-1, -2):
        flipped = torch.stack([(e == plain.flip(axis)).flatten(1).all(1) for e in epochs])
        assert abs(flipped.float().mean().item() - 0.103) < 4 * math.sqrt(0.103 * 0.897 / 1200)
    differ = (epochs[0] != epochs[1]).flatten(1).any(1).float().mean().item()
    assert differ > 0.8
    assert torch.equal(views[1, 7], epochs[1][7])  # the same item again
    same = views.__class__(np.stack([images[0]] * 50), np.arange(50), data.augmentation(24), seed=1)
    assert (
        len({same[0, i].numpy().tobytes() for i in range(50)}) > 20
    )  # images differ among themselves


def test_batches_are_shuffled_anew_in_every_epoch():
    batches = data.EpochBatches
    batches, orders = batches(40, 8, seed=0), []
    for epoch in (0, 1, 0):
        batches.epoch = epoch
        orders.append([i for batch in batches for _, i in batch])
    assert orders[0] == orders[2] != orders[1] and sorted(orders[1]) == list(range(40)) != orders[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_no_process_gets_a_single_image_and_no_other_is_lost(world_size):
    for n in range(2 * world_size, 60):
        shares = [
            list(data.EpochBatches(n, 4, 0, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        sizes = [len(batch) for share in shares for batch in share]
        assert min(sizes) > 1 and len({len(share) for share in shares}) == 1
        assert n - sum(sizes) < 2 * world_size
        assert len({i for share in shares for batch in share for i in batch}) == sum(sizes)


# fine-tuning


@pytest.fixture
def fed():
    """What the fine-tuned network gets: (training mode, images, its weights) per forward pass."""
    calls = []

    def note(module, inputs):
        if type(module).__name__ == "ResNet":
            calls.append(
                (
                    module.training,
                    inputs[0].detach().clone(),
                    {k: v.clone() for k, v in module.state_dict().items()},
                )
            )

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    yield calls
    handle.remove()


def test_finetuning_equals_a_plain_loop(pretrained, folder, script, fed, monkeypatch):
    """The used labels alone, weights from them, a new head, training mode, plain validation."""
    monkeypatch.setattr(data, "augmentation", lambda *_, **__: lambda image: 255 - image)
    status, _, err = script(
        finetune,
        "--ckpt",
        pretrained / "cnn.pt",
        "--frac",
        0.5,
        "--epochs",
        1,
        "--bs",
        4,
        "--t-max",
        2,
        "--lr",
        2e-3,
        "--min-lr",
        1e-4,
        "--amp",
        "off",
        "--class-weights",
        "inverse",
    )
    assert status == 0, err
    fed[:] = [call for call in fed if not (call[1] == 0).all()]  # looks at shapes do not count
    out = pretrained / "finetune_cnn_0.5"
    split = rows(out / "split.csv")
    used = [r for r in split if r["label_used"] == "1"]
    assert 0 < len(used) < sum(r["split"] == "train" for r in split)
    names = [r["path"] for r in used]
    inverted = torch.stack(
        [(1 - (normalized(folder / n) * STD + MEAN) - MEAN) / STD for n in names]
    )

    training = [call for call in fed if call[0]][
        -math.ceil(len(used) / 4) :
    ]  # after the timed steps
    start, seen, batches = training[0][2], [], []
    for _, images, _ in training:
        index = [((inverted - image).abs().amax((1, 2, 3))).argmin().item() for image in images]
        torch.testing.assert_close(images.contiguous(), inverted[index], rtol=0, atol=1e-4)
        seen += index
        batches.append((images, torch.tensor(["abc".index(used[i]["labels"]) for i in index])))
    assert sorted(seen) == list(range(len(names)))  # each used label once, no other

    before = weights(pretrained / "cnn.pt")["state_dict"]
    head = {k for k in start if k.startswith("fc.")}
    assert all(torch.equal(v, before[k]) for k, v in start.items() if k not in head)
    assert start["fc.weight"].shape == (3, before["fc.weight"].shape[1])
    assert not torch.equal(start["fc.weight"], before["fc.weight"][:3])

    counts = [sum(r["labels"] == c for r in used) for c in "abc"]
    w = torch.tensor([1 / n for n in counts])
    w = w / w.mean()
    model = timm.create_model("test_resnet", num_classes=3)
    model.load_state_dict(start)
    model.to(memory_format=LAST).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2, 1e-4)
    losses = []
    for images, target in batches:
        optimizer.zero_grad()
        p = model(images).sigmoid()
        y = F.one_hot(target, 3).float()
        p_t = p * y + (1 - p) * (1 - y)
        loss = (-((1 - p_t) ** 2) * p_t.log() * w[target][:, None]).mean()  # of the images
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    equal(weights(out / "best.pt")["state_dict"], model.state_dict(), atol=1e-5, rtol=1e-4)
    log, metrics = log_of(out), json.loads((out / "metrics.json").read_text())
    assert log[0]["train_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert metrics["class_weights"] == pytest.approx(w.tolist(), rel=1e-5)

    # validation: the plain pixels, evaluation mode, its loss weighted alike
    validation = [r for r in split if r["split"] == "val"]
    plain = torch.stack([normalized(folder / r["path"]) for r in validation])
    given = torch.cat([images for mode, images, _ in fed if not mode])
    torch.testing.assert_close(given[: len(plain)].contiguous(), plain, rtol=0, atol=1e-4)
    with torch.no_grad():
        p = model.eval()(plain).sigmoid()
    y = F.one_hot(torch.tensor(["abc".index(r["labels"]) for r in validation]), 3).float()
    p_t = p * y + (1 - p) * (1 - y)
    expected = (-((1 - p_t) ** 2) * p_t.log() * (y @ w)[:, None]).mean().item()
    assert log[0]["val_loss"] == pytest.approx(expected, rel=1e-3)


def test_the_tested_weights_are_those_of_the_lowest_validation_loss(
    pretrained, folder, script, fed
):
    settings = "--lr 0.03 --t-max 4 --epochs 7 --patience 7 --bs 8 --amp off".split()
    status, _, err = script(finetune, "--ckpt", pretrained / "cnn.pt", *settings)
    assert status == 0, err
    out = pretrained / "finetune_cnn_1"
    losses = [row["val_loss"] for row in log_of(out)]
    best = int(np.argmin(losses))
    assert best < len(losses) - 1 and len(losses) == 7
    epochs, training = [], False
    for mode, _, state in fed:
        if training and not mode:  # the first look at validation after an epoch
            epochs.append(state)
        training = mode
    assert len(epochs) == 7
    model = timm.create_model("test_resnet", num_classes=3).eval()
    model.load_state_dict(epochs[best])
    predictions = rows(out / "predictions.csv")
    with torch.no_grad():
        p = model(torch.stack([normalized(folder / r["path"]) for r in predictions])).sigmoid()
    written = torch.tensor([[float(r[f"prob_{c}"]) for c in "abc"] for r in predictions])
    torch.testing.assert_close(written, p, rtol=1e-3, atol=1e-4)
    model.load_state_dict(epochs[-1])
    with torch.no_grad():
        last = model(torch.stack([normalized(folder / r["path"]) for r in predictions])).sigmoid()
    assert (last - written).abs().max() > 1e-2  # it would be seen


# splits, decisions, numbers at the edge


def grouped(seed, n=300, patients=40, duplicates=0):
    rng = np.random.default_rng(seed)
    groups = np.sort(rng.integers(0, patients, n))
    labels = rng.integers(0, 2, groups.max() + 1)[groups]
    table = np.zeros(n, [("hash", "u8")])
    table["hash"] = np.arange(n)
    table["hash"][rng.permutation(n)[:duplicates]] = 0
    return ImageSet(
        "set",
        [str(i) for i in range(n)],
        [],
        np.eye(2, dtype=bool)[labels],
        ["0", "1"],
        np.array([""] * n),
        np.array([f"p{g}" for g in groups]),
        table=table,
    )


@pytest.mark.parametrize("duplicates", [0, 6])
def test_finetuning_splits_as_pretraining_did(duplicates):
    for seed in range(50):
        images = grouped(seed, duplicates=duplicates)
        first = make_split(images, seed)
        known = carried(images, first)
        assert (make_split(images, seed, known[:, known[1] == 0]) == first).all()


@pytest.mark.parametrize("seed", range(5))
def test_label_fractions_take_whole_groups(seed):
    images = grouped(seed)
    train, before = make_split(images, seed) == "train", np.zeros(300, bool)
    for frac in (0.1, 0.3, 1.0):
        used = label_fraction(images, train, frac, seed)
        assert not (used & ~train).any() and not (before & ~used).any()
        for group in np.unique(images.groups[used]):
            assert used[(images.groups == group) & train].all()
        assert abs(used.sum() - frac * train.sum()) <= 20 and used.any()
        before = used


def test_a_probability_of_exactly_a_half_is_a_yes():
    below = np.nextafter(np.float32(0.5), np.float32(0))
    p = np.array([[0.5, below, 0.6]], np.float32)
    assert predicted_labels(p, multilabel=True).tolist() == [[True, False, True]]
    assert predicted_labels(p, multilabel=False).tolist() == [[False, False, True]]


def test_equation_1_does_not_see_small_norms():
    torch.manual_seed(0)
    R, T = torch.randn(6, 9), torch.randn(6, 9)
    tiny = 1e-6 / R.norm(dim=1, keepdim=True)
    expected = (2 - 2 * F.cosine_similarity(R.double(), T.double(), dim=1)).mean().item()
    assert cosine_loss(R * tiny, T).item() == pytest.approx(expected, abs=1e-5)
    assert cosine_loss(R, T * tiny).item() == pytest.approx(expected, abs=1e-5)
    assert cosine_loss(torch.zeros(2, 3), torch.ones(2, 3)).item() == 2.0  # and zero is no NaN


def test_class_weights_where_a_class_is_absent():
    assert class_weights([8, 0, 4]).tolist() == pytest.approx([1.0, 0.2, 0.6])
    inverse = class_weights([8, 0, 4], "inverse")
    plain = np.array([1 / 8, 1.0, 1 / 4])
    assert inverse.tolist() == pytest.approx((plain / plain.mean()).tolist())
    assert class_weights([8, 0, 4], "none").tolist() == [1, 1, 1]


# gradient checkpointing, two processes


def test_gradient_checkpointing_gives_the_weights_that_come_without(folder, tmp_path, script):
    for name, more in (("plain", []), ("checkpointed", ["--grad-checkpointing"])):
        status, _, err = script(
            pretrain,
            "--data",
            folder,
            *ARMS,
            "--cnn",
            "resnet10t",
            "--epochs",
            2,
            "--bs",
            7,
            "--amp",
            "off",
            *more,
            "--out",
            tmp_path / name,
        )
        assert status == 0, err
    plain, other = (
        weights(tmp_path / f"{n}/cnn.pt")["state_dict"] for n in ("plain", "checkpointed")
    )
    learned = [x for x in plain if "running" not in x and "num_batches" not in x]
    equal(*({x: found[x] for x in learned} for found in (other, plain)), rtol=1e-4, atol=1e-4)


ENTRY = """
import os, sys, torch
sys.path.insert(0, {root!r})
import pretrain, swa
from cass import CASS
{imports}
forward, batches = CASS.forward, []
def note(self, images):
    if not batches:
        torch.save(self.state_dict(), f"start{{RANK}}.pt")
    batches.append(images.detach().clone())
    torch.save(batches, f"batches{{RANK}}.pt")
    return forward(self, images)
if "NOTE" in os.environ:
    CASS.forward = note
cut, after = int(os.environ.get("CUT", 0)), swa.SWA.after_step
def stop(self, iteration):
    if cut and iteration == cut:
        os._exit(9)
    after(self, iteration)
swa.SWA.after_step = stop
cli.run(pretrain.main)
"""
IMPORTS = "from common import cli\nfrom common.distributed import RANK"


TWO = [
    *ARMS,
    "--cnn",
    "test_vit2",
    "--epochs",
    1,
    "--bs",
    4,
    "--amp",
    "off",
    "--lr",
    3e-3,
    "--swa-start",
    1,
]


def test_two_processes_and_an_uneven_last_batch_equal_a_plain_loop_cut_or_not(folder, tmp_path):
    """21 images in batches of 2 x 4: the last one is 3 + 2. Both processes count alike; cut inside
    the epoch and resumed, they log the loss of the whole epoch and end with equal weights."""
    command = ["--data", folder, *TWO, "--save-every", 1]
    entry = tmp_path / "entry.py"
    entry.write_text(ENTRY.format(root=str(ROOT), imports=IMPORTS))
    done = torchrun(entry, *command, "--out", "run", cwd=tmp_path, NOTE="1")
    assert done.returncode == 0, done.stderr
    shares = [torch.load(tmp_path / f"batches{r}.pt", weights_only=True)[-3:] for r in (0, 1)]
    assert [[len(batch) for batch in share] for share in shares] == [[4, 4, 3], [4, 4, 2]]
    arms = [
        timm.create_model("test_vit2", num_classes=1000, img_size=32),
        timm.create_model("test_vit", num_classes=1000, img_size=32),
    ]
    pair = CASS(*arms)
    pair.load_state_dict(weights(tmp_path / "start0.pt"))
    optimizers = [torch.optim.Adam(arm.parameters(), lr=3e-3, fused=True) for arm in arms]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 16, 1e-6) for o in optimizers]
    losses = []
    for both in zip(*shares):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = sum(pair(images) for images in both) / 2
        loss.backward()
        for part in (*optimizers, *schedulers):
            part.step()
        losses.append(loss.item())
    for arm, model in zip(("cnn", "vit"), arms):
        equal(
            weights(tmp_path / f"run/{arm}.pt")["state_dict"],
            model.state_dict(),
            rtol=1e-3,
            atol=1e-4,
        )
    assert log_of(tmp_path / "run")[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-3)
    cut = torchrun(entry, *command, "--out", "cut", cwd=tmp_path, CUT="2")
    assert cut.returncode != 0
    assert weights(tmp_path / "cut/last.pt")["batch"] == 2
    resumed = torchrun(ROOT / "pretrain.py", "--resume", "cut/last.pt", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert log_of(tmp_path / "cut")[0]["loss"] == log_of(tmp_path / "run")[0]["loss"]
    for arm in ("cnn", "vit"):
        a, b = (weights(tmp_path / f"{n}/{arm}.pt")["state_dict"] for n in ("run", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)
