"""Small images made on the spot, and the scripts run in this process or in their own."""

import contextlib
import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # small models, and two tests at a time; before torch

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download; read when huggingface_hub is imported

import finetune  # noqa: E402
import pretrain  # noqa: E402
from common import cli  # noqa: E402

ARMS = ["--cnn", "test_resnet", "--vit", "test_vit", "--img-size", "32", "--init", "random"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CASS_CACHE", str(tmp_path / "cache"))


def picture(seed, size=(40, 36), tint=0):
    """(H, W, 3) uint8 noise over a gradient, brighter in one channel by `tint`."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 120, (size[1], size[0], 3)) + np.arange(size[0])[None, :, None]
    values[..., seed % 3] += tint
    return np.clip(values, 0, 255).astype(np.uint8)


def draw_classes(folder, counts, start=0, tints=(0, 60, 120, 180)):
    """folder/CLASS/0.png ...; counts: {class: images}. Every image another one."""
    for tint, (name, count) in zip(tints, counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = picture(start + 3 * i + 1000 * tint, tint=tint)
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    """30 images of three classes."""
    return draw_classes(tmp_path / "images", {"a": 14, "b": 10, "c": 6})


@pytest.fixture
def script(capsys, monkeypatch):
    """script(module, *arguments) -> (exit status, stdout, stderr), in this process."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            cli.run(module.main)
        except SystemExit as leave:
            status = leave.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def pretrained(folder, tmp_path, script):
    """A finished run on `folder`, two epochs."""
    out = tmp_path / "run"
    status, _, err = script(
        pretrain, "--data", folder, *ARMS, "--epochs", 2, "--bs", 8, "--t-max", 2, "--out", out
    )
    assert status == 0, err
    return out


def run(*command, cwd, timeout=280, **env):
    """A command in its own process, from another folder, with the scripts' folder spelled out."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        text=True,
        timeout=timeout,
        capture_output=True,
        env={**os.environ, **env},
    )


def torchrun(script, *arguments, cwd, timeout=200, **env):
    """A script in two processes, on the CPU (gloo)."""
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    env = {"PYTHONPATH": str(ROOT), **env}
    return run(*launcher, script, *arguments, cwd=cwd, timeout=timeout, **env)


def rows(path):
    """The rows of a CSV file, {column: text} each."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def in_this_process(words, output):
    """Stands for experiments.run_script: the same, without starting Python anew."""
    module = importlib.import_module(words[0].removesuffix(".py"))
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        patch.setattr(sys, "argv", list(map(str, words)))
        try:
            cli.run(module.main)
        except SystemExit as leave:
            return leave.code
    return 0


def one_line(err):
    """The one line that a user gets to see; progress bars do not count."""
    lines = [
        part
        for line in err.splitlines()
        for part in line.split("\r")
        if part.strip() and "img/s" not in part
    ]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


__all__ = ["finetune", "pretrain"]
