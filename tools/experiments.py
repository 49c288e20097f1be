"""The paper's tables, one command each, its figures beside ours.

    python -m tools.experiments --table 4 --data /path --dry-run      (commands and time; nothing is run)
    python -m tools.experiments --table 4 --data /path                (the paper's size: a GPU)
    python -m tools.experiments --table 4 --data /path --scale small --seeds 0 1 2     (small arms, 32 px)

Every cell is a pre-training and a fine-tuning through the scripts, with one seed. Finished cells are
skipped when the command is called again, an interrupted one resumes, a failed one is recorded and tried again.
Writes to --out (default: results/tableN): config.json, cells/*.json, table.csv, table.md; weights and
logs of the runs to --work, shared by all tables.

Tables: 1 training time; 2 to 5 label fractions; 6, 14 batch size; 7, 15 epochs; 8 augmentations; 9 SGD;
10 to 13, 16, 17 other arms; 18 two CNNs; 19 two Transformers; 20 initialisation; 21 softmax, sigmoid;
objectives: what else makes the arms agree (docs/collapse.md).
"""

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision

import data
from cass import build_arm
from common import cli
from common.checkpoint import atomic_open, load_weights, write_csv, write_json
from common.cli import UserError
from common.decode import digest
from common.readers import read
from tools import ensemble

ROOT = Path(__file__).parents[1]

# what the paper calls a model -> at its size; at a size that a CPU manages
MODELS = {
    "ResNet-50": (("resnet50.a1_in1k", {}), ("resnet10t", {})),
    "ResNet-18": (("resnet18.a1_in1k", {}), ("test_resnet", {})),
    "ResNet-200": (("resnet200d", {}), ("resnet18", {})),  # 64.69 M parameters
    "DenseNet-161": (("densenet161.tv_in1k", {}), ("densenet121", {"growth_rate": 8})),
    "ViT-B/16": (
        ("vit_base_patch16_384.augreg_in21k_ft_in1k", {}),
        ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 6}),
    ),
    "ViT-L/16": (
        ("vit_large_patch16_384.augreg_in21k_ft_in1k", {}),
        ("vit_small_patch16_224", {"patch_size": 8, "depth": 6}),
    ),
    "DeiT-B/16": (
        ("deit_base_patch16_384.fb_in1k", {}),
        ("deit_tiny_patch16_224", {"patch_size": 8, "depth": 6}),
    ),
    "Swin-B": (
        ("swin_base_patch4_window12_384.ms_in22k_ft_in1k", {}),
        (
            "swin_tiny_patch4_window7_224",
            {"window_size": 4, "embed_dim": 48, "depths": (2, 2, 2), "num_heads": (3, 6, 12)},
        ),
    ),
}
SCALES = {  # image size, epochs, flags
    "paper": (384, 100, []),
    "small": (32, 3, ["--init", "random"]),
}
SMALL_DINO = ["--outputs", "4096", "--crops", "4"]
OTHER_ARMS = {
    "10",
    "11",
    "12",
    "13",
    "16",
    "17",
    "18",
    "19",
    "20",
}  # tables that change arms or start
VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "torchvision": torchvision.__version__,
    "timm": timm.__version__,
}


@dataclass
class Row:
    """A line of a table: a pre-training of two arms (or none: supervised) and the flags it takes."""

    label: str
    method: str = "cass"
    cnn: str = "ResNet-50"
    vit: str = "ViT-B/16"
    flags: list = field(default_factory=list)
    epochs: float = 1  # times those of the scale
    arms: tuple = ("cnn", "vit")
    fracs: tuple = (1.0,)


def rows_of(table):
    """The rows of a table of the paper."""

    def fractions(*fracs):
        return [
            Row("DINO", "dino", fracs=fracs),
            Row("CASS", fracs=fracs),
            Row("Supervised", "supervised", fracs=fracs),
        ]

    def pairs(*names):
        return [
            Row(
                f"{cnn} + {vit}",
                cnn=cnn,
                vit=vit,
                flags=["--init-cnn", "random"] if cnn == "ResNet-200" else [],
            )
            for cnn, vit in names
        ]

    def alone(*names):
        return [
            Row(
                name,
                "supervised",
                arms=(arm,),
                **{arm: name},
                flags=["--init", "random"] if name == "ResNet-200" else [],
            )
            for arm, name in names
        ]

    cnns = [(cnn, "ViT-B/16") for cnn in ("ResNet-18", "ResNet-50", "ResNet-200")]
    batch = [Row(f"batch {n}", flags=["--bs", str(n)] if n != 16 else []) for n in (8, 16, 32)]
    epochs = [Row(f"{round(100 * e)} epochs", epochs=e) for e in (0.5, 1, 2, 3)]
    two = ("ResNet-50", "ViT-B/16")
    return {
        "1": [Row("DINO", "dino", fracs=()), Row("CASS", fracs=())],
        "2": fractions(0.1, 1.0),
        "3": fractions(0.1, 1.0),
        "4": fractions(0.01, 0.1, 1.0),
        "5": fractions(0.01, 0.1, 1.0),
        "6": batch,
        "14": batch,
        "7": epochs,
        "15": epochs,
        "8": [
            Row("CASS only"),
            Row("CASS + Solarize", flags=["--ablation", "solarize"]),
            Row("CASS + Gaussian blur", flags=["--ablation", "blur"]),
            Row("CASS + Gaussian blur + Solarize", flags=["--ablation", "blur", "solarize"]),
        ],
        "9": [Row("Adam"), Row("SGD", flags=["--ablation", "sgd"])],
        "10": pairs(two, ("ResNet-50", "ViT-L/16")),
        "11": alone(("cnn", "ResNet-50"), ("vit", "ViT-B/16"), ("vit", "ViT-L/16")),
        "12": pairs(*cnns),
        "13": alone(*(("cnn", cnn) for cnn, _ in cnns)),
        "16": pairs(*cnns),
        "17": pairs(*(("ResNet-50", vit) for vit in ("DeiT-B/16", "ViT-B/16", "ViT-L/16"))),
        "18": pairs(two, ("ResNet-50", "DenseNet-161")),
        "19": pairs(two, ("Swin-B", "ViT-B/16")),
        "20": [
            Row("random", flags=["--init", "random"]),
            Row("ImageNet", flags=["--init", "imagenet"]),
        ],
        "21": [
            Row("without"),
            Row("sigmoid", flags=["--ablation", "sigmoid"]),
            Row("softmax", flags=["--ablation", "softmax"]),
        ],
        "objectives": [
            *fractions(0.01, 0.1),
            Row("CASS, vicreg", fracs=(0.01, 0.1), flags=["--objective", "vicreg", "--lr", "3e-4"]),
        ],  # the rate was chosen on validation images
    }.get(table)


def parse_arguments():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--table", required=True, metavar="N", help="number in the paper, or: objectives")
    data.add_arguments(parser)
    add(
        "--scale",
        default="paper",
        choices=list(SCALES),
        help="paper: its arms at 384 px, ImageNet weights, 100 epochs; small: small arms at 32 px "
        "from random weights, 3 epochs",
    )
    add("--epochs", type=cli.positive, help="of pre-training, instead of the scale's")
    add(
        "--seeds",
        type=cli.count,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        metavar="N",
        help="each is a pre-training and a fine-tuning of its own",
    )
    add(
        "--fracs", type=cli.fraction, nargs="+", metavar="F", help="label fractions, of the table's"
    )
    add("--only", nargs="+", metavar="ROW", help="only these rows, by their names in the table")
    add(
        "--metric",
        choices=["macro_f1", "micro_f1", "balanced_accuracy", "accuracy", "auroc"],
        help="in table.md (default: macro_f1; Table 5: balanced_accuracy); table.csv has all",
    )
    add(
        "--warm",
        nargs=2,
        metavar=("CNN", "VIT"),
        help="start both arms from these weights files of finetune.py, heads included",
    )
    add("--dry-run", action="store_true", help="print every command and an estimate of the time")
    add("--out", metavar="DIR", help="folder of the table (default: results/tableN)")
    add("--work", default="runs", metavar="DIR", help="folder of the runs (default: %(default)s)")
    add("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    args = parser.parse_args()
    rows = rows_of(args.table)
    if rows is None:
        parser.error(
            f"--table {args.table}: the paper has no such table that can be measured; "
            f"there are 1 to 21 and: objectives"
        )
    if args.data is None:
        parser.error("--data PATH is missing")
    names, known = [row.label for row in rows], {f for row in rows for f in row.fracs}
    for name in args.only or ():
        if name not in names:
            parser.error(
                f"--only {name}: no row of the table is called so; there are {', '.join(names)}"
            )
    for frac in args.fracs or ():
        if frac not in known:
            parser.error(
                f"--fracs {frac:g}: not in the table, which has "
                f"{', '.join(f'{f:g}' for f in sorted(known)) or 'none'}"
            )
    rows = [row for row in rows if not args.only or row.label in args.only]
    for row in rows:
        row.fracs = tuple(f for f in row.fracs if not args.fracs or f in args.fracs)
    if args.warm and args.table in OTHER_ARMS:
        parser.error(f"--warm brings its own arms, which Table {args.table} changes")
    args.warm_weights = [load_weights(path) for path in args.warm or ()]
    data.make_absolute(args)
    name = f"table{args.table}" if args.table.isdigit() else args.table
    args.out = Path(args.out or f"results/{name}")
    cli.refuse_overwrite(args.out, (), False)  # it may be no folder
    return args, rows


def data_flags(args):
    """The data flags as they were given, to hand on; and those of the cache alone."""
    given, cached = [], []
    for key in data.OPTIONS[:-1]:
        value = getattr(args, key)
        if value:
            given.append("--" + key.replace("_", "-"))
            given += (
                [] if value is True else map(str, value) if isinstance(value, list) else [value]
            )
    if args.cache:
        cached = ["--cache", args.cache]
    return [*given, *cached], cached


def model_of(args, row, arm):
    """Name and arguments of an arm for timm.create_model; with --warm, the file's own."""
    if not args.warm:
        return MODELS[getattr(row, arm)][args.scale == "small"]
    weights = args.warm_weights[arm == "vit"]
    kwargs = {k: v for k, v in weights["model_kwargs"].items() if k != "img_size"}
    return weights["arch"], {**kwargs, "num_classes": weights["num_classes"]}


def model_flags(args, row, arm, prefix):
    """--cnn NAME --cnn-kwargs KEY=VALUE … (prefix: cnn, vit or arch)."""
    name, kwargs = model_of(args, row, arm)
    if prefix == "arch":
        kwargs = {k: v for k, v in kwargs.items() if k != "num_classes"}
    words = [f"{k}={v}".replace(" ", "") for k, v in kwargs.items()]
    return [f"--{prefix}", name, *([f"--{prefix}-kwargs", *words] if words else [])]


def epochs_of(args, row):
    """Epochs of a row's pre-training."""
    return max(1, round((args.epochs or SCALES[args.scale][1]) * row.epochs))


def commands(args, row, seed):
    """(pre-training or None, {(arm, frac): fine-tuning}), each a list of words and its folder."""
    size, _, flags = SCALES[args.scale]
    device = ["--device", args.device] if args.device != "auto" else []
    given, cached = data_flags(args)
    common = [*given, *device]
    flags = [*flags, *row.flags]  # of two settings of one flag the last counts

    def folder(words):
        digest = hashlib.sha256("\0".join(map(str, words)).encode()).hexdigest()[:10]
        return Path(args.work) / f"{row.method}_seed{seed}_{digest}"

    if row.method == "supervised":
        init = [w for i, w in enumerate(flags) if w == "--init" or flags[i - 1] == "--init"]
        tunings = {}
        for arm in row.arms:
            start = ["--init", args.warm[arm == "vit"]] if args.warm else init
            for frac in row.fracs:
                words = [
                    "finetune.py",
                    *model_flags(args, row, arm, "arch"),
                    *start,
                    "--img-size",
                    str(size),
                    "--frac",
                    f"{frac:g}",
                    "--seed",
                    str(seed),
                    *common,
                ]
                tunings[arm, frac] = words, folder(words)
        return None, tunings
    if row.method == "dino" and args.scale == "small":
        flags += SMALL_DINO
    if args.warm:
        flags += ["--init-cnn", args.warm[0], "--init-vit", args.warm[1]]
    words = [
        "tools.dino" if row.method == "dino" else "pretrain.py",
        *model_flags(args, row, "cnn", "cnn"),
        *model_flags(args, row, "vit", "vit"),
        "--img-size",
        str(size),
        "--epochs",
        str(epochs_of(args, row)),
        *flags,
        "--seed",
        str(seed),
        *common,
    ]
    pretraining = words, folder(words)
    return pretraining, {
        (arm, frac): (
            [
                "finetune.py",
                "--ckpt",
                str(pretraining[1] / f"{arm}.pt"),
                "--frac",
                f"{frac:g}",
                *cached,
                *device,
            ],
            pretraining[1] / f"finetune_{arm}_{frac:g}",
        )
        for arm in row.arms
        for frac in row.fracs
    }


def shown(words, folder):
    """A command as one would type it."""
    module = ["-m"] if words[0] == "tools.dino" else []
    return shlex.join(["python", *module, *map(str, words), "--out", str(folder)])


def portable(args, text):
    """Without what comes before the data and the runs on this machine."""
    for path in (args.data, args.images, args.split, args.work, str(args.out), *(args.warm or ())):
        if path:
            before = os.path.dirname(
                os.path.dirname(path) if path in (args.warm or ()) else os.path.normpath(path)
            )
            text = text.replace(path, path.removeprefix(before).lstrip("/"))
    return text


class Failed(Exception):
    """A script left with another status than 0; the text is its last line."""


def run_script(words, output):
    """Run a script; its exit status. A signal to this process is handed on, and waited for."""
    with cli.Signals() as signals:
        script = ["-m", words[0]] if words[0] == "tools.dino" else [str(ROOT / words[0])]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, *script, *map(str, words[1:])],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        while process.poll() is None and not signals.number:
            time.sleep(0.05)
        if signals.number:
            process.send_signal(signals.number)
            process.wait()
            signals.leave("the interrupted run resumes when the command is called again")
    return process.returncode


def call(words, folder, failed):
    """Run a script into its folder unless it is finished there. failed: {folder: error} of this
    table, which are not tried twice."""
    if folder in failed:
        raise Failed(failed[folder])
    if (folder / "finished").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "w") as output:
        status = run_script([*words, "--out", folder, "--resume"], output)
    if status:
        lines = (folder / "output.txt").read_text(errors="replace").replace("\r", "\n").split("\n")
        failed[folder] = next(
            (line for line in reversed(lines) if line.strip()), f"status {status}"
        )
        raise Failed(failed[folder])
    (folder / "finished").touch()
    (folder / "last.pt").unlink(missing_ok=True)


def hardware(device):
    """In words."""
    if cli.pick_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    names = (
        re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def run_cell(args, row, seed, arm, frac, runs, failed):
    """The record of a cell, for cells/*.json. runs: (words, folder) of a pre-training, of a
    fine-tuning, or of both arms' for the mean of their probabilities."""
    cell = {
        "row": row.label,
        "arm": arm,
        "frac": frac,
        "seed": seed,
        "status": "done",
        "commands": commands_of(args, runs),
        "hardware": hardware(args.device),
        "versions": VERSIONS,
    }
    try:
        for run in runs:
            call(*run, failed)
        tunings = [folder for words, folder in runs if words[0] == "finetune.py"]
        if row.method != "supervised":
            log = (runs[0][1] / "log.jsonl").read_text().splitlines()
            log = [json.loads(line) for line in log]
            cell["pretrain_seconds"] = round(sum(line["seconds"] for line in log), 1)
            if not tunings:
                cell["log"] = log
        if tunings:
            metrics = [json.loads((folder / "metrics.json").read_text()) for folder in tunings]
            cell["finetune_seconds"] = round(sum(m["seconds"] for m in metrics), 1)
            cell["metrics"] = {k: v for k, v in metrics[0].items() if k != "ckpt"}
        if len(tunings) == 2:
            *_, cell["metrics"] = ensemble.score(ensemble.read_equal(tunings, tunings))[0]
    except Failed as error:
        cell |= {"status": "failed", "error": portable(args, str(error))}
    return cell


def commands_of(args, runs):
    """The commands of a cell, for its record."""
    return [portable(args, shown(*run)) for run in runs]


def summarize(cells, metric):
    """{row|arm|frac: [score of each seed]} of finished cells, in the order they come."""
    summary = {}
    for cell in cells:
        value = cell.get("metrics", {}).get("test", {}).get(metric)
        if value is not None:
            key = f"{cell['row']}|{cell['arm']}|{cell['frac']:g}"
            summary.setdefault(key, {})[cell["seed"]] = value
    return summary


def gain(means, frac, over):
    """Points that CASS gains over `over` on one data set (G.0.3): summed over both arms."""
    keys = [f"{row}|{arm}|{frac}" for row in ("CASS", over) for arm in ("cnn", "vit")]
    if not all(key in means for key in keys):
        return None
    a, b, c, d = (means[key] for key in keys)
    return 100 * (a + b - c - d)


def gain_lines(args, summary, paper):
    """For Tables 2 to 5: the gain per label fraction, of this table and over the finished ones, from
    the paper's figures and from ours (G.0.3: the sum over both arms and the data sets, divided by the
    number of data sets)."""
    printed = {n: {k: float(v.split("±")[0]) for k, v in paper[n]["cells"].items()} for n in "2345"}
    mine = {args.table: {k: np.mean(list(v.values())) for k, v in summary.items()}}
    for n in set("2345") - {args.table}:
        other = args.out.parent / f"table{n}" / "table.json"
        if args.out.name == f"table{args.table}" and other.exists():
            other = json.loads(other.read_text())
            if (other["scale"], other["epochs"], other["warm"]) == (
                args.scale,
                args.epochs,
                bool(args.warm),
            ):
                mine[n] = other["means"]
    for over in ("DINO", "Supervised"):
        for frac in ("0.01", "0.1", "1"):

            def mean(of, tables):
                gains = [
                    g for n in tables if n in of and (g := gain(of[n], frac, over)) is not None
                ]
                return f"{np.mean(gains):+.1f} ({len(gains)} data sets)" if gains else "not run"

            yield (
                f"| CASS over {over}, {float(frac):.0%} | {mean(printed, [args.table])} | "
                f"{mean(printed, '2345')} | {mean(mine, [args.table])} | {mean(mine, '2345')} |"
            )


def paired(summary, frac, row, other):
    """Mean and standard error over seeds of the difference of two rows, the mean of their arms; n."""
    sides = []
    for name in (row, other):
        arms = [summary.get(f"{name}|{arm}|{frac}", {}) for arm in ("cnn", "vit")]
        sides.append(
            {seed: (arms[0][seed] + arms[1][seed]) / 2 for seed in arms[0].keys() & arms[1]}
        )
    both = np.array([sides[0][s] - sides[1][s] for s in sorted(sides[0].keys() & sides[1])])
    return (both.mean(), both.std(ddof=1) / len(both) ** 0.5, len(both)) if len(both) > 1 else None


def time_lines(cells, paper):
    """Table 1: seconds per epoch of both methods, the median over epochs, arms summed."""
    seconds = {}
    for cell in cells:
        if cell["status"] == "done":
            arms = {}
            for line in cell["log"]:
                arms.setdefault(line["arms"], []).append(line["seconds"])
            seconds.setdefault(cell["row"], {})[cell["seed"]] = sum(map(np.median, arms.values()))
    yield "| data set | DINO | CASS | CASS / DINO |\n|---|---|---|---|"

    def minutes(text):
        return sum(
            int(n) * (60 if unit == "h" else 1)
            for n, unit in re.findall(r"(\d+) ([hm])", text.lower())
        )

    ratios = []
    for name, times in paper["1"]["times"].items():
        ratios.append(minutes(times["CASS"]) / minutes(times["DINO"]))
        yield f"| paper, {name} | {times['DINO']} | {times['CASS']} | {ratios[-1]:.2f} |"
    yield (
        f'| paper, mean of the ratios (its "69 % less time" would be 0.31) | | | '
        f"{np.mean(ratios):.2f} |"
    )
    both = sorted(seconds.get("DINO", {}).keys() & seconds.get("CASS", {}))
    if both:
        dino, ours = (np.array([seconds[m][s] for s in both]) for m in ("DINO", "CASS"))
        yield (
            f"| **this code**, seconds per epoch, n = {len(both)} | {dino.mean():.1f} | "
            f"{ours.mean():.1f} | {np.mean(ours / dino):.3f} |"
        )


def write_table(args, rows, cells, paper, metric):
    """table.csv, table.json and table.md from the cells that there are. Returns the lines of it."""
    columns = ("macro_f1", "micro_f1", "balanced_accuracy", "accuracy", "auroc")
    parts = ("test", "test_without_duplicates")
    write_csv(
        args.out / "table.csv",
        [
            "row",
            "arm",
            "frac",
            "seed",
            "status",
            "pretrain_seconds",
            "finetune_seconds",
            *(f"{c}{p[4:]}" for p in parts for c in columns),
            "error",
        ],
        (
            [
                c["row"],
                c["arm"],
                c["frac"],
                c["seed"],
                c["status"],
                c.get("pretrain_seconds"),
                c.get("finetune_seconds"),
                *(
                    (c["metrics"][p] or {}).get(k) if "metrics" in c else None
                    for p in parts
                    for k in columns
                ),
                c.get("error"),
            ]
            for c in cells
        ),
    )
    summary = summarize(cells, metric)
    write_json(
        args.out / "table.json",
        {
            "scale": args.scale,
            "epochs": args.epochs,
            "warm": bool(args.warm),
            "metric": metric,
            "means": {k: float(np.mean(list(v.values()))) for k, v in summary.items()},
            "values": {k: {str(s): x for s, x in v.items()} for k, v in summary.items()},
        },
    )

    about = paper.get(
        args.table,
        {
            "title": "Objectives beside equation 1",
            "section": "not in it",
            "metric": "",
            "cells": {},
        },
    )
    size, epochs, _ = SCALES[args.scale]
    done = [c for c in cells if c["status"] == "done"]
    lines = [
        f"# {'Table ' * args.table.isdigit()}{args.table}: {about['title']} (section "
        f"{about['section']})",
        "",
        f"`{portable(args, shlex.join(['python', 'experiments.py', *sys.argv[1:]]))}`",
        "",
        f"Data: {Path(args.data).name}"
        + (", de-duplicated" if args.dedup else "")
        + (f", grouped by {args.group_col}" if args.group_col else "")
        + f". Scale: **{args.scale}**, epochs of pre-training: {args.epochs or epochs}, at {size} px"
        + (", small arms from random weights: not the paper's" if args.scale == "small" else "")
        + (", from warm arms" if args.warm else "")
        + ". "
        + "; ".join(sorted({c["hardware"] for c in done}))
        + "; "
        + ", ".join(f"{k} {v}" for k, v in VERSIONS.items())
        + ".",
        "",
    ]
    if args.table == "1":
        lines += [
            "DINO trains one arm after the other, CASS both at once. The paper took DINO from "
            "another implementation with other settings (student temperature 0.9, 65,336 outputs, "
            "two full-size local views); here it is the original's for Transformers, for both arms."
            + (
                " At this scale with 4,096 outputs and 4 local crops."
                if args.scale == "small"
                else ""
            ),
            "",
            *time_lines(cells, paper),
        ]
    else:
        lines += [
            f"Score: {metric.replace('_', ' ')} on the test split"
            + (f" (paper: {about['metric']})" if about["metric"] else "")
            + "; mean ± standard deviation (n − 1) over seeds. *Mean of both*: the probabilities of "
            "both arms averaged, which the paper does not do.",
            "",
            "| | arm | labels | paper | this code | time: pre-training, fine-tuning |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            for frac in row.fracs:
                arms = (*row.arms, "mean") if len(row.arms) == 2 else row.arms
                lines += [
                    table_line(args, cells, summary, about["cells"], row, arm, frac) for arm in arms
                ]
        if args.table in "2345":
            lines += [
                "",
                "Gain in points (G.0.3: summed over both arms, mean over data sets). The "
                "paper's own figures do not give the +3.8 and +5.9 of its abstract.",
                "",
                "| | paper, this table | paper, Tables 2–5 | this code, this table | this code, "
                "Tables 2–5 |",
                "|---|---|---|---|---|",
                *gain_lines(args, summary, paper),
            ]
        labels = [row.label for row in rows]
        if {"CASS", "Supervised"} <= set(labels):
            lines += [
                "",
                "Paired by seed, mean of both arms' scores: difference ± standard error.",
                "",
                "| | labels | over Supervised | over CASS |",
                "|---|---|---|---|",
            ]
            for label in labels:
                for frac in sorted({f for row in rows for f in row.fracs}):
                    got = [
                        paired(summary, f"{frac:g}", label, other) if other != label else None
                        for other in ("Supervised", "CASS")
                    ]
                    lines.append(
                        f"| {label} | {frac:.0%} | "
                        + " | ".join(
                            "" if g is None else f"{g[0]:+.3f} ± {g[1]:.3f} (n = {g[2]})"
                            for g in got
                        )
                        + " |"
                    )
    failed = [c for c in cells if c["status"] == "failed"]
    lines += [""] + [
        f"Failed: {c['row']}, {c['arm']}, {c['frac']:g}, seed {c['seed']}: {c['error']}"
        for c in failed
    ]
    with atomic_open(args.out / "table.md") as file:
        file.write("\n".join(lines).rstrip() + "\n")
    return lines


def table_line(args, cells, summary, printed, row, arm, frac):
    """One line of table.md."""
    key = f"{row.label}|{arm}|{frac:g}"
    mine = [
        c
        for c in cells
        if c["status"] == "done" and (c["row"], c["arm"], c["frac"]) == (row.label, arm, frac)
    ]
    values = list(summary.get(key, {}).values())
    ours = (
        "not run"
        if not values
        else f"{np.mean(values):.4f}"
        + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")
        + f" (n = {len(values)})"
    )
    seconds = [
        f"{np.mean([c[k] for c in mine if k in c]):.0f} s" if any(k in c for c in mine) else "–"
        for k in ("pretrain_seconds", "finetune_seconds")
    ]
    name = "mean of both" if arm == "mean" else model_of(args, row, arm)[0]
    label = row.label
    if args.table in ("7", "15"):
        label += f" (here {epochs_of(args, row)})"
    return (
        f"| {label} | {name} | {frac:.0%} | {printed.get(key, '–')} | {ours} | "
        f"{', '.join(seconds)} |"
    )


def estimate(args, rows, n_train, n_val, n_test):
    """Print every command, and about how long they take: a step of each arm is timed, and a fine-
    tuning counted with all of its 50 epochs."""
    size, device, known = SCALES[args.scale][0], cli.pick_device(args.device), {}
    amp = cli.pick_amp("auto", device)

    def per_image(name, kwargs):
        """Seconds for an image, forward and backward."""
        key = name, str(kwargs)
        if key not in known:
            model = build_arm(name, size, **kwargs).to(device).train()
            images = torch.randn(
                16 if args.scale == "small" or device.type == "cuda" else 2,
                3,
                size,
                size,
                device=device,
            )
            for _ in range(2):  # the first one warms up
                began = time.perf_counter()
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    loss = model(images).float().square().mean()
                loss.backward()
                loss.item()
            known[key] = (time.perf_counter() - began) / len(images)
        return known[key]

    total, seen = 0.0, set()
    for seed in args.seeds:
        for row in rows:
            arm_seconds = {
                arm: per_image(*model_of(args, row, arm))
                for arm in ("cnn", "vit")
                if row.method != "supervised" or arm in row.arms
            }
            pretraining, tunings = commands(args, row, seed)
            jobs = []
            if pretraining:
                images = n_train * epochs_of(args, row)
                small = 4 if args.scale == "small" else 8
                crops = (
                    2 + small * (96 / 224) ** 2 + 2 / 3
                )  # of DINO; the teacher goes forward only
                jobs.append(
                    (
                        pretraining,
                        images * sum(arm_seconds.values()) * (crops if row.method == "dino" else 1),
                    )
                )
            for (arm, frac), tuning in tunings.items():
                images = 50 * (max(frac * n_train, 1) + n_val / 3) + n_test / 3
                jobs.append((tuning, images * arm_seconds[arm]))
            for (words, folder), seconds in jobs:
                if folder not in seen:
                    state = (
                        "finished"
                        if (folder / "finished").exists()
                        else f"~ {seconds / 60:.1f} min"
                    )
                    print(f"{shown(words, folder)}    # {state}")
                    total += 0 if state == "finished" else seconds
                    seen.add(folder)
    print(
        f"{len(seen)} runs, about {total / 3600:.1f} hours here; fine-tuning stops early, and is "
        f"counted with all its epochs"
    )


def jobs_of(args, rows):
    """What run_cell takes of each cell, but for `failed`."""
    for seed in args.seeds:
        for row in rows:
            pretraining, tunings = commands(args, row, seed)
            before = [pretraining] if pretraining else []
            for (arm, frac), tuning in tunings.items():
                yield row, seed, arm, frac, [*before, tuning]
            if not tunings:
                yield row, seed, "both", 0, before
            for frac in row.fracs if len(row.arms) == 2 else ():
                yield row, seed, "mean", frac, [*before, tunings["cnn", frac], tunings["vit", frac]]


def refuse_other_configuration(args, images):
    """Write config.json; raise UserError where the folder holds results of something else."""
    config = {
        "table": args.table,
        "scale": args.scale,
        "settings": [*SCALES[args.scale], *SMALL_DINO],
        "epochs": args.epochs,
        "data": portable(args, shlex.join(data_flags(args)[0])),
        "images": len(images),
        "classes": images.classes,
        "digest": digest("".join(images.names), np.ascontiguousarray(images.labels)),
        "warm": [digest(*(v.numpy() for v in w["state_dict"].values())) for w in args.warm_weights],
    }
    file = args.out / "config.json"
    try:
        same = not file.exists() or json.loads(file.read_text()) == config
    except ValueError:
        same = False
    if not same:
        raise UserError(
            f"{args.out}: holds results of another configuration ({file}); name another "
            f"folder with --out"
        )
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    write_json(file, config)


def main():
    args, rows = parse_arguments()
    images = read(args.data, **data.options(args))
    if not images.classes or len(images.classes) == 1 and not images.multilabel:
        raise UserError(
            f"{images.path}: has no labels, which the tables need; give each class a folder "
            f"of its own, or a CSV file"
        )
    metric = args.metric or (
        "balanced_accuracy" if args.table == "5" and not images.multilabel else "macro_f1"
    )
    if images.multilabel and metric in ("balanced_accuracy", "accuracy"):
        raise UserError(
            f"--metric {metric}: {images.path} has several labels to an image; take "
            f"macro_f1, micro_f1 or auroc"
        )
    if args.dry_run:
        n = len(images)
        given = {part: int((images.given == part).sum()) for part in ("train", "val", "test")}
        test = given["test"] or round(0.2 * n)
        val = given["val"] or round((n - test) / 8)
        return estimate(args, rows, n - test - val, val, test)

    jobs, failed, errors = list(jobs_of(args, rows)), {}, 0
    refuse_other_configuration(args, images)
    paper = json.loads(Path(__file__).with_name("paper.json").read_text())["tables"]
    for job in cli.progress(jobs, unit="cell", desc=f"table {args.table}"):
        row, seed, arm, frac, runs = job
        name = re.sub(r"[^\w.-]+", "_", f"{row.label}_{arm}_{frac:g}_seed{seed}")
        file = args.out / "cells" / f"{name}.json"
        before = json.loads(file.read_text()) if file.exists() else {"status": None}
        if before["status"] != "done" or before["commands"] != commands_of(args, runs):
            cell = run_cell(args, *job, failed)
            write_json(file, cell)
            if cell["status"] == "failed":
                errors += 1
                print(f"failed: {name}: {cell['error']}", file=sys.stderr)
    every = rows_of(args.table)
    order = {row.label: i for i, row in enumerate(every)}
    cells = [json.loads(file.read_text()) for file in (args.out / "cells").glob("*.json")]
    cells = sorted(
        (c for c in cells if c["row"] in order),
        key=lambda c: (order[c["row"]], c["frac"], c["arm"], c["seed"]),
    )
    print("\n".join(write_table(args, every, cells, paper, metric)))
    if errors:
        print(
            f"error: {errors} of {len(jobs)} cells failed; the same command tries them again",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
