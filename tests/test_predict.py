"""Predictions, features and the mean of two arms, against what finetune.py wrote, timm and
scikit-learn."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import draw_classes, one_line, picture, rows
from PIL import Image
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

import finetune
import predict
from common.decode import normalize
from common.pixels import decode
from tools import compare

RUN = ["--init", "random", "--epochs", 1, "--amp", "off"]


def probabilities(table, classes="abc"):
    return np.array([[float(row[f"prob_{c}"]) for c in classes] for row in table])


@pytest.fixture
def tuned(folder, tmp_path, script):
    """Two fine-tuned arms on `folder`, of other image sizes: tuned["cnn"] / best.pt ..."""
    runs = {}
    for arm, name, size in (("cnn", "test_resnet", 32), ("vit", "test_vit", 48)):
        runs[arm] = tmp_path / f"run/finetune_{arm}"
        status, _, err = script(
            finetune, "--arch", name, "--img-size", size, "--data", folder, "--out", runs[arm], *RUN
        )
        assert status == 0, err
    return runs


def by_hand(run, files):
    """Logits by timm, Pillow and numpy alone: nothing of ours but the file."""
    weights = torch.load(run / "best.pt", weights_only=True)
    model = timm.create_model(
        weights["arch"],
        num_classes=weights["num_classes"],
        **weights["model_kwargs"],
        checkpoint_path=str(run / "best.pt"),
    )
    model.eval()
    size, images = weights["img_size"], []
    for file in files:
        image = Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        values = (np.asarray(image) / 255 - weights["mean"]) / weights["std"]
        images.append(torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1))
    images = torch.stack(images)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        return model(images), features


def test_predictions_are_those_of_finetune(tuned, folder, tmp_path, script):
    """Of all images, in the order of their names; labels are neither needed nor looked at."""
    plain = tmp_path / "plain/deep/er"
    for i, file in enumerate(sorted(folder.glob("*/*.png"))):
        plain.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, plain / f"{i:02} {file.parent.name}{file.name}")
    for name, path in (("labelled", folder), ("plain", tmp_path / "plain")):
        status, out, err = script(
            predict,
            "--ckpt",
            tuned["cnn"] / "best.pt",
            "--data",
            path,
            "--out",
            tmp_path / f"new/{name}.csv",
        )
        assert status == 0 and "30 images" in out, err
    table, other = (rows(tmp_path / f"new/{name}.csv") for name in ("labelled", "plain"))
    assert list(table[0]) == [
        *("path", "predicted", "prob_a", "prob_b", "prob_c"),
        *("calibrated_a", "calibrated_b", "calibrated_c"),
    ]
    assert [r["path"] for r in table] == sorted(
        f"{f.parent.name}/{f.name}" for f in folder.glob("*/*")
    )
    assert [r["path"] for r in other] == sorted(f"deep/er/{f.name}" for f in plain.iterdir())
    np.testing.assert_array_equal(probabilities(table), probabilities(other))
    tested = {r["path"]: r for r in rows(tuned["cnn"] / "predictions.csv")}
    same = [r for r in table if r["path"] in tested]
    assert len(same) == len(tested) == 6
    for row in same:
        assert row["predicted"] == tested[row["path"]]["predicted"]
    np.testing.assert_allclose(
        probabilities(same), probabilities([tested[r["path"]] for r in same]), atol=1e-6
    )


def test_several_files_are_averaged_each_with_its_own_images(tuned, folder, tmp_path, script):
    weights = torch.load(tuned["vit"] / "best.pt", weights_only=True)
    torch.save({**weights, "mean": [0.5] * 3, "std": [0.4] * 3}, tuned["vit"] / "best.pt")
    status, out, err = script(
        predict,
        "--ckpt",
        *(tuned[a] / "best.pt" for a in ("cnn", "vit")),
        "--data",
        folder,
        "--out",
        tmp_path / "p.csv",
        "--embeddings",
        tmp_path / "e.npz",
    )
    assert status == 0 and "mean of 2 files" in out, err
    table = rows(tmp_path / "p.csv")
    files = [folder / r["path"] for r in table]
    (logits_cnn, features_cnn), (logits_vit, features_vit) = (
        by_hand(tuned[a], files) for a in ("cnn", "vit")
    )
    expected = (logits_cnn.sigmoid() + logits_vit.sigmoid()).numpy() / 2
    np.testing.assert_allclose(probabilities(table), expected, atol=1e-5)
    assert [r["predicted"] for r in table] == ["abc"[i] for i in expected.argmax(1)]
    arrays = np.load(tmp_path / "e.npz")
    assert arrays["paths"].tolist() == [r["path"] for r in table]
    assert arrays["files"].tolist() == [str(tuned[a] / "best.pt") for a in ("cnn", "vit")]
    for name, features in (("embeddings_1", features_cnn), ("embeddings_2", features_vit)):
        assert arrays[name].dtype == np.float32
        np.testing.assert_allclose(arrays[name], features, atol=1e-4)


@pytest.mark.parametrize("arm", ["cnn", "vit"])
def test_best_pt_gives_timm_the_same_logits_without_our_code(tuned, folder, arm):
    files = sorted(folder.glob("*/*.png"))[::5]
    expected, _ = by_hand(tuned[arm], files)
    loaded = predict.load(tuned[arm] / "best.pt")
    assert loaded.class_names == ["a", "b", "c"] and not loaded.model.training
    with torch.no_grad():
        logits = loaded.model(torch.stack([loaded.transform(Image.open(file)) for file in files]))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert expected.std() > 1e-3


def test_the_transform_is_to_the_bit_that_of_training(tuned, tmp_path):
    transform = predict.load(tuned["vit"] / "best.pt").transform
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    colour = Image.fromarray(picture(3, (90, 50)))
    colour.save(tmp_path / "turned.jpg", exif=exif)
    colour.convert("RGBA").rotate(30).save(tmp_path / "clear.png")
    Image.fromarray(picture(4)[..., 0].astype(np.uint16) * 200).save(tmp_path / "grey16.png")
    colour.quantize(8).save(tmp_path / "palette.gif", save_all=True, append_images=[colour])
    for name in ("turned.jpg", "clear.png", "grey16.png", "palette.gif"):
        pixels, _ = decode(str(tmp_path / name), 48)
        with Image.open(tmp_path / name) as image:
            assert torch.equal(transform(image), normalize(torch.from_numpy(pixels)))


def test_neither_batch_nor_workers_nor_cache_change_the_numbers(tuned, folder, tmp_path, script):
    variants = ["--bs 1", "--bs 32", "--bs 7 --workers 1", "--bs 7 --no-cache"]
    for i, flags in enumerate(variants):
        assert (
            script(
                predict,
                "--ckpt",
                *(tuned[a] / "best.pt" for a in ("cnn", "vit")),
                "--data",
                folder,
                "--out",
                tmp_path / f"{i}.csv",
                "--embeddings",
                tmp_path / f"{i}.npz",
                *flags.split(),
            )[0]
            == 0
        )
    first = rows(tmp_path / "0.csv")
    for i in range(1, len(variants)):
        table = rows(tmp_path / f"{i}.csv")
        assert [r["path"] for r in table] == [r["path"] for r in first]
        np.testing.assert_allclose(probabilities(table), probabilities(first), atol=1e-5)
        np.testing.assert_allclose(
            np.load(tmp_path / f"{i}.npz")["embeddings_2"],
            np.load(tmp_path / "0.npz")["embeddings_2"],
            atol=1e-4,
        )


def test_a_bad_image(tuned, folder, tmp_path, script):
    (folder / "a/0.png").write_bytes(b"no image")
    arguments = [
        "--ckpt",
        *(tuned[a] / "best.pt" for a in ("cnn", "vit")),
        "--data",
        folder,
        "--out",
        tmp_path / "p/p.csv",
    ]
    status, _, err = script(predict, *arguments)
    assert status == 2 and "a/0.png" in one_line(err) and "--skip-bad" in one_line(err)
    assert not list((tmp_path / "p").iterdir())
    status, out, err = script(predict, *arguments, "--skip-bad")
    assert status == 0 and "a/0.png" in out, err
    table = rows(tmp_path / "p/p.csv")
    (folder / "a/0.png").unlink()
    assert [r["path"] for r in table] == sorted(
        f"{f.parent.name}/{f.name}" for f in folder.glob("*/*")
    )
    logits = [by_hand(tuned[a], [folder / r["path"] for r in table])[0] for a in ("cnn", "vit")]
    expected = sum(x.sigmoid() for x in logits) / 2
    np.testing.assert_allclose(probabilities(table), expected, atol=1e-5)


def test_csv_files_and_arrays_without_labels(tuned, folder, tmp_path, script):
    """A CSV keeps its order and its repeated rows, whatever its other columns hold; a .npz file
    needs no labels."""
    names = [f"{c}/{i}.png" for i in (3, 0, 5) for c in "cab"]
    (tmp_path / "d.csv").write_text(
        "image,label,label2\n"
        + "".join(f"{name},,{i}\n" for i, name in enumerate([*names, *names[:2]]))
    )
    np.savez(
        tmp_path / "d.npz",
        test_images=np.stack([np.asarray(Image.open(folder / n)) for n in names]),
    )
    for kind, more in (("csv", ["--images", folder]), ("npz", [])):
        status, _, err = script(
            predict,
            "--ckpt",
            tuned["vit"] / "best.pt",
            "--data",
            tmp_path / f"d.{kind}",
            *more,
            "--out",
            tmp_path / f"{kind}.out",
        )
        assert status == 0, err
    table = rows(tmp_path / "csv.out")
    assert [r["path"] for r in table] == [*names, *names[:2]] and table[9:] == table[:2]
    assert [r["path"] for r in rows(tmp_path / "npz.out")] == [f"test/{i}" for i in range(9)]
    np.testing.assert_array_equal(
        probabilities(table[:9]), probabilities(rows(tmp_path / "npz.out"))
    )


def test_folders_named_as_splits_are_but_folders(tuned, folder, tmp_path, script):
    for name in ("train/x.png", "test/x.png", "x.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "a/1.png", tmp_path / "d" / name)
    status, _, err = script(
        predict,
        "--ckpt",
        tuned["vit"] / "best.pt",
        "--data",
        tmp_path / "d",
        "--out",
        tmp_path / "p.csv",
    )
    assert status == 0, err
    assert [r["path"] for r in rows(tmp_path / "p.csv")] == ["test/x.png", "train/x.png", "x.png"]


def test_pretrained_arms_give_features_alone(pretrained, folder, tmp_path, script):
    status, _, err = script(
        predict, "--ckpt", pretrained / "cnn.pt", "--data", folder, "--out", tmp_path / "p.csv"
    )
    assert status == 2 and "no classes" in one_line(err) and "--embeddings" in one_line(err)
    status, _, err = script(
        predict,
        "--ckpt",
        pretrained / "cnn.pt",
        "--data",
        folder,
        "--embeddings",
        tmp_path / "e.npz",
    )
    assert status == 0 and not (tmp_path / "p.csv").exists(), err
    arrays = np.load(tmp_path / "e.npz")
    assert set(arrays.files) == {"embeddings", "paths"}
    shutil.copy(pretrained / "cnn.pt", tmp_path / "best.pt")
    _, features = by_hand(tmp_path, [folder / name for name in arrays["paths"]])
    np.testing.assert_allclose(arrays["embeddings"], features, atol=1e-4)


def test_predict_refuses(tuned, folder, tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = torch.load(tuned["vit"] / "best.pt", weights_only=True)
    torch.save({**weights, "class_names": ["b", "a", "c"]}, "other.pt")
    torch.save({**weights, "multilabel": True}, "several.pt")
    torch.save({**weights, "arch": "test_resnet"}, "misfit.pt")
    (tmp_path / "there.csv").write_text("mine")
    best, out = tuned["vit"] / "best.pt", ["--out", "p.csv"]
    for ckpt, more, message in (
        ([best, "other.pt"], out, "other.pt: has the classes b, a, c"),
        ([best, "several.pt"], out, "several.pt: predicts several labels"),
        (["misfit.pt"], out, "misfit.pt: its weights do not fit test_resnet"),
        (["nothing.pt"], out, "nothing.pt: there is no such file"),
        ([tmp_path / "there.csv"], out, "there.csv"),
        ([best], [], "--out FILE, --embeddings FILE"),
        ([best], ["--out", "x", "--embeddings", "x"], "same file"),
        ([best], ["--out", "there.csv"], "there.csv: is there already"),
        ([best], ["--out", "images"], "images: is a folder"),
        ([best], ["--out", "there.csv/p.csv"], "there.csv: is not a folder"),
        ([best], [*out, "--data", "nothing"], "nothing: there is no such"),
    ):
        status, _, err = script(predict, "--ckpt", *ckpt, "--data", folder, *more)
        assert status == 2 and message in one_line(err), (message, err)
    assert (tmp_path / "there.csv").read_text() == "mine" and not (tmp_path / "p.csv").exists()
    assert (
        script(predict, "--ckpt", best, "--data", folder, "--out", "there.csv", "--overwrite")[0]
        == 0
    )
    assert len(rows(tmp_path / "there.csv")) == 30


# both arms in one go, and two runs compared


def expected_scores(true, p):
    predicted, how = p.argmax(1), {"labels": [0, 1, 2], "zero_division": 0}
    return {
        "macro_f1": f1_score(true, predicted, average="macro", **how),
        "micro_f1": f1_score(true, predicted, average="micro", **how),
        "balanced_accuracy": balanced_accuracy_score(true, predicted),
        "auroc": np.mean([roc_auc_score(true == c, p[:, c]) for c in range(3)]),
    }


def test_both_arms_and_their_mean(pretrained, tmp_path, script, monkeypatch):
    """As each arm alone, and the mean against scikit-learn; resumed, predicted and compared."""
    cnn, vit = pretrained / "cnn.pt", pretrained / "vit.pt"
    both = ["--ckpt", cnn, vit, "--epochs", 2, "--seeds", 0, 1]
    status, out, err = script(finetune, *both)
    assert status == 0 and "mean of cnn and vit, seed 1" in out, err
    folder = pretrained / "finetune_cnn_vit_1"
    for arm, ckpt in (("cnn", cnn), ("vit", vit)):
        alone = tmp_path / arm
        assert (
            script(finetune, "--ckpt", ckpt, "--epochs", 2, "--seeds", 0, 1, "--out", alone)[0] == 0
        )
        for seed in ("seed0", "seed1"):
            for name in ("predictions.csv", "confusion.csv", "split.csv"):
                text = (folder / arm / seed / name).read_text()
                assert text == (alone / seed / name).read_text(), (arm, seed, name)
        assert (folder / arm / "summary.json").read_text() == (alone / "summary.json").read_text()
    for seed in (0, 1):
        tables = [rows(folder / arm / f"seed{seed}/predictions.csv") for arm in ("cnn", "vit")]
        true = np.array(["abc".index(r["path"][0]) for r in tables[0]])
        mean = sum(map(probabilities, tables)) / 2
        written = rows(folder / f"mean/seed{seed}/predictions.csv")
        np.testing.assert_allclose(probabilities(written), mean, atol=1e-7)
        metrics = json.loads((folder / f"mean/seed{seed}/metrics.json").read_text())
        assert metrics["arm"] == "mean of cnn and vit" and metrics["n_labelled"] == 21
        for key, value in expected_scores(true, mean).items():
            assert metrics["test"][key] == pytest.approx(value), key
    scores = json.loads((folder / "mean/summary.json").read_text())["metrics"]["macro_f1"]
    assert f"{scores['mean']:.4f} ± {scores['std']:.4f}" in out
    (folder / "vit/seed1/metrics.json").unlink()
    status, again, err = script(finetune, *both, "--resume")
    assert status == 0 and again.count("is finished") == 3, err
    assert (folder / "vit/seed1/metrics.json").exists()
    files = [folder / arm / "seed1/best.pt" for arm in ("cnn", "vit")]
    data = ["--data", pretrained.parent / "images", "--amp", "auto"]
    assert script(predict, "--ckpt", *files, *data, "--out", tmp_path / "p.csv")[0] == 0
    new = {r["path"]: r for r in rows(tmp_path / "p.csv")}
    for row in written:
        for kind in ("prob", "calibrated"):
            ours = [float(new[row["path"]][f"{kind}_{c}"]) for c in "abc"]
            assert ours == pytest.approx([float(row[f"{kind}_{c}"]) for c in "abc"], abs=1e-6)
        assert sum(ours) == pytest.approx(1, abs=1e-5)


def test_arms_that_are_not_of_one_pretraining_are_refused(pretrained, tuned, tmp_path, script):
    cnn, vit = pretrained / "cnn.pt", pretrained / "vit.pt"
    weights = torch.load(vit, weights_only=True)
    torch.save({**weights, "seed": 1}, tmp_path / "other.pt")
    torch.save({**weights, "split": weights["split"][:, 1:]}, tmp_path / "split.pt")
    for files in ([cnn, cnn], [cnn, tmp_path / "other.pt"], [cnn, tmp_path / "split.pt"]):
        status, _, err = script(finetune, "--ckpt", *files, "--epochs", 1)
        assert status == 2 and "are not the arms of one pre-training" in one_line(err)
    assert not list(pretrained.glob("finetune_cnn_*"))


def test_compare_against_scikit_learn(tmp_path, script):
    """A given test split with copies of training images; two seeds; an arm that saw some of it."""
    d = tmp_path / "d"
    alike = {"tints": (0, 9, 18)}  # so that some are wrong
    draw_classes(d / "train", {"a": 12, "b": 12, "c": 12}, **alike)
    draw_classes(d / "test", {"a": 12, "b": 12, "c": 12}, start=500, **alike)
    for c in "abc":
        (d / f"test/{c}/copy.png").write_bytes((d / f"train/{c}/0.png").read_bytes())
    more = ["--data", d, *RUN, "--out"]
    assert (
        script(finetune, "--arch", "test_vit", "--img-size", 32, *more, tmp_path / "start")[0] == 0
    )
    start = torch.load(tmp_path / "start/best.pt", weights_only=True)
    hashes = [decode(str(d / f"test/{c}/1.png"), 32)[1]["hash"] for c in "abc"]
    start["seen"] = torch.from_numpy(np.array(hashes, "u8").view("int64"))
    torch.save(start, tmp_path / "saw.pt")
    runs = [tmp_path / "finetune_cnn", tmp_path / "finetune_vit"]
    arch = ["--arch", "test_resnet", "--img-size", 32, "--init", "random"]
    for run, flags in zip(runs, (arch, ["--ckpt", tmp_path / "saw.pt"])):
        words = [*flags, "--data", d, "--frac", 0.6, "--epochs", 9, "--seeds", 0, 1, "--out", run]
        assert script(finetune, *words)[0] == 0
    status, out, err = script(compare, *runs, "--out", tmp_path / "c.json")
    assert status == 0, err
    found, seeds = json.loads((tmp_path / "c.json").read_text()), {"a": [], "b": [], "mean": []}
    for s in (0, 1):
        tables = [rows(run / f"seed{s}/predictions.csv") for run in runs]
        copied = np.array(["copy" in r["path"] for r in tables[0]])
        seen = np.array([r["path"].endswith("/1.png") for r in tables[0]])
        true = np.array(["abc".index(r["path"].split("/")[1]) for r in tables[0]])
        each = [probabilities(t) for t in tables]
        for name, p in zip(seeds, (*each, sum(each) / 2)):
            seeds[name].append(p)
    parts = (("test", copied | True), ("test_without_duplicates", ~copied))
    for part, mask in (*parts, ("test_without_seen", ~seen)):
        assert found[part]["n"] == found[part]["n_units"] == mask.sum()
        for name, ps in seeds.items():
            expected = [expected_scores(true[mask], p[mask]) for p in ps]
            for key in expected[0]:
                value = found[part]["scores"][key][name]
                assert value == pytest.approx(np.mean([x[key] for x in expected])), (part, key)
        row = found[part]["scores"]["micro_f1"]
        assert row["difference"] == pytest.approx(row["b"] - row["a"])
        right = [[p[mask].argmax(1) == true[mask] for p in seeds[name]] for name in "ab"]
        for test, a, b in zip(found[part]["mcnemar"], *right):
            assert (test["only_a"], test["only_b"]) == ((a & ~b).sum(), (b & ~a).sum())
        gains = np.mean([b * 1.0 - a for a, b in zip(*right)], 0)  # of each image
        draws = np.random.default_rng(1).integers(0, len(gains), (4000, len(gains)))
        reach = stats.norm.cdf(-stats.t.ppf(0.975, len(gains) - 1) * (1 + 1 / len(gains)) ** 0.5)
        limits = np.quantile(gains[draws].mean(1), [reach, 1 - reach])
        assert row["ci95"] == pytest.approx(limits, abs=0.04)
        verdict = "better" if limits[0] > 0 else "worse" if limits[1] < 0 else ""
        assert row["verdict"] == verdict or min(abs(limits)) < 0.04
    assert "36 images" in out and "39 images" in out and "B alone: McNemar's p" in out


def test_compare_refuses(tuned, tmp_path, script):
    cnn, vit = tuned["cnn"], tuned["vit"]
    before = (vit / "predictions.csv").read_text()
    lines = before.splitlines(keepends=True)
    label = lines[1].split(",")[1]
    other = lines[1].replace(f",{label},", f",{'b' if label != 'b' else 'c'},", 1)
    not_those = "its test images, their labels or groups are not those of"
    old = [",".join(line.strip().split(",")[:-1]) + "\n" for line in lines]
    for text, message in (
        (lines[0] + other + "".join(lines[2:]), not_those),
        (lines[0] + "x" + "".join(lines[1:]), not_those),
        ("".join(lines[:-1]), "does not fit the metrics.json"),
        (before.replace(",0,0,", ",0,1,"), "does not fit"),
        ("".join(old), "of an earlier version"),
        (None, "--resume"),
    ):
        (vit / "predictions.csv").write_text(text) if text else (vit / "predictions.csv").unlink()
        status, _, err = script(compare, cnn, vit)
        assert status == 2 and message in one_line(err), (message, err)
    status, _, err = script(finetune, "--resume", "--out", vit)  # the way out that was named
    assert status == 0 and (vit / "predictions.csv").read_text() == before, err
    shutil.copytree(vit, tmp_path / "several/seed0")
    metrics = json.loads((cnn / "metrics.json").read_text())
    for runs, message in (
        ([cnn], "RUN_B"),
        ([cnn, tmp_path / "nothing"], "nothing: holds no finished run"),
        ([cnn, tmp_path / "several"], "its seeds are not those of"),
    ):
        status, _, err = script(compare, *runs)
        assert status == 2 and message in one_line(err), (message, err)
    (cnn / "metrics.json").write_text(json.dumps({**metrics, "multilabel": True}))
    status, _, err = script(compare, cnn, vit)
    assert status == 2 and not_those in one_line(err)
    (cnn / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "c.json").write_text("mine")
    status, _, err = script(compare, cnn, vit, "--out", tmp_path / "c.json")
    assert status == 2 and "--overwrite" in one_line(err)
    assert (tmp_path / "c.json").read_text() == "mine"
    assert script(compare, cnn, vit, "--out", tmp_path / "c.json", "--overwrite")[0] == 0
    status, out, _ = script(compare, cnn, cnn)
    assert status == 0 and "better" not in out and "worse" not in out


def test_images_of_one_patient_are_resampled_together(folder, tmp_path, script):
    """Five images each; predictions.csv numbers the patients, metrics.json counts them."""
    files = sorted(str(p.relative_to(folder)) for p in folder.glob("*/*.png"))
    lines = [f"{name},{name[0]},p{i // 5}" for i, name in enumerate(files)]
    (tmp_path / "t.csv").write_text("image,label,patient\n" + "\n".join(lines))
    words = ["--data", tmp_path / "t.csv", "--images", folder, "--group-by", "patient"]
    arch = ["--arch", "test_resnet", "--img-size", 32, "--init", "random", "--mode", "knn"]
    whole = {name: f"p{i // 5}" for i, name in enumerate(files)}
    status, _, err = script(finetune, *arch, *words, "--out", tmp_path / "run")
    assert status == 0, err
    table = rows(tmp_path / "run/predictions.csv")
    pairs = {(whole[r["path"]], r["group"]) for r in table}
    patients = {patient for patient, _ in pairs}
    assert len(pairs) == len(patients) == len({group for _, group in pairs}) < len(table)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["test"]["n_units"] == len(patients) and metrics["test"]["n"] == len(table)
