"""The two scripts from end to end, on images and arms that are small enough for a test."""

import json
import os
import re

import draw_demo
import numpy as np
import pytest
import timm
import torch
from conftest import ARMS, ROOT, draw_classes, one_line, picture, rows, run
from PIL import Image
from sklearn.metrics import f1_score

import data
import finetune
import pretrain
from common.decode import normalize
from common.pixels import decode


def weights(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    a, b = weights(a)["state_dict"], weights(b)["state_dict"]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_pretraining_writes_what_it_promises(pretrained, folder):
    log = [json.loads(line) for line in (pretrained / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2] and all(
        np.isfinite(line["loss"]) for line in log
    )
    split = rows(pretrained / "split.csv")
    assert len(split) == 30 and {row["split"] for row in split} == {"train", "val", "test"}
    assert json.loads((pretrained / "config.json").read_text())["arguments"]["bs"] == 8
    last = weights(pretrained / "last.pt")
    assert last["epoch"] == 2 and {"method", "optimizer_cnn", "optimizer_vit", "rng"} <= set(last)
    seen = weights(pretrained / "cnn.pt")["seen"]
    assert len(seen) == sum(row["split"] == "train" for row in split)
    assert not list(pretrained.glob(".*"))  # nothing half written


@pytest.mark.parametrize("arm", ["cnn", "vit"])
def test_timm_loads_the_weights_strictly(pretrained, arm):
    file = weights(pretrained / f"{arm}.pt")
    model = timm.create_model(
        file["arch"],
        num_classes=file["num_classes"],
        **file["model_kwargs"],
        checkpoint_path=str(pretrained / f"{arm}.pt"),
    )
    assert all(torch.equal(v, file["state_dict"][k]) for k, v in model.state_dict().items())
    fresh = timm.create_model(file["arch"], num_classes=file["num_classes"], **file["model_kwargs"])
    assert any(not torch.equal(v, file["state_dict"][k]) for k, v in fresh.named_parameters())


def test_the_weights_move_and_follow_the_seed(folder, tmp_path, script):
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        assert (
            script(
                pretrain,
                "--data",
                folder,
                *ARMS,
                "--epochs",
                1,
                "--bs",
                8,
                "--seed",
                seed,
                "--out",
                tmp_path / name,
            )[0]
            == 0
        )
    for arm in ("cnn", "vit"):
        assert same(tmp_path / f"one/{arm}.pt", tmp_path / f"two/{arm}.pt")
        assert not same(tmp_path / f"one/{arm}.pt", tmp_path / f"three/{arm}.pt")


def test_workers_and_the_cache_do_not_change_the_result(folder, tmp_path, script):
    for name, more in (("one", []), ("two", ["--workers", 2]), ("three", ["--no-cache"])):
        assert (
            script(
                pretrain,
                "--data",
                folder,
                *ARMS,
                "--epochs",
                2,
                "--bs",
                8,
                *more,
                "--out",
                tmp_path / name,
            )[0]
            == 0
        )
    assert same(tmp_path / "one/cnn.pt", tmp_path / "two/cnn.pt")
    assert same(tmp_path / "one/cnn.pt", tmp_path / "three/cnn.pt")


def test_pretraining_never_looks_at_labels(tmp_path, script):
    """The same training images in other classes give the same weights."""
    for name, swap in (("one", False), ("two", True)):
        for i in range(12):
            cls = "ab"[i % 2 ^ swap]
            path = tmp_path / name / "train" / cls / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(i // 2)).save(path)  # equal pairs: the order is the same
            other = tmp_path / name / "test" / cls / f"{i:02}.png"
            other.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(100 + i)).save(other)
        assert (
            script(
                pretrain,
                "--data",
                tmp_path / name / "train",
                "--label-col",
                "none",
                *ARMS,
                "--epochs",
                1,
                "--bs",
                4,
                "--out",
                tmp_path / f"out_{name}",
            )[0]
            == 0
        )
    assert same(tmp_path / "out_one/cnn.pt", tmp_path / "out_two/cnn.pt")


@pytest.mark.parametrize(
    "more",
    [
        ["--ablation", "sgd", "softmax", "blur", "solarize"],
        ["--t-max", "run", "--swa-start", "1", "--ablation", "sigmoid", "--amp", "bf16"],
        ["--cnn", "test_vit", "--vit", "test_vit2", "--vit-kwargs", "patch_size=8"],
    ],
)
def test_the_paper_s_variants_run(folder, tmp_path, script, more):
    status, out, err = script(
        pretrain,
        "--data",
        folder,
        *ARMS,
        "--epochs",
        1,
        "--bs",
        8,
        *more,
        "--out",
        tmp_path / "run",
    )
    assert status == 0, err


def test_initial_weights_from_a_file(pretrained, folder, tmp_path, script):
    assert (
        script(
            pretrain,
            "--data",
            folder,
            *ARMS,
            "--init-cnn",
            pretrained / "cnn.pt",
            "--epochs",
            1,
            "--lr",
            0,
            "--min-lr",
            0,
            "--swa-start",
            1,
            "--out",
            tmp_path / "next",
        )[0]
        == 0
    )
    before, after = weights(pretrained / "cnn.pt"), weights(tmp_path / "next/cnn.pt")
    assert all(
        torch.equal(after["state_dict"][k], v)
        for k, v in before["state_dict"].items()
        if k.endswith("weight")
    )
    assert not same(pretrained / "vit.pt", tmp_path / "next/vit.pt")


def test_a_run_too_short_for_a_snapshot_says_so(folder, tmp_path, script):
    status, out, _ = script(
        pretrain, "--data", folder, *ARMS, "--epochs", 1, "--out", tmp_path / "run"
    )
    assert status == 0 and "no weights averaged" in out
    file, last = weights(tmp_path / "run/cnn.pt"), weights(tmp_path / "run/last.pt")
    assert file["swa_snapshots"] == 0
    assert all(torch.equal(v, last["method"][f"cnn.{k}"]) for k, v in file["state_dict"].items())


def test_a_loss_that_is_no_number_ends_with_1(folder, tmp_path, script):
    status, _, err = script(
        pretrain,
        "--data",
        folder,
        *ARMS,
        "--lr",
        1e30,
        "--epochs",
        5,
        "--bs",
        8,
        "--out",
        tmp_path / "run",
    )
    assert status == 1 and "the loss is nan" in one_line(err)
    assert not (tmp_path / "run/cnn.pt").exists()
    if (tmp_path / "run/last.pt").exists():
        assert all(
            torch.isfinite(v).all() for v in weights(tmp_path / "run/last.pt")["method"].values()
        )


# fine-tuning


def test_finetuning_needs_only_the_checkpoint(pretrained, script):
    status, out, err = script(
        finetune, "--ckpt", pretrained / "cnn.pt", "--frac", 0.5, "--epochs", 3
    )
    assert status == 0, err
    folder = pretrained / "finetune_cnn_0.5"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (
        metrics["n_train"] == 21
        and metrics["n_labelled"] in (10, 11)
        and metrics["n_test_seen"] == 0
    )
    split = rows(folder / "split.csv")
    assert [(r["path"], r["split"]) for r in split] == [
        (r["path"], r["split"]) for r in rows(pretrained / "split.csv")
    ]
    assert sum(int(r["label_used"]) for r in split) == metrics["n_labelled"]

    predictions = rows(folder / "predictions.csv")
    test = {r["path"]: r["labels"] for r in split if r["split"] == "test"}
    assert {r["path"]: r["true"] for r in predictions} == test
    true, predicted = [r["true"] for r in predictions], [r["predicted"] for r in predictions]
    assert metrics["test"]["macro_f1"] == pytest.approx(
        f1_score(true, predicted, labels=list("abc"), average="macro", zero_division=0)
    )
    for row in predictions:
        assert row["predicted"] == max("abc", key=lambda c: float(row[f"prob_{c}"]))
    confusion = rows(folder / "confusion.csv")
    assert sum(int(r[c]) for r in confusion for c in "abc") == metrics["n_test"]

    best = weights(folder / "best.pt")
    assert best["class_names"] == ["a", "b", "c"] and best["num_classes"] == 3
    model = timm.create_model(
        best["arch"], num_classes=3, **best["model_kwargs"], checkpoint_path=str(folder / "best.pt")
    ).eval()
    pixels = [decode(str(pretrained.parent / "images" / r["path"]), 32)[0] for r in predictions]
    with torch.no_grad():
        logits = model(normalize(torch.from_numpy(np.stack(pixels))))
    expected = [[float(r[f"prob_{c}"]) for c in "abc"] for r in predictions]
    np.testing.assert_allclose(logits.sigmoid(), expected, atol=0.02)  # they may be of bfloat16


def test_both_arms_several_seeds_and_summary(pretrained, script):
    status, out, err = script(
        finetune, "--ckpt", pretrained / "vit.pt", "--frac", 0.5, "--epochs", 2, "--seeds", 0, 1
    )
    assert status == 0 and "±" in out, err
    out = pretrained / "finetune_vit_0.5"
    metrics = [json.loads((out / f"seed{s}/metrics.json").read_text()) for s in (0, 1)]
    summary = json.loads((out / "summary.json").read_text())["metrics"]["macro_f1"]
    scores = [m["test"]["macro_f1"] for m in metrics]
    assert summary["mean"] == pytest.approx(np.mean(scores))
    assert summary["std"] == pytest.approx(np.std(scores, ddof=1))
    used = [
        [r["path"] for r in rows(out / f"seed{s}/split.csv") if r["label_used"] == "1"]
        for s in (0, 1)
    ]
    tests = [
        [r["path"] for r in rows(out / f"seed{s}/split.csv") if r["split"] == "test"]
        for s in (0, 1)
    ]
    assert used[0] != used[1] and tests[0] == tests[1]


def test_early_stopping_restores_the_best_epoch(pretrained, script):
    status, _, err = script(
        finetune, "--ckpt", pretrained / "cnn.pt", "--lr", 0.1, "--patience", 2, "--epochs", 30
    )
    assert status == 0, err
    folder = pretrained / "finetune_cnn_1"
    metrics = json.loads((folder / "metrics.json").read_text())
    losses = [
        json.loads(line)["val_loss"] for line in (folder / "log.jsonl").read_text().splitlines()
    ]
    assert metrics["best_epoch"] == int(np.argmin(losses)) + 1 and metrics["val_loss"] == min(
        losses
    )
    assert metrics["epochs"] == len(losses) == min(30, metrics["best_epoch"] + 2)


def test_linear_mode_trains_the_head_alone(pretrained, script):
    assert (
        script(finetune, "--ckpt", pretrained / "cnn.pt", "--mode", "linear", "--epochs", 2)[0] == 0
    )
    before = weights(pretrained / "cnn.pt")["state_dict"]
    after = weights(pretrained / "finetune_cnn_1_linear/best.pt")["state_dict"]
    head = {k for k in after if k.startswith("fc.") or "head.fc" in k}
    assert head and all(torch.equal(v, before[k]) for k, v in after.items() if k not in head)


def test_supervised_baseline_shares_the_split(pretrained, folder, tmp_path, script):
    status, _, err = script(
        finetune,
        "--arch",
        "test_resnet",
        "--init",
        "random",
        "--img-size",
        32,
        "--data",
        folder,
        "--epochs",
        2,
        "--frac",
        0.5,
        "--class-weights",
        "inverse",
        "--out",
        tmp_path / "base",
    )
    assert status == 0, err
    assert [r["split"] for r in rows(tmp_path / "base/split.csv")] == [
        r["split"] for r in rows(pretrained / "split.csv")
    ]
    assert json.loads((tmp_path / "base/metrics.json").read_text())["ckpt"] is None


def test_multilabel_from_a_csv_file(tmp_path, script):
    rng = np.random.default_rng(0)
    lines = []
    for i in range(40):
        Image.fromarray(picture(i)).save(tmp_path / f"i{i}.png")
        lines.append(f"i{i}.png," + ",".join(map(str, rng.integers(0, 2, 3))))
    (tmp_path / "labels.csv").write_text("image,x,y,z\n" + "\n".join(lines))
    assert (
        script(
            pretrain,
            "--data",
            tmp_path / "labels.csv",
            *ARMS,
            "--epochs",
            1,
            "--bs",
            8,
            "--out",
            tmp_path / "run",
        )[0]
        == 0
    )
    status, _, err = script(
        finetune, "--ckpt", tmp_path / "run/vit.pt", "--frac", 0.2, "--epochs", 2
    )
    assert status == 0, err
    out = tmp_path / "run/finetune_vit_0.2"
    assert json.loads((out / "metrics.json").read_text())["multilabel"]
    for row in rows(out / "predictions.csv"):
        assert row["predicted"] == "|".join(c for c in "xyz" if float(row[f"prob_{c}"]) >= 0.5)
    assert [r["label"] for r in rows(out / "confusion.csv")] == ["x", "y", "z"]


def test_copies_of_training_images_in_a_given_test_split(tmp_path, script):
    d = tmp_path / "d"
    draw_classes(d / "Training", {"a": 8, "b": 8})
    draw_classes(d / "Testing", {"a": 5, "b": 5}, start=500)
    for i in range(3):
        (d / f"Testing/a/copy{i}.png").write_bytes((d / f"Training/a/{i}.png").read_bytes())
    assert (
        script(pretrain, "--data", d, *ARMS, "--epochs", 1, "--bs", 8, "--out", tmp_path / "run")[0]
        == 0
    )
    status, out, err = script(finetune, "--ckpt", tmp_path / "run/cnn.pt", "--epochs", 1)
    assert status == 0, err
    metrics = json.loads((tmp_path / "run/finetune_cnn_1/metrics.json").read_text())
    assert metrics["n_test"] == 13 and metrics["n_test_duplicates"] == 3
    assert metrics["test_without_duplicates"]["n"] == 10 and "without the 3" in out
    listed = rows(tmp_path / "run/duplicates.csv")
    assert {r["path"] for r in listed if r["split"] == "test"} == {
        f"Testing/a/copy{i}.png" for i in range(3)
    }


def test_dedup_and_contradictions_and_the_report(tmp_path, script):
    d = tmp_path / "d"
    draw_classes(d / "train", {"a": 8, "b": 8})
    draw_classes(d / "test", {"a": 5, "b": 5}, start=500)
    (d / "test/a/copy.png").write_bytes((d / "train/a/0.png").read_bytes())
    (d / "test/b/lie.png").write_bytes((d / "train/a/1.png").read_bytes())
    status, out, _ = script(data, d, "--img-size", 32, "--out", tmp_path / "report")
    assert status == 0 and "28 images, 2 classes" in out
    assert "4 images have exact duplicates; 2 of them" in out
    assert "1 sets of exact duplicates have different labels" in out and "test/b/lie.png" in out
    assert "RGB 28" in out and "ImageNet" in out
    assert len(rows(tmp_path / "report/duplicates.csv")) == 4
    status, out, _ = script(data, d, "--img-size", 32, "--dedup")
    assert status == 0 and "26 images" in out and "left out by --dedup: 2" in out
    assert (
        script(pretrain, "--data", d, *ARMS, "--epochs", 1, "--dedup", "--out", tmp_path / "run")[0]
        == 0
    )
    assert script(finetune, "--ckpt", tmp_path / "run/cnn.pt", "--epochs", 1)[0] == 0
    metrics = json.loads((tmp_path / "run/finetune_cnn_1/metrics.json").read_text())
    assert metrics["n_test"] == 10 and metrics["n_test_duplicates"] == metrics["n_test_seen"] == 0


def test_groups_of_a_csv_file_are_never_parted(tmp_path, script):
    lines = ["image,label,patient"]
    for i in range(60):
        Image.fromarray(picture(i)).save(tmp_path / f"i{i}.png")
        lines.append(f"i{i},{'ab'[i // 3 % 2]},p{i // 3}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    status, out, err = script(
        data,
        tmp_path / "labels.csv",
        "--group-col",
        "patient",
        "--img-size",
        16,
        "--out",
        tmp_path / "report",
    )
    assert status == 0 and "20 groups" in out, err
    split = [r["split"] for r in rows(tmp_path / "report/split.csv")]
    assert len(set(split)) == 3 and all(len(set(split[i : i + 3])) == 1 for i in range(0, 60, 3))
    status, out, _ = script(
        data,
        tmp_path / "labels.csv",
        "--group-col",
        "patient",
        "--img-size",
        16,
        "--split",
        tmp_path / "report/split.csv",
        "--out",
        tmp_path / "again",
    )
    assert status == 0 and rows(tmp_path / "again/split.csv") == rows(tmp_path / "report/split.csv")


def test_a_label_known_only_to_the_test_split_is_named(tmp_path, script):
    draw_classes(tmp_path / "d/train", {"a": 8, "b": 8})
    draw_classes(tmp_path / "d/test", {"a": 3, "c": 3}, start=500)
    assert (
        script(pretrain, "--data", tmp_path / "d", *ARMS, "--epochs", 1, "--out", tmp_path / "run")[
            0
        ]
        == 0
    )
    status, _, err = script(finetune, "--ckpt", tmp_path / "run/cnn.pt")
    assert status == 2 and "no training image has the label c" in one_line(err)


def test_medmnist_from_end_to_end(tmp_path, script):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "m.npz",
        **{
            f"{s}_{k}": v
            for s, n in (("train", 16), ("val", 4), ("test", 6))
            for k, v in (
                ("images", rng.integers(0, 255, (n, 28, 28), np.uint8)),
                ("labels", np.arange(n)[:, None] % 2),
            )
        },
    )
    assert (
        script(
            pretrain,
            "--data",
            tmp_path / "m.npz",
            *ARMS,
            "--epochs",
            1,
            "--bs",
            8,
            "--out",
            tmp_path / "run",
        )[0]
        == 0
    )
    status, _, err = script(
        finetune, "--ckpt", tmp_path / "run/vit.pt", "--frac", 0.5, "--epochs", 1
    )
    assert status == 0, err
    metrics = json.loads((tmp_path / "run/finetune_vit_0.5/metrics.json").read_text())
    assert (metrics["n_labelled"], metrics["n_val"], metrics["n_test"]) == (8, 4, 6)


def test_pretraining_on_a_plain_folder_then_labels_for_some(tmp_path, script):
    """The practitioner's case: all images unlabelled, later a CSV file for some of them."""
    for i in range(30):
        (tmp_path / "all").mkdir(exist_ok=True)
        Image.fromarray(picture(i)).save(tmp_path / f"all/{i}.png")
    assert (
        script(
            pretrain,
            "--data",
            tmp_path / "all",
            *ARMS,
            "--epochs",
            1,
            "--bs",
            8,
            "--out",
            tmp_path / "run",
        )[0]
        == 0
    )
    lines = ["image,label", *(f"{i},{'ab'[i % 2]}" for i in range(30))]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    arguments = [
        "--ckpt",
        tmp_path / "run/cnn.pt",
        "--data",
        tmp_path / "labels.csv",
        "--epochs",
        1,
        "--images",
        tmp_path / "all",
    ]
    status, _, err = script(finetune, *arguments)
    assert status == 2 and "--allow-seen" in one_line(err)
    assert script(finetune, *arguments, "--allow-seen", "--out", tmp_path / "f")[0] == 0
    metrics = json.loads((tmp_path / "f/metrics.json").read_text())
    assert metrics["n_test_seen"] == metrics["n_test"] and metrics["test_without_seen"] is None
    for i in range(30, 60):
        Image.fromarray(picture(i)).save(tmp_path / f"all/{i}.png")
        lines.append(f"{i},{'ab'[i % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    assert script(finetune, *arguments, "--out", tmp_path / "g")[0] == 0
    metrics = json.loads((tmp_path / "g/metrics.json").read_text())
    assert metrics["n_test_seen"] == 0 and metrics["n_test"] == 12
    assert all(int(r["path"].split(".")[0]) >= 30 for r in rows(tmp_path / "g/predictions.csv"))


# bad input


class Bomb:
    def __reduce__(self):
        return open, ("ran", "w")


def spoil(folder):
    (folder / "a/0.png").write_bytes((folder / "a/0.png").read_bytes()[:200])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nothing"], "nothing.*--data"),
        ([], "--data PATH"),
        (["--data", "images", "--cnn", "resnet5O"], "--cnn.*resnet5O.*resnet50"),
        (["--data", "images", "--cnn-kwargs", "num_classes=7"], r"paired.*\(1, 7\).*\(1, 1000\)"),
        (["--data", "images", "--cnn-kwargs", "nonsense=7"], "--cnn test_resnet.*nonsense"),
        (["--data", "images", "--cnn-kwargs", "flag=7"], "--cnn test_resnet.*flag"),
        (["--data", "images", "--init", "imagenet"], "ImageNet.*--init random.*--init-cnn FILE"),
        (["--data", "images", "--init-vit", "nothing.pt"], "nothing.pt"),
        (["--data", "images", "--init-vit", "odd.pt"], "odd.pt: holds no state dict"),
        (["--data", "images", "--epochs", "-1"], "--epochs"),
        (["--data", "images", "--devise", "cpu"], "--devise"),
        (["--data", "images", "--device", "cuda:77"], "--device cuda:77"),
        (["--data", "images", "--t-max", "0"], "--t-max"),
        (["--data", "images", "--lr", "-1"], "--lr"),
        (["--data", "images", "--lr", "nan"], "--lr"),
        (["--data", "images", "--seed", "-1"], "--seed"),
        (["--data", "images", "--vit-kwargs", "patch_size"], "patch_size is no KEY=VALUE"),
        (["--data", "images", "--vit-kwargs", "img_size=64"], "flags of their own"),
        (["--data", "images", "--out", "images/a/1.png"], "--out"),
    ],
)
def test_pretraining_refuses(folder, script, monkeypatch, arguments, message):
    monkeypatch.chdir(folder.parent)
    torch.save({"epoch": 1}, "odd.pt")
    status, _, err = script(pretrain, *ARMS, *arguments)
    assert status == 2
    assert re.search(message, one_line(err)), err


def test_a_side_that_is_empty_or_was_seen_is_refused(pretrained, folder, tmp_path, script):
    own = {r["path"]: r["split"] for r in rows(pretrained / "split.csv")}

    def tune(split):
        lines = [f"{path},{side}" for path, side in split.items()]
        (tmp_path / "own.csv").write_text("\n".join(["path,split", *lines]))
        flags = "--split", tmp_path / "own.csv", "--epochs", 1, "--out", tmp_path / "tuned"
        return script(finetune, "--ckpt", pretrained / "cnn.pt", *flags)

    seen = {k: {"train": "test", "test": "train"}.get(v, v) for k, v in own.items()}
    status, _, err = tune(seen)
    assert status == 2 and "pre-training saw all test images; add new or" in one_line(err)
    few = draw_classes(tmp_path / "few", {"a": 1, "b": 1})
    flags = "--arch", "test_resnet", "--init", "random", "--img-size", 32, "--data", few
    status, _, err = script(finetune, *flags, "--out", tmp_path / "few_tuned")
    assert status == 2 and "2 images leave none for the test split" in one_line(err)


def test_file_names_of_any_bytes(folder, tmp_path, script):
    odd = os.fsencode(folder) + b"/a/M\xfcller.png"
    with open(odd, "wb") as file:
        file.write((folder / "a/1.png").read_bytes())
    status, out, err = script(
        pretrain, "--data", folder, *ARMS, "--epochs", 1, "--out", tmp_path / "run"
    )
    assert status == 0, err
    assert b"a/M\xfcller.png," in (tmp_path / "run/split.csv").read_bytes()


def test_flags_beside_a_checkpoint_count(pretrained, folder, tmp_path, script):
    split = rows(pretrained / "split.csv")
    own = {
        r["path"]: "test" if r["split"] == "val" else "val" if r["split"] == "test" else "train"
        for r in split
    }
    (tmp_path / "own.csv").write_text("path,split\n" + "\n".join(map(",".join, own.items())))
    (folder / "zz.png").write_bytes(b"")
    (folder / "zz.png").rename(folder / "a/zz.png")
    status, _, err = script(
        finetune,
        "--ckpt",
        pretrained / "cnn.pt",
        "--split",
        tmp_path / "own.csv",
        "--multilabel",
        "--epochs",
        1,
    )
    assert status == 0, err
    metrics = json.loads((pretrained / "finetune_cnn_1/metrics.json").read_text())
    assert metrics["multilabel"] and metrics["n_test"] == 3
    status, _, err = script(finetune, "--ckpt", pretrained / "cnn.pt", "--out", tmp_path / "f")
    assert status == 2 and "a/zz.png" in one_line(err)
    assert (
        script(
            finetune,
            "--ckpt",
            pretrained / "cnn.pt",
            "--skip-bad",
            "--epochs",
            1,
            "--out",
            tmp_path / "f",
        )[0]
        == 0
    )
    for flag in (["--seed", 7], ["--init", "random"]):
        status, _, err = script(finetune, "--ckpt", pretrained / "cnn.pt", *flag)
        assert status == 2 and "go with --arch" in one_line(err)


def test_what_a_fine_tuned_model_saw_is_known_too(pretrained, folder, tmp_path, script):
    assert (
        script(finetune, "--ckpt", pretrained / "cnn.pt", "--epochs", 1, "--out", tmp_path / "f")[0]
        == 0
    )
    seen = weights(tmp_path / "f/best.pt")["seen"]
    assert len(seen) == sum(r["split"] != "test" for r in rows(tmp_path / "f/split.csv"))
    again = [
        "--arch",
        "test_resnet",
        "--init",
        pretrained / "cnn.pt",
        "--img-size",
        32,
        "--data",
        folder,
    ]
    assert script(finetune, *again, "--seed", 5, "--epochs", 1, "--out", tmp_path / "g")[0] == 0
    metrics = json.loads((tmp_path / "g/metrics.json").read_text())
    assert metrics["n_test_seen"] == 0 and metrics["n_train"] >= 21
    test = {r["path"] for r in rows(tmp_path / "g/predictions.csv")}
    assert not test & {r["path"] for r in rows(pretrained / "split.csv") if r["split"] == "train"}


def test_unreadable_images_are_named_before_training(folder, tmp_path, script):
    spoil(folder)
    (folder / "b/1.png").write_bytes(b"")
    status, _, err = script(pretrain, "--data", folder, *ARMS, "--out", tmp_path / "run")
    line = one_line(err)
    assert (
        status == 2
        and "2 of 30" in line
        and "a/0.png" in line
        and "b/1.png (an empty file)" in line
    )
    assert not (tmp_path / "run").exists()
    status, out, _ = script(
        pretrain, "--data", folder, *ARMS, "--epochs", 1, "--skip-bad", "--out", tmp_path / "run"
    )
    assert status == 0 and "28 images" in out and "a/0.png" in out


def test_a_finished_run_is_not_overwritten(pretrained, folder, script):
    arguments = ["--data", folder, *ARMS, "--epochs", 1, "--bs", 8, "--out", pretrained]
    before = (pretrained / "cnn.pt").read_bytes()
    status, _, err = script(pretrain, *arguments)
    assert status == 2 and "--overwrite" in one_line(err)
    assert (pretrained / "cnn.pt").read_bytes() == before
    assert script(pretrain, *arguments, "--overwrite")[0] == 0
    assert len((pretrained / "log.jsonl").read_text().splitlines()) == 1
    tune = ["--ckpt", pretrained / "cnn.pt", "--epochs", 1]
    assert script(finetune, *tune)[0] == 0
    status, _, err = script(finetune, *tune)
    assert status == 2 and "--overwrite" in one_line(err)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "no such file"),
        (lambda p: p.write_bytes(b"text"), "c.pt"),
        (lambda p: torch.save({"state_dict": {}, "x": Bomb()}, p), "nothing in it was run"),
        (lambda p: torch.save({"state_dict": {}}, p), "no weights file of"),
        (lambda p: torch.save([1, 2], p), "is no checkpoint"),
    ],
)
def test_foreign_checkpoints_are_refused_and_not_run(tmp_path, script, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "c.pt")
    status, _, err = script(finetune, "--ckpt", tmp_path / "c.pt")
    assert status == 2 and message in one_line(err)
    assert not (tmp_path / "ran").exists()


def test_finetuning_refuses(pretrained, folder, tmp_path, script):
    draw_classes(tmp_path / "one", {"only": 5})
    for arguments, message in (
        (["--data", tmp_path / "one"], "one class"),
        (["--frac", "0.01"], "smallest fraction"),
        (["--frac", "0"], "--frac"),
        (["--img-size", "64"], "--img-size"),
        (["--arch", "resnet18"], "either --ckpt"),
    ):
        status, _, err = script(finetune, "--ckpt", pretrained / "cnn.pt", *arguments)
        assert status == 2 and message in one_line(err), (arguments, err)
    moved = folder.rename(tmp_path / "moved")
    status, _, err = script(finetune, "--ckpt", pretrained / "cnn.pt")
    assert status == 2 and "--data" in one_line(err)
    assert script(finetune, "--ckpt", pretrained / "cnn.pt", "--data", moved, "--epochs", 1)[0] == 0


# the demo, and the owner's commands word for word in processes of their own


def test_mean_colour_tells_nothing_of_the_demo_s_classes():
    kinds = np.arange(400) % 4
    means = np.stack(
        [[draw_demo.cells(k, np.random.default_rng([7, i])).mean()] for i, k in enumerate(kinds)]
    )
    means = (means - means[:200].mean(0)) / means[:200].std(0)
    distance = ((means[200:, None] - means[None, :200]) ** 2).sum(2)
    nearest = kinds[:200][np.argsort(distance, axis=1)[:, :9]]
    votes = np.array([np.bincount(row, minlength=4).argmax() for row in nearest])
    assert (votes == kinds[200:]).mean() < 0.45  # chance is 0.25


def test_the_demo_is_what_its_script_draws():
    with np.load(ROOT / "docs/demo.npz") as file:
        drawn = draw_demo.draw()
        assert file.files == [*drawn]
        assert all((file[name] == array).all() for name, array in drawn.items())


def test_the_owner_s_two_commands(tmp_path, folder, monkeypatch):
    arms = f"{ARMS[1]} {ARMS[3]}".split()
    first = run(
        ROOT / "pretrain.py",
        "--data",
        folder,
        "--epochs",
        "2",
        "--bs",
        "16",
        "--cnn",
        arms[0],
        "--vit",
        arms[1],
        "--img-size",
        "32",
        "--init",
        "random",
        cwd=tmp_path,
    )
    assert first.returncode == 0, first.stderr
    second = run(ROOT / "finetune.py", "--ckpt", "cnn.pt", "--frac", "0.5", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "finetune_cnn_0.5/metrics.json").exists()


def test_weights_that_do_not_say_what_they_saw_are_refused(pretrained, script):
    """As the earliest files are: an image of their training could be drawn for testing."""
    file = pretrained / "cnn.pt"
    weights = torch.load(file, weights_only=True)
    for key in ("split", "seen"):
        torch.save({k: x for k, x in weights.items() if k != key}, file)
        status, _, err = script(finetune, "--ckpt", file, "--epochs", 1)
        assert status == 2 and f"outdated: {key} missing" in one_line(err)


ODD = "--img-size 32 --init random --epochs 1".split()
DISTILLED = "patch_size=16 embed_dim=24 depth=1 num_heads=1".split()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["repvit_m0_9"], "its head changes when it is reset"),
        (
            ["deit_tiny_distilled_patch16_224", "--arch-kwargs", *DISTILLED, "--mode", "linear"],
            "has more than one head",
        ),
        (["test_resnet", "--arch-kwargs", "in_chans=1"], "accepts no images of 3x32x32"),
        (["test_resnet", "--arch-kwargs", "global_pool="], "accepts no images of 3x32x32"),
        (["test_resnet", "--arch-kwargs", "features_only=True"], "that shapes a model"),
        (["test_resnet", "--arch-kwargs", "checkpoint_path=x.pt"], "that shapes a model"),
    ],
)
def test_models_that_cannot_be_used_are_refused_before_training(
    folder, tmp_path, script, arguments, message
):
    out = tmp_path / "out"
    command = ["--data", folder, *ODD, "--out", out, "--arch", *arguments]
    status, _, err = script(finetune, *command)
    assert status == 2 and message in one_line(err), err
    assert not (out / "best.pt").exists() and not (out / "last.pt").exists()
