"""Every family of timm through pre-training, fine-tuning, prediction, the linear mode and --init.

    python tests/families.py --out families.json [--only resnet vision_transformer]   (an hour)

takes a small model of each family that has one below 120 M weights, at 64 px or, where it accepts
no such images, at 224. What is refused must be refused in one line before training, status 2;
anything else is a fault.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

import timm
import torch
from conftest import draw_classes, finetune, pretrain

import predict
from common import cli

SMALL = "test atto femto pico nano tiny xxs xs _s 0 small 18 10 mini light 24 lite b1 a0".split()


def smallest(family):
    """A small model of the family: of a few with a name like one, that with the fewest weights."""
    names = timm.list_models(module=family)
    names.sort(key=lambda name: (min([SMALL.index(s) for s in SMALL if s in name] or [99]), name))
    size = {}
    for name in names[:12]:
        with contextlib.suppress(Exception), torch.device("meta"):
            size[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    name = min(size, key=size.get, default=names[0])
    return name, size.get(name, 0)


def call(module, *arguments):
    """(exit status, last line of stderr) of a script, in this process."""
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run(module.main)
            status = 0
        except SystemExit as leave:
            status = leave.code
    text = err.buffer.getvalue().decode()
    lines = [line for line in text.splitlines() if line.strip() and "img/s" not in line]
    status = 3 if "Traceback" in text else status
    return status, lines[-1] if lines else ""


def steps(name, size, data, out):
    """The commands that a family goes through, {step: (module, arguments)}."""
    few = ["--epochs", 1, "--bs", 8, "--lr", 1e-4, "--device", "cpu", "--workers", 0]
    tune = ["--data", data, *few, "--class-weights", "none"]
    arms = ["--cnn", name, "--vit", "test_vit", "--init", "random", "--img-size", size]
    best = out / "tuned/best.pt"
    return {
        "pretrain": (pretrain, ["--data", data, *arms, *few, "--out", out]),
        "finetune": (finetune, ["--ckpt", out / "cnn.pt", *tune, "--out", out / "tuned"]),
        "predict": (predict, ["--ckpt", best, "--data", data, "--out", out / "p.csv"]),
        "embed": (predict, ["--ckpt", best, "--data", data, "--embeddings", out / "e.npz"]),
        "linear": (
            finetune,
            ["--ckpt", best, *tune, "--mode", "linear", "--out", out / "l", "--allow-seen"],
        ),
        "init": (
            finetune,
            [
                *("--arch", name, "--init", out / "cnn.pt", "--img-size", size, *tune),
                *("--out", out / "i", "--allow-seen"),
            ],
        ),
    }


def try_family(family):
    """{"model", "img_size", step: "ok", or the status and line that ended it} of one family."""
    name, weights = smallest(family)
    if weights > 1.2e8:
        return {"model": name, "skipped": f"{weights / 1e6:.0f} M weights"}
    with tempfile.TemporaryDirectory() as folder:
        data = draw_classes(Path(folder) / "images", {"a": 14, "b": 10})
        for size in (64, 224):
            row = {"model": name, "img_size": size}
            for step, (module, arguments) in steps(name, size, data, Path(folder) / "o").items():
                status, line = call(module, *arguments)
                row[step] = "ok" if status == 0 else f"{status}: {line[:200]}"
                if status and step in ("pretrain", "finetune"):
                    break
            if "accepts no images" not in row["pretrain"]:
                break
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="families.json")
    parser.add_argument("--only", nargs="+", default=timm.list_modules())
    args, found = parser.parse_args(), {}
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for family, row in zip(args.only, pool.imap(try_family, args.only, chunksize=1)):
            found[family] = row
            print(family, row, flush=True)
            Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    bad = [f for f, row in found.items() if any(str(x)[:2] in ("1:", "3:") for x in row.values())]
    print(f"{len(found)} families; neither done nor refused in one line: {bad or 'none'}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
