"""experiments.py: its commands run, its tables hold the scores of the runs, it resumes."""

import csv
import json
import os
import re
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, draw_classes, in_this_process, one_line

import data
from common import cli
from tools import experiments
from tools.experiments import MODELS, rows_of

TIMED = experiments.seconds_per_image

PAPER = experiments.PAPER["tables"]
TABLES = [str(n) for n in range(1, 22)]


@pytest.mark.parametrize("table", TABLES)
def test_every_cell_of_the_paper_has_a_row(table):
    cells = {
        f"{row.label}|{arm}|{frac:g}"
        for row in rows_of(table)
        for frac in row.fracs
        for arm in row.arms
        if not row.label.startswith("DINO, ")  # ours: the paper claims robustness over it
    }
    printed = PAPER[table].get("cells", {})
    assert cells == set(printed)
    for value in printed.values():
        assert 0 < float(value.split("±")[0]) < 1


@pytest.mark.parametrize("table", [t for t in PAPER if t not in TABLES])
def test_rows_of_the_protocol_name_flags_that_the_scripts_know(table):
    for row in rows_of(table):
        if table != "times_paper":
            assert row.size == {"gpu": 224}.get(table, 84)
            assert row.models["cnn"][0] == "tf_efficientnet_lite0"
        if "times" not in PAPER[table]:
            short = {"supervised": 0, "dino": 2 if table == "trials" else 1}
            assert row.epochs == short.get(row.method, row.epochs)
        parser = cli.Parser("")
        pretrain_flags = row.flags.split()
        parser.add_argument("--lr", type=float)
        parser.add_argument("--min-lr", type=float)
        parser.add_argument("--objective", choices=["vicreg"])
        parser.add_argument("--outputs", type=int)
        parser.add_argument("--crops", type=int)
        parser.add_argument("--momentum", type=float)
        parser.add_argument("--teacher-temp", type=float)
        parser.add_argument("--variant", nargs="+")
        parser.parse_args(pretrain_flags)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The tests' arms in place of the small ones, 32 px, one epoch."""
    small = {"cnn": ("test_resnet", {}), "vit": ("test_vit", {})}
    monkeypatch.setattr(
        experiments,
        "MODELS",
        {
            name: (paper, small["vit" if name[0] in "VD" and "Net" not in name else "cnn"])
            for name, (paper, _) in MODELS.items()
        },
    )
    monkeypatch.setitem(experiments.SCALES, "small", (32, 1, "random"))
    monkeypatch.setattr(experiments, "SMALL_DINO", ["--outputs", "64", "--crops", "2"])
    monkeypatch.setattr(experiments, "seconds_per_image", lambda *_: 0.01)
    monkeypatch.chdir(tmp_path)
    return draw_classes(tmp_path / "images", {"a": 14, "b": 10, "c": 6})


@pytest.mark.parametrize("table", ["2", "7", "12", "19"])
def test_dry_run_prints_commands_with_a_time_and_writes_nothing(
    tiny, tmp_path, script, table, monkeypatch
):
    monkeypatch.setattr(experiments, "seconds_per_image", TIMED)
    status, said, err = script(
        experiments,
        "--table",
        table,
        "--data",
        tiny,
        "--scale",
        "small",
        "--seeds",
        0,
        "--epochs",
        2,
        "--dry-run",
    )
    assert status == 0, err
    lines = said.splitlines()
    commands = [line for line in lines if line.startswith("python ")]
    assert all(re.search(r"# ~ [\d.]+ min$", line) for line in commands)
    assert f"{len(commands)} runs, about" in lines[-1]
    # a row's pre-training, and a fine-tuning for each label fraction; runs that two rows share once
    runs = sum(1 + len(row.fracs) for row in rows_of(table))
    assert len(commands) == runs if table == "2" else 0 < len(commands) <= runs
    assert {shlex.split(line.split("#")[0])[1] for line in commands} <= {
        "pretrain.py",
        "finetune.py",
        "-m",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "images"] or sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["images"]


@pytest.mark.parametrize(
    "given, words",
    [
        ("", ""),
        (
            "--labels /x/y.csv --group-by p --split none",
            "--images=/x/y.csv --group-col=p --split=none",
        ),
        ("--multilabel", "--multilabel"),
        ("--label-sep ,", "--multilabel=,"),
        ("--image-col=-i --label-col a b", "--image-col=-i --label-col a b"),
        ("--group-near --skip-bad --dedup", "--skip-bad --group-near --dedup"),
        ("--uncertain skip --no-cache", "--uncertain=skip --cache=none"),
    ],
)
def test_data_flags_are_handed_on_as_they_were_given(given, words):
    parser = cli.Parser("")
    data.add_arguments(parser)
    args = parser.parse_args(["--data", "/images", *given.split()])
    assert experiments.data_flags(args) == ["--data=/images", *words.split()]
    again = parser.parse_args(experiments.data_flags(args))
    assert vars(again) == vars(args)


def test_a_table_is_run_recorded_and_gone_on_with(tiny, tmp_path, script, monkeypatch):
    command = [
        "--table",
        2,
        "--data",
        tiny,
        "--scale",
        "small",
        "--seeds",
        0,
        1,
        "--fracs",
        1,
        "--only",
        "CASS",
        "Supervised",
    ]
    calls = []

    def failing_once(words, output):
        calls.append(list(map(str, words)))
        if words[0] == "pretrain.py" and sum(w[0] == "pretrain.py" for w in calls) == 1:
            output.write("error: a disk fell over\n")
            return 1
        return in_this_process(words, output)

    monkeypatch.setattr(experiments, "run_script", failing_once)
    status, said, err = script(experiments, *command)
    assert status == 1 and "1 of 4 cells failed" in err
    assert "failed: images_CASS_seed0: error: a disk fell over" in err
    assert "Failed: CASS, seed 0: error: a disk fell over" in said
    epochs = [c[c.index("--epochs") + 1] for c in calls if c[0] == "pretrain.py"]
    # the supervised row's is of no epoch
    assert epochs == ["1", "0", "1", "0"]
    assert not (tmp_path / "results").exists()  # its tables are committed
    out = tmp_path / "runs/table2"
    status, said, err = script(experiments, *command)
    assert status == 0 and "Failed" not in said, err
    before = len(calls)
    status, again, _ = script(experiments, *command)
    first = said.splitlines()[0]
    assert re.match(r"2 runs, about [\d.]+ hours", first)  # of the cell that failed
    assert status == 0 and len(calls) == before  # finished cells are skipped
    assert again == said.removeprefix(f"{first}\n")
    for mark in (tmp_path / "runs").glob("supervised_seed0_*/finished"):
        mark.unlink()  # as if it had been cut after it wrote its arms
    (out / "cells/images_Supervised_seed0.json").unlink()
    status, again, err = script(experiments, *command)
    assert status == 0 and again == said and len(calls) == before + 1, err

    with open(out / "table.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["images"] == "test"]
    assert len(rows) == 12
    for row in rows:
        cell = json.loads((out / f"cells/images_{row['row']}_seed{row['seed']}.json").read_text())
        assert cell["status"] == "done" and cell["code"] == experiments.CODE
        words = shlex.split(cell["commands"][-1])
        folder = tmp_path / words[words.index("--out") + 1]
        metrics = json.loads((folder / row["arm"] / "metrics.json").read_text())
        assert float(row["macro_f1"]) == metrics["test"]["macro_f1"]
        scores = cell["scores"][f"{row['arm']}|1"]
        assert scores["test"]["recall"] == [x["recall"] for x in metrics["test"]["per_class"]]
        assert metrics["seed"] == int(row["seed"])
        assert str(tmp_path) not in json.dumps(cell)
        if row["arm"] != "mean":
            assert scores["seconds"] == metrics["seconds"]
        assert bool(cell["log"]) == (row["row"] == "CASS")
        assert cell["pretrain_seconds"] == round(sum(x["seconds"] for x in cell["log"]), 1)
    scores = [float(r["macro_f1"]) for r in rows if (r["row"], r["arm"]) == ("CASS", "cnn")]
    line = next(x for x in said.splitlines() if x.startswith("| CASS | test_resnet |"))
    assert f"{np.mean(scores):.4f} ± {np.std(scores, ddof=1):.4f} (n = 2)" in line
    assert "; paper: 0.8650±0.0001 |" in line
    assert "**small**" in said and "not the paper's" in said and experiments.CODE in said

    other = draw_classes(tmp_path / "other/images", {"a": 14, "b": 10, "c": 6}, start=5)
    (other / "a/0.png").rename(other / "a/new.png")
    for changed in (["--epochs", 7], ["--data", other], ["--multilabel"]):
        status, _, err = script(experiments, *command, *changed)
        assert status == 2 and "another configuration" in one_line(err)
    monkeypatch.setattr(experiments, "CODE", "0123")  # as if the training code had been edited
    status, _, err = script(experiments, *command)
    assert status == 2 and "another configuration, or code" in one_line(err)
    status, _, err = script(experiments, *command, "--out", tmp_path / "new")
    assert status == 2 and "was made with other flags or by other code" in err


def test_a_row_of_one_arm_tunes_that_one(tiny, tmp_path, script, monkeypatch):
    """From the weights that a pre-training of no epoch wrote: the supervised baseline."""
    monkeypatch.setattr(experiments, "run_script", in_this_process)
    flags = ["--table", 11, "--data", tiny, "--scale", "small", "--seeds", 3, "--only", "ViT-B/16"]
    status, said, err = script(experiments, *flags)
    assert status == 0, err
    (file,) = (tmp_path / "runs/table11/cells").glob("*.json")
    cell = json.loads(file.read_text())
    (run,) = (tmp_path / "runs").glob("supervised_seed3_*")
    (tuned,) = (path for path in run.iterdir() if path.is_dir())
    metrics = json.loads((tuned / "metrics.json").read_text())
    assert (metrics["arm"], metrics["arch"], metrics["seed"]) == ("vit", "test_vit", 3)
    (scores,) = cell["scores"].values()
    assert scores["test"]["macro_f1"] == metrics["test"]["macro_f1"]
    assert not cell["log"] and scores["seconds"] > 0
    assert f"| ViT-B/16 | {scores['test']['macro_f1']:.4f} (n = 1); paper: 0.8420±0.009 |" in said


@pytest.mark.parametrize("table, rows", [("20", ["ImageNet"]), ("15", ["100 epochs"])])
def test_rows_that_are_the_same_run_share_it(table, rows):
    def folders(table, only):
        args = dict(scale="paper", seeds=[0], device="cpu", work="runs")
        args |= dict.fromkeys(data.OPTIONS) | {"data": "/images"}
        args = SimpleNamespace(**args)
        jobs = experiments.jobs_of(args, rows_of(table, only=only))
        return {folder for _, _, runs in jobs for _, folder in runs}

    assert folders(table, rows) <= folders("4", ["CASS"])
    assert not folders("20", ["random"]) & folders("4", ["CASS"])


def test_signals_reach_the_run_which_leaves_a_checkpoint(tiny, tmp_path):
    import signal
    import subprocess
    import time

    command = [
        sys.executable,
        "-m",
        "tools.experiments",
        "--table",
        "14",
        "--data",
        tiny,
        "--scale",
        "small",
        "--epochs",
        "5000",
        "--seeds",
        "0",
    ]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=tmp_path,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    for _ in range(600):
        time.sleep(0.1)
        if list((tmp_path / "runs").glob("*/last.pt")):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "resumes when the command is called again" in err
    output = next((tmp_path / "runs").glob("*/output.txt")).read_text()
    assert "stopped by SIGTERM" in output


@pytest.mark.parametrize(
    "table, columns", [("18", "ResNet-50 arm | arm 2"), ("19", "arm 1 | ViT-B/16 arm")]
)
def test_two_arms_of_a_kind_stand_under_the_papers_names(table, columns):
    args = SimpleNamespace(table=table, scale="paper", metric="macro_f1")
    text = experiments.scores_section(args, {})
    assert f"|  | {columns} | mean of both |" in text and "macro f1 (the paper's: F1)" in text


def test_the_ratios_of_the_papers_times():
    *sets, (name, (*_, mean)) = PAPER["1"]["times"].items()
    minutes = [
        [
            60 * sum(map(int, hours)) + int(rest)
            for *hours, rest in (re.findall(r"\d+", x) for x in y)
        ]
        for _, (*y, _) in sets
    ]
    ratios = [cass / dino for dino, cass in minutes]
    assert [f"{x:.2f}" for x in ratios] == [printed for _, (*_, printed) in sets]
    assert name == "mean of the ratios" and f"{np.mean(ratios):.2f}" == mean


def test_table_1_is_the_ratio_of_the_logged_seconds(tiny, tmp_path, script, monkeypatch):
    monkeypatch.setattr(experiments, "run_script", in_this_process)
    command = ["--table", 1, "--scale", "small", "--seeds", 0]
    status, said, err = script(experiments, *command, "--data", tiny)
    assert status == 0, err
    seconds = {}
    for log in (tmp_path / "runs").glob("*/log.jsonl"):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        seconds[log.parent.name.split("_")[0]] = sum(
            np.median([r["seconds"] for r in rows if r["arms"] == arms])
            for arms in {r["arms"] for r in rows}
        )
    ratio = f"{seconds['cass'] / seconds['dino']:.3f} |"
    assert any(x.startswith("| **images, here**") and x.endswith(ratio) for x in said.splitlines())
    arrays, rng = {}, np.random.default_rng(0)
    for side, n in (("train", 16), ("val", 6), ("test", 6)):
        arrays[f"{side}_images"] = rng.integers(0, 256, (n, 32, 32), dtype=np.uint8)
        arrays[f"{side}_labels"] = np.arange(n)[:, None] % 2
    np.savez(tmp_path / "second.npz", **arrays)
    status, said, err = script(experiments, *command, "--data", tmp_path / "second.npz")
    assert status == 0, err
    assert "| **images, here**" in said and "| **second, here**" in said  # of both data sets
    assert "| paper, Brain MRI | 26 Hours 21 Mins | 7 Hours 11 Mins | 0.27 |" in said
    assert "| 0.30 |" in next(line for line in said.splitlines() if "mean of the ratios" in line)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--table", "22", "--data", "."], "invalid choice: '22' (choose from"),
        (["--table", "4"], "--data PATH is missing"),
        (["--table", "4", "--data", "nowhere"], "nowhere"),
        (["--table", "4", "--data", "flat"], "has no labels"),
        (["--table", "4", "--data", "images", "--only", "BYOL"], "--only BYOL"),
        (["--table", "4", "--data", "images", "--fracs", "0.5"], "--fracs 0.5"),
        (
            ["--table", "4", "--data", "images", "--multilabel", "--metric", "accuracy"],
            "--metric accuracy",
        ),
    ],
)
def test_bad_input_is_one_line_with_status_2(tiny, tmp_path, script, flags, message):
    draw_classes(tmp_path, {"flat": 3}, start=99)
    status, _, err = script(experiments, *flags)
    assert status == 2
    assert message in one_line(err)
    assert not (tmp_path / "runs").exists()
