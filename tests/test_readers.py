"""What people have on disk, read right or refused in a line that names it."""

from collections import Counter

import numpy as np
import pytest
from conftest import draw_classes, picture
from PIL import Image

from common.cli import UserError
from common.readers import read


def flags(data, **more):
    return {"path": str(data), **more}


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path)
    return path


def labels_of(images):
    return {
        name: [c for c, has in zip(images.classes, row) if has]
        for name, row in zip(images.names, images.labels)
    }


# folders


def test_images_at_any_depth_have_no_labels(tmp_path):
    for name in ("x.png", "one/y.JPG", "one/two/z.tif"):
        save(tmp_path / "d" / name)
    for hidden in (".git/a.png", "one/.ipynb_checkpoints/b.png", ".c.png", "__MACOSX/d.png"):
        save(tmp_path / "d" / hidden)
    (tmp_path / "d/notes.txt").write_text("no image")
    images = read(**flags(tmp_path / "d"))
    assert images.names == ["one/two/z.tif", "one/y.JPG", "x.png"] and images.classes == []
    assert any(".txt" in note for note in images.notes)


def test_one_folder_of_images_is_not_a_class(tmp_path):
    save(tmp_path / "d/images/a.png")
    assert read(**flags(tmp_path / "d")).classes == []


def test_class_folders(folder):
    images = read(**flags(folder))
    assert images.classes == ["a", "b", "c"] and (images.given == "").all()
    assert Counter(labels_of(images)["a/3.png"]) == {"a": 1}
    assert images.labels.sum(0).tolist() == [14, 10, 6]
    assert read(**flags(folder, label_col=["none"])).classes == []


@pytest.mark.parametrize(
    "names",
    [
        ("train", "test"),
        ("Training", "Testing"),
        ("TRAIN", "val", "Test"),
        ("train", "valid"),
        ("train", "validation", "test"),
    ],
)
def test_splits_above_the_classes(tmp_path, names):
    for i, name in enumerate(names):
        draw_classes(tmp_path / "d" / name, {"a": 3, "b": 2}, start=100 * i)
    images = read(**flags(tmp_path / "d"))
    kind = {"t": "train", "v": "val"}
    expected = Counter({"test" if "est" in n.lower() else kind[n[0].lower()]: 5 for n in names})
    assert Counter(images.given.tolist()) == expected
    assert images.classes == ["a", "b"]


def test_images_beside_the_split_folders_are_refused(tmp_path):
    draw_classes(tmp_path / "d/train", {"a": 2, "b": 2})
    draw_classes(tmp_path / "d/test", {"a": 2, "b": 2})
    save(tmp_path / "d/other/x.png")
    with pytest.raises(UserError, match="other/x.png"):
        read(**flags(tmp_path / "d"))


def test_a_folder_without_images_says_what_is_there(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/scan.nii").write_text("")
    with pytest.raises(UserError, match="1 .nii, but no images"):
        read(**flags(tmp_path / "d"))
    with pytest.raises(UserError, match="no such"):
        read(**flags(tmp_path / "nothing"))


def test_names_with_spaces_and_other_letters_and_a_folder_named_like_an_image(tmp_path):
    for name in ("x.jpg/é ü.png", "x.jpg/日本.png", "y/a b.png"):
        save(tmp_path / "d" / name)
    images = read(**flags(tmp_path / "d"))
    assert images.names == ["x.jpg/é ü.png", "x.jpg/日本.png", "y/a b.png"]
    assert images.classes == ["x.jpg", "y"]


def test_links_are_followed_once(tmp_path):
    draw_classes(tmp_path / "d", {"a": 2, "b": 2})
    (tmp_path / "d/a/loop").symlink_to(tmp_path / "d")
    (tmp_path / "d/a/itself.png").symlink_to("itself.png")
    assert len(read(**flags(tmp_path / "d"))) == 5  # decoding will name the one that is none


# CSV files


@pytest.fixture
def table(tmp_path):
    """table(text, names=...) -> flags of a CSV file beside these images."""

    def make(text, names=("i0.png", "i1.png", "i2.png"), **more):
        for i, name in enumerate(names):
            save(tmp_path / "t" / name, i)
        file = tmp_path / "t/labels.csv"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return flags(file, **more)

    return make


LABELS = {"i0.png": ["a"], "i1.png": ["b"], "i2.png": ["a"]}


@pytest.mark.parametrize(
    "text",
    [
        "image,label\ni0.png,a\ni1.png,b\ni2.png,a\n",
        "image,label\ni0,a\ni1,b\ni2,a\n",
        b"\xef\xbb\xbfimage;label\r\ni0;a\r\ni1;b\r\ni2;a\r\n",
        "label\tname\na\ti0\nb\ti1\na\ti2",
        'image,label\n"i0.png","a"\n\ni1.png, b \ni2.png,a\n',
        "age,image,label\n3,i0,a\n4,i1,b\n5,i2,a\n",
        "image,label\ni0,a\ni1,b\ni2,a\ni2.png,a\n",
        "image,label\n./i0.png,a\ni1.png,b\nnowhere/../i2.png,a\n",
        'image,note,label\ni0,"two\nlines",a\ni1,"",b\ni2,x,a\n',
    ],
)
def test_one_label_column(table, text):
    assert labels_of(read(**table(text))) == LABELS


def test_absolute_names_below_the_folder(table, tmp_path):
    text = "".join(f"{tmp_path}/t/i{i}.png,{'aba'[i]}\n" for i in range(3))
    assert labels_of(read(**table("image,label\n" + text))) == LABELS
    with pytest.raises(UserError, match="1 of 1 rows.*else/x.png, 0 images"):
        read(**table(f"image,label\n{tmp_path}/else/x.png,a\n"))


def test_names_in_folders_below_and_in_another_folder(table, tmp_path):
    names = ("deep/er/i0.png", "i1.png", "deep/i2.png")
    images = read(**table("image,label\ni0,a\ni1.png,b\ndeep/i2,a\n", names))
    assert labels_of(images) == {name: [label] for name, label in zip(names, "aba")}
    (tmp_path / "t/labels.csv").rename(tmp_path / "other.csv")
    images = read(**flags(tmp_path / "other.csv", images=str(tmp_path / "t")))
    assert sorted(images.names) == sorted(names)


def test_one_hot_with_an_empty_column(table):
    text = "image,MEL,NV,UNK\ni0,1.0,0.0,0.0\ni1,0.0,1.0,0.0\ni2,1.0,0.0,0.0\n"
    images = read(**table(text))
    assert images.classes == ["MEL", "NV"] and not images.multilabel
    assert labels_of(images)["i1.png"] == ["NV"] and "UNK" in " ".join(images.notes)


def test_multi_hot(table):
    images = read(**table("image,x,y\ni0,1,1\ni1,0,0\ni2,0,1\n"))
    assert images.multilabel and labels_of(images) == {
        "i0.png": ["x", "y"],
        "i1.png": [],
        "i2.png": ["y"],
    }


def test_delimited_labels(table):
    text = "image,label\ni0,x|y\ni1,\ni2,y\n"
    with pytest.raises(UserError, match="1 label cells are blank; give --uncertain negative"):
        read(**table(text))
    assert read(**table(text, uncertain="skip")).labelled.tolist() == [True, False, True]
    images = read(**table(text, uncertain="negative"))
    assert images.multilabel and labels_of(images) == {
        "i0.png": ["x", "y"],
        "i1.png": [],
        "i2.png": ["y"],
    }
    images = read(**table('image,label\ni0,"x,y"\ni1,x\ni2,y\n', multilabel=","))
    assert images.labels.sum() == 4
    images = read(**table('image,label\ni0,"x,y"\ni1,x\ni2,x\n', multilabel="none"))
    assert images.classes == ["x", "x,y"]


def test_columns_as_told(table):
    text = "file,age,sex,dx\ni0,1,m,a\ni1,0,f,b\ni2,1,m,a\n"
    assert labels_of(read(**table(text, label_col=["dx"]))) == LABELS
    assert read(**table(text, label_col=["none"])).classes == []
    images = read(**table(text, label_col=["dx"], group_col="sex"))
    assert images.groups.tolist() == ["m", "f", "m"]


def test_numbers_are_sorted_as_numbers(table):
    assert read(**table("image,label\ni0,10\ni1,9\ni2,10\n")).classes == ["9", "10"]


def test_multilabel_as_told(folder):
    assert not read(**flags(folder)).multilabel
    assert read(**flags(folder, multilabel=True)).multilabel


@pytest.mark.parametrize(
    "text, message, more",
    [
        ("image,label\ni0,a\nlost,b\ngone,a\n", "2 of 3 rows.*line 3: lost.*line 4: gone", {}),
        ("image,label\ni0,a\n../../etc/x.png,b\n", "line 3: ../../etc/x.png, 0 images", {}),
        ("image,label\ni0,a\ni1\n", "line 3: 1", {}),
        ("image,label\ni0,a\ni0.png,b\n", "1 of 2 rows contradict.*line 3: i0.png", {}),
        ("image,label\ni0,x|y\ni1,x;y\n", "--label-sep", {}),
        ('image,label\ni0,"x,y"\ni1,x\n', "--label-sep", {}),
        ("image,dx,age\ni0,a,3\ni1,b,4\n", "--label-col", {}),
        ("image,x,y\ni0,0,1\ni1,2,1\n", "0, 1 or -1.*line 3", {"label_col": ["x", "y"]}),
        ("image,label\ni0,a\n", "no column dx.*image, label", {"label_col": ["dx"]}),
        ("image,label\ni0,a\n", "no column id", {"image_col": "id"}),
        ("one,two\ni0,i1\ni1,i0\n", "--image-col", {}),
        ("one,two\nq,r\ns,t\n", "no column names images in .*--images DIR.*--image-col", {}),
        ("image,image\ni0,i1\n", "distinct.*image, image", {}),
        ("image,label\n", "rows below", {}),
        ("", "column names", {}),
        (b"image,label\ni0,\x81\n", "UTF-8", {}),
        ('image,label\ni0,"a\n', "CSV", {}),
        (b"image,label\ni0,a\0\ni1,a\n", "is no CSV file in UTF-8.*NUL", {}),
        ("image,label\ni0,a\n".encode("utf-16-le"), "is no CSV file in UTF-8.*NUL", {}),
        ("image,label\ni0,a\n", "no such folder", {"images": "/nowhere/at/all"}),
    ],
)
def test_bad_tables_are_refused(table, text, message, more):
    with pytest.raises(UserError, match=message) as error:
        read(**table(text, **more))
    assert "\n" not in str(error.value)


def test_a_name_that_fits_two_files_is_refused(table):
    with pytest.raises(UserError, match="or several.*line 2: same, 2 images"):
        read(**table("image,label\nsame,a\n", ("x/same.png", "y/same.png")))


def test_flags_of_tables_need_a_table(folder):
    with pytest.raises(UserError, match="--image-col, --uncertain need a CSV"):
        read(**flags(folder, image_col="x", uncertain="skip"))
    with pytest.raises(UserError, match="--class-depth x/: no column, and found in 0 of 30 paths"):
        read(**flags(folder, label_col=["x/"]))


# splits made elsewhere, MedMNIST


def test_a_split_of_ones_own(folder, tmp_path):
    images = read(**flags(folder))
    lines = [f"{name},{'Testing' if i % 3 else 'train'}" for i, name in enumerate(images.names)]
    file = tmp_path / "own.csv"
    file.write_text("\n".join(["path,split", *lines]))
    given = read(**flags(folder, split=str(file))).given
    assert given.tolist() == ["test" if i % 3 else "train" for i in range(30)]
    file.write_text("path,split\n" + "\n".join(lines[1:]))
    images = read(**flags(folder, split=str(file)))
    assert len(images) == 29 and "a/0.png" in images.notes[0]  # what it does not name is left out
    for text, message in (
        (
            "path,split\n" + "\n".join([*lines, "a/no.png,test"]),
            "1 of 31 rows name no image.*line 32: a/no.png",
        ),
        ("path,split\na/0.png,later", "line 2: later"),
        ("name,split\na,b", "no column path"),
        ("\n".join(["path,split", *lines, lines[0]]), "twice"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read(**flags(folder, split=str(file)))


def medmnist(classes=3, channels=(), labels=1):
    rng = np.random.default_rng(0)
    return {
        f"{s}_{kind}": array
        for s, n in (("train", 9), ("val", 3), ("test", 6))
        for kind, array in (
            ("images", rng.integers(0, 255, (n, 28, 28, *channels), dtype=np.uint8)),
            (
                "labels",
                (np.arange(n) % classes)[:, None]
                if labels == 1
                else rng.integers(0, 2, (n, labels)),
            ),
        )
    }


@pytest.mark.parametrize("channels", [(), (3,)])
def test_medmnist(tmp_path, channels):
    arrays = medmnist(channels=channels)
    np.savez(tmp_path / "m.npz", **arrays)
    images = read(**flags(tmp_path / "m.npz"))
    assert Counter(images.given.tolist()) == {"train": 9, "val": 3, "test": 6}
    assert images.classes == ["0", "1", "2"] and not images.multilabel
    assert (images.sources[9] == arrays["val_images"][0]).all() and images.names[9] == "val/0"
    assert labels_of(images)["test/4"] == ["1"]


def test_medmnist_with_several_labels(tmp_path):
    np.savez(tmp_path / "m.npz", **medmnist(labels=4))
    images = read(**flags(tmp_path / "m.npz"))
    assert images.multilabel and images.classes == ["0", "1", "2", "3"]


def test_bad_npz_files_are_refused_and_not_run(tmp_path):
    file = tmp_path / "m.npz"

    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    for arrays, message in (
        ({"x": np.zeros(2)}, "train,val,test}_images"),
        ({**medmnist(), "train_images": np.array([Bomb()] * 9)}, "plain arrays"),
        ({**medmnist(), "val_labels": np.zeros((6, 1), int)}, "labels.*one N"),
        ({**medmnist(), "val_images": np.zeros((3, 28, 28))}, "uint8"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(UserError, match=message):
            read(**flags(file))
    assert not (tmp_path / "ran").exists()
    np.savez(file, **medmnist())
    for broken in (b"not a zip", file.read_bytes()[:500]):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="plain arrays"):
            read(**flags(file))
