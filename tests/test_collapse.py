"""Measures of features against loops and closed forms; the monitor on arms built to collapse."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ARMS, one_line
from torch import nn

import finetune
import pretrain
from common import collapse


def test_spread_equals_the_loop():
    torch.manual_seed(0)
    x = torch.randn(7, 5) + 1
    rows = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in x.tolist()]
    columns = list(zip(*rows))
    sds = [math.sqrt(sum((v - sum(c) / 7) ** 2 for v in c) / 6) for c in columns]
    assert collapse.measures(x)["spread"] == pytest.approx(sum(sds) / 5 * math.sqrt(5), rel=1e-5)


def test_measures_of_a_constant_and_of_everything():
    constant = torch.ones(20, 4) * torch.rand(4)
    assert collapse.measures(constant)["spread"] == pytest.approx(0, abs=1e-6)
    torch.manual_seed(0)
    everywhere = torch.randn(2000, 16)
    assert collapse.measures(everywhere)["spread"] == pytest.approx(1, abs=0.02)
    assert collapse.measures(everywhere)["effective_rank"] == pytest.approx(16, abs=0.2)


def test_effective_rank_of_known_singular_values():
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(30, 4) - torch.randn(30, 4).mean(0))[0]
    u = torch.linalg.qr(u - u.mean(0))[0]  # orthonormal columns of mean 0
    v = torch.linalg.qr(torch.randn(6, 4))[0]
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    x = u @ torch.diag(values) @ v.T
    p = (values / 8).tolist()
    expected = math.exp(-sum(q * math.log(q) for q in p))
    assert collapse.measures(x)["effective_rank"] == pytest.approx(expected, rel=1e-4)
    assert collapse.measures(x + 100 * torch.randn(6))["effective_rank"] == pytest.approx(
        expected, rel=1e-2
    )


def test_agreement_of_equal_of_unrelated_and_of_shuffled_arms():
    torch.manual_seed(0)
    a = torch.randn(200, 30)
    same, retrieval = collapse.agreement(a * 3 + 7, a)  # offset and scale do not count
    assert same == pytest.approx(1, abs=1e-5) and retrieval == 1
    same, retrieval = collapse.agreement(a, torch.randn(200, 30))
    assert abs(same) < 0.05 and retrieval < 0.05
    _, retrieval = collapse.agreement(a, a.roll(1, 0))
    assert retrieval == 0
    assert all(math.isfinite(v) for v in collapse.agreement(torch.ones(8, 3), torch.ones(8, 3)))


def test_knn_equals_the_loop_and_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    torch.manual_seed(0)
    features, queries = torch.randn(40, 6), torch.randn(9, 6)
    classes = torch.randint(0, 3, (40,))
    labels = torch.eye(3)[classes]
    found = collapse.knn(features, labels, queries, k=5)
    unit = [[v / math.sqrt(sum(u * u for u in r)) for v in r] for r in features.tolist()]
    for query, scores in zip(queries.tolist(), found.tolist()):
        norm = math.sqrt(sum(v * v for v in query))
        cosines = sorted(
            ((sum(a * b for a, b in zip(query, row)) / norm, i) for i, row in enumerate(unit)),
            reverse=True,
        )[:5]
        weights = [math.exp(c / 0.07) for c, _ in cosines]
        for c in range(3):
            votes = sum(w for w, (_, i) in zip(weights, cosines) if classes[i] == c)
            assert scores[c] == pytest.approx(votes / sum(weights), abs=1e-4)
    oracle = KNeighborsClassifier(5, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(
        features, classes
    )
    assert found.argmax(1).tolist() == oracle.predict(queries).tolist()
    assert collapse.knn(features[:3], labels[:3], queries).shape == (9, 3)  # fewer than k


class Arm(nn.Module):
    """Logits: an offset, and `scale` times a random projection of the images' own means."""

    def __init__(self, scale, seed=0, offset=5.0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(3 * 16, 20, generator=g)
        self.scale, self.offset = scale, offset

    def forward_features(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)

    def forward_head(self, features, pre_logits=False):
        if pre_logits:
            return features
        offset = torch.linspace(-1, 1, 20) * self.offset
        return offset + self.scale * features @ self.weight


def monitor(n=80, labels=None):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 3, 16, 16), dtype=np.uint8)
    classes = [] if labels is None else ["a", "b"]
    images = SimpleNamespace(images=images, labels=labels, classes=classes, multilabel=False)
    images.labelled = np.full(n, bool(classes))
    return collapse.Monitor(images, np.repeat(["train", "val"], [n - 20, 20]), 0)


def flags(cnn, vit):
    row = monitor()({"cnn": cnn, "vit": vit}, torch.device("cpu"))
    found = collapse.flags({"cnn_logits_spread": 0.5, "vit_logits_spread": 0.5}, row)
    assert list(found) == ["cnn_logits_collapsed", "vit_logits_collapsed"]
    assert not any(collapse.flags({"cnn_logits_spread": 0, "vit_logits_spread": 0}, row).values())
    return row, tuple(found.values())


def test_monitor_flags_arms_that_collapsed_and_no_others():
    row, both = flags(Arm(1e-4, 1), Arm(1e-4, 2))
    assert both == (True, True)
    assert row["cnn_logits_spread"] < 0.01
    _, healthy = flags(Arm(1.0, 1, offset=0), Arm(1.0, 1, offset=0))
    assert healthy == (False, False)
    _, one = flags(Arm(1e-4, 1), Arm(1.0, 2, offset=0))
    assert one == (True, False)
    # an objective that standardizes leaves a common offset: little spread, but all of it shared
    row, offset = flags(Arm(1e-3, 1), Arm(1e-3, 1))
    assert row["cnn_logits_spread"] < 0.05
    assert row["agreement"] > 0.9 and offset == (False, False)


def test_monitor_sees_labels_only_for_knn_and_no_test_images():
    labels = np.eye(4, dtype=bool)[np.arange(80) % 4]
    m = monitor(labels=labels)
    assert set(m.train) <= set(range(60)) and set(m.val) <= set(range(60, 80))
    arms = {"cnn": Arm(1.0), "vit": Arm(1.0)}
    with_labels, without = m(arms, torch.device("cpu")), monitor()(arms, torch.device("cpu"))
    assert {k: v for k, v in with_labels.items() if "knn" not in k} == without
    assert 0 <= with_labels["cnn_knn_readout"] <= 1 and "cnn_knn_readout" not in without
    assert collapse.flags({}, m({"cnn": Arm(1e-4)}, torch.device("cpu"))) == {}  # one arm: DINO's


def test_the_first_epoch_shows_that_equation_1_collapses_and_vicreg_does_not(
    folder, tmp_path, script
):
    command = ["--data", folder, *ARMS, "--epochs", 2, "--bs", 4, "--lr", 3e-3, "--t-max", "run"]

    def rows(name):
        return [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    status, _, err = script(pretrain, *command, "--epochs", 3, "--out", tmp_path / "cosine")
    assert status == 0, err
    first = rows("cosine")[0]
    assert first["vit_logits_collapsed"], first
    before = first["start"]  # measured by the same monitor, before the first step
    assert before.keys() == first.keys() & before.keys() and "start" not in rows("cosine")[1]
    assert not [key for key in before if "collapsed" in key]  # nothing has been trained
    assert before["vit_logits_spread"] > 3 * first["vit_logits_spread"]
    ranks = [row["vit_features_effective_rank"] for row in (before, first)]
    shown = collapse.change(before, first)
    assert "vit rank {:.3g} to {:.3g}".format(*ranks) in shown, shown
    assert "collapsed to nearly one vector" in err and "try --objective vicreg" in err
    status, _, err = script(
        pretrain, *command, "--objective", "vicreg", "--out", tmp_path / "vicreg"
    )
    assert status == 0 and "collapsed" not in err
    assert not any(
        row[f"{arm}_logits_collapsed"] for row in rows("vicreg") for arm in ("cnn", "vit")
    )

    stop = [*command, "--fail-on-collapse", "--out", tmp_path / "failed"]
    for extra in ([], ["--resume"]):  # going on does not pass over it
        status, _, err = script(pretrain, *stop, *extra)
        assert status == 1 and "--fail-on-collapse" in err.splitlines()[-1]
        assert one_line(err.splitlines()[-1])
    assert len(rows("failed")) == 1 and not (tmp_path / "failed/cnn.pt").exists()
    status, _, err = script(pretrain, "--out", tmp_path / "failed", "--resume")  # without the flag
    assert status == 0 and (tmp_path / "failed/cnn.pt").exists()


def test_vicreg_needs_two_images(folder, tmp_path, script):
    status, _, err = script(pretrain, "--data", folder, *ARMS, "--bs", 1, "--objective", "vicreg")
    assert status == 2 and "--bs 2 or more" in one_line(err)


def test_mode_knn_labels_by_the_nearest_features(folder, pretrained, script):
    """Against timm's own features and scikit-learn."""
    import csv

    import timm
    from PIL import Image
    from sklearn.neighbors import KNeighborsClassifier

    status, said, err = script(
        finetune, "--ckpt", pretrained / "cnn.pt", "--mode", "knn", "--amp", "off"
    )
    assert status == 0, err
    out = pretrained / "finetune_cnn_1_knn"
    weights = torch.load(pretrained / "cnn.pt", weights_only=True)
    model = timm.create_model(weights["arch"], num_classes=0, **weights["model_kwargs"])
    model.load_state_dict(weights["state_dict"], strict=False)
    model.eval()

    def features(name):
        image = Image.open(folder / name).convert("RGB").resize((32, 32), Image.BILINEAR)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        x = (x - torch.tensor(weights["mean"])[:, None, None]) / torch.tensor(weights["std"])[
            :, None, None
        ]
        with torch.no_grad():
            return model(x[None])[0].numpy()

    with open(out / "split.csv") as file:
        rows = list(csv.DictReader(file))
    train = [(features(r["path"]), r["labels"]) for r in rows if r["label_used"] == "1"]
    oracle = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    oracle.fit([f for f, _ in train], [c for _, c in train])
    with open(out / "predictions.csv") as file:
        predicted = {r["path"]: r["predicted"] for r in csv.DictReader(file)}
    assert predicted == {name: oracle.predict([features(name)])[0] for name in predicted}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["neighbours"] == 20 and not (out / "best.pt").exists()
    status, said, _ = script(finetune, "--ckpt", pretrained / "cnn.pt", "--mode", "knn", "--resume")
    assert status == 0 and "is finished" in said
