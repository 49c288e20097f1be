"""Every command of the README, of docs/ and of the docstrings, run at a tiny size."""

import csv
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import ARMS, ROOT, draw_classes, in_this_process

import finetune
import pretrain
from common import cli
from tools import benchmark, dino, experiments

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
MODULES = [p for folder in ("", "common/", "tools/") for p in ROOT.glob(f"{folder}*.py")]
OURS = r"(?:[a-z]+\.py|-m tools\.[a-z]+)"
ELSEWHERE = ("-m pytest", "tests/", "torchrun")  # the suite itself; test_distributed.py


def commands():
    """The command lines of ours in code blocks and inline code, each once."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        found += re.findall(r"```[a-z]*\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)
    found += [path.read_text().split('"""')[1] for path in MODULES if path.stat().st_size]
    lines = [line for text in found for line in re.split(r"\n|&&", text)]
    lines = (re.sub(r"  +\(.*|  +#.*| \[.*\]| \.\.\.", "", line).strip() for line in lines)
    lines = {re.sub(" RUN$", " finetune_cnn_0.1", x) for x in lines}
    lines = {x for x in lines if re.match(rf"python {OURS} .", x)}
    alike = {}  # commands that tiny() makes the same are run once
    for line in sorted(lines):
        words = shlex.split(line)
        steps = "tools.benchmark" in words and "step" in words
        alike.setdefault("step" if steps else re.split(" --(?:out|amp) ", line)[0], line)
    return list(alike.values())


def tiny(words):
    """The flags that make a command quick, put behind its own: the last one counts."""
    name, more = words[0], []
    if name == "pretrain.py" and "--resume" not in words:
        more = [*ARMS, "--cnn-kwargs", "--vit-kwargs", "--epochs", "1"]
    elif name == "tools.dino" and "--resume" not in words:
        more = [*ARMS, "--cnn-kwargs", "--vit-kwargs", "--epochs", "1", "--outputs", "16"]
    elif name == "finetune.py" and "--resume" not in words:
        arch = ["--arch", "test_resnet", "--img-size", "32", "--init", "random"]
        more = ["--epochs", "1", *(arch if "--arch" in words else ())]
    elif name == "tools.experiments":
        more = ["--scale", "small", "--dry-run", "--seeds", "0"]
    elif name == "tools.folds":
        more = [*ARMS, "--cnn-kwargs", "--vit-kwargs", "--epochs", "1", "--folds", "2"]
        more += ["--finetune", "--epochs 1"]
    elif name == "tools.benchmark":
        more = ["--preset", "small", "--img-size", "32", "--steps", "1", "--rounds", "1"]
    return [*words, *more]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with all that the commands name."""
    place = tmp_path_factory.mktemp("workplace")
    patch = pytest.MonkeyPatch()
    patch.setenv("CASS_CACHE", str(place / "cache"))
    images = draw_classes(place / "images", {"a": 110, "b": 110})
    files = sorted(p.relative_to(images) for p in images.glob("*/*.png"))
    for name in ("metadata.csv",):
        with open(place / name, "w", newline="") as file:
            rows = [(str(p), p.parts[0], i // 2) for i, p in enumerate(files)]
            csv.writer(file).writerows([("image_id", "dx", "lesion_id"), *rows])
    shutil.copy(images / files[0], place / "scan.png")
    some = "image,label\n" + "".join(f"{p},{p.parts[0]}\n" for p in files[::2])
    (place / "few.csv").write_text(some)
    (place / "all.csv").write_text(some + "".join(f"{p},\n" for p in files[1::2]))
    assert not run(pretrain, ["--data", images, *ARMS, "--epochs", 1, "--out", place], patch)
    for arm, frac in (("cnn", 0.1), ("cnn", 0.01), ("vit", 0.1)):
        assert not run(
            finetune, ["--ckpt", place / f"{arm}.pt", "--epochs", 1, "--frac", frac], patch
        )
    made = {name: place / f"finetune_{name}_0.1" for name in ("cnn", "vit")}
    for name in ("supervised", "CNN_RUN"):
        shutil.copytree(made["cnn"], place / name)
    for name in ("finetune_vit_1", "VIT_RUN"):
        shutil.copytree(made["vit"], place / name)
    shutil.copy(made["cnn"] / "best.pt", place)
    run(
        dino,
        ["--data", images, *ARMS, "--epochs", 1, "--outputs", 16, "--out", place / "dino"],
        patch,
    )
    for name in ("laptop", "small", "gpu", "few", "all", "demo", "DIR"):
        (place / name).mkdir()
        for file in (*place.glob("*.pt"), *place.glob("*.json*"), *place.glob("*s*.csv")):
            shutil.copy(file, place / name)
    (place / "results/pretrained").mkdir(parents=True)
    shutil.copy(made["cnn"] / "split.csv", place / "results/pretrained/brain_mri.csv")
    (place / "docs").mkdir()
    shutil.copy(ROOT / "docs/demo.npz", place / "docs")
    yield place
    patch.undo()


def run(module, arguments, patch):
    """Run a command in this process; its exit status."""
    patch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    try:
        cli.run(module.main)
    except SystemExit as leave:
        return leave.code or 0
    return 0


@pytest.mark.parametrize("line", commands())
def test_command(line, workplace, monkeypatch, tmp_path, capsys):
    if any(word in line for word in ELSEWHERE):
        pytest.skip("run elsewhere")
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("CASS_CACHE", str(workplace / "cache"))
    monkeypatch.setattr(experiments, "run_script", in_this_process)
    monkeypatch.setattr(experiments, "seconds_per_image", lambda *_: 0.01)
    assert timm.is_model(benchmark.PAPER["cnn"]) and timm.is_model(benchmark.PAPER["vit"])
    monkeypatch.setattr(benchmark, "PAPER", benchmark.SMALL)  # whose arms take a second a step
    draw = benchmark.draw_large
    monkeypatch.setattr(benchmark, "draw_large", lambda folder, n=4, side=64: draw(folder, n, 64))
    for word in ("/path", "brain_mri", "new_images/", "FOLDER", "photos", "PATH"):
        line = re.sub(rf"(?<=[ =]){word}(?= |$)", str(workplace / "images"), line)
    line = line.replace(" images ", f" {workplace / 'images'} ").replace("FILE", "scan.png")
    if "tools.dino" in line:
        line = line.replace("DIR", "dino")
    line = re.sub(r"(?<= )(few|all)\.csv", rf"{workplace}/\1.csv", line)
    if "all.csv" in line:
        line += f" --images {workplace / 'images'}"
    line = line.replace("RUN_FOLDER", "finetune_cnn_0.1").replace("NAME", "x")
    line = line.replace("RUN_A", "finetune_cnn_0.1").replace("RUN_B", "finetune_vit_0.1")
    words = shlex.split(line.removeprefix("python ").removeprefix("-m "))
    module = importlib.import_module(words[0].removesuffix(".py"))
    words = tiny(words)
    if "--out" in words and "--resume" not in words:
        words[words.index("--out") + 1] = str(tmp_path / words[words.index("--out") + 1])
    elif words[0] in ("pretrain.py", "finetune.py", "tools.dino") and "--resume" not in words:
        words += ["--out", str(tmp_path / "out")]
    if "--out" in words:
        Path(words[words.index("--out") + 1]).parent.mkdir(exist_ok=True)
    status = run(module, words[1:], monkeypatch)
    needs_gpu = words[1] == "memory" and not torch.cuda.is_available()
    assert status == (2 if needs_gpu else 0), capsys.readouterr().err
