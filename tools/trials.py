"""Objectives tried beside equation 1, judged on the training and validation splits alone.

    python -m tools.trials --data /path [--epochs 2 --img-size 32 --only barlow ...] --out FILE

Each pre-trains small arms, then scores k-NN and a ridge probe on 1 % and 10 % of the labels (5
draws) by balanced accuracy. VICReg earned its place in losses.py; the rest stays here.
"""

import itertools
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import pretrain
from cass import CASS, build_arm
from common import cli, collapse
from common.checkpoint import write_json
from common.decode import normalize
from common.metrics import multiclass_scores
from common.readers import read
from common.run import Run, on_device
from losses import cosine_loss, vicreg

ARMS = {"cnn": ("resnet10t", {}), "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 6})}
CPU, STEPS = torch.device("cpu"), itertools.count(1)


def standardize(x):
    return (x - x.mean(0)) / (x.std(0) + 1e-4)


def barlow(R, T, lambd=5e-3):
    C = standardize(R).T @ standardize(T) / len(R)
    on = (C.diagonal() - 1).square().sum()
    return on + lambd * (C.square().sum() - C.diagonal().square().sum())


def infonce(R, T, temperature=0.1):
    logits = F.normalize(R, dim=1) @ F.normalize(T, dim=1).T / temperature
    target = torch.arange(len(R))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def centre(x):
    return x - x.mean(0)


def after(change, objective):
    return lambda R, T: objective(change(R), change(T))


def alternating(R, T):
    """Equation 1, the gradient into one arm at a time."""
    return cosine_loss(R.detach(), T) if next(STEPS) % 2 else cosine_loss(R, T.detach())


class OnFeatures(CASS):
    """The features before the heads, through a projector each, instead of the logits."""

    def __init__(self, cnn, vit, objective, width=512):
        super().__init__(cnn, vit, objective=objective)
        for model in (cnn, vit):
            layers = nn.Linear(model.num_features, width), nn.BatchNorm1d(width), nn.ReLU()
            model.projector = nn.Sequential(*layers, nn.Linear(width, width))

    def forward(self, images):
        arms = self.arms.values()
        features = [m.forward_head(m.forward_features(images), pre_logits=True) for m in arms]
        return self.objective(*(m.projector(x).float() for m, x in zip(arms, features)))


OBJECTIVES = {"cosine": cosine_loss, "barlow": barlow, "vicreg": vicreg, "infonce": infonce}
OBJECTIVES |= {f"centred_{name}": after(centre, OBJECTIVES[name]) for name in ("infonce", "cosine")}
OBJECTIVES |= {"standardized_cosine": after(standardize, cosine_loss), "alternating": alternating}
OBJECTIVES |= {f"{name}_projector": OBJECTIVES[name] for name in ("barlow", "vicreg", "infonce")}


def pretrained(name, images, train, seed, args):
    """{arm: model} after pre-training with this objective, or "untrained"."""
    torch.manual_seed(seed)
    arms = [build_arm(arch, args.img_size, **kwargs) for arch, kwargs in ARMS.values()]
    method = (OnFeatures if "projector" in name else CASS)(*arms, objective=OBJECTIVES.get(name))
    method.to(memory_format=torch.channels_last)
    if name == "untrained":
        return method.arms
    views = data.AugmentedImages(images, train, data.augmentation(args.img_size), seed=seed)
    loader = data.loader(views, data.EpochBatches(len(views), 16, seed), CPU)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), CPU, torch.bfloat16, {})
        swa = pretrain.train(method, loader, run, args.epochs, lr=args.lr)
    return swa.finish(lambda: on_device(loader, CPU))


def embed(model, images, index):
    """Features (N, D) of the images at these N indices."""
    parts = (torch.from_numpy(np.stack([images[i] for i in part])) for part in index.split(256))
    return collapse.embed(model, map(normalize, parts))[0]


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


def readouts(train, y, val, true, classes):
    """{measure: balanced accuracy} on the features of one arm. true: (M,) class indices."""
    votes = collapse.knn(train, y, val, temperature=math.inf)  # the 20 neighbours count alike
    scores, row = {"knn": [votes.round(decimals=2)]}, {}
    for frac in (0.01, 0.1):
        scores[f"{frac}"] = [probe(train, y, val, frac, draw) for draw in range(5)]
    for name, draws in scores.items():
        found = [multiclass_scores(true, x.numpy(), classes)["balanced_accuracy"] for x in draws]
        row[name] = round(sum(found) / len(found), 4)
    return row


def main():
    parser, names = cli.Parser(__doc__), [*OBJECTIVES, "untrained"]
    data.add_arguments(parser)
    add = parser.add_argument
    add("--epochs", type=cli.positive, default=2)
    add("--img-size", type=cli.positive, default=32, help="64 and less: bfloat16 on a CPU")
    add("--lr", type=cli.rate, default=1e-3)
    add("--only", nargs="+", default=names[:-1], choices=names, help="(default: all objectives)")
    add("--seeds", type=cli.count, nargs="+", default=[0])
    add("--out", default="trials.json")
    args, rows = parser.parse_args(), []
    for seed in args.seeds:
        images = read(args.data, **data.options(args))
        images.decode(args.img_size, data.cache_dir(args.cache), args.skip_bad)
        split, true = data.split_and_report(images, seed, args.dedup), images.labels.argmax(1)
        train, val = (torch.from_numpy((split == s).nonzero()[0]) for s in ("train", "val"))
        some = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:2000]]
        y = F.one_hot(torch.from_numpy(true[some]), len(images.classes)).float()
        for name in args.only:
            began = time.perf_counter()
            arms = pretrained(name, images.images, train.numpy(), seed, args)
            row = {"objective": name, "seed": seed, "epochs": args.epochs}
            row["seconds"] = round(time.perf_counter() - began)
            for arm, model in arms.items():
                features, queries = (embed(model, images.images, i) for i in (some, val))
                found = readouts(features, y, queries, true[val], images.classes)
                row |= {f"{arm}_{measure}": value for measure, value in found.items()}
            print(row, flush=True)
            rows.append(row)
            write_json(args.out, {"command": sys.argv, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    cli.run(main)
