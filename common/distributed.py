"""One process per GPU under torchrun; without torchrun there is one process and nothing happens."""

import contextlib
import gc
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def rank():
    """Number of this process, from 0. Only process 0 writes and prints."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """How many processes train together: torchrun says it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device):
    """Join the other processes, each with a device of its own."""
    if world_size() == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    if rank():
        sys.stdout = open(os.devnull, "w")


def stop():
    """Leave the others after a successful run."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # threads of DistributedDataParallel may abort the exit (seen in torch 2.15)
        dist.destroy_process_group()


def wrap(module):
    """The module under DistributedDataParallel, or itself in a single process."""
    return torch.nn.parallel.DistributedDataParallel(module) if world_size() > 1 else module


def all_reduce(tensor, op="SUM"):
    """The tensor, reduced in place over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
    return tensor


def agree(numbers, device):
    """Whether all processes, which may not share a disk, have the same whole numbers."""
    mine = torch.tensor(numbers, device=device)
    return torch.equal(all_reduce(mine.clone(), "MAX"), all_reduce(mine.clone(), "MIN"))


def gather(x):
    """(n, ...) of this process -> (N, ...) of all, in the order of their ranks; n may differ. The
    gradient into x is that of the sum over the processes: DistributedDataParallel averages it."""
    if world_size() == 1:
        return x
    sizes = torch.tensor([len(x) * (i == rank()) for i in range(world_size())], device=x.device)
    parts = [x.new_zeros(n, *x.shape[1:]) for n in all_reduce(sizes).tolist()]
    mine = torch.cat([*parts[: rank()], x, *parts[rank() + 1 :]])
    zeros = (mine - mine.detach()) * world_size()  # that carry the gradient
    return all_reduce(mine.detach().clone()) + zeros


@contextlib.contextmanager
def one_first():
    """Inside `with`, one process of each machine goes first: images are decoded once."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if world_size() > 1 and not first:
        dist.barrier()
    yield
    if world_size() > 1 and first:
        dist.barrier()
