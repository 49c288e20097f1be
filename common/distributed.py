"""One process per GPU under torchrun; without torchrun there is one process and nothing happens."""

import contextlib
import gc
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

RANK = int(os.environ.get("RANK", 0))  # number of this process; only process 0 writes and prints
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many train together; torchrun sets both


def start(device):
    """Join the other processes, each with a device of its own."""
    if WORLD_SIZE == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    if RANK:
        sys.stdout = open(os.devnull, "w")


def stop():
    """Leave the others after a successful run."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # threads of DistributedDataParallel may abort the exit (seen in torch 2.15)
        dist.destroy_process_group()


def wrap(module):
    """The module under DistributedDataParallel, or itself in a single process."""
    return torch.nn.parallel.DistributedDataParallel(module) if WORLD_SIZE > 1 else module


def all_reduce(tensor, op="SUM"):
    """The tensor, reduced in place over all processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
    return tensor


def agree(numbers, device):
    """Whether all processes, which may not share a disk, have the same whole numbers."""
    mine = torch.tensor(numbers, device=device)
    return torch.equal(all_reduce(mine.clone(), "MAX"), all_reduce(mine.clone(), "MIN"))


def gather(x):
    """(n, ...) of this process -> (N, ...) of all, in the order of their ranks; n may differ. The
    gradient into x is that of the sum over the processes: DistributedDataParallel averages it."""
    if WORLD_SIZE == 1:
        return x
    sizes = torch.tensor([len(x) * (i == RANK) for i in range(WORLD_SIZE)], device=x.device)
    parts = [x.new_zeros(n, *x.shape[1:]) for n in all_reduce(sizes).tolist()]
    mine = torch.cat([*parts[:RANK], x, *parts[RANK + 1 :]])
    zeros = (mine - mine.detach()) * WORLD_SIZE  # that carry the gradient
    return all_reduce(mine.detach().clone()) + zeros


@contextlib.contextmanager
def one_first():
    """Inside `with`, one process of each machine goes first: images are decoded once."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if WORLD_SIZE > 1 and not first:
        dist.barrier()
    yield
    if WORLD_SIZE > 1 and first:
        dist.barrier()
