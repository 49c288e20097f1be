"""The scripts behind results/pretrained: splits, variants, read-outs, measures, statistics."""

import json
import math
import shutil
from itertools import product

import draw_split
import evidence
import numpy as np
import pytest
import readouts
import torch
import torch.nn.functional as F
import variants
from conftest import ARMS, ROOT, draw_classes, rows, run
from scipy import stats
from torch import nn

import data
import losses
from common import readers


def test_the_splits_part_no_group_and_the_trials_name_no_test_image(tmp_path, script, monkeypatch):
    monkeypatch.setattr(draw_split, "SIZES", {"train": 12, "val": 3})
    folder = draw_classes(tmp_path / "images", {"a": 40, "b": 30})
    lines = ["path,label,patient"]
    for name in ("a", "b"):
        lines += [f"{name}/{i}.png,{name},{name}{i // 2}" for i in range({"a": 40, "b": 30}[name])]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    flags = ["--data", tmp_path / "t.csv", "--images", folder, "--group-by", "patient"]
    status, _, err = script(draw_split, *flags, "--out", tmp_path / "s")
    assert status == 0, err
    whole, trials = (
        {r["path"]: r["split"] for r in rows(tmp_path / f"s{x}.csv")} for x in ("", "_trials")
    )
    for split in (whole, trials):
        patients = {}
        for name, side in split.items():
            patients.setdefault((name[0], int(name[2:-4]) // 2), set()).add(side)
        assert max(map(len, patients.values())) == 1
    chosen = {n: s for n, s in whole.items() if s != "test"}
    assert chosen == {n: s for n, s in trials.items() if s != "test"}
    assert [list(chosen.values()).count(s) for s in ("train", "val")] == [12, 2]
    test, stand_in = ({n for n, s in x.items() if s == "test"} for x in (whole, trials))
    assert test and stand_in and not test & trials.keys() and not stand_in & whole.keys()
    status, _, err = script(draw_split, *flags, "--out", tmp_path / "again")
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "s.csv").read_text()


class Arm(nn.Module):
    """A linear layer and batch-norm on the mean colours."""

    def __init__(self, width):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width)), None
        self.head = nn.Linear(width, 7)

    def forward_features(self, x):
        return self.body(x.mean((2, 3)))

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def variant(monkeypatch, **given):
    monkeypatch.setattr(variants, "given", given)
    torch.manual_seed(0)
    return variants.Variant(Arm(4), Arm(6)).train(), torch.randn(8, 3, 5, 5)


def test_controls_do_what_they_are_called(monkeypatch):
    plain, x = variant(monkeypatch)
    R, T = plain.cnn(x), plain.vit(x)
    expected = losses.cosine_loss(R, T)
    torch.testing.assert_close(plain(x), expected)
    shuffled, _ = variant(monkeypatch, shuffled=1)
    torch.testing.assert_close(shuffled(x), losses.cosine_loss(R, T.roll(1, 0)))
    for frozen, other in (("cnn", "vit"), ("vit", "cnn")):
        model, _ = variant(monkeypatch, **{f"frozen_{frozen}": 1})
        loss = model(x)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert all(p.grad is None for p in model.arms[frozen].parameters())
        assert all(p.grad is not None for p in model.arms[other].parameters())
    kept, _ = variant(monkeypatch, keep_bn=1)
    kept.train()(x)
    assert (
        kept.cnn.body[1].running_mean.abs().max() == 0 < plain.cnn.body[1].running_mean.abs().max()
    )
    anchored, _ = variant(monkeypatch, anchor=3)
    torch.testing.assert_close(anchored(x), expected)  # nothing has moved yet
    with torch.no_grad():
        size = sum(p.square().sum() for p in anchored.parameters())
        anchored.vit.head.bias += 0.5
    expected = losses.cosine_loss(R, T + 0.5) + 3 * 7 * 0.25 / size
    torch.testing.assert_close(anchored(x), expected)
    views, _ = variant(monkeypatch, two_views=1)
    torch.testing.assert_close(
        views(torch.stack([x, x + 1], 1)), losses.cosine_loss(R, views.vit(x + 1))
    )


def test_relations_equal_the_loop(monkeypatch):
    model, x = variant(monkeypatch, relations=1)
    a, b = (arm.forward_features(x).detach() for arm in model.arms.values())
    total = []
    for i in range(8):
        for j in range(8):
            cosines = [
                F.cosine_similarity((y - y.mean(0))[i], (y - y.mean(0))[j], dim=0) for y in (a, b)
            ]
            total += [(cosines[0] - cosines[1]).item() ** 2] * (i != j)
    assert model(x).item() == pytest.approx(np.mean(total), rel=1e-4)


def test_rates_of_the_arms_and_the_command(pretrained, folder, tmp_path):
    words = ["--data", folder, *ARMS, "--epochs", 1, "--bs", 4, "--lr", 1e-3, "--min-lr", 0]
    words += ["--init-cnn", pretrained / "cnn.pt"]
    script = ROOT / "tests/variants.py"
    more = ["--variant", "cnn=0", "vit=0.5", "two_views", "decay=0.1", "keep_bn"]
    more += ["--swa-start", 0, "--t-max", 1]  # an average, whose batch-norm is kept too
    done = run(script, *more, *words, "--out", tmp_path / "varied", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(script, *words, "--epochs", 0, "--out", tmp_path / "start", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    moved = {}
    for arm in ("cnn", "vit"):
        a, b = (
            torch.load(tmp_path / x / f"{arm}.pt", weights_only=True)["state_dict"]
            for x in ("start", "varied")
        )
        moved[arm] = max((a[k] - b[k]).abs().max().item() for k in a if k.endswith("weight"))
    assert moved["cnn"] == 0 < moved["vit"]
    done = [torch.load(tmp_path / x / "cnn.pt", weights_only=True) for x in ("start", "varied")]
    assert done[1]["swa_snapshots"] > 1
    for key, x in done[0]["state_dict"].items():
        if "running" in key:
            torch.testing.assert_close(done[1]["state_dict"][key], x, rtol=0, atol=0)


def test_readouts_equal_scikit_learn(pretrained, folder, tmp_path, script, monkeypatch):
    from sklearn.linear_model import Ridge
    from sklearn.metrics import f1_score

    torch.manual_seed(0)
    X, Y, Q = torch.randn(9, 5), torch.eye(3)[torch.arange(9) % 3], torch.randn(4, 5)
    oracle = Ridge(alpha=9, fit_intercept=False).fit(X, Y - Y.mean(0))
    expected = oracle.predict(Q) + Y.mean(0).numpy()
    np.testing.assert_allclose(readouts.linear(X, Y, Q).numpy(), expected, atol=1e-5)
    labels = np.eye(3, dtype=bool)[[0, 1, 2, 0]]
    p = torch.eye(3)[[0, 2, 2, 0]]
    expected = f1_score([0, 1, 2, 0], [0, 2, 2, 0], average="macro", zero_division=0)
    assert readouts.macro_f1(labels, p) == pytest.approx(expected)

    monkeypatch.setattr(readouts, "VIEWED", 4)
    (pretrained / "finished").touch()
    status, _, err = script(readouts, tmp_path, "--draws", 2, "--fracs", 0.5, 1)
    assert status == 0, err
    found = json.loads((pretrained / "readouts.json").read_text())
    assert set(found["cnn"]) == {"knn|0.5", "linear|0.5", "knn|1", "linear|1"}
    arrays = np.load(pretrained / "features.npz")
    split = rows(pretrained / "split.csv")
    sides = [r["split"] for r in split]
    for arm in ("cnn", "vit"):
        assert [len(arrays[f"{arm}_{s}"]) for s in ("train", "val", "test")] == [
            sides.count(s) for s in ("train", "val", "test")
        ]
        views = arrays[f"{arm}_views"]
        assert views.shape[:2] == (4, 10) and (views[:, 0] != views[:, 1]).any()
    # the probe on all labels, from the features that were kept
    images = readers.read(str(folder), **dict.fromkeys(data.READING))
    names = {name: i for i, name in enumerate(images.names)}
    label = {s: images.labels[[names[r["path"]] for r in split if r["split"] == s]] for s in sides}
    x = {s: torch.from_numpy(arrays[f"vit_{s}"]).float() for s in sides}
    mean, std = x["train"].mean(0), x["train"].std(0) + 1e-6
    y = torch.from_numpy(label["train"]).float()
    p = readouts.linear(*((x["train"] - mean) / std, y, (x["test"] - mean) / std))
    score = f1_score(
        label["test"].argmax(1), p.argmax(1), average="macro", labels=[0, 1, 2], zero_division=0
    )
    assert found["vit"]["linear|1"]["test"] == pytest.approx(score, abs=0.02)

    (tmp_path / "cells").mkdir()
    cell = tmp_path / "cells/c.json"
    cell.write_text(json.dumps({"commands": [f"python pretrain.py --out x/{pretrained.name}"]}))
    monkeypatch.setattr(evidence, "label_free", lambda file: sorted(np.load(file)))
    evidence.collect(tmp_path / "cells", tmp_path)
    assert json.loads(cell.read_text())["readouts"] == found
    assert json.loads(cell.read_text())["label_free"] == sorted(arrays)
    shutil.rmtree(pretrained)
    evidence.collect(tmp_path / "cells", tmp_path)  # and it stays


def features(values, n=400):
    """(n, D) centred, with these singular values."""
    torch.manual_seed(0)
    x = torch.randn(n, len(values))
    u = torch.linalg.qr(x - x.mean(0))[0]
    return u @ torch.diag(values)


def test_measures_of_known_spectra():
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    expected = math.exp(stats.entropy(values.numpy()))
    assert evidence.rankme(features(values)) == pytest.approx(expected, rel=1e-4)
    assert evidence.effective_rank(features(values) + 9) == pytest.approx(expected, rel=1e-3)
    for alpha in (0.5, 1.0, 1.7):
        x = features(torch.arange(1, 121.0) ** (-alpha / 2))
        assert evidence.alpha_req(x) == pytest.approx(-abs(alpha - 1), abs=1e-3)
    torch.manual_seed(0)
    for d in (2, 6):
        assert evidence.intrinsic_dimension(torch.rand(2000, d)) == pytest.approx(d, rel=0.15)
    x = torch.randn(30, 5)
    unit = F.normalize(x - x.mean(0), dim=1)
    pairs = [-2 * (unit[i] - unit[j]).square().sum() for i in range(30) for j in range(i)]
    expected = -math.log(np.mean(np.exp(pairs)))
    assert evidence.uniformity(x) == pytest.approx(expected, rel=1e-4)


def test_lidar_counts_directions_that_tell_images_apart():
    torch.manual_seed(0)
    images = torch.randn(300, 1, 8)
    noise = torch.randn(300, 10, 8)
    apart = images * torch.tensor([1.0] * 3 + [0] * 5) + 0.01 * noise
    assert evidence.lidar(apart) == pytest.approx(3, abs=0.3)
    assert evidence.lidar(images + 0.01 * noise) == pytest.approx(8, abs=0.3)


def test_clusters_are_learnable_where_there_are_some():
    torch.manual_seed(0)
    centres = torch.randn(50, 30)
    clear = centres[torch.arange(2000) % 50] + 0.01 * torch.randn(2000, 30)
    assert evidence.cluster_learnability(clear[torch.randperm(2000)]) > 0.95
    assert evidence.cluster_learnability(torch.randn(2000, 30)) < 0.6


def test_paired_differences_and_holm():
    a, b = [0.1, 0.5, 0.3, 0.2], [0.2, 0.5, 0.6, 0.3]
    d = np.subtract(b, a)
    half = stats.t.ppf(0.975, 3) * d.std(ddof=1) / 2
    mean, low, high, p = evidence.paired(a, b)
    assert (mean, low, high) == pytest.approx((d.mean(), d.mean() - half, d.mean() + half))
    assert (p < 0.05) == (low > 0 or high < 0)
    # by hand: sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, none below the one before
    assert evidence.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert evidence.holm([0.5, 0.9]) == [1.0, 1.0]
    assert evidence.paired(a, a)[3] == 1


def cell(row, seed, scores, log=(), **more):
    """A finished cell; scores: {"cnn|0.01": (validation, test) F1}, the ensemble's as the CNN's."""
    scores |= {f"mean|{f}": scores[f"cnn|{f}"] for f in evidence.FRACS}
    each = {}
    for key, both in scores.items():
        sides = zip(("val", "test"), both)
        each[key] = {side: {"macro_f1": x, "recall": [x, 0.9]} for side, x in sides}
        each[key] |= {"best_epoch": seed + 1, "epochs": seed + 16}
    found = {"row": row, "seed": seed, "status": "done", "log": list(log), "scores": each}
    kinds = [f"{kind}|{frac}" for kind in ("knn", "linear") for frac in (*evidence.FRACS, "1")]
    readouts = {arm: {k: {"test": scores[f"{arm}|0.1"][1]} for k in kinds} for arm in evidence.ARMS}
    return found | {"pretrain_seconds": 10.0 + seed, "readouts": readouts} | more


def flat(cnn, vit):
    """Scores alike for both fractions and sides."""
    return {f"{a}|{f}": (x, x) for f in evidence.FRACS for a, x in (("cnn", cnn), ("vit", vit))}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """write(folder, *cells) to a results/pretrained of its own."""
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)

    def write(folder, *cells):
        (tmp_path / folder / "cells").mkdir(parents=True, exist_ok=True)
        for c in cells:
            file = tmp_path / folder / "cells" / f"{c['row']}_{c['seed']}.json"
            file.write_text(json.dumps(c))

    return write


def losses_of(cnn, vit):
    return [{"arms": a, "loss": x} for a, last in (("cnn", cnn), ("vit", vit)) for x in (8.3, last)]


def test_the_trials_choose_the_highest_score_of_dino_only_where_it_learned(results):
    names = {"equation 1, 1e-3": 0.2, "equation 1, 1e-5": 0.4, "VICReg, 1e-3": 0.5, "recipe a": 0.6}
    results("trials", *(cell(name, 100, flat(x, x + 0.1)) for name, x in names.items()))
    results("trials", cell("DINO, 1e-3", 100, flat(0.9, 0.9), losses_of(7.0, 8.0)))
    results("trials", cell("DINO, 1e-4", 100, flat(0.8, 0.8), losses_of(7.9, 7.9)))
    assert evidence.chosen() == {
        "equation 1, best rate": "equation 1, 1e-5",
        "chosen objective": "recipe a",
        "DINO": "DINO, 1e-3, 1 epoch",
    }
    results("trials", cell("DINO, 1e-5", 100, flat(0.1, 0.1), losses_of(7.0, 7.4)))
    results("trials", cell("recipe a", 100, flat(0.3, 0.3)))
    assert evidence.best("DINO") == "DINO, 1e-5"
    assert evidence.chosen()["chosen objective"] == "VICReg, 1e-3"


def test_differences_are_paired_by_seed_and_holm_judges(results):
    row, rng = "VICReg, 1e-3", np.random.default_rng(0)
    results("trials", cell(row, 100, flat(0.5, 0.5)))
    start, gain = rng.uniform(0.3, 0.9, 6), 0.05 + rng.normal(0, 0.004, 6)
    none = np.array([0.1, -0.1, 0.05, -0.05, 0.02, -0.02])
    for s in range(6):
        base = flat(start[s], start[s] - 0.1)
        results("brain_mri", cell(evidence.BASE, s, base))
        scores = flat(start[s] + gain[s], start[s] - 0.1 + gain[s])
        scores["vit|0.1"] = (1.0, start[s] - 0.1)  # the better arm on validation
        scores["cnn|0.1"] = (0.0, start[s] + none[s])
        results("brain_mri", cell(row, s, scores))
    results("brain_mri", cell(row, 7, flat(0, 0)))  # of no pair
    (first, second), test = evidence.primary(row), stats.ttest_1samp(gain, 0)
    interval = test.confidence_interval()
    assert first[0] == "brain_mri" and first[3][4] == 6
    assert first[3][:4] == pytest.approx((gain.mean(), *interval, test.pvalue))
    assert first[4] == pytest.approx(4 * test.pvalue) and first[5] == "not all have run"
    assert second[3][0] == pytest.approx(0, abs=1e-9)
    for s in range(6):
        results("ham10000", cell(evidence.BASE, s, flat(0.2, 0.2)))
        results("ham10000", cell(row, s, flat(0.2, 0.2 - 0.01 * (s % 2))))
    judged = [x[5] for x in evidence.primary(row)]
    assert judged == ["better", *["no difference shown"] * 3]
    found = evidence.views(evidence.cells_of("brain_mri")[row], "0.1")
    assert [found["better arm"][s] for s in range(6)] == pytest.approx(list(start - 0.1))
    assert found["ensemble"] == found["CNN"]
    found = evidence.read_outs(evidence.cells_of("brain_mri")[row], "1")
    assert found["CNN, probe"] != found["ViT, probe"] == found["ViT, k-NN"]
    results("brain_mri", *(cell(evidence.PAPERS, s, flat(0.5, 0.5)) for s in range(6)))
    for s in range(3):
        results("random", cell(evidence.PAPERS, s, flat(0.3 + 0.01 * s, 0.1)))
    text = evidence.report()
    half = stats.t.ppf(0.975, 2) * 0.01 / 3**0.5
    expected = f"random weights | 3 | **−0.190 (−{0.19 + half:.3f} to −{0.19 - half:.3f})**"
    assert expected in text and f"| {evidence.PAPERS} | 6 | 0.500 |" in text
    assert f"| Brain MRI, 1 % | 6 | {start.mean() - 0.05:.3f} |" in text
    assert f"**+{gain.mean():.3f} (+{interval[0]:.3f} to +{interval[1]:.3f})**" in text


def test_a_set_is_reported_once_two_seeds_can_be_compared(results):
    row = "VICReg, 1e-3"
    results("trials", cell(row, 100, flat(0.5, 0.5)))
    results("brain_mri", *(cell(evidence.BASE, s, flat(0.5, 0.5)) for s in range(2)))
    results("brain_mri", cell(row, 0, flat(0.6, 0.6)))
    assert "## Brain MRI" not in evidence.report()
    results("brain_mri", cell(row, 1, flat(0.7, 0.6)))
    assert "## Brain MRI" in evidence.report()


def test_a_measure_that_orders_runs_has_a_correlation_of_one(results):
    """By hand: with two neighbours of four turned round, 1 - 6 * 2 / 60 = 0.8."""
    rows, y = ["a", "b", "c", evidence.BASE], [0.3, 0.1, 0.2, 0.4]
    turned = [0.2, 0.1, 0.3, 0.4]

    def monitor(x):
        names = {"agreement": -1, "cnn_logits_spread": 1, "vit_logits_spread": -1}
        return {name: sign * x for name, sign in names.items()} | {"retrieval": 0.5}

    for folder, s, (i, row) in product(evidence.SETS, range(4), enumerate(rows)):
        known = {"rank": y[i] ** 3 + s, "turned": (turned if s == 1 else y)[i], "same": 0.1 * s}
        c = cell(row, s, flat(y[i], y[i])) | {"label_free": dict.fromkeys(evidence.ARMS, known)}
        log = [{"start": monitor(y[3])}, monitor(y[i])]  # direct use has none: the others' start
        results(folder, c | {"log": log if row != evidence.BASE else []})
    results("brain_mri", cell("a", 4, flat(1, 1)))  # of a seed that is not whole
    found = {row[0]: row[1:] for row in evidence.correlation_rows(rows[:3])}
    assert found["rank"] == pytest.approx((1,) * 6)
    mean, half = 0.95, stats.t.ppf(0.975, 3) * stats.sem([1, 0.8, 1, 1])
    assert found["turned"] == pytest.approx((mean,) * 4 + (mean - half, mean + half))
    assert found["agreement"] == pytest.approx((-1,) * 6)
    assert found["logits_spread"][:3] == pytest.approx((1, -1, 0))
    assert found["same"] == found["retrieval"] == (0,) * 6


def test_the_report_is_that_of_the_cells():
    assert (evidence.RESULTS / "README.md").read_text(encoding="utf-8") == evidence.report()
