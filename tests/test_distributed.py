"""Two processes under torchrun, on the CPU (gloo)."""

import json

import numpy as np
import pytest
import torch
from conftest import ARMS, ROOT, draw_classes, torchrun

import data
import pretrain
from cass import CASS, build_arm
from losses import cosine_loss, vicreg


@pytest.mark.parametrize("n, batch_size", [(40, 4), (37, 4), (33, 8), (5, 2), (6, 4)])
def test_every_image_comes_once_an_epoch_across_the_processes(n, batch_size):
    ranks = [data.EpochBatches(n, batch_size, seed=3, rank=r, world_size=2) for r in (0, 1)]
    for epoch in (0, 1):
        for rank in ranks:
            rank.epoch = epoch
        shares = [list(rank) for rank in ranks]
        assert len(shares[0]) == len(shares[1]) == len(ranks[0])
        seen = sorted(i for share in shares for batch in share for _, i in batch)
        assert len(seen) == len(set(seen)) and n - len(seen) < 4
        assert all(len(batch) >= 2 for share in shares for batch in share)
        whole = data.EpochBatches(n, 2 * batch_size, seed=3)
        whole.epoch = epoch
        for both, one in zip(zip(*shares), whole):
            assert both[0] + both[1] == one


def test_batches_can_start_in_the_middle():
    batches = data.EpochBatches(37, 4, seed=3)
    everything = list(batches)
    batches.start = 3
    assert list(batches) == everything[3:]


STEP = """
import sys, torch
sys.path.insert(0, {root!r})
from common import distributed
from cass import CASS, build_arm
from losses import vicreg
from torch.nn.parallel import DistributedDataParallel
distributed.start(torch.device("cpu"))

def step(part, **kwargs):
    method = CASS(*arms(), **kwargs)
    ddp = DistributedDataParallel(method)  # must live until the backward pass is over
    loss = ddp(part)
    loss.backward()
    return loss.detach(), {{n: p.grad for n, p in method.named_parameters()}}

def arms():
    torch.manual_seed(0)
    return build_arm("test_vit", 32), build_arm("test_vit2", 32)

arms()  # the seed, and as many draws as before the test's own images
images, first = torch.randn(16, 3, 32, 32), distributed.RANK == 0
found = [step(images[:8] if first else images[8:])]
whole = lambda R, T: vicreg(distributed.gather(R), distributed.gather(T))
found.append(step(images[:6] if first else images[6:11], objective=whole))  # of different size
if not first:
    torch.save(found, "found.pt")
distributed.stop()
"""


def test_gradients_of_two_processes_are_those_of_one_with_the_whole_batch(tmp_path):
    """Of equation 1, with 2 x 8 images, and of VICReg, which sees 6 + 5 as one batch."""
    (tmp_path / "step.py").write_text(STEP.format(root=str(ROOT)))
    done = torchrun(tmp_path / "step.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for n, objective, (share, gradients) in zip((16, 11), (cosine_loss, vicreg), found):
        torch.manual_seed(0)
        arms = build_arm("test_vit", 32), build_arm("test_vit2", 32)
        images = torch.randn(16, 3, 32, 32)[:n]
        method = CASS(*arms, objective=objective)
        loss = method(images)
        loss.backward()
        if objective is vicreg:
            torch.testing.assert_close(share, loss.detach(), rtol=1e-4, atol=1e-5)
        close = {"rtol": 1e-3 if objective is vicreg else 1e-4, "atol": 1e-5}
        for name, parameter in method.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, **close)


def test_dino_trains_on_two_processes(tmp_path):
    images = draw_classes(tmp_path / "images", {"a": 14, "b": 10, "c": 6})
    done = torchrun(
        "-m",
        "tools.dino",
        "--data",
        images,
        *ARMS,
        "--epochs",
        1,
        "--bs",
        4,
        "--outputs",
        64,
        "--crops",
        1,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["arms"] for row in log] == ["cnn", "vit"]
    assert (tmp_path / "vit.pt").exists()


ENTRY = """
import sys, torch
sys.path.insert(0, {root!r})
from common import cli, distributed
import pretrain
train = pretrain.train
def note(method, *more):
    swa = train(method, *more)
    torch.save(method.state_dict(), f"rank{{distributed.RANK}}.pt")
    return swa
pretrain.train = note
cli.run(pretrain.main)
"""


def test_a_whole_run_on_two_processes(tmp_path, script):
    """Both hold the same weights at the end; they are those of one process with twice the batch."""
    folder = draw_classes(tmp_path / "images", {"a": 14, "b": 14, "c": 14})
    (tmp_path / "entry.py").write_text(ENTRY.format(root=str(ROOT)))
    arguments = [
        "--data",
        folder,
        *ARMS,
        "--cnn",
        "test_vit2",
        "--epochs",
        3,
        "--t-max",
        3,
        "--swa-start",
        0.3,
        "--amp",
        "off",
        "--lr",
        1e-4,
    ]
    done = torchrun(tmp_path / "entry.py", *arguments, "--bs", 4, "--out", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    status, _, err = script(pretrain, *arguments, "--bs", 8, "--out", tmp_path / "one")
    assert status == 0, err
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("two", "one")
    ]
    np.testing.assert_allclose(
        [x["loss"] for x in logs[0]], [x["loss"] for x in logs[1]], rtol=0.05
    )
    two, one = (torch.load(tmp_path / n / "vit.pt", weights_only=True) for n in ("two", "one"))
    assert two["swa_snapshots"] == one["swa_snapshots"] >= 1
    status, _, err = script(pretrain, "--resume", tmp_path / "two/last.pt")
    assert status == 2 and "torchrun --nproc-per-node 2" in err
    resumed = torchrun(ROOT / "pretrain.py", "--resume", "two/last.pt", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr


def test_a_process_that_dies_ends_the_run_with_an_error(tmp_path):
    folder = draw_classes(tmp_path / "images", {"a": 14, "b": 14})
    entry = ENTRY.format(root=str(ROOT)).replace(
        "cli.run",
        """
if distributed.RANK == 1:
    import os, swa
    swa.SWA.after_step = lambda self, iteration: iteration == 2 and os.kill(os.getpid(), 9)
cli.run""",
    )
    (tmp_path / "entry.py").write_text(entry)
    done = torchrun(
        tmp_path / "entry.py",
        "--data",
        folder,
        *ARMS,
        "--epochs",
        50,
        "--bs",
        4,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode != 0
    assert not (tmp_path / "cnn.pt").exists()
