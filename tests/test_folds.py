"""Folds that part no patient, arms that never saw what they are tested on, one table of it all."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ARMS, draw_classes, in_this_process, rows
from PIL import Image
from sklearn.metrics import f1_score

from common import readers
from common.pixels import decode
from tools import experiments, folds
from tools.folds import draw_folds

PRETRAIN = [*ARMS, "--epochs", 1]
TUNE = "--epochs 2 --frac 0.5"


@pytest.mark.parametrize("seed", range(3))
def test_folds_are_whole_stratified_and_seeded(seed):
    rng = np.random.default_rng(seed)
    unit = np.repeat(np.arange(90), rng.integers(1, 6, 90))
    labels = np.eye(3, dtype=bool)[rng.choice(3, 90, p=(0.6, 0.3, 0.1))[unit]]
    labelled = unit % 10 > 0
    labels[~labelled] = False
    fold = draw_folds(labels, labelled, unit, 5, seed)
    assert all(len(set(fold[unit == u])) == 1 for u in range(90))
    assert set(fold[labelled]) == set(range(5)) and set(fold[~labelled]) == {-1}
    for has in (*labels.T, labelled):  # a fifth of each class, to the images of a patient or two
        counts = np.bincount(fold[has], minlength=5)
        assert counts.max() - counts.min() <= 8, counts
    assert (fold == draw_folds(labels, labelled, unit, 5, seed)).all()
    assert (fold != draw_folds(labels, labelled, unit, 5, seed + 1)).any()


@pytest.fixture
def patients(tmp_path, monkeypatch):
    """48 images of 24 patients, an exact duplicate of another patient's among them."""
    monkeypatch.setattr(experiments, "run_script", in_this_process)
    images = draw_classes(tmp_path / "images", {"a": 24, "b": 24})
    (images / "a/1.png").write_bytes((images / "a/8.png").read_bytes())
    lines = [f"{c}/{i}.png,{c},{c}{i // 2}" for c in "ab" for i in range(24)]
    (tmp_path / "t.csv").write_text("image,label,patient\n" + "\n".join(lines))
    return ["--data", tmp_path / "t.csv", "--images", images, "--group-by", "patient"]


def test_an_experiment_in_folds(patients, tmp_path, script, monkeypatch):
    out = tmp_path / "out"
    words = [*patients, "--folds", 3, *PRETRAIN, "--img-size", 32, "--finetune", TUNE, "--out", out]
    status, said, err = script(folds, *words, "--dry-run")
    assert status == 0 and "3 folds take about" in said and not out.exists()
    status, said, err = script(folds, *words)
    assert status == 0, err
    table = rows(out / "predictions.csv")
    assert len(table) == 6 * 48
    summary = json.loads((out / "summary.json").read_text())
    for method in ("baseline", "cass"):
        for arm in ("cnn", "vit", "mean"):
            mine = [r for r in table if (r["method"], r["arm"]) == (method, arm)]
            assert set(Counter(r["path"] for r in mine).values()) == {1} and len(mine) == 48
            scores, wanted = summary[f"{method} {arm}"], {"average": "macro"}
            true, found = ([r[key] for r in mine] for key in ("true", "predicted"))
            assert scores["test"]["macro_f1"] == pytest.approx(f1_score(true, found, **wanted))
            assert scores["test"]["n_units"] == 23  # 24 patients, of whom two share an image
            low, high = scores["test"]["ci95"]["brier"]
            assert low < scores["test"]["brier"] < high and len(scores["folds"]["auroc"]) == 3
            assert "auroc" not in json.dumps(scores["test"])  # of three models, which differ
    of_fold = {r["path"]: r["fold"] for r in table}
    patient = {r["image"]: r["patient"] for r in rows(tmp_path / "t.csv")}
    for k in range(3):
        folder = out / f"fold{k}"
        split = {r["path"]: r["split"] for r in rows(folder / "split.csv")}
        assert {p for p, side in split.items() if side == "test"} == {
            p for p, fold in of_fold.items() if fold == str(k)
        }
        sides = {(patient[p], side) for p, side in split.items()}
        assert len(sides) == 24 and set(split.values()) == {"train", "val", "test"}
        begun, trained = (
            torch.load(folder / f"{method}/cnn.pt", weights_only=True)
            for method in ("baseline", "cass")
        )
        train = [str(tmp_path / "images" / p) for p, side in split.items() if side == "train"]
        seen = {int(np.uint64(decode(p, 32)[1]["hash"]).astype("i8")) for p in train}
        assert set(trained["seen"].tolist()) == seen  # neither its test nor its validation images
        assert (begun["epoch"], trained["epoch"]) == (0, 1)
        config = json.loads((folder / "cass/finetune/cnn/config.json").read_text())
        assert config["arguments"]["frac"] == 0.5 and config["arguments"]["epochs"] == 2
    for arm in ("cnn", "vit", "mean"):
        row = summary[f"cass {arm} - baseline {arm}"]["test"]["scores"]["accuracy"]
        scores = [summary[f"{m} {arm}"]["test"]["accuracy"] for m in ("baseline", "cass")]
        assert (row["a"], row["b"]) == pytest.approx(scores)
    assert "patients or different images" in said and "A: baseline mean\nB: cass mean" in said

    before, calls = (out / "summary.json").read_text(), []
    (out / "summary.json").unlink()
    (out / "fold1/cass/finetune/finished").unlink()  # as if it had been cut there
    real = experiments.run_script
    monkeypatch.setattr(
        experiments, "run_script", lambda words, o: calls.append(words) or real(words, o)
    )
    assert script(folds, *words)[0] == 0 and (out / "summary.json").read_text() == before
    assert [w[0] for w in calls if "--dry-run" not in w] == ["finetune.py"]
    for more, message in (
        (["--seed", 1], "split.csv: is of other images or flags"),
        (["--finetune", "--epochs 1"], "was made with other flags"),
    ):
        status, _, err = script(folds, *words, *more)
        assert status == 2 and message in err, err
    assert (out / "summary.json").read_text() == before


def test_folds_refuse(patients, tmp_path, script):
    out = tmp_path / "out"
    few = tmp_path / "few.csv"
    few.write_text(
        "image,label,patient\n" + "".join(f"a/{i}.png,{i % 2},{i // 9}\n" for i in range(18))
    )
    for words, message in (
        ([], "give --data"),
        ([*patients, "--split", "none"], "no --split"),
        ([*patients, "--folds", 1], "2 --folds or more"),
        ([*patients, "--finetune", "--seeds 0 1"], "no --seeds"),
        (["--data", few, *patients[2:], "--folds", 5], "too few patients or images: fold"),
        ([*patients, "--no-such-flag"], "--no-such-flag"),
        ([*patients, *PRETRAIN, "--folds", 2, "--finetune=--wrong"], "--wrong"),
    ):
        status, _, err = script(folds, *words, "--img-size", 32, "--out", out)
        assert status in (1, 2) and message in err and "Traceback" not in err, (message, err)
    assert not list(out.glob("fold*/cass/cnn.pt"))


def test_images_without_a_label_are_for_training_alone(patients, tmp_path, script):
    """Whatever fold is tested; but for those of a tested patient."""
    text = (tmp_path / "t.csv").read_text().splitlines()
    lines = [
        x.replace(",a,", ",,").replace(",b,", ",,") if i % 4 == 1 else x for i, x in enumerate(text)
    ]
    (tmp_path / "t.csv").write_text("\n".join([text[0], *lines[1:]]))
    images = readers.read(str(tmp_path / "t.csv"), str(tmp_path / "images"), group_col="patient")
    assert (~images.labelled).sum() == 12
    images.decode(32, None)
    unit = folds.splits.indivisible_units(images)
    fold = draw_folds(images.labels, images.labelled, unit, 3, 0)
    for k in range(3):
        split = folds.split_of(images, fold, k, 0)
        tested = set(images.groups[split == "test"])
        for group, labelled, side in zip(images.groups, images.labelled, split):
            assert labelled or side == ("test" if group in tested else side) != "none"
        assert not tested & set(images.groups[split != "test"])


def test_seven_patients_are_too_few_for_an_interval(tmp_path, script, monkeypatch):
    """As many as in the paper's biopsy set: scores, but no interval, and a line that says so."""
    monkeypatch.setattr(experiments, "run_script", in_this_process)
    rng, lines = np.random.default_rng(0), []
    for i in range(56):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
            tmp_path / f"i{i}.png"
        )
        x, y = rng.integers(0, 2, 2)
        lines.append(f"i{i}.png,{x},{y},p{i // 8}")
    (tmp_path / "t.csv").write_text("image,x,y,patient\n" + "\n".join(lines))
    data = ["--data", tmp_path / "t.csv", "--group-by", "patient", "--img-size", 32]
    words = [*data, "--folds", 3, *PRETRAIN, "--finetune", "--mode knn", "--out", tmp_path / "o"]
    status, said, err = script(folds, *words)
    assert status == 0, err
    summary = json.loads((tmp_path / "o/summary.json").read_text())["cass mean"]["test"]
    assert summary["n_units"] == 7 and set(summary["ci95"].values()) == {None}
    assert "(too few)" in said and "an interval takes 20 patients" in said
    assert "10 of each class (x has 7, y has 7) and, for ece, 300 images" in said
    assert "not given" in said  # the difference in ece
