"""The page of tools.report: what it says, what it hides, and that it needs nothing else."""

import csv
import importlib
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ARMS, draw_classes, one_line, picture, rows
from PIL import Image
from sklearn.calibration import calibration_curve

import finetune
import pretrain
from tools import dino, report

NASTY = "<img src=x onerror=alert(1)>.png"


class Page(HTMLParser):
    """Tags, texts and the cells of tables."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.cells, self.captions = [], "", [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data
        self.cells += [data] if data.strip() and self.tags[-1][0] in ("td", "th") else []

        if self.tags and self.tags[-1][0] == "figcaption" and data.strip():
            self.captions.append(data)

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Both arms fine-tuned on 60 images, and several labels to an image; one has a nasty name."""
    place = tmp_path_factory.mktemp("report")
    draw_classes(place / "images", {"a": 30, "b": 30})
    for file in sorted((place / "images").glob("*/*.png")):
        file.rename(file.with_name(f"patient_{file.name}"))
    (place / "images/a/patient_0.png").rename(place / "images/a" / NASTY)
    shutil.copy(place / "images/a/patient_1.png", place / "images/b/patient_copy.png")
    (place / "many").mkdir()
    lines = [["image", "red", "dark"]]
    for i in range(40):
        Image.fromarray(picture(i, tint=60 * (i % 2))).save(place / f"many/cell{i}.png")
        lines.append([f"cell{i}.png", i % 2, i % 3 == 0])
    with open(place / "many.csv", "w", newline="") as file:
        csv.writer(file).writerows([*lines[:1], *([x, int(y), int(z)] for x, y, z in lines[1:])])
    patch = pytest.MonkeyPatch()
    patch.setenv("CASS_CACHE", str(place / "cache"))

    def call(module, *words):
        patch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, words)])
        module.main()

    call(pretrain, "--data", place / "images", *ARMS, "--epochs", 1, "--out", place / "run")
    arms = [place / "run" / f"{arm}.pt" for arm in ("cnn", "vit")]
    call(finetune, "--ckpt", *arms, "--epochs", 2, "--out", place / "both")
    many = ["--data", place / "many.csv", "--images", place / "many", "--multilabel"]
    words = ["--arch", "test_resnet", "--init", "random", "--img-size", 32, "--epochs", 1]
    call(finetune, *words, *many, "--out", place / "labels")
    yield place
    patch.undo()


@pytest.fixture
def page(place, tmp_path, script, monkeypatch):
    """page(*words) -> the parsed page of a command."""
    monkeypatch.setenv("CASS_CACHE", str(place / "cache"))

    def make(*words):
        status, _, err = script(report, *words, "--out", tmp_path / "report.html")
        assert status == 0, err
        return Page(tmp_path / "report.html")

    return make


def test_the_page_needs_nothing_and_tells_everything(place, page):
    found = page(place / "both", place / "labels", place / "run")
    names = [tag for tag, _ in found.tags]
    assert not {"script", "link", "iframe", "object", "form"} & set(names)
    assert names.count("h1") == names.count("main") == names.count("nav") == 1
    for image in found.all("img"):
        assert image["src"].startswith("data:image/") and image["alt"].strip()
    assert len(found.all("img")) > 20
    for _, attrs in found.tags:
        assert not [key for key in attrs if key.startswith("on")]
        assert not attrs.get("href", "#").startswith(("http", "/"))
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    links = [attrs["href"][1:] for attrs in found.all("a")]
    assert links and set(links) == set(ids) and len(ids) == len(set(ids))
    assert found.all("html")[0]["lang"] == "en"
    assert any(x.get("name") == "viewport" for x in found.all("meta"))
    for script in ("pretrain.py", "finetune.py"):
        assert re.search(f"python {script} .*--data={place / 'images'} ", found.text)
    assert "random maps" in found.text and "Nearest of" in found.text
    for folder in ("both/cnn", "both/vit", "both/mean", "labels"):
        metrics = json.loads((place / folder / "metrics.json").read_text())
        for key in ("macro_f1", "auroc", "brier"):
            assert any(x.startswith(f"{metrics['test'][key]:.3f} (") for x in found.cells), key
    used = [r["labels"] for r in rows(place / "both/cnn/split.csv") if r["label_used"] == "1"]
    at = found.cells.index("a")
    assert found.cells[at + 1] == str(used.count("a"))
    (head, *lines) = csv.reader(open(place / "both/cnn/confusion.csv", newline=""))
    at = next(i for i, x in enumerate(found.cells) if found.cells[i : i + 3] == ["label", "a", "b"])
    assert found.cells[at + 3 : at + 9] == sum(lines, [])


def test_other_kinds_of_runs_have_a_page(place, page, script):
    """Seeds, neighbours alone, DINO's arms; and a mean alone, with the settings of its arms."""
    ckpt = ["--ckpt", place / "run/cnn.pt", place / "run/vit.pt", "--epochs", 1]
    assert script(finetune, *ckpt, "--seeds", 0, 1, "--out", place / "seeds")[0] == 0
    assert script(finetune, *ckpt[:2], "--mode", "knn", "--out", place / "knn")[0] == 0
    small = ["--epochs", 1, "--outputs", 16, "--crops", 1, "--out", place / "dino"]
    assert script(dino, "--data", place / "images", *ARMS, *small)[0] == 0
    found = page(place / "seeds/mean/seed1", place / "knn", place / "dino")
    titles = [attrs["id"] for attrs in found.all("h2")]
    assert len(titles) == 3 and found.text.count("tools.dino") == 1
    assert found.text.count("python finetune.py ") == 2 and "--mode=knn" in found.text
    assert found.text.count("Surest errors") == 2 and "Training, by epoch" in found.captions
    assert found.text.count("nearest images: this run has no weights of its own") == 2
    for folder in ("seeds/mean/seed1", "knn"):
        metrics = json.loads((place / folder / "metrics.json").read_text())
        value = metrics["test"]["macro_f1"]
        assert any(x.startswith(f"{value:.3f} (") for x in found.cells), folder
    assert len(page(place / "seeds").all("h2")) == 6


def test_names_are_hidden_unless_asked_for_and_shown_as_text(place, page):
    text = page(place / "both/cnn").text
    assert "patient_" not in text and "onerror" not in text and "row " in text
    assert "different labels: row " in text  # in what data.py says
    test = [row["path"] for row in rows(place / "both/cnn/predictions.csv")]
    raw = page(place / "both/cnn", "--show-names")
    assert any(name in raw.text for name in test)
    assert all(image.get("src") != "x" for image in raw.all("img"))


def test_a_nasty_name_is_text_wherever_it_stands(place, page, monkeypatch):
    """As the name of every image."""
    monkeypatch.setattr(report, "SHOWN", 2)
    folder = place / "nasty"
    shutil.copytree(place / "labels", folder)
    for name in ("split.csv", "predictions.csv"):
        lines = list(csv.reader(open(folder / name, newline="")))
        lines = [lines[0], *([f"<i onclick=x>{x[0]}\udcff", *x[1:]] for x in lines[1:])]
        with open(folder / name, "w", newline="", errors="surrogateescape") as file:
            csv.writer(file).writerows(lines)
    found = page(folder, "--show-names")
    assert "<i onclick=x>" in found.text and not found.all("i")
    assert "cannot be read at their place" in found.text


def test_surest_errors_come_first_and_successes_are_right(place, page):
    """Against the rows of predictions.csv."""
    found = page(place / "both/cnn")
    number = {row["path"]: i for i, row in enumerate(rows(place / "both/cnn/split.csv"), 1)}
    table = rows(place / "both/cnn/predictions.csv")
    sure = lambda row: max(float(row["calibrated_a"]), float(row["calibrated_b"]))  # noqa: E731
    wrong = sorted((r for r in table if r["true"] != r["predicted"]), key=sure, reverse=True)
    right = sorted((r for r in table if r["true"] == r["predicted"]), key=sure)
    expected = [f"row {number[r['path']]}: " for r in wrong[:4] + right[:4]]
    shown = [caption for caption in found.captions if caption.startswith("row ")]
    assert [alt.split("predicted")[0] for alt in shown] == expected
    for alt, row in zip(shown, wrong[:4] + right[:4]):
        assert f"predicted {row['predicted']}, its probability {sure(row):.2f}" in alt
        assert f"true {row['true']}" in alt


def test_without_images_a_line_says_so(place, page, tmp_path):
    folder = tmp_path / "gone"
    shutil.copytree(place / "both", folder)
    for file in folder.glob("*/config.json"):
        file.write_text(file.read_text().replace(str(place / "images"), "/nowhere"))
    found = page(folder)
    assert "The images cannot be read at their place" in found.text
    assert all(x["src"].startswith("data:image/svg") for x in found.all("img"))


def test_the_nearest_training_images_are_those_of_the_highest_cosine(place, monkeypatch):
    monkeypatch.setenv("CASS_CACHE", str(place / "cache"))
    run = report.load(place / "both/cnn", show_names=False)
    used = [i for i, row in enumerate(run.split) if row["label_used"] == "1"]
    run.known = used, report.features(run, used)
    i = 0
    c = int(run.test.labels[i].argmin())
    shown = report.example(run, i, c, True)  # an error: it has not this label
    own = report.features(run, [run.tested[i]])[0].double().numpy()
    known = run.known[1].double().numpy()
    cosines = [own @ x / np.linalg.norm(own) / np.linalg.norm(x) for x in known]
    best = np.argsort(cosines)[::-1][: report.NEAREST]
    expected = ", ".join(
        f"row {used[j] + 1} {run.split[used[j]]['labels']} {cosines[j]:.2f}" for j in best
    )
    assert expected in shown[1][0]


def test_bad_input_gives_one_line_and_status_2(place, tmp_path, script, monkeypatch):
    monkeypatch.setenv("CASS_CACHE", str(place / "cache"))
    (tmp_path / "empty").mkdir()
    shutil.copytree(place / "labels", tmp_path / "torn")
    (tmp_path / "torn/config.json").write_text("{")
    shutil.copytree(place / "labels", tmp_path / "short")
    (tmp_path / "short/split.csv").unlink()
    for words, said in (
        ([tmp_path / "empty"], "empty: holds no run"),
        (["nowhere"], "nowhere: holds no run"),
        ([tmp_path / "torn"], "config.json: damaged"),
        ([tmp_path / "short"], "its files are damaged, or not of one run: No such file"),
        ([], "RUN"),
    ):
        status, _, err = script(report, *words, "--out", tmp_path / "a.html")
        assert status == 2 and said in one_line(err), err
    assert not (tmp_path / "a.html").exists()


def test_without_captum_the_page_has_no_maps_and_says_so(place, page, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    found = page(place / "labels")
    assert "No maps, nor nearest images: Grad-CAM needs captum" in found.text
    assert "random maps" not in found.text


def test_reliability_shows_means_and_shares_of_each_bin():
    """Against scikit-learn's calibration curve."""
    rng = np.random.default_rng(0)
    labels, p = rng.random((300, 3)) < 0.4, rng.random((300, 3)).astype("f4")
    test = SimpleNamespace(arrays=lambda: (None, labels, p, p**2, True))
    found = {f"{k}{x}": 0.5 for k in ("ece", "brier") for x in ("", "_uncalibrated")}
    above, _ = report.reliability(test, {"test": found}).axes
    for line, q in zip(above.lines[1:], (p, p**2)):
        share, mean = calibration_curve(labels.ravel(), q.ravel(), n_bins=15)
        x, y = line.get_data()
        np.testing.assert_allclose(x, mean, atol=1e-5)
        np.testing.assert_allclose(y, share, atol=1e-5)


def drawn(log):
    """{panel: {line: [(epoch, number)]}}."""
    panels = report.curves(log).axes
    lines = [[(x.get_label(), [*zip(*x.get_data())]) for x in ax.lines] for ax in panels]
    return {ax.get_title(): dict(x) for ax, x in zip(panels, lines)}


def test_curves_put_train_and_val_and_both_arms_together_and_begin_before_the_first_step():
    rows = [
        {"epoch": 1, "iteration": 9, "train_loss": 2.0, "val_loss": 3, "lr": 0.1, "note": "x"},
        {"epoch": 2, "train_loss": 1.0, "val_loss": None, "cnn_rank": 4, "vit_rank": 5},
    ]
    rows[0]["start"] = {"cnn_rank": 7}
    found = drawn(rows)
    assert found["loss"] == {"train": [(1, 2.0), (2, 1.0)], "val": [(1, 3)]}
    assert [*found["lr"].values()] == [[(1, 0.1)]]
    assert found["rank"] == {"cnn": [(0, 7), (2, 4)], "vit": [(2, 5)]}
    dino = [{"arms": "cnn", "epoch": 1, "loss": 3.0}, {"arms": "vit", "epoch": 1, "loss": 4.0}]
    assert drawn(dino) == {"loss": {"cnn": [(1, 3.0)], "vit": [(1, 4.0)]}}


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, script, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, *words in (["report", "anywhere"], ["maps", "--ckpt", "a.pt", "--image", "b.png"]):
        monkeypatch.delitem(sys.modules, f"tools.{name}")
        module = importlib.import_module(f"tools.{name}")
        status, _, err = script(module, *words, "--out", tmp_path / "a")
        assert status == 2 and "pip install -r requirements-extra.txt" in one_line(err)
