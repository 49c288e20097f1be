"""One process per GPU under torchrun; without torchrun one process, and nothing happens here."""

import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def rank():
    """Number of this process, from 0. Process 0 alone writes and prints."""
    return int(os.environ.get("RANK", 0))


def world():
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device):
    """Join the other processes, each with a device of its own."""
    if world() == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    if rank():
        sys.stdout = open(os.devnull, "w")


def over_all(tensor, op="SUM"):
    """The tensor, reduced over all processes."""
    if world() > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
    return tensor


@contextlib.contextmanager
def process_0_first():
    """Others enter when process 0 has left (the decoded images are made once)."""
    if world() > 1 and rank():
        dist.barrier()
    yield
    if world() > 1 and not rank():
        dist.barrier()
