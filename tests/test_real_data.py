"""Images and labels as they really come: said or asked, never guessed."""

import csv
import json
import shlex

import draw_demo
import numpy as np
import pytest
from conftest import ARMS, ROOT, one_line
from PIL import Image
from test_readers import labels_of, save

import data
import finetune
import pretrain
from common import splits
from common.cli import UserError
from common.readers import read

NAMES = [f"i{i}" for i in range(6)]


@pytest.fixture
def make(tmp_path):
    """make({name of a CSV file: text}, images) -> the folder."""

    def make(files=(), images=tuple(f"{name}.png" for name in NAMES)):
        for i, name in enumerate(images):
            save(tmp_path / name, i)
        for name, text in dict(files).items():
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return make


def rows(*cells, head="image,label"):
    return "\n".join([head, *(f"{name},{cell}" for name, cell in zip(NAMES, cells))]) + "\n"


def of(folder, text="", **flags):
    if text:
        (folder / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(str(folder / "t.csv"), **flags)


def told(images):
    return "\n".join(images.notes)


# cells


@pytest.mark.parametrize("blank", ["", "nan", "NA", "N/A", "null"])
def test_a_cell_without_a_label_is_an_image_without_a_label(make, blank):
    images = of(make(), rows("a", blank, "b", blank, "a", "b"))
    assert images.classes == ["a", "b"] and not images.multilabel
    assert images.labelled.tolist() == [True, False] * 2 + [True, True]
    assert not images.labels[~images.labelled].any()


@pytest.mark.parametrize(
    "cells, classes, note",
    [
        (("Benign", "benign", "Benign", "x", "x", "X"), ["Benign", "x"], "X = x, benign = Benign"),
        (("0", "0.0", "1", "1.00", "0", "1"), ["0", "1"], "0.0 = 0, 1.00 = 1"),
        (("True", "TRUE", "False", "true", "True", "False"), ["False", "True"], "TRUE = True"),
        (("10", "9", "2", "2", "9", "10"), ["2", "9", "10"], ""),
    ],
)
def test_spellings_of_one_class(make, cells, classes, note):
    images = of(make(), rows(*cells))
    assert images.classes == classes and note in told(images)
    assert (images.labels.sum(1) == 1).all()


FINDINGS = "image,No Finding,Mass,Nodule\n" + "".join(
    f"i{i},{cells}\n"
    for i, cells in enumerate(("1,,", "0,1.0,-1", "0,,1", "0,True,0", ",,", "1,0,1"))
)


@pytest.mark.parametrize("policy, mass", [("negative", [1, 3]), ("positive", [1, 3])])
def test_uncertain_and_unmentioned_findings(make, policy, mass):
    images = of(make(), FINDINGS, uncertain=policy)
    mine = dict(zip(images.classes, images.labels.T))
    assert images.multilabel and np.flatnonzero(mine["Mass"]).tolist() == mass
    assert mine["Nodule"][1] == (policy == "positive")
    assert images.labelled.tolist() == [True] * 4 + [False, True]  # nothing at all is said
    assert "1 labels are -1, 3 blank" in told(images) and "1 images have No Finding" in told(images)


def test_uncertain_images_can_be_left_without_a_label(make):
    images = of(make(), FINDINGS, uncertain="skip")
    assert images.labelled.tolist() == [True, False, True, True, False, True]


def test_a_policy_is_asked_for(make):
    with pytest.raises(UserError, match="1 labels are -1, 3 blank; give --uncertain negative or"):
        of(make(), FINDINGS)
    with pytest.raises(UserError, match="1 of 6 rows are not 0, 1 or -1 in Mass: line 3: 2"):
        of(make(), FINDINGS.replace("1.0", "2"), label_col=["Mass", "Nodule"])


def test_a_row_per_finding(make):
    text = "image,label\ni0,mass\ni0,nodule\ni1,mass\ni2,clear\ni1,mass\n"
    with pytest.raises(UserError, match="1 of 5 rows contradict.*--multilabel: line 3: i0.png"):
        of(make(), text)
    images = of(make(), text, multilabel=True)
    assert labels_of(images) == {
        "i0.png": ["mass", "nodule"],
        "i1.png": ["mass"],
        "i2.png": ["clear"],
    }
    assert images.rows.tolist() == [0, 0, 1, 2, 1] and "2 rows repeat" in told(images)


def test_lists_as_python_prints_them(make):
    cells = ("\"['a', 'b']\"", "['a']", "['b']", "[]", "['a']", "['b']")
    images = of(make(), rows(*cells), uncertain="negative")
    assert images.classes == ["a", "b"] and images.labels[0].all() and not images.labels[3].any()


@pytest.mark.parametrize(
    "cells, message",
    [
        (("0.31", "0.2", "1.5", "3", "3", "0.2") * 2, "label has 4 different texts in 12 rows"),
        (range(10, 22), "label has 12 different texts in 12 rows, such as 19, 20, 21; no classes"),
    ],
)
def test_columns_that_are_no_classes(make, cells, message):
    folder = make(images=[f"i{i}.png" for i in range(12)])
    text = "image,label\n" + "".join(f"i{i},{cell}\n" for i, cell in enumerate(cells))
    with pytest.raises(UserError, match=message):
        of(folder, text)


# columns


@pytest.mark.parametrize("column", ["split", "Partition", "set"])
def test_a_column_of_splits_is_asked_for(make, column):
    cells = ("a,train", "b,test", "a,Training", "b,train", "a,test", "b,val")
    text = rows(*cells, head=f"image,label,{column}")
    with pytest.raises(UserError, match=f"column {column} names splits; give --split '{column}'"):
        of(make(), text)
    images = of(make(), text, split=column)
    assert images.given.tolist() == ["train", "test", "train", "train", "test", "val"]
    assert (of(make(), text, split="none").given == "").all()
    with pytest.raises(UserError, match="1 of 6 rows name neither train, val nor test: line 2: x"):
        of(make(), text.replace("a,train", "a,x"), split=column)


def test_a_column_like_patients_is_named_with_what_the_split_parts(folder, tmp_path, script):
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    lines = [f"{n},{n[0]},p{i % 7},{i}" for i, n in enumerate(names)]
    (tmp_path / "t.csv").write_text("\n".join(["image,dx,Patient ID,age", *lines]))
    flags = tmp_path / "t.csv", "--labels", folder, "--label-col", "dx", "--img-size", 16
    status, out, err = script(data, *flags)
    assert status == 0, err
    assert "column Patient ID is not used: 7 texts, of which the split parts " in out
    assert "columns that are not used: age" in out
    status, out, _ = script(data, *flags, "--group-by", "Patient ID")
    assert status == 0 and "7 groups" in out and "is not used: 7" not in out
    for column in ("Patient Age", "patient_sex", "study_date"):
        (tmp_path / "t.csv").write_text("\n".join([f"image,dx,{column},n", *lines]))
        assert "are these patients" not in script(data, *flags)[1]


@pytest.mark.parametrize("pattern, n", [(r"p(\d+)_", 3), ("2", 2), (r"^(\w+)/.*_(\d)", 4)])
def test_groups_by_a_pattern_on_the_path(make, pattern, n):
    folder = make(images=[f"{c}/x{i % 2}/p{i % 3}_{i % 2}.png" for c in "ab" for i in range(6)])
    images = read(str(folder), group_col=pattern, label_col=["1"])
    assert len(set(images.groups)) == n and f"{n} groups, " in told(images)
    with pytest.raises(UserError, match=r"--group-by q\(: no column, nor a regular expression"):
        read(str(folder), group_col="q(")
    with pytest.raises(
        UserError, match="--group-by q: no column, and found in 0 of 12 paths, not in a/x0/p0_0.png"
    ):
        read(str(folder), group_col="q")


def test_one_group_leaves_nothing_to_test_on(make, script):
    make({"t.csv": rows(*("a,p", "b,p") * 3, head="image,label,patient")})
    _, out, _ = script(data, make() / "t.csv", "--group-by", "patient", "--img-size", 16)
    assert "drawn for test: none, too few" in out


# CSV files as programs write them

PLAIN = rows(*"abab", head="image,label")


@pytest.mark.parametrize(
    "text",
    [
        ",image,label\n0,i0.png,a\n1,i1.png,b\n2,i2.png,a\n3,i3.png,b\n",
        "image,label,\ni0.png,a,\ni1.png,b,\ni2.png,a,\ni3.png,b\n",
        "image,label,,,\ni0,a,,,\ni1,b,,,\ni2,a,,,\ni3,b,,,\n",
        "sep=;\nimage;label\ni0;a\ni1;b\ni2;a\ni3;b\n",
        '"sep=|"\r\nimage|label\r\ni0|a\r\ni1|b\r\ni2|a\r\ni3|b\r\n',
        PLAIN.encode("utf-16"),
        "image,label\n i0.png,a\n./i1.png, b\nI2.PNG,a\ni3.jpeg,b\n",
        "image,label\nC:\\x\\y\\i0.png,a\nC:\\x\\y\\i1.png,b\nC:\\x\\y\\i2.png,a\nC:\\x\\y\\i3,b\n",
        "image,label\n/home/me/i0.png,a\n/home/me/i1.png,b\n/home/me/i2.png,a\n/home/me/i3.png,b\n",
    ],
)
def test_dialects(make, text):
    images = of(make(), text)
    assert labels_of(images) == {f"i{i}.png": ["ab"[i % 2]] for i in range(4)}


@pytest.mark.parametrize(
    "text, message",
    [
        ("i0.png,a\ni1.png,b\n", "line 1 names an image, i0.png: put column names above it"),
        ("i0,a\ni1,b\ni2,a\n", "line 1 names an image, i0: put column names"),
        ("image,label\ni0,a\ni1,b,c\n", "1 of 2 rows need 2 cells: line 3: 3"),
        ('image,label\ni0,"' + "x" * 200_000 + '"\n', "is no CSV file.*field larger"),
        ("image,label\nc/train/i0,a\nc/train/i1,b\n", "2 of 2 rows name no image"),
        ("image,label\ntest/i0,a\ntest/i1,b\n", "2 of 2 rows name no image"),  # no other i0
    ],
)
def test_tables_that_are_refused(make, text, message):
    with pytest.raises(UserError, match=message):
        of(make(), text)


def test_what_is_read_otherwise_than_written_is_said(make):
    folder = make(images=["e\u0301.png", "a/u\u0308.JPG", "b.png"])
    images = of(folder, "image,label\n\u00e9.png,x\nu\u0308.jpeg,y\nb.png,x\n")
    assert set(images.names) == {"e\u0301.png", "a/u\u0308.JPG", "b.png"}
    assert "differ from their file: \u00e9.png = e\u0301.png, u\u0308.jpeg = a/u\u0308.JPG" in told(
        images
    )
    images = of(make(), rows("gr\u00fcn", "rot", "gr\u00fcn").encode("cp1252"))
    assert images.classes == ["gr\u00fcn", "rot"] and "Windows-1252" in told(images)


def test_missing_images_can_be_left_out(make):
    text = rows(*"ababab") + "gone,a\nlost,b\n"
    with pytest.raises(UserError, match="2 of 8 rows name no image.*--skip-bad"):
        of(make(), text)
    images = of(make(), text, skip_bad=True)
    assert len(images) == 6 and "no such image: gone, lost" in told(images)


def test_predictions_keep_the_rows_of_the_file(make):
    images = of(make(), "image\ni2\ni0\ni2\ni1\n", label_col=["none"])
    assert [images.names[i] for i in images.rows] == ["i2.png", "i0.png", "i2.png", "i1.png"]
    images.keep(np.array([True, False, True]))
    assert [images.names[i] for i in images.rows] == ["i2.png", "i2.png", "i1.png"]


# folders


def test_masks_and_thumbnails_are_no_images(make):
    names = [f"{c}/{c} ({i}).png" for c in ("benign", "normal") for i in range(3)]
    masks = ["benign/benign (1)_mask.png", "benign/benign (1)_mask_1.png", "normal/@eaDir/x.png"]
    masks += ["masks/1.png", "thumbnails/1.jpg", "normal/Thumbs.png", "preview.png"]
    folder = make(images=names + masks)
    images = read(str(folder))
    assert images.names == sorted(names) and images.classes == ["benign", "normal"]
    assert "masks, thumbnails and the like: benign/benign (1)_mask.png" in told(images)
    assert "and 4 more" in told(images)


def test_masks_alone_are_images(make):
    assert len(read(str(make(images=["masks/1.png", "masks/2.png"])))) == 2


@pytest.mark.parametrize(
    "names, note",
    [
        (
            ["a/1.png", "b/1.png", "c.png"],
            "not directly inside a class folder: c.png; --class-depth",
        ),
        (
            ["s/p/a/1.png", "s/p/b/1.png"],
            "not directly inside a class folder: s/p/a/1.png, s/p/b/1.png",
        ),
        (["a/1.png", "a/2.png"], "all images are in one folder, a"),
    ],
)
def test_no_labels_says_why(make, names, note):
    images = read(str(make(images=names)))
    assert not images.classes
    import re

    assert re.search(note, told(images)), told(images)


@pytest.mark.parametrize(
    "names, message",
    [
        (["x/train/a/1.png", "x/test/b/1.png"], "x/.*a folder named like a split, further down"),
        (["train/a/1.png", "held/b/1.png"], "there is train alone"),
        (["test/a/1.png", "test/b/1.png"], "there is test alone"),
    ],
)
def test_a_test_folder_is_not_trained_on(make, names, message):
    folder = str(make(images=names))
    with pytest.raises(UserError, match=message):
        read(folder)
    assert len(read(folder, label_col=["none"])) == 2


@pytest.mark.parametrize("level", ["3", r"/(ben|mal)[^/]*/[^/]+$"])
def test_classes_deeper_down(make, level):
    names = [f"s{s}/p{p}/{c}/1.png" for s in range(2) for p in range(2) for c in ("ben", "mal")]
    images = read(str(make(images=names)), label_col=[level])
    assert images.classes == ["ben", "mal"] and images.labels.sum(0).tolist() == [4, 4]


# images without labels


def few_labels(folder, n=9):
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    return names, [f"{name},{'xy'[i % 2]}" for i, name in enumerate(names[:n])]


def test_the_labels_of_a_folder(folder, tmp_path):
    names, lines = few_labels(folder)
    (tmp_path / "few.csv").write_text("\n".join(["image,label", *lines]))
    images = read(str(folder), images=str(tmp_path / "few.csv"))
    assert sorted(images.names) == names and images.labelled.sum() == 9
    assert images.classes == ["x", "y"] and not images.multilabel and len(images) == len(names)
    images = read(str(tmp_path / "few.csv"), images=str(folder))
    assert images.names == names[:9]
    with pytest.raises(UserError, match="need a CSV file"):
        read(str(folder), images=str(folder))


def test_only_labelled_images_are_drawn_for_testing(folder, tmp_path):
    names, lines = few_labels(folder, 20)
    (tmp_path / "few.csv").write_text(
        "\n".join(["image,label,pid", *(f"{x},p{i // 2}" for i, x in enumerate(lines))])
    )
    for groups in (None, "pid"):
        images = read(str(folder), images=str(tmp_path / "few.csv"), group_col=groups)
        images.decode(16, None)
        split = data.split_and_report(images, seed=3)
        assert (split[~images.labelled] == "train").all() and len(split) == len(names)
        drawn = [(split[images.labelled] == side).sum() for side in ("train", "val", "test")]
        assert sum(drawn) == 20 and abs(drawn[2] - 4) <= 1 and drawn[1] >= 1


def test_an_image_without_a_label_beside_a_test_image_is_left_out(folder, tmp_path, capsys):
    names, _ = few_labels(folder)
    lines = [f"{n},{'xy'[i // 2 % 2] if i % 2 else ''},p{i // 2}" for i, n in enumerate(names)]
    (tmp_path / "t.csv").write_text("\n".join(["image,label,pid", *lines]))
    images = read(str(tmp_path / "t.csv"), images=str(folder), group_col="pid")
    images.decode(16, None)
    split = data.split_and_report(images, seed=0)
    away = set(images.groups[split != "train"])
    assert away and not away & set(images.groups[split == "train"])
    assert images.labelled[split != "train"].all() and "left out without a label beside" in told(
        images
    )


def test_images_of_one_colour_do_not_break_the_report(tmp_path, script):
    for i in range(12):
        path = tmp_path / f"d/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9), i).save(path)
    assert script(data, tmp_path / "d", "--img-size", 16)[0] == 0


@pytest.mark.parametrize("table", ["few", "all"])
def test_the_recipes_for_a_few_labels(folder, tmp_path, table, script, monkeypatch):
    """The README's lines; only the sizes are tiny."""
    monkeypatch.chdir(tmp_path)
    names, lines = few_labels(folder, 20)
    (tmp_path / "few.csv").write_text("\n".join(["image,label", *lines]))
    lines = [f"images/{x}" for x in lines] + [f"images/{name}," for name in names[20:]]
    (tmp_path / "all.csv").write_text("\n".join(["image,label", *lines]))
    readme = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in readme if f" {table}.csv" in line or f" {table}/cnn.pt" in line]
    commands = [shlex.split(line) for line in commands if line.startswith("python ")]
    tiny = ["--epochs", "1", *ARMS, "--cnn-kwargs", "--vit-kwargs"], ["--epochs", "1"]
    for words, more in zip(commands, tiny):
        words = [str(folder) if word == "/path" else word for word in words[1:]]
        module = {"pretrain.py": pretrain, "finetune.py": finetune}[words[0]]
        status, _, err = script(module, *words[1:], *more)
        assert status == 0, err
    metrics = json.loads((tmp_path / table / "finetune_cnn_1/metrics.json").read_text())
    assert metrics["n_train"] + metrics["n_val"] + metrics["n_test"] == 30
    assert (
        metrics["n_test_seen"] == 0
        and metrics["n_labelled"] == 20 - metrics["n_val"] - metrics["n_test"]
    )


def test_a_run_without_labels_says_that_nothing_can_be_tested(folder, tmp_path, script):
    flags = *ARMS, "--epochs", 1, "--out", tmp_path / "run"
    status, out, err = script(pretrain, "--data", folder, "--label-col", "none", *flags)
    assert status == 0, err
    assert out.index("none can be tested on later") < out.index("1 epochs of 30 images")
    names, lines = few_labels(folder, 20)
    (tmp_path / "few.csv").write_text("\n".join(["image,label", *lines]))
    flags = "--data", tmp_path / "few.csv", "--images", folder, "--epochs", 1
    status, _, err = script(finetune, "--ckpt", tmp_path / "run/cnn.pt", *flags)
    assert status == 2 and "pre-train with --labels FILE" in one_line(err)
    flags = *flags, "--allow-seen"
    assert script(finetune, "--ckpt", tmp_path / "run/cnn.pt", *flags)[0] == 0


# near-duplicates


@pytest.fixture
def alike(tmp_path):
    """Twelve drawn images of two classes; of the first six, of class a, a compressed copy."""
    for i in range(12):
        image = Image.fromarray(draw_demo.cells(i % 4, np.random.default_rng(i)))
        path = tmp_path / f"set/{'ab'[i // 6]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        if i < 6:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
                path.with_suffix(".jpg"), quality=70
            )
    return tmp_path / "set"


def test_near_duplicates_are_counted_listed_and_kept_together(alike, tmp_path, script):
    _, out, _ = script(data, alike, "--img-size", 16, "--out", tmp_path / "one")
    assert "12 images have near-duplicates; " in out
    with open(tmp_path / "one/duplicates.csv") as file:
        found = list(csv.DictReader(file))
    groups = [
        {row["path"].split(".")[0] for row in found if row["group"] == str(n)} for n in range(6)
    ]
    assert groups == [{f"a/{i}"} for i in range(6)] and len(found) == 12
    assert all(0 < int(row["distance"]) <= 30 for row in found)
    parted = []
    for seed in range(6):
        images = read(str(alike), group_near=seed > 2)
        images.decode(16, None)
        split = data.split_and_report(images, seed)
        sides = dict(zip(images.names, split))
        parted.append(sum(sides[f"a/{i}.png"] != sides[f"a/{i}.jpg"] for i in range(6)))
        later = splits.cross_split_duplicates(images, split, near=True)
        assert later.sum() == parted[-1] and not splits.cross_split_duplicates(images, split).any()
    assert sum(parted[:3]) and not any(parted[3:])


def test_the_score_without_near_duplicates_stands_beside(alike, tmp_path, script):
    rows = [
        f"{p.relative_to(alike)},{'train' if p.suffix == '.png' and i % 4 else 'test'}"
        for i, p in enumerate(sorted(alike.rglob("*.*g")))
    ]
    (tmp_path / "split.csv").write_text("\n".join(["path,split", *rows]))
    flags = "--arch", "test_resnet", "--init", "random", "--img-size", 32, "--epochs", 1
    flags = *flags, "--data", alike, "--split", tmp_path / "split.csv", "--out", tmp_path / "run"
    status, out, err = script(finetune, *flags)
    assert status == 0, err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    images = read(str(alike), split=str(tmp_path / "split.csv"))
    given = dict(zip(images.names, images.given))
    train = {name[:-4] for name, side in given.items() if side != "test"}
    near = sum(name[:-4] in train for name, side in given.items() if side == "test")
    assert near and metrics["n_test_near"] >= near and metrics["n_test_duplicates"] == 0
    assert metrics["test_without_near"]["n"] == metrics["n_test"] - metrics["n_test_near"]
    assert f"without the {metrics['n_test_near']} exact and near-duplicates" in out


def test_a_dry_run_decodes_and_writes_nothing(folder, tmp_path, script, monkeypatch):
    cache = tmp_path / "cache"
    status, out, err = script(data, folder, "--img-size", 16, "--dry-run", "--cache", cache)
    assert status == 0 and "30 images at 16 px, decoded, need 0.0 MB in " in out, err
    assert not cache.exists()
    assert "about" not in out and not (tmp_path / "out").exists()
    flags = *ARMS, "--dry-run", "--cache", cache, "--out", tmp_path / "out"
    status, out, err = script(pretrain, "--data", folder, *flags)
    assert (
        status == 0
        and "30 images at 32 px, decoded, need 0.1 MB" in out
        and "100 epochs of 21 images: about" in out
    ), err
    flags = "--arch", "test_resnet", "--init", "random", "--img-size", 32, *flags[len(ARMS) :]
    status, out, err = script(finetune, "--data", folder, *flags, "--seeds", 0, 1)
    assert status == 0 and "50 epochs of 21 images: about" in out, err
    assert not cache.exists() and not (tmp_path / "out").exists()


def test_an_absent_class_and_a_model_of_one_class_are_said(folder, tmp_path, script):
    lines = [
        f"{'c' if 'c/' in n else n[0]}/{n[2:]},{'train' if n[0] == 'c' or i % 3 else 'test'}"
        for i, n in enumerate(few_labels(folder)[0])
    ]
    (tmp_path / "split.csv").write_text("\n".join(["path,split", *lines]))
    flags = "--arch", "test_resnet", "--init", "random", "--img-size", 32, "--epochs", 1, "--lr", 0
    flags = *flags, "--data", folder, "--split", tmp_path / "split.csv", "--out", tmp_path / "run"
    status, out, err = script(finetune, *flags)
    assert status == 0, err
    assert "no test image of c: 0 in macro_f1, left out of macro_f1_present" in out
    test = json.loads((tmp_path / "run/metrics.json").read_text())["test"]
    f1 = [row["f1"] for row in test["per_class"]]
    assert np.isclose(test["macro_f1"], sum(f1) / 3) and np.isclose(
        test["macro_f1_present"], sum(f1[:2]) / 2
    )
    one = {row["support"] for row in test["per_class"]}
    assert ("every prediction is" in out) == (sum(np.sum(test["confusion"], 0) > 0) == 1), one
