"""A run that was cut and goes on ends where the uncut one does, to the last bit."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ARMS, ROOT, one_line, run
from kill_and_resume import kill_and_resume

import finetune
import pretrain
from common import checkpoint, cli
from common.run import Run

# 21 training images, the last one alone and left out: four batches an epoch; snapshots from the
# second epoch on; drop paths draw random numbers
LONG = [
    *ARMS,
    "--epochs",
    4,
    "--bs",
    5,
    "--t-max",
    3,
    "--swa-start",
    0.3,
    "--vit-kwargs",
    "drop_path_rate=0.2",
]


class Cut(BaseException):
    pass


@pytest.fixture
def cut_after(monkeypatch):
    """cut_after(n): the run dies, as if killed, in its n-th optimizer step of the CNN or model."""

    def arm(n):
        step, count = torch.optim.Adam.step, [0]

        def dying_step(self, *args, **kwargs):
            count[0] += 1
            if count[0] == n:
                raise Cut
            return step(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.Adam, "step", dying_step)
        return lambda: monkeypatch.setattr(torch.optim.Adam, "step", step)

    return arm


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def same(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[k], b[k]) for k in a)


def test_pretraining_cut_anywhere(folder, tmp_path, script, cut_after):
    uncut = tmp_path / "uncut"
    assert script(pretrain, "--data", folder, *LONG, "--out", uncut)[0] == 0
    for cut in (3, 11, 17, 29):
        resumed = tmp_path / f"cut{cut}"
        mend = cut_after(cut)
        with pytest.raises(Cut):
            script(pretrain, "--data", folder, *LONG, "--save-every", 2, "--out", resumed)
        mend()
        torch.manual_seed(1234)  # nothing may hang on what this process drew before
        status, out, err = script(pretrain, "--data", folder, *LONG, "--resume", "--out", resumed)
        assert status == 0, err
        for arm in ("cnn", "vit"):
            assert same(uncut / f"{arm}.pt", resumed / f"{arm}.pt"), cut
        logs = [
            [json.loads(line) for line in (o / "log.jsonl").read_text().splitlines()]
            for o in (uncut, resumed)
        ]
        for a, b in zip(*logs, strict=True):
            for key in ("epoch", "iteration", "loss", "lr", "swa_snapshots"):
                assert a[key] == b[key], (cut, key)


@pytest.mark.parametrize("cut", [2, 9])
def test_finetuning_cut_anywhere(pretrained, tmp_path, script, cut_after, cut):
    command = ["--ckpt", pretrained / "cnn.pt", "--epochs", 6, "--patience", 2, "--bs", 8]
    assert script(finetune, *command, "--out", tmp_path / "uncut")[0] == 0
    mend = cut_after(cut)
    with pytest.raises(Cut):
        script(finetune, *command, "--save-every", 1, "--out", tmp_path / "resumed")
    mend()
    status, _, err = script(finetune, *command, "--resume", "--out", tmp_path / "resumed")
    assert status == 0, err
    assert same(tmp_path / "uncut/best.pt", tmp_path / "resumed/best.pt")
    a, b = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("uncut", "resumed"))
    assert a["test"] == b["test"] and a["epochs"] == b["epochs"] and a["val_loss"] == b["val_loss"]
    assert not (tmp_path / "resumed/last.pt").exists()


def test_finetuning_goes_on_from_a_folder_that_was_moved(pretrained, tmp_path, script, cut_after):
    command = ["--ckpt", pretrained / "cnn.pt", "--epochs", 4, "--bs", 8]
    assert script(finetune, *command, "--out", tmp_path / "uncut")[0] == 0
    mend = cut_after(7)
    with pytest.raises(Cut):
        script(finetune, *command, "--save-every", 1, "--out", tmp_path / "old")
    mend()
    (tmp_path / "old").rename(tmp_path / "moved")
    status, _, err = script(finetune, "--resume", tmp_path / "moved/last.pt")
    assert status == 0, err
    assert same(tmp_path / "uncut/best.pt", tmp_path / "moved/best.pt")
    assert not (tmp_path / "old").exists()


def test_finetuning_refuses_to_go_on_with_other_data(
    pretrained, folder, tmp_path, script, cut_after
):
    command = [
        "--ckpt",
        pretrained / "cnn.pt",
        "--epochs",
        4,
        "--bs",
        8,
        "--out",
        tmp_path / "tuned",
    ]
    mend = cut_after(7)
    with pytest.raises(Cut):
        script(finetune, *command, "--save-every", 1)
    mend()
    (folder / "a/0.png").rename(folder / "b/new.png")
    status, _, err = script(finetune, *command, "--resume")
    assert status == 2 and "not those that the run" in one_line(err)


def test_a_resumed_finished_finetuning_trains_nothing(pretrained, tmp_path, script, cut_after):
    command = ["--ckpt", pretrained / "cnn.pt", "--epochs", 3, "--out", tmp_path / "tuned"]
    assert script(finetune, *command)[0] == 0
    kept = {
        name: (tmp_path / "tuned" / name).read_text()
        for name in ("confusion.csv", "predictions.csv", "log.jsonl")
    }
    for name in kept:
        (tmp_path / "tuned" / name).unlink()
    cut_after(1)  # no step may be taken
    status, _, err = script(finetune, *command, "--resume")
    assert status == 0, err
    assert kept == {name: (tmp_path / "tuned" / name).read_text() for name in kept}


def test_other_flags_come_from_the_checkpoint(folder, tmp_path, script, cut_after):
    mend = cut_after(9)
    with pytest.raises(Cut):
        script(pretrain, "--data", folder, *LONG, "--save-every", 2, "--out", tmp_path / "run")
    mend()
    last = tmp_path / "run/last.pt"
    before = last.read_bytes()
    for changed, message in (
        (["--lr", "0.5"], "--lr 0.001 (not 0.5)"),
        (["--bs", "4", "--seed", "3"], "--seed 0 (not 3), --bs 5 (not 4)"),
        (["--epochs", "2"], "--epochs 4"),
        (["--data", tmp_path], "--data"),
    ):
        status, _, err = script(pretrain, "--resume", last, *changed)
        assert status == 2 and message in one_line(err), err
    assert last.read_bytes() == before
    assert script(pretrain, "--resume", last, "--workers", 1)[0] == 0
    assert script(pretrain, "--data", folder, *LONG, "--out", tmp_path / "uncut")[0] == 0
    assert same(tmp_path / "run/cnn.pt", tmp_path / "uncut/cnn.pt")


def test_epochs_may_grow_until_a_snapshot_is_taken(folder, tmp_path, script):
    short, long = [*LONG[:]], [*LONG[:]]
    short[short.index("--epochs") + 1] = 1
    short[short.index("--t-max") + 1] = long[long.index("--t-max") + 1] = 9
    long[long.index("--epochs") + 1] = 2
    assert script(pretrain, "--data", folder, *short, "--out", tmp_path / "a")[0] == 0
    status, _, err = script(pretrain, "--resume", tmp_path / "a/last.pt", "--epochs", 2)
    assert status == 0, err
    assert script(pretrain, "--data", folder, *long, "--out", tmp_path / "b")[0] == 0
    assert same(tmp_path / "a/vit.pt", tmp_path / "b/vit.pt")
    assert script(pretrain, "--resume", tmp_path / "a/last.pt", "--epochs", 3)[0] == 0
    assert torch.load(tmp_path / "a/cnn.pt", weights_only=True)["swa_snapshots"] == 1
    status, _, err = script(pretrain, "--resume", tmp_path / "a/last.pt", "--epochs", 4)
    assert status == 2 and "snapshot" in one_line(err)


def test_resuming_a_finished_run_rewrites_what_is_missing(pretrained, script):
    before = weights(pretrained / "cnn.pt")
    status, out, _ = script(pretrain, "--out", pretrained, "--resume")
    assert status == 0 and "finished" in out
    for name in ("cnn.pt", "split.csv", "log.jsonl"):
        (pretrained / name).unlink()
    assert script(pretrain, "--out", pretrained, "--resume")[0] == 0
    assert all(torch.equal(v, before[k]) for k, v in weights(pretrained / "cnn.pt").items())
    assert len((pretrained / "log.jsonl").read_text().splitlines()) == 2
    tune = ["--ckpt", pretrained / "cnn.pt", "--epochs", 1, "--seeds", 0, 1]
    assert script(finetune, *tune)[0] == 0
    metrics = pretrained / "finetune_cnn_1/seed1/metrics.json"
    scores = json.loads(metrics.read_text())["test"]
    metrics.unlink()
    status, out, err = script(finetune, *tune, "--resume")
    assert status == 0 and "seed 0" in out and "±" in out, err
    assert json.loads(metrics.read_text())["test"] == scores


def test_resume_refuses_what_it_cannot_go_on_from(folder, tmp_path, script):
    status, _, err = script(pretrain, "--resume", tmp_path / "no.pt")
    assert status == 2 and "no.pt" in one_line(err)
    torch.save({"x": 1}, tmp_path / "other.pt")
    status, _, err = script(pretrain, "--resume", tmp_path / "other.pt")
    assert status == 2 and "no training state" in one_line(err)
    assert script(pretrain, "--data", folder, *LONG, "--out", tmp_path / "run")[0] == 0
    status, _, err = script(finetune, "--resume", tmp_path / "run/last.pt")
    assert status == 2 and "no training state of finetune.py" in one_line(err)
    (folder / "a/0.png").write_bytes((folder / "a/1.png").read_bytes())
    (tmp_path / "run/cnn.pt").unlink()
    status, _, err = script(pretrain, "--resume", tmp_path / "run/last.pt")
    assert status == 2 and "training images are not those" in one_line(err)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_a_checkpoint(folder, tmp_path, number, status):
    command = [
        sys.executable,
        ROOT / "pretrain.py",
        "--data",
        folder,
        *LONG,
        "--out",
        tmp_path / "run",
        "--workers",
        1,
    ]
    command[command.index("--epochs") + 1] = 2000
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run/last.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == status, err
    assert "--resume" in one_line(err)
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert state["iteration"] == state["epoch"] * 4 + state["batch"]


def test_kills(folder, tmp_path):
    assert (
        kill_and_resume(
            "pretrain.py",
            2,
            ["--data", str(folder), *map(str, LONG), "--save-every", "2"],
            tmp_path,
        )
        >= 1
    )


FULL = """
import resource, signal, sys, torch
sys.path.insert(0, {root!r})
from common import checkpoint, cli
from common.run import Run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
cli.run(lambda: checkpoint.save("last.pt", {{"bad": torch.zeros(1_000_000)}}))
"""


def test_a_full_disk_leaves_the_last_good_file(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"good": torch.ones(3)})
    done = run("-c", FULL.format(root=str(ROOT)), cwd=tmp_path)
    assert done.returncode == 1 and "last.pt: File too large" in one_line(done.stderr)
    assert torch.equal(checkpoint.load(tmp_path / "last.pt")["good"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_save_every(tmp_path):
    assert cli.save_every("20") == 20 and cli.save_every("10m") == 10.0

    def due(every, iteration, seconds_ago=0):
        run = Run(tmp_path, torch.device("cpu"), None, {}, save_every=every)
        run.progress["iteration"], run.saved = iteration, time.perf_counter() - seconds_ago
        return run._agree()[1]

    assert due(20, 40) and not due(20, 41) and not due(None, 20)
    assert due(0.5, 1, 31) and not due(0.5, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 with a scaler needs a CUDA GPU")
def test_fp16_scaling_trains_and_resumes(folder, tmp_path, script, cut_after):
    arguments = ["--data", folder, *LONG, "--device", "cuda", "--amp", "fp16", "--save-every", 2]
    mend = cut_after(9)
    with pytest.raises(Cut):
        script(pretrain, *arguments, "--out", tmp_path / "run")
    mend()
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert state["scaler"]["scale"] > 1
    status, _, err = script(pretrain, "--resume", tmp_path / "run/last.pt")
    assert status == 0, err
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run/cnn.pt").values())


def test_initial_weights_may_lie_in_the_folder_that_is_overwritten(folder, tmp_path, script):
    """They are read before anything is removed, and a resumed run does without them."""
    out, common = tmp_path / "run", ["--data", folder, *ARMS, "--epochs", 1]
    assert script(pretrain, *common, "--out", out)[0] == 0
    first = torch.load(out / "cnn.pt", weights_only=True)["seen"]
    inits = ["--init-cnn", out / "cnn.pt", "--init-vit", out / "vit.pt"]
    status, _, err = script(pretrain, *common, *inits, "--out", out, "--overwrite")
    assert status == 0, err
    assert torch.equal(torch.load(out / "cnn.pt", weights_only=True)["seen"], first)
    (out / "vit.pt").unlink()
    (out / "cnn.pt").rename(tmp_path / "elsewhere.pt")
    status, _, err = script(pretrain, "--out", out, "--resume")
    assert status == 0 and (out / "cnn.pt").exists(), err
