"""DINO against slow loops written from the pseudocode of its paper, and the script."""

import json
import math

import pytest
import timm
import torch
from conftest import ARMS, one_line
from test_resume import Cut, same
from torch import nn

import finetune
from common import checkpoint
from tools import dino
from tools.dino import DINO, Head, cosine, dino_loss, learning_rate, multi_crop

SMALL = [*ARMS, "--outputs", 64, "--crops", 2, "--epochs", 2, "--bs", 8]


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, images):
        return self.layer(images.mean((2, 3)))


def views(n=4, crops=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 8, 8, generator=g) for _ in range(2)] + [
        torch.randn(n, 3, 4, 4, generator=g) for _ in range(crops)
    ]


def softmax(x):
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def slow_loss(student, teacher, center, student_temp, teacher_temp):
    total, pairs = 0.0, 0
    for i, t in enumerate(teacher.tolist()):
        for j, s in enumerate(student.tolist()):
            if i == j:
                continue
            pairs += 1
            for t_row, s_row in zip(t, s):
                p = softmax([(v - c) / teacher_temp for v, c in zip(t_row, center.tolist())])
                q = softmax([v / student_temp for v in s_row])
                total -= sum(a * math.log(b) for a, b in zip(p, q)) / len(t)
    return total / pairs


@pytest.mark.parametrize("crops", [0, 1, 3])
def test_loss_equals_the_double_loop(crops):
    torch.manual_seed(crops)
    student, teacher = torch.randn(2 + crops, 4, 6), torch.randn(2, 4, 6)
    center = torch.randn(6)
    fast = dino_loss(student, teacher, center, 0.1, 0.04)
    assert fast.item() == pytest.approx(slow_loss(student, teacher, center, 0.1, 0.04), rel=1e-4)


def test_forward_center_and_teacher_update_as_in_the_pseudocode():
    torch.manual_seed(0)
    method = DINO("cnn", Backbone(), 5, out_dim=6)
    batch = views()
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        logits = {
            name: torch.stack([net(v) for v in batch])
            for name, net in (("student", method.student), ("teacher", method.teacher))
        }
    center = method.center.clone()
    loss = method(batch)
    assert loss.item() == pytest.approx(
        slow_loss(logits["student"], logits["teacher"][:2], center, 0.1, 0.04), rel=1e-4
    )
    teacher_rows = [row for view in logits["teacher"][:2].tolist() for row in view]
    mean = [sum(column) / len(teacher_rows) for column in zip(*teacher_rows)]
    for now, before, m in zip(method.center.tolist(), center.tolist(), mean):
        assert now == pytest.approx(0.9 * before + 0.1 * m, abs=1e-6)

    loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.student.parameters())
    before = {n: p.clone() for n, p in method.teacher.named_parameters()}
    method.after_step(0.25)
    momentum = 1 - (1 - 0.996) * (math.cos(math.pi * 0.25) + 1) / 2
    student = dict(method.student.named_parameters())
    for name, p in method.teacher.named_parameters():
        for new, old, s in zip(
            p.flatten()[:20].tolist(),
            before[name].flatten().tolist(),
            student[name].flatten().tolist(),
        ):
            assert new == pytest.approx(momentum * old + (1 - momentum) * s, abs=1e-6)


def test_schedules_start_and_end_as_the_paper_has_them():
    assert cosine(0.996, 1.0, 0) == 0.996 and cosine(0.996, 1.0, 1) == 1.0
    assert cosine(0.04, 0.4, 0.5) == pytest.approx(0.22)
    assert learning_rate(5e-4, 1e-6, 0) == 0
    assert learning_rate(5e-4, 1e-6, 0.05) == pytest.approx(2.5e-4)
    assert learning_rate(5e-4, 1e-6, 0.1) == pytest.approx(5e-4)
    assert learning_rate(5e-4, 1e-6, 1) == pytest.approx(1e-6)
    method = DINO("cnn", Backbone(), 5, out_dim=6)
    assert method.teacher_temp.item() == pytest.approx(0.04)
    for progress, temperature in ((0.15, 0.055), (0.3, 0.07), (0.9, 0.07)):
        method.after_step(progress)
        assert method.teacher_temp.item() == pytest.approx(temperature)


def test_a_short_run_s_teacher_moves_faster_and_stays_sharp(folder, tmp_path, script, monkeypatch):
    """--momentum and --teacher-temp, from the command to the step."""
    after_step, seen = DINO.after_step, []

    def seeing(self, progress):
        before = [p.clone() for p in self.teacher.parameters()]
        after_step(self, progress)
        weight = 1 - cosine(0.5, 1.0, progress)
        for old, new, s in zip(before, self.teacher.parameters(), self.student.parameters()):
            torch.testing.assert_close(new, old + weight * (s - old))
        seen.append(self.teacher_temp.item())

    monkeypatch.setattr(DINO, "after_step", seeing)
    flags = ["--momentum", 0.5, "--teacher-temp", 0.05]
    status, _, err = script(dino, "--data", folder, *SMALL, *flags, "--out", tmp_path / "run")
    assert status == 0, err
    assert seen[0] == pytest.approx(0.04) and max(seen) == seen[-1] == pytest.approx(0.05)


def test_before_step_sets_clips_and_freezes():
    torch.manual_seed(0)
    method = DINO("vit", Backbone(), 5, out_dim=6)
    optimizer = method.optimizer(1e-3)
    decayed, plain = optimizer.param_groups
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(method.student.parameters()))

    def gradients(progress):
        for p in method.student.parameters():
            p.grad = torch.full_like(p, 7.0)
        method.before_step(optimizer, 1e-3, 1e-6, progress)
        return [p.grad for p in method.student.parameters()]

    assert method.student.head.last.weight.grad is gradients(0.0)[-1] is None
    for gradient in gradients(0.5):
        assert gradient.double().norm().item() <= 3.0 * 1.01  # a sum of 4 million float32
    assert decayed["weight_decay"] == pytest.approx(0.22) and plain["weight_decay"] == 0
    assert decayed["lr"] == plain["lr"] == pytest.approx(learning_rate(1e-3, 1e-6, 0.5))


def test_stochastic_depth_is_for_the_student_alone():
    torch.manual_seed(0)
    vit, _ = dino.make_backbone("--vit", "test_vit", "random", 32)
    method = DINO("vit", vit, vit.num_features, out_dim=6).train()
    images = torch.randn(32, 3, 32, 32)
    student, teacher = (
        [net.backbone(images) for _ in range(2)] for net in (method.student, method.teacher)
    )
    assert not torch.equal(*student) and torch.equal(*teacher)


def test_the_head_compares_directions_alone():
    torch.manual_seed(0)
    head = Head(5, 7)
    features = torch.randn(4, 5)
    logits = head(features)
    assert logits.shape == (4, 7) and logits.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        head.last.weight.mul_(torch.rand(7, 1) + 0.5)
    torch.testing.assert_close(head(features), logits)
    assert [tuple(layer.weight.shape) for layer in head.mlp[::2]] == [
        (2048, 5),
        (2048, 2048),
        (256, 2048),
    ]


def test_multi_crop_gives_two_large_and_eight_small_views():
    image = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8)
    torch.manual_seed(0)
    first = multi_crop(48, 24)(image)
    assert [tuple(v.shape) for v in first] == [(3, 48, 48)] * 2 + [(3, 24, 24)] * 8
    assert all(v.dtype == torch.uint8 for v in first)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(first, multi_crop(48, 24)(image)))
    assert len({v.float().mean().item() for v in first}) > 5


def test_the_script_trains_one_arm_after_the_other(folder, tmp_path, script):
    out = tmp_path / "run"
    status, said, err = script(dino, "--data", folder, *SMALL, "--out", out)
    assert status == 0, err
    assert "the teachers" in said
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(row["arms"], row["epoch"]) for row in log] == [
        ("cnn", 1),
        ("cnn", 2),
        ("vit", 1),
        ("vit", 2),
    ]
    for arm in ("cnn", "vit"):
        weights = torch.load(out / f"{arm}.pt", weights_only=True)
        model = timm.create_model(
            weights["arch"],
            num_classes=weights["num_classes"],
            **weights["model_kwargs"],
            checkpoint_path=str(out / f"{arm}.pt"),
        )
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, model.num_features)
        status, _, err = script(finetune, "--ckpt", out / f"{arm}.pt", "--epochs", 1)
        assert status == 0, err
    state = checkpoint.load(out / "last.pt")
    teacher = {
        k.removeprefix("teacher.backbone."): v
        for k, v in state["method"].items()
        if k.startswith("teacher.backbone.")
    }
    assert all(torch.equal(teacher[k], v) for k, v in weights["state_dict"].items())


def test_resumed_equals_uncut(folder, tmp_path, script, monkeypatch):
    assert script(dino, "--data", folder, *SMALL, "--out", tmp_path / "uncut")[0] == 0
    after_step = DINO.after_step

    def losses(name):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return [json.loads(x)["loss"] for x in lines]

    for cut in (3, 8, 11):  # three steps an epoch: in the first arm and the second
        resumed, count = f"cut{cut}", iter(range(1, cut + 1))

        def dying(self, progress, count=count, cut=cut):
            if next(count) == cut:
                raise Cut
            after_step(self, progress)

        monkeypatch.setattr(DINO, "after_step", dying)
        with pytest.raises(Cut):
            script(dino, "--data", folder, *SMALL, "--save-every", 1, "--out", tmp_path / resumed)
        monkeypatch.setattr(DINO, "after_step", after_step)
        torch.manual_seed(99)
        status, _, err = script(dino, "--out", tmp_path / resumed, "--resume")
        assert status == 0, err
        for arm in ("cnn", "vit"):
            assert same(tmp_path / f"uncut/{arm}.pt", tmp_path / f"{resumed}/{arm}.pt"), cut
        assert losses("uncut") == losses(resumed) and len(losses(resumed)) == 4


def test_a_transformer_of_one_size_gets_resized_crops_said_once(folder, tmp_path, script):
    mixer = ["--vit", "mixer_s32_224"]
    status, said, err = script(
        dino, "--data", folder, *SMALL, *mixer, "--epochs", 1, "--out", tmp_path / "run"
    )
    assert status == 0, err
    assert said.count("local crops are resized") == 1 and "32 pixels alone" in said


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vit-kwargs", "patch_size=7"], "accepts no images of 3x32x32"),
        (["--cnn", "resnet5"], "close names"),
        (["--cnn-kwargs", "flag=7"], "--cnn test_resnet: cannot be built"),
    ],
)
def test_arms_that_cannot_be_used_are_one_line(folder, tmp_path, script, flags, message):
    status, _, err = script(dino, "--data", folder, *SMALL, *flags, "--out", tmp_path / "run")
    assert status == 2 and message in one_line(err)


def test_arms_whose_features_are_wider_than_timm_says(folder, tmp_path, script):
    status, _, err = script(
        dino,
        "--data",
        folder,
        *SMALL,
        "--epochs",
        1,
        "--cnn",
        "mobilenetv3_small_050",
        "--amp",
        "off",
        "--out",
        tmp_path / "run",
    )
    assert status == 0, err
