"""Nothing lost, nothing hung, no code run: each kind of fault with a case of its own. Damaged files
are in fuzz.py, of which a small part runs here."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ARMS, ROOT, draw_classes, finetune, one_line, picture, pretrain, run
from fuzz import KINDS, fuzz
from PIL import Image

import data
import predict
from common import cli, decode, pixels
from common.cli import UserError
from tools import compare

TINY = [*ARMS, "--epochs", 1, "--bs", 8, "--workers", 0]


def sides(folder):
    """{path: split} of a run's split.csv."""
    with open(folder / "split.csv", encoding="utf-8") as file:
        return {row["path"]: row["split"] for row in csv.DictReader(file)}


def begin(code, cwd, *arguments, **env):
    """Start Python code that has the scripts' folder on its path."""
    prefix = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    command = [sys.executable, "-c", prefix + code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, **env}, **pipes)


MAIN = """
import os, signal, time
import {module} as script, data
from common import cli, collapse, pixels
import swa
{patch}
sys.argv = ["{module}.py", *sys.argv[1:]]
cli.run(script.main)
"""


def patched(module, patch, cwd, *arguments, timeout=100, **env):
    """A script with a fault put in: (status, stderr)."""
    process = begin(MAIN.format(module=module, patch=patch), cwd, *arguments, **env)
    _, err = process.communicate(timeout=timeout)
    return process.returncode, err


def test_overwriting_with_a_wrong_command_loses_nothing(pretrained, folder, script):
    small = ["--cnn", "resnet10t", "--vit", "test_vit", "--init", "random", "--img-size", 32]
    tuning = [finetune, "--ckpt", pretrained / "cnn.pt", "--epochs", 1, "--seeds", 0, 0]
    assert script(*tuning)[0] == 0  # a seed that is named twice is one
    kept = {p: p.read_bytes() for p in sorted(pretrained.rglob("*")) if p.is_file()}
    for command in (  # a batch of one image, which batch-norm refuses in the first step
        [pretrain, "--data", folder, *small, "--bs", 1, "--overwrite", "--out", pretrained],
        [finetune, "--data", folder, "--arch", "resnet10t", "--init", "random", "--img-size", 32]
        + ["--bs", 1, "--overwrite", "--out", pretrained / "finetune_cnn_1"],
    ):
        status, _, err = script(*command)
        assert status == 2 and "a batch of 1 is too small" in one_line(err)
        assert kept == {p: p.read_bytes() for p in sorted(pretrained.rglob("*")) if p.is_file()}


def test_no_command_writes_over_a_run_of_another_kind(pretrained, folder, script):
    assert script(finetune, "--ckpt", pretrained / "cnn.pt", "--epochs", 1)[0] == 0
    tuned = pretrained / "finetune_cnn_1"
    for command in (
        [pretrain, "--data", folder, *TINY, "--out", tuned],
        [finetune, "--data", folder, "--ckpt", pretrained / "cnn.pt", "--out", pretrained],
        [data, folder, "--out", tuned],
        [data, folder, "--out", pretrained],
    ):
        status, _, err = script(*command)
        assert status == 2 and "; give another --out" in one_line(err), command


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_predicted(
    pretrained, folder, script, monkeypatch
):
    def refused(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(predict.tempfile, "TemporaryFile", refused)
    status, _, err = script(predict, "--ckpt", "no.pt", "--data", folder, "--out", "deep/p.csv")
    assert status == 2 and "deep: cannot be written to (--out): Permission" in one_line(err)


# the split that a checkpoint carries


def grouped(tmp_path):
    """64 images of 16 patients in two classes, four of them exact copies of another patient's."""
    rows = ["image,label,patient"]
    for i in range(64):
        Image.fromarray(picture(i - 4 if i in (7, 23) else i)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'ab'[i // 4 % 2]},p{i // 4}")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    return ["--data", tmp_path / "t.csv", "--group-col", "patient"]


def test_finetuning_and_baseline_keep_pretrainings_split(tmp_path, script):
    given = grouped(tmp_path)
    assert script(pretrain, *given, *TINY, "--seed", 3, "--out", tmp_path / "run")[0] == 0
    before = sides(tmp_path / "run")
    assert set(before.values()) == {"train", "val", "test"}
    tune = ["--epochs", 1, "--workers", 0]
    assert (
        script(finetune, "--ckpt", tmp_path / "run/cnn.pt", *tune, "--out", tmp_path / "a")[0] == 0
    )
    arch = ["--arch", "test_resnet", "--init", "random", "--img-size", 32, "--seed", 3]
    assert script(finetune, *arch, *given, *tune, "--out", tmp_path / "b")[0] == 0
    assert sides(tmp_path / "a") == sides(tmp_path / "b") == before
    again = ["--init-cnn", tmp_path / "run/cnn.pt", "--seed", 9]  # another seed would draw another
    assert script(pretrain, *given, *TINY, *again, "--out", tmp_path / "c")[0] == 0
    assert sides(tmp_path / "c") == before
    assert (
        script(finetune, "--ckpt", tmp_path / "a/best.pt", *tune, "--out", tmp_path / "d")[0] == 0
    )
    assert sides(tmp_path / "d") == before


def test_a_weights_file_carries_no_names(tmp_path, script):
    given = grouped(tmp_path)
    assert script(pretrain, *given, *TINY, "--out", tmp_path / "run")[0] == 0
    weights = torch.load(tmp_path / "run/cnn.pt", weights_only=True)
    assert weights["split"].shape == (2, 62) and weights["split"].dtype == torch.int64
    text = repr({k: v for k, v in weights.items() if k != "state_dict"})
    assert "7.png" not in text and "p3" not in text


def test_images_that_the_split_does_not_hold_are_drawn_beside_it(folder, tmp_path, script):
    assert script(pretrain, "--data", folder, *TINY, "--out", tmp_path / "run")[0] == 0
    before = sides(tmp_path / "run")
    for i in range(30):
        Image.fromarray(picture(9000 + i)).save(folder / f"{'abc'[i % 3]}/new{i}.png")
    tune = ["--ckpt", tmp_path / "run/cnn.pt", "--epochs", 1, "--out", tmp_path / "a"]
    assert script(finetune, *tune)[0] == 0
    after = sides(tmp_path / "a")
    assert len(after) == 60 and before.items() <= after.items()
    drawn = [side for name, side in after.items() if name not in before]
    assert "test" in drawn and "train" in drawn


def test_a_small_drawn_split_is_said_and_nobody_stops_early_on_it(tmp_path, script):
    folder = draw_classes(tmp_path / "few", {"a": 9, "b": 9})
    arch = ["--arch", "test_resnet", "--init", "random", "--img-size", 32, "--lr", 0.1]
    more = ["--epochs", 9, "--patience", 1, "--out", tmp_path / "a"]
    status, out, err = script(finetune, *arch, "--data", folder, *more)
    assert status == 0, err
    assert "drawn for val: 1, too few" in out and "--patience is ignored" in out
    assert len((tmp_path / "a/log.jsonl").read_text().splitlines()) == 9


# output folders


def test_a_second_run_into_a_folder_is_refused(folder, tmp_path, script):
    cli.claim(tmp_path / "same")
    try:
        done = run(ROOT / "pretrain.py", "--data", folder, *TINY, "--out", "same", cwd=tmp_path)
        assert done.returncode == 2 and "another run writes there" in one_line(done.stderr)
    finally:
        cli._afterwards.close()
    status, _, err = script(pretrain, "--data", folder, *TINY, "--out", tmp_path / "same")
    assert status == 0, err  # a lock does not outlive its process


def test_a_killed_run_leaves_no_lock(folder, tmp_path, script):
    patch = "collapse.Monitor.__call__ = lambda *a: os.kill(os.getpid(), signal.SIGKILL)"
    arguments = ["--data", folder, *TINY, "--out", tmp_path / "run"]
    assert patched("pretrain", patch, tmp_path, *arguments)[0] == -signal.SIGKILL
    assert script(pretrain, *arguments, "--resume")[0] == 0


def test_seeds_can_be_added_but_not_mixed(pretrained, script):
    tune = ["--ckpt", pretrained / "cnn.pt", "--epochs", 1, "--frac", 0.5, "--seeds"]
    out = pretrained / "finetune_cnn_0.5"
    assert script(finetune, *tune, 0, 1)[0] == 0
    first = (out / "summary.json").read_text()
    for seeds in ((2, 3), (4,)):
        status, _, err = script(finetune, *tune, *seeds)
        assert status == 2 and "seed0" in one_line(err)
    assert (out / "summary.json").read_text() == first and not (out / "metrics.json").exists()
    best = (out / "seed1/best.pt").stat().st_mtime_ns
    status, stdout, err = script(finetune, *tune, 0, 1, 2, "--resume")
    assert status == 0, err
    assert "seed 1" in stdout and (out / "seed1/best.pt").stat().st_mtime_ns == best
    assert json.loads((out / "summary.json").read_text())["seeds"] == [0, 1, 2]
    (out / "summary.json").unlink()
    assert script(finetune, *tune[:-1], "--resume")[0] == 0  # the last command's seeds
    assert json.loads((out / "summary.json").read_text())["seeds"] == [0, 1, 2]
    vit = ["--ckpt", pretrained / "vit.pt", *tune[2:], 0, 1, 2]
    assert script(finetune, *vit)[0] == 0
    both = [out, pretrained / "finetune_vit_0.5", "--out", pretrained / "mean.json"]
    (out / "seed2/metrics.json").unlink()
    status, _, err = script(compare, *both)
    assert status == 2 and "unfinished: seed2" in one_line(err)
    assert script(finetune, *tune[:-1], "--resume")[0] == 0
    assert script(compare, *both)[0] == 0


@pytest.mark.parametrize("out", ["file/below", "x" * 300, "/proc/nothing"])
def test_an_output_folder_that_cannot_be_made_is_found_first(
    out, folder, tmp_path, script, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(pixels, "decode", lambda *_: pytest.fail("images were decoded before"))
    status, _, err = script(pretrain, "--data", folder, *TINY, "--out", out)
    assert status == 2 and "--out" in one_line(err)


def test_what_is_read_is_not_replaced(pretrained, folder, tmp_path, script):
    table = tmp_path / "a/split.csv"
    table.parent.mkdir()
    table.write_text("image,label\n" + "".join(f"a/{i}.png,{'xy'[i % 2]}\n" for i in range(14)))
    best = tmp_path / "a/best.pt"
    best.write_bytes((pretrained / "cnn.pt").read_bytes())
    before = table.read_bytes(), best.read_bytes()
    csv_file = ["--data", table, "--images", folder]
    for command in (
        (data, table, "--images", folder, "--out", table.parent),
        (pretrain, *csv_file, *TINY, "--out", table.parent),
        (finetune, "--ckpt", best, "--data", folder, "--out", table.parent, "--overwrite"),
        (predict, "--ckpt", best, *csv_file, "--out", table, "--overwrite"),
        (predict, "--ckpt", best, *csv_file, "--embeddings", best, "--overwrite"),
    ):
        status, _, err = script(*command)
        assert status == 2 and "would be replaced" in one_line(err)
    assert (table.read_bytes(), best.read_bytes()) == before


# the decoded map


def test_rot_in_the_map_is_noticed_and_mended(folder, tmp_path, script):
    def report():
        return script(data, folder, "--img-size", 32)

    _, right, _ = report()
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for at in (3, 200, len(whole) - 5 * 3 * 32 * 32):  # checksum, table, pixels
        broken = bytearray(whole)
        broken[at : at + 64] = bytes(64)
        file.write_bytes(broken)
        images = data.read(folder)
        try:
            images.decode(32, tmp_path / "cache")
            found = [images.images[i].copy() for i in range(len(images))]
        except UserError as error:
            assert str(file) in str(error)
        else:
            assert all((p == pixels.decode(s, 32)[0]).all() for p, s in zip(found, images.sources))
        del images
        assert report() == (0, right, "") or report()[1] == right


def test_a_map_is_not_removed_under_a_reader(tmp_path):
    paths = []
    for i in range(8):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(picture(i)).save(paths[-1])
    _, images, _ = decode.decode_all(paths, 16, "set", tmp_path / "cache")
    _, others, _ = decode.decode_all(paths[:5], 16, "set", tmp_path / "cache")
    again = decode.DecodedImages(*images.__reduce__()[1])  # as a spawned worker opens it
    assert (again[7] == pixels.decode(paths[7], 16)[0]).all()
    del images, again
    decode.decode_all(paths[:5], 16, "set", tmp_path / "cache")
    decode.decode_all(paths[:4], 16, "set", tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.map"))) == 2  # of `others`, and the last


def test_an_image_changed_under_its_old_size_and_time_is_noticed(tmp_path):
    path = tmp_path / "a.bmp"
    for value in (10, 200):
        Image.new("RGB", (9, 9), (value,) * 3).save(path)
        os.utime(path, ns=(10**18, 10**18))
        _, images, _ = decode.decode_all([str(path)], 8, "set", tmp_path / "cache")
        assert images[0].max() == value


# hangs


FORKED = ["--workers", 2]


def test_loader_processes_end_with_a_run_that_is_done(folder, tmp_path):
    """They ignore the signal that exit sends them."""
    arguments = ["--data", folder, *TINY, *FORKED, "--out", tmp_path / "run"]
    status, err = patched("pretrain", "", tmp_path, *arguments, timeout=60)
    assert status == 0, err


def test_loader_processes_end_with_a_program_that_uses_the_loader(tmp_path):
    code = """import torch, data
dataset = [torch.zeros(3, 8, 8)] * 9
batches = torch.utils.data.BatchSampler(range(9), 3, False)
loader = data.loader(dataset, batches, torch.device("cpu"), workers=2)
assert len([*loader]) == 3"""
    process = begin(code, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_a_killed_loader_process_ends_the_run_in_one_line(folder, tmp_path):
    patch = "data.AugmentedImages.__getitem__ = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
    patch += "script.Run.announce = lambda *a, **k: True"
    arguments = ["--data", folder, *TINY, *FORKED, "--out", tmp_path / "run"]
    status, err = patched("pretrain", patch, tmp_path, *arguments)
    assert status == 1 and "--workers 0" in one_line(err)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_goes_away_during_training_is_named(workers, folder, tmp_path):
    patch = "real = script.Run.announce\n"
    patch += f"script.Run.announce = lambda *a, **k: not os.remove({str(folder / 'a/3.png')!r})"
    arguments = [
        "--data",
        folder,
        *TINY,
        "--workers",
        workers,
        "--no-cache",
        "--out",
        tmp_path / "r",
    ]
    status, err = patched("pretrain", patch, tmp_path, *arguments)
    assert status == 2 and "a/3.png" in one_line(err)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_an_unforeseen_error_ends_with_its_traceback_and_a_line(method, folder, tmp_path):
    """With loader processes alive, which ignore the signals that exit sends them."""
    patch = f"import multiprocessing; multiprocessing.set_start_method({method!r})\n"
    patch += "def fail(*a):\n    raise ZeroDivisionError('unforeseen')\nscript.Run.note = fail\n"
    arguments = ["--data", folder, *TINY, *FORKED, "--out", tmp_path / "run"]
    code = MAIN.format(module="pretrain", patch=patch)
    (tmp_path / "entry.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nif __name__ == '__main__':\n"
        + "\n".join("    " + line for line in code.splitlines())
    )
    done = run("entry.py", *arguments, cwd=tmp_path, timeout=100)
    assert done.returncode == 1 and "ZeroDivisionError: unforeseen" in done.stderr
    assert "--resume" in done.stderr.strip().splitlines()[-1]


def test_a_named_pipe_among_the_images_is_refused(folder, tmp_path, script):
    os.mkfifo(folder / "a/pipe.png")
    status, _, err = script(data, folder, "--img-size", 32)
    assert status == 2 and "a/pipe.png (not a regular file)" in one_line(err)
    for module, flag in ((predict, "--ckpt"), (finetune, "--ckpt")):
        arguments = [flag, folder / "a/pipe.png", "--data", folder, "--out", tmp_path / "o.csv"]
        status, _, err = script(module, *arguments)
        assert status == 2 and "no such file" in one_line(err)


# one line instead of a traceback


def test_a_batch_that_batch_norm_cannot_take(folder, tmp_path, script):
    arms = ["--cnn", "resnet10t", "--vit", "test_vit", "--img-size", 32, "--init", "random"]
    status, _, err = script(pretrain, "--data", folder, *arms, "--bs", 1, "--out", tmp_path / "a")
    assert status == 2 and "a batch of 1 is too small" in one_line(err)


def test_memory_that_is_not_there(folder, tmp_path):
    patch = "import torch\ndef fail(*a):\n    torch.empty(1 << 60)\nscript.Run.note = fail\n"
    arguments = ["--data", folder, *TINY, "--out", tmp_path / "run"]
    status, err = patched("pretrain", patch, tmp_path, *arguments)
    assert status == 1 and "out of memory" in one_line(err) and "--bs" in err


def test_no_home_needs_no_home(folder, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "CASS_CACHE", "XDG_CACHE_HOME")}
    code = "import os, runpy, sys\nos.path.expanduser = lambda p: p\nsys.argv = sys.argv[1:]\n"
    code += f"sys.path.insert(0, {str(ROOT)!r})\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, ROOT / "data.py", folder, "--img-size", "32"]
    options = {"cwd": tmp_path, "env": {**env, "TMPDIR": str(tmp_path)}, "text": True}
    done = subprocess.run([*map(str, command)], capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("redirect", ["| true", ">&-", "2>&-", "2>/dev/null | head -1"])
def test_closed_and_broken_pipes(redirect, folder, tmp_path):
    command = f"{sys.executable} {ROOT / 'data.py'} {folder} --img-size 32 2>err {redirect}"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert "Traceback" not in (tmp_path / "err").read_text()


@pytest.mark.parametrize("split", ["nothing.csv", "."])
def test_split_files_that_are_none(split, folder, tmp_path, script):
    status, _, err = script(data, folder, "--split", tmp_path / split)
    assert status == 2 and str(tmp_path) in one_line(err)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"arguments": 5}', '{"a": 1}', '{"arguments": {"bs": 0}}', "\0" * 9]
)
def test_broken_json_beside_a_run(text, pretrained, script):
    tune = ["--ckpt", pretrained / "cnn.pt", "--epochs", 1]
    assert script(finetune, *tune)[0] == 0
    (pretrained / "finetune_cnn_1/config.json").write_text(text)
    status, _, err = script(finetune, *tune, "--resume")
    assert status == 2 and "config.json" in one_line(err)


CHANGES = {
    "rng": lambda s: s.pop("rng"),
    "args": lambda s: s.update(args=None),
    "--bs": lambda s: s["args"].update(bs=0),
    "--cnn": lambda s: s["args"].update(cnn="no_such_model"),
    "processes": lambda s: s.pop("processes"),
    "epoch": lambda s: s.update(epoch=-1),
    "loss": lambda s: s.update(loss=[float("nan")]),
    "log": lambda s: s.update(log=[1]),
    "initial": lambda s: s.update(initial=torch.zeros(3, 1)),
    "method": lambda s: s["method"].popitem(),
    "optimizer_cnn": lambda s: s.update(optimizer_cnn={}),
    "scheduler_vit": lambda s: s.pop("scheduler_vit"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_every_part_of_last_pt_is_checked(field, pretrained, script):
    (pretrained / "cnn.pt").unlink()
    state = torch.load(pretrained / "last.pt", weights_only=True)
    CHANGES[field](state)
    torch.save(state, pretrained / "last.pt")
    status, _, err = script(pretrain, "--out", pretrained, "--resume")
    assert status == 2 and field in one_line(err)


def test_bits_that_flip_in_a_weights_file_are_noticed(pretrained, script, tmp_path):
    content = bytearray((pretrained / "cnn.pt").read_bytes())
    content[len(content) // 2] ^= 4  # among the numbers of a tensor
    (pretrained / "cnn.pt").write_bytes(content)
    status, _, err = script(finetune, "--ckpt", pretrained / "cnn.pt")
    assert status == 2 and "cnn.pt" in one_line(err)


# signals


SLOW = """
real = {what}
def slow(*a):
    print("here", flush=True)
    time.sleep({seconds})
    return real(*a)
{what} = slow
"""
STOPS = {"pixels.decode": 0.3, "collapse.Monitor.__call__": 2, "swa.update_bn": 60}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("where", STOPS)
def test_signals_outside_the_loop_leave_in_one_line(where, number, folder, tmp_path, script):
    arguments = ["--data", folder, *TINY, "--t-max", 1, "--swa-start", 0, "--out", tmp_path / "run"]
    patch = SLOW.format(what=where, seconds=STOPS[where])
    code = MAIN.format(module="pretrain", patch=patch)
    process = begin(code, tmp_path, *arguments)
    for line in process.stdout:
        if "here" in line:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume" in one_line(err)
    assert script(pretrain, *arguments, "--resume")[0] == 0  # what the line says works


def test_nohup_holds_sighup_back(folder, tmp_path):
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    patch = "script.Run.mean_loss = lambda *a: os.kill(os.getpid(), signal.SIGHUP) or 1.0"
    code += MAIN.format(module="pretrain", patch=patch)
    process = begin(code, tmp_path, "--data", folder, *TINY, "--out", tmp_path / "run")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


# models and damaged files


@pytest.mark.parametrize("name", ["levit_128", "swiftformer_xs"])
def test_models_with_two_heads_take_their_own_weights(name, folder, tmp_path, script):
    arms = ["--cnn", name, "--vit", "test_vit", "--init", "random", "--img-size", 64]
    few = ["--epochs", 1, "--bs", 8, "--lr", 1e-4]
    assert script(pretrain, "--data", folder, *arms, *few, "--out", tmp_path / "run")[0] == 0
    start = ["--arch", name, "--init", tmp_path / "run/cnn.pt", "--img-size", 64, "--data", folder]
    status, _, err = script(finetune, *start, *few, "--allow-seen", "--out", tmp_path / "a")
    assert status == 0, err


def test_weights_of_five_dimensions_train():
    model = torch.nn.Sequential(torch.nn.Conv3d(1, 1, 1))
    from common.arms import channels_last

    assert channels_last(model) is model


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind):
    found = fuzz(kind, 25, seed=1)
    assert not found["wrong"] and found["right"] + found["refused"] == 25


def test_the_fuzzing_would_notice(monkeypatch):
    """With the checksums of rows or of the archive left out, wrong results come through."""
    monkeypatch.setattr(decode.zlib, "crc32", lambda *_: 0)
    assert any("wrong result" in text for text in fuzz("map", 40, seed=1)["wrong"])


def test_processes_that_differ_are_told(monkeypatch):
    from common import distributed

    assert distributed.agree([1, 2], "cpu")
    monkeypatch.setattr(distributed, "all_reduce", lambda x, op="SUM": x + (op == "MAX"))
    assert not distributed.agree([1, 2], "cpu")


def test_flags_that_mean_nothing_are_refused_and_the_defaults_are_shown(folder, script):
    for wrong in (["--swa-start", 2], ["--save-every=-1m"], ["--save-every", "nanm"], ["--cache"]):
        status, _, err = script(pretrain, "--data", folder, *TINY, *wrong)
        assert status == 2 and f"argument {wrong[0].partition('=')[0]}" in one_line(err), wrong
    status, said, _ = script(finetune, "--help")
    said = " ".join(said.split())
    assert "images per step (default: 16)" in said and "(F.3.2) (default: 5)" in said
    assert "(default: None)" not in said and "(default: False)" not in said


def test_the_next_command_works(folder, tmp_path, script):
    status, said, err = script(pretrain, "--data", folder, *TINY, "--out", tmp_path / "a")
    assert status == 0 and said.endswith(f"next: python finetune.py --ckpt {tmp_path}/a/cnn.pt\n")
    flags = [*TINY, "--label-col", "none", "--out", tmp_path / "b"]
    status, said, err = script(pretrain, "--data", folder, *flags)
    assert status == 0 and "next:" not in said, err  # without labels none can be tuned
