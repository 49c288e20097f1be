"""Objectives tried beside equation 1, judged on the training and validation splits alone.

    python -m tools.trials --data /path [--epochs 2 --img-size 32 --only barlow ...] --out FILE

Each pre-trains the small arms through pretrain.train, then embeds training and validation images:
k-NN accuracy, and the balanced accuracy of a ridge probe on 1 % and 10 % of the labels (5 draws).
VICReg earned its place in losses.py; the rest stays here. 64 px and less: bfloat16 on a CPU.
"""

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
from common.readers import read
from common.run import Run, on_device
from losses import cosine_loss, vicreg

ARMS = {"cnn": ("resnet10t", {}), "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 6})}


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


def centred_cosine(R, T):
    return cosine_loss(R - R.mean(0), T - T.mean(0))


def standardized_cosine(R, T):
    return cosine_loss(standardize(R), standardize(T))


def centred_infonce(R, T):
    return infonce(R - R.mean(0), T - T.mean(0))


class Alternating:
    """Equation 1, the gradient into one arm at a time."""

    def __init__(self):
        self.step = 0

    def __call__(self, R, T):
        self.step += 1
        return cosine_loss(R.detach(), T) if self.step % 2 else cosine_loss(R, T.detach())


class OnFeatures(nn.Module):
    """The features before the heads, through a projector each, instead of the logits."""

    def __init__(self, cnn, vit, objective, width=512):
        super().__init__()
        self.cnn, self.vit, self.objective = cnn, vit, objective
        for arm, model in self.arms.items():
            model.projector = nn.Sequential(
                nn.Linear(model.num_features, width),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Linear(width, width),
            )

    @property
    def arms(self):
        return {"cnn": self.cnn, "vit": self.vit}

    def forward(self, images):
        R, T = (
            m.projector(m.forward_head(m.forward_features(images), pre_logits=True)).float()
            for m in self.arms.values()
        )
        return self.objective(R, T)


OBJECTIVES = {
    "cosine": cosine_loss,
    "barlow": barlow,
    "vicreg": vicreg,
    "infonce": infonce,
    "centred_infonce": centred_infonce,
    "centred_cosine": centred_cosine,
    "standardized_cosine": standardized_cosine,
    "alternating": Alternating(),
    "barlow_projector": barlow,
    "vicreg_projector": vicreg,
    "infonce_projector": infonce,
}


def embed(model, images, index):
    return collapse.embed(
        model,
        (
            normalize(torch.from_numpy(np.stack([images[i] for i in part])))
            for part in index.split(256)
        ),
    )[0]


def balanced(predicted, true, classes):
    return (
        torch.stack(
            [
                (predicted[true == c] == c).float().mean()
                for c in range(classes)
                if (true == c).any()
            ]
        )
        .mean()
        .item()
    )


def probe(train, y, val, y_val, frac, draw, classes):
    g = torch.Generator().manual_seed(draw)
    mine = torch.cat(
        [
            (i := (y == c).nonzero()[:, 0])[
                torch.randperm(len(i), generator=g)[: max(1, round(frac * len(i)))]
            ]
            for c in range(classes)
        ]
    )
    mean, std = train.mean(0), train.std(0) + 1e-6
    X, V = (train[mine] - mean) / std, (val - mean) / std
    Y = F.one_hot(y[mine], classes).float()
    bias = Y.mean(0)
    W = torch.linalg.solve(X.T @ X + len(X) * torch.eye(X.shape[1]), X.T @ (Y - bias))
    return balanced((V @ W + bias).argmax(1), y_val, classes)


def main():
    parser = cli.Parser(__doc__)
    data.add_arguments(parser)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--only", nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", default="trials.json")
    args = parser.parse_args()
    out, rows = Path(args.out), []
    for seed in args.seeds:
        images = read(args.data, **data.options(args))
        images.decode(args.img_size, data.cache_dir(args.cache), args.skip_bad)
        split = data.split_and_report(images, seed, args.dedup)
        y = torch.from_numpy(images.labels.argmax(1))
        train, val = (torch.from_numpy((split == s).nonzero()[0]) for s in ("train", "val"))
        some = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:2000]]
        for name in args.only:
            torch.manual_seed(seed)
            arms = [build_arm(a, args.img_size, **k) for a, k in ARMS.values()]
            objective = OBJECTIVES.get(name)
            method = (
                OnFeatures(*arms, objective)
                if "projector" in name
                else CASS(*arms, objective=objective)
            )
            method.to(memory_format=torch.channels_last)
            began = time.perf_counter()
            if objective is not None:
                views = data.AugmentedImages(
                    images.images,
                    train.numpy(),
                    seed=seed,
                    transform=data.augmentation(args.img_size),
                )
                batches = data.EpochBatches(len(views), 16, seed)
                cpu = torch.device("cpu")
                loader = data.loader(views, batches, cpu)
                with tempfile.TemporaryDirectory() as folder:
                    swa = pretrain.train(
                        method,
                        loader,
                        Run(Path(folder), cpu, {}),
                        cpu,
                        torch.bfloat16,
                        args.epochs,
                        lr=args.lr,
                    )
                arms = swa.finish(lambda: on_device(loader, cpu))
            else:
                arms = method.arms
            row = {
                "objective": name,
                "seed": seed,
                "epochs": args.epochs,
                "seconds": round(time.perf_counter() - began),
            }
            for arm, model in arms.items():
                E, V = embed(model, images.images, some), embed(model, images.images, val)
                C = len(images.classes)
                near = (F.normalize(V, dim=1) @ F.normalize(E, dim=1).T).topk(20).indices
                votes = F.one_hot(y[some][near], C).sum(1)
                row[f"{arm}_knn"] = round(balanced(votes.argmax(1), y[val], C), 4)
                for frac in (0.01, 0.1):
                    row[f"{arm}_{frac:g}"] = round(
                        sum(probe(E, y[some], V, y[val], frac, d, C) for d in range(5)) / 5, 4
                    )
            print(row, flush=True)
            rows.append(row)
            write_json(out, {"command": sys.argv, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
