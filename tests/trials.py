"""Objectives tried beside equation 1, judged on the training and validation splits alone.

    python tests/trials.py --data /path [--epochs 2 --img-size 32 --only barlow ...] --out FILE

Each pre-trains small arms, then scores k-NN and a ridge probe on 1 % and 10 % of the labels (5
draws) by balanced accuracy. VICReg earned its place in losses.py; the others that were tried on
more than one data set stay here.
"""

import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import losses
import pretrain
from cass import CASS, build_arm
from common import cli, collapse, decode, readers
from common.checkpoint import write_json
from common.metrics import score
from common.run import Run, on_device

ARMS = {"resnet10t": {}, "vit_tiny_patch16_224": {"patch_size": 8, "depth": 6}}
CPU = torch.device("cpu")


def barlow(R, T, lambd=5e-3):
    R, T = ((x - x.mean(0)) / (x.std(0) + 1e-4) for x in (R, T))
    C = R.T @ T / len(R)
    on = (C.diagonal() - 1).square().sum()
    return on + lambd * (C.square().sum() - C.diagonal().square().sum())


def infonce(R, T, temperature=0.1):
    logits = F.normalize(R, dim=1) @ F.normalize(T, dim=1).T / temperature
    target = torch.arange(len(R))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


OBJECTIVES = {"untrained": None, **losses.OBJECTIVES, "barlow": barlow, "infonce": infonce}
OBJECTIVES["centred_infonce"] = lambda R, T: infonce(R - R.mean(0), T - T.mean(0))


def pretrained(name, images, train, seed, args):
    """{arm: model} after pre-training with this objective, or "untrained"."""
    torch.manual_seed(seed)
    arms = [build_arm(arch, args.img_size, **kwargs) for arch, kwargs in ARMS.items()]
    method = CASS(*arms, objective=OBJECTIVES[name]).to(memory_format=torch.channels_last)
    if name == "untrained":
        return method.arms
    views = data.AugmentedImages(images, train, data.augmentation(args.img_size), seed=seed)
    loader = data.loader(views, data.EpochBatches(len(views), 16, seed), CPU)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), CPU, torch.bfloat16, {})
        swa = pretrain.train(method, loader, run, args.epochs, lr=args.lr)
    return swa.finish(lambda: on_device(loader, CPU))


def probe(train, y, val, frac, draw):
    """Ridge regression on a share of the labels, at least one per class: scores (M, C).
    train: (N, D); y: (N, C) float 0/1; val: (M, D)."""
    g, mine = torch.Generator().manual_seed(draw), []
    for has in y.T:
        i = has.nonzero()[:, 0]
        mine.append(i[torch.randperm(len(i), generator=g)[: max(1, round(frac * len(i)))]])
    mine, mean, std = torch.cat(mine), train.mean(0), train.std(0) + 1e-6
    X, V = (train[mine] - mean) / std, (val - mean) / std
    bias = y[mine].mean(0)
    W = torch.linalg.solve(X.T @ X + len(X) * torch.eye(X.shape[1]), X.T @ (y[mine] - bias))
    return V @ W + bias


def readouts(model, images, some, val):
    """{measure: balanced accuracy} of an arm's features: the labels of the training images at
    `some`, (N,), predict those of the validation images at `val`, (M,)."""
    pixels = (torch.from_numpy(np.stack([images.images[i] for i in x])) for x in (some, val))
    batches = (map(decode.normalize, x.split(256)) for x in pixels)
    train, queries = (collapse.embed(model, x)[0] for x in batches)
    y = torch.from_numpy(images.labels[some]).float()
    votes = collapse.knn(train, y, queries, temperature=math.inf)  # 20 neighbours count alike
    found, row = {"knn": [votes.round(decimals=2)]}, {}
    for frac in (0.01, 0.1):
        found[frac] = [probe(train, y, queries, frac, draw) for draw in range(5)]
    for name, draws in found.items():
        scores = [
            score(None, images.labels[val], x.numpy(), x.numpy(), False, images.classes)
            for x in draws
        ]
        row[name] = round(np.mean([x["balanced_accuracy"] for x in scores]).item(), 4)
    return row


def main():
    parser, names, rows = cli.Parser(__doc__), list(OBJECTIVES), []
    data.add_arguments(parser)
    add = parser.add_argument
    add("--epochs", type=cli.positive, default=2)
    add("--img-size", type=cli.positive, default=32, help="64 and less: bfloat16 on a CPU")
    add("--lr", type=cli.rate, default=1e-3)
    add("--only", nargs="+", default=names, choices=names, help="(default: all)")
    add("--seeds", type=cli.count, nargs="+", default=[0])
    add("--out", default="trials.json")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data PATH is missing")
    for seed in args.seeds:
        images = readers.read(args.data, **data.options(args))
        images.decode(args.img_size, data.cache_dir(args.cache), args.skip_bad)
        split = data.split_and_report(images, seed, args.dedup)
        train, val = (np.flatnonzero(split == part) for part in ("train", "val"))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        for name in args.only:
            began = time.perf_counter()
            arms = pretrained(name, images.images, train, seed, args)
            seconds = round(time.perf_counter() - began)
            row = {"objective": name, "seed": seed, "epochs": args.epochs, "seconds": seconds}
            for arm, model in arms.items():
                found = readouts(model, images, train[order[:2000]], val)
                row |= {f"{arm}_{measure}": value for measure, value in found.items()}
            print(row, flush=True)
            rows.append(row)
            write_json(args.out, {"command": sys.argv, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    cli.run(main)
