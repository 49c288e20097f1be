"""The paper's tables, one command each, its figures beside ours.

    python -m tools.experiments --table 4 --data /path --dry-run    (prints commands and time)
    python -m tools.experiments --table 4 --data /path              (the paper's size: a GPU)
    python -m tools.experiments --table 4 --data /path --scale small --seeds 0 1 2    (a CPU)

Every cell is a pre-training and a fine-tuning with one seed. Called again, it skips finished cells,
resumes interrupted ones and retries failed ones. Writes config.json, cells/*.json and table.csv,
.json and .md to --out; weights and logs of the runs to --work, shared by all tables.

Tables: 1 training time; 2 to 5 label fractions; 6, 14 batch size; 7, 15 epochs; 8 augmentations;
9 SGD; 10 to 13, 16, 17 other arms; 18 two CNNs; 19 two Transformers; 20 initialisation; 21 softmax,
sigmoid; objectives: what else makes the arms agree (docs/collapse.md).
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
from itertools import product
from pathlib import Path

import numpy as np
import torch

import data
from cass import build_arm
from common import cli
from common.checkpoint import atomic_open, write_csv, write_json
from common.decode import digest
from common.readers import read
from common.run import seconds_per_step
from common.starts import load_weights
from common.testing import SHOWN, refuse_unlabelled
from pretrain import VERSIONS
from tools import ensemble

ROOT = Path(__file__).parents[1]
VIT_B, VIT_L = (f"vit_{size}_patch16_384.augreg_in21k_ft_in1k" for size in ("base", "large"))
SWIN = "swin_base_patch4_window12_384.ms_in22k_ft_in1k"
SMALL = {"patch_size": 8, "depth": 6}
SMALL_SWIN = {"window_size": 4, "embed_dim": 48, "depths": (2, 2, 2), "num_heads": (3, 6, 12)}
MODELS = {  # the paper's name: (timm's, arguments) at the paper's size, and at one for a CPU
    "ResNet-50": (("resnet50.a1_in1k", {}), ("resnet10t", {})),
    "ResNet-18": (("resnet18.a1_in1k", {}), ("test_resnet", {})),
    "ResNet-200": (("resnet200d", {}), ("resnet18", {})),  # 64.69 M parameters
    "DenseNet-161": (("densenet161.tv_in1k", {}), ("densenet121", {"growth_rate": 8})),
    "ViT-B/16": ((VIT_B, {}), ("vit_tiny_patch16_224", SMALL)),
    "ViT-L/16": ((VIT_L, {}), ("vit_small_patch16_224", SMALL)),
    "DeiT-B/16": (("deit_base_patch16_384.fb_in1k", {}), ("deit_tiny_patch16_224", SMALL)),
    "Swin-B": ((SWIN, {}), ("swin_tiny_patch4_window7_224", SMALL_SWIN)),
}
SCALES = {"paper": (384, 100, []), "small": (32, 3, ["--init", "random"])}  # px, epochs, flags
SMALL_DINO = ["--outputs", "4096", "--crops", "4"]
OTHER_ARMS = "10 11 12 13 16 17 18 19 20".split()  # tables that change arms or start


@dataclass
class Row:
    """A line of a table: a pre-training of two arms (or none: supervised) and its flags."""

    label: str
    method: str = "cass"
    cnn: str = "ResNet-50"
    vit: str = "ViT-B/16"
    flags: list = field(default_factory=list)
    epochs: float = 1  # times those of the scale
    arms: tuple = ("cnn", "vit")
    fracs: tuple = (1.0,)


def methods(*fracs):
    """DINO, CASS and no pre-training, at these label fractions."""
    return [Row(label, label.lower(), fracs=fracs) for label in ("DINO", "CASS", "Supervised")]


def variants(flags):
    """CASS with other flags. flags: {label: as one would type them}."""
    return [Row(label, flags=words.split()) for label, words in flags.items()]


def pairs(*labels):
    """CASS on other arms. labels: "CNN + Transformer"."""
    flags, names = {"ResNet-200": ["--init-cnn", "random"]}, [x.split(" + ") for x in labels]
    return [Row(f"{cnn} + {vit}", "cass", cnn, vit, flags.get(cnn, [])) for cnn, vit in names]


def alone(arm, *names):
    """Supervised training of one arm."""
    flags, arms = {"ResNet-200": ["--init", "random"]}, {"method": "supervised", "arms": (arm,)}
    return [Row(name, **arms, **{arm: name}, flags=flags.get(name, [])) for name in names]


def rows_of(table):
    """The rows of a table of the paper, None where there is no such table."""
    blur, solarize = "--ablation blur", "--ablation solarize"
    labels = [f"CASS + {x}" for x in ("Solarize", "Gaussian blur", "Gaussian blur + Solarize")]
    augmentations = {"CASS only": ""} | dict(zip(labels, (solarize, blur, f"{blur} solarize")))
    vicreg = "--objective vicreg --lr 3e-4".split()  # the rate: chosen on validation images
    resnets, two = ("ResNet-18", "ResNet-50", "ResNet-200"), "ResNet-50 + ViT-B/16"
    tables = {
        "1": methods()[:2],
        "2": methods(0.1, 1.0),
        "4": methods(0.01, 0.1, 1.0),
        "6": variants({"batch 8": "--bs 8", "batch 16": "", "batch 32": "--bs 32"}),
        "7": [Row(f"{round(100 * e)} epochs", epochs=e) for e in (0.5, 1, 2, 3)],
        "8": variants(augmentations),
        "9": variants({"Adam": "", "SGD": "--ablation sgd"}),
        "10": pairs(two, "ResNet-50 + ViT-L/16"),
        "11": alone("cnn", "ResNet-50") + alone("vit", "ViT-B/16", "ViT-L/16"),
        "12": pairs(*(f"{cnn} + ViT-B/16" for cnn in resnets)),
        "13": alone("cnn", *resnets),
        "17": pairs("ResNet-50 + DeiT-B/16", two, "ResNet-50 + ViT-L/16"),
        "18": pairs(two, "ResNet-50 + DenseNet-161"),
        "19": pairs(two, "Swin-B + ViT-B/16"),
        "20": variants({"random": "--init random", "ImageNet": "--init imagenet"}),
        "21": variants({"without": ""} | {x: f"--ablation {x}" for x in ("sigmoid", "softmax")}),
        "objectives": methods(0.01, 0.1) + [Row("CASS, vicreg", flags=vicreg, fracs=(0.01, 0.1))],
    }
    same = {"3": "2", "5": "4", "14": "6", "15": "7", "16": "12"}  # on other data
    return tables.get(same.get(table, table))


def add_arguments(parser):
    add = parser.add_argument
    add("--table", required=True, metavar="N", help="number in the paper, or: objectives")
    data.add_arguments(parser)
    scale = "paper: its arms, ImageNet weights, 384 px, 100 epochs; small: 32 px, random, 3 epochs"
    add("--scale", default="paper", choices=list(SCALES), help=scale)
    add("--epochs", type=cli.positive, help="of pre-training, instead of the scale's")
    add("--seeds", type=cli.count, nargs="+", default=[0, 1, 2, 3, 4], metavar="N", help="of runs")
    add("--fracs", type=cli.fraction, nargs="+", metavar="F", help="only these label fractions")
    add("--only", nargs="+", metavar="ROW", help="only these rows, by their names in the table")
    add("--metric", choices=SHOWN, help="in table.md (macro_f1; in Table 5, balanced_accuracy)")
    warm = "start both arms from these weights files of finetune.py, heads included"
    add("--warm", nargs=2, metavar=("CNN", "VIT"), help=warm)
    add("--dry-run", action="store_true", help="print every command and an estimate of the time")
    add("--out", metavar="DIR", help="folder of the table (default: results/tableN)")
    add("--work", default="runs", metavar="DIR", help="folder of the runs (default: %(default)s)")
    add("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")


def parse_arguments():
    """The arguments, and the rows of the table that they ask for."""
    parser = cli.Parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    rows = rows_of(args.table)
    if rows is None:
        parser.error(f"--table {args.table}: no such table; there are 1 to 21 and: objectives")
    if args.data is None:
        parser.error("--data PATH is missing")
    labels, fracs = [row.label for row in rows], sorted({f for row in rows for f in row.fracs})
    for flag, asked, known in (("only", args.only, labels), ("fracs", args.fracs, fracs)):
        for value in (v for v in asked or () if v not in known):
            there = ", ".join(map(str, known)) or "none"
            parser.error(f"--{flag} {value}: not in the table, which has: {there}")
    if args.warm and args.table in OTHER_ARMS:
        parser.error(f"--warm brings its own arms, which Table {args.table} changes")
    rows = [row for row in rows if not args.only or row.label in args.only]
    for row in rows:
        row.fracs = tuple(f for f in row.fracs if not args.fracs or f in args.fracs)
    args.warm_weights = [load_weights(path) for path in args.warm or ()]
    data.make_absolute(args)
    args.out = Path(args.out or f"results/{'table' * args.table.isdigit()}{args.table}")
    cli.refuse_overwrite(args.out, (), False)  # it may be no folder
    return args, rows


def data_flags(args):
    """The data flags that were given, as words to hand on."""
    words = []
    for key, value in data.options(args, data.OPTIONS).items():
        if value:
            values = value if isinstance(value, list) else [value] * (value is not True)
            words += [f"--{key.replace('_', '-')}", *values]
    return words


def model_of(args, row, arm):
    """Name and arguments of an arm for timm.create_model; with --warm, the file's own."""
    if not args.warm:
        return MODELS[getattr(row, arm)][args.scale == "small"]
    weights = args.warm_weights[arm == "vit"]
    kwargs = {**weights["model_kwargs"], "num_classes": weights["num_classes"]}
    return weights["arch"], {k: v for k, v in kwargs.items() if k != "img_size"}


def model_flags(args, row, arm, prefix):
    """--cnn NAME --cnn-kwargs KEY=VALUE … (prefix: cnn, vit or arch)."""
    name, kwargs = model_of(args, row, arm)
    left_out = "num_classes" if prefix == "arch" else None
    words = [f"{k}={v}".replace(" ", "") for k, v in kwargs.items() if k != left_out]
    return [f"--{prefix}", name, *([f"--{prefix}-kwargs", *words] if words else [])]


def epochs_of(args, row):
    """Epochs of a row's pre-training."""
    return max(1, round((args.epochs or SCALES[args.scale][1]) * row.epochs))


def commands(args, row, seed):
    """([pre-training], {(arm, frac): fine-tuning}) of a row, each a list of words and its folder;
    the first list is empty for supervised training."""
    size, _, flags = SCALES[args.scale]
    flags, warm = [*flags, *row.flags], args.warm  # of two settings of one flag the last counts
    device = ["--device", args.device] if args.device != "auto" else []
    common, tunings = ["--seed", str(seed), *data_flags(args), *device], {}

    def with_folder(words):
        name = hashlib.sha256("\0".join(words).encode()).hexdigest()[:10]
        return words, Path(args.work) / f"{row.method}_seed{seed}_{name}"

    if row.method == "supervised":
        for arm, frac in product(row.arms, row.fracs):
            words = ["finetune.py", *model_flags(args, row, arm, "arch")]
            words += ["--init", warm[arm == "vit"]] if warm else flags
            words += f"--img-size {size} --frac {frac:g}".split() + common
            tunings[arm, frac] = with_folder(words)
        return [], tunings
    words = ["tools.dino" if row.method == "dino" else "pretrain.py"]
    words += model_flags(args, row, "cnn", "cnn") + model_flags(args, row, "vit", "vit")
    words += f"--img-size {size} --epochs {epochs_of(args, row)}".split() + flags
    words += SMALL_DINO if row.method == "dino" and args.scale == "small" else []
    words += ["--init-cnn", warm[0], "--init-vit", warm[1]] if warm else []
    words, folder = with_folder(words + common)
    cache = ["--cache", args.cache] if args.cache else []
    for arm, frac in product(row.arms, row.fracs):
        tuning = ["finetune.py", "--ckpt", str(folder / f"{arm}.pt"), "--frac", f"{frac:g}"]
        tunings[arm, frac] = tuning + cache + device, folder / f"finetune_{arm}_{frac:g}"
    return [(words, folder)], tunings


def jobs_of(args, rows):
    """(row, seed, arm, frac, its runs) of each cell, a run being a command and its folder."""
    for seed, row in product(args.seeds, rows):
        before, tunings = commands(args, row, seed)
        for (arm, frac), tuning in tunings.items():
            yield row, seed, arm, frac, [*before, tuning]
        if not tunings:
            yield row, seed, "both", 0, before
        for frac in row.fracs if len(row.arms) == 2 else ():
            yield row, seed, "mean", frac, [*before, tunings["cnn", frac], tunings["vit", frac]]


def shown(words, folder):
    """A command as one would type it."""
    module = ["-m"] * words[0].startswith("tools.")
    return shlex.join(["python", *module, *words, "--out", str(folder)])


def portable(args, text):
    """Without what comes before the data and the runs on this machine."""
    warm = args.warm or ()
    for path in filter(None, (args.data, args.images, args.split, args.work, str(args.out), *warm)):
        before = os.path.dirname(os.path.dirname(path) if path in warm else os.path.normpath(path))
        text = text.replace(path, path.removeprefix(before).lstrip("/"))
    return text


def run_script(words, output):
    """Run a script; its exit status. A signal to this process is handed on, and waited for."""
    script = ["-m", words[0]] if words[0].startswith("tools.") else [str(ROOT / words[0])]
    command = [sys.executable, *script, *map(str, words[1:])]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    streams = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
    with cli.Signals() as signals:
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **streams)
        while process.poll() is None and not signals.number:
            time.sleep(0.05)
        if signals.number:
            process.send_signal(signals.number)
            process.wait()
            signals.leave("the interrupted run resumes when the command is called again")
    return process.returncode


def call(words, folder, failed):
    """Run a script into its folder, unless it is finished. Returns the last line of a failed one,
    else None. failed: {folder: that line} of this table, which are not tried twice."""
    if folder in failed or (folder / "finished").exists():
        return failed.get(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "w") as output:
        status = run_script([*words, "--out", folder, "--resume"], output)
    if status:
        said = (folder / "output.txt").read_text(errors="replace").split("\n")
        failed[folder] = next((text for text in said[::-1] if text.strip()), f"status {status}")
        return failed[folder]
    (folder / "finished").touch()
    (folder / "last.pt").unlink(missing_ok=True)


def hardware(device):
    """The name of the GPU, or of the CPU and how many threads it runs."""
    if cli.pick_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def results_of(row, runs):
    """Seconds and metrics of finished runs, for the record of a cell."""
    result, tunings = {}, [folder for words, folder in runs if words[0] == "finetune.py"]
    if row.method != "supervised":
        log = [json.loads(line) for line in (runs[0][1] / "log.jsonl").read_text().splitlines()]
        result["pretrain_seconds"] = round(sum(line["seconds"] for line in log), 1)
        if not tunings:
            result["log"] = log
    if tunings:
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in tunings]
        result["finetune_seconds"] = round(sum(m["seconds"] for m in metrics), 1)
        result["metrics"] = {k: v for k, v in metrics[0].items() if k != "ckpt"}
    if len(tunings) == 2:  # the mean of both arms' probabilities
        *_, result["metrics"] = ensemble.score(ensemble.read_equal(tunings, tunings))[0]
    return result


def run_cells(args, jobs):
    """Run the cells that are not done, and record each in cells/*.json. Returns how many failed."""
    failed, errors, machine = {}, 0, hardware(args.device)
    for row, seed, arm, frac, runs in cli.progress(jobs, "cell", desc=f"table {args.table}"):
        name = re.sub(r"[^\w.-]+", "_", f"{row.label}_{arm}_{frac:g}_seed{seed}")
        file = args.out / "cells" / f"{name}.json"
        words = [portable(args, shown(*run)) for run in runs]
        before = json.loads(file.read_text()) if file.exists() else {}
        if (before.get("status"), before.get("commands")) == ("done", words):
            continue
        cell = {"row": row.label, "arm": arm, "frac": frac, "seed": seed, "status": "done"}
        cell |= {"commands": words, "hardware": machine, "versions": VERSIONS}
        error = next(filter(None, (call(*run, failed) for run in runs)), None)
        if error:
            errors += 1
            cell |= {"status": "failed", "error": portable(args, error)}
            print(f"failed: {name}: {cell['error']}", file=sys.stderr)
        else:
            cell |= results_of(row, runs)
        write_json(file, cell)
    return errors


def summarize(cells, metric):
    """{row|arm|frac: {seed: score}} of finished cells, in the order they come."""
    summary = {}
    for cell in cells:
        value = cell.get("metrics", {}).get("test", {}).get(metric)
        if value is not None:
            summary.setdefault("{row}|{arm}|{frac:g}".format(**cell), {})[cell["seed"]] = value
    return summary


def gain(means, frac, over):
    """Points that CASS gains over `over` on one data set (G.0.3): summed over both arms."""
    rows = product(("CASS", over), ("cnn", "vit"))
    a, b, c, d = (means.get(f"{row}|{arm}|{frac}") for row, arm in rows)
    return None if None in (a, b, c, d) else 100 * (a + b - c - d)


def gain_lines(args, table, paper):
    """For Tables 2 to 5: the gain per label fraction, of this table and over the finished ones,
    from the paper's figures and from ours (G.0.3: mean over data sets). table: its table.json."""
    printed = {n: {k: float(v.split("±")[0]) for k, v in paper[n]["cells"].items()} for n in "2345"}
    ours = {args.table: table["means"]}
    for n in set("2345") - {args.table}:
        file = args.out.parent / f"table{n}" / "table.json"
        if args.out.name == f"table{args.table}" and file.exists():
            other = json.loads(file.read_text())
            if all(other[key] == table[key] for key in ("scale", "epochs", "warm")):
                ours[n] = other["means"]
    yield (
        "\nGain in points (G.0.3: summed over both arms, mean over data sets). The paper's own "
        "figures do not give the +3.8 and +5.9 of its abstract.\n\n| | paper, this table | paper, "
        "Tables 2–5 | this code, this table | this code, Tables 2–5 |\n|---|---|---|---|---|"
    )
    for over, frac in product(("DINO", "Supervised"), ("0.01", "0.1", "1")):
        texts = []
        for means, tables in product((printed, ours), (args.table, "2345")):
            gains = [gain(means.get(n, {}), frac, over) for n in tables]
            gains = [points for points in gains if points is not None]
            texts.append(f"{np.mean(gains):+.1f} ({len(gains)} data sets)" if gains else "not run")
        yield f"| CASS over {over}, {float(frac):.0%} | {' | '.join(texts)} |"


def paired(summary, frac, row, other):
    """Mean and standard error over seeds of the difference of two rows, mean of both arms; n."""
    names = product((row, other), ("cnn", "vit"))
    a, b, c, d = (summary.get(f"{name}|{arm}|{frac}", {}) for name, arm in names)
    seeds = sorted(a.keys() & b.keys() & c.keys() & d.keys())
    both = np.array([(a[s] + b[s]) / 2 - (c[s] + d[s]) / 2 for s in seeds])
    return (both.mean(), both.std(ddof=1) / len(both) ** 0.5, len(both)) if len(both) > 1 else None


def paired_lines(rows, summary):
    """The differences of all rows from Supervised and from CASS."""
    yield "\nPaired by seed, mean of both arms' scores: difference ± standard error.\n"
    yield "| | labels | over Supervised | over CASS |\n|---|---|---|---|"
    for row, frac in product(rows, sorted({f for r in rows for f in r.fracs})):
        texts = []
        for other in ("Supervised", "CASS"):
            got = paired(summary, f"{frac:g}", row.label, other) if other != row.label else None
            texts.append("{:+.3f} ± {:.3f} (n = {})".format(*got) if got else "")
        yield f"| {row.label} | {frac:.0%} | {' | '.join(texts)} |"


def time_lines(args, done, paper):
    """Table 1: seconds per epoch of both methods, the median over epochs, arms summed."""
    small = " At this scale with 4,096 outputs and 4 local crops." * (args.scale == "small")
    yield (
        "DINO trains one arm after the other, CASS both at once. The paper took DINO from another "
        "implementation with other settings (student temperature 0.9, 65,336 outputs, two "
        "full-size local views); here it is the original's for Transformers, for both arms."
        f"{small}\n\n| data set | DINO | CASS | CASS / DINO |\n|---|---|---|---|"
    )
    ratios, seconds = [], {"DINO": {}, "CASS": {}}
    for name, times in paper["1"]["times"].items():
        minutes = {}
        for method, text in times.items():  # 1 Hour 13 Mins
            *hours, rest = map(int, re.findall(r"\d+", text))
            minutes[method] = 60 * sum(hours) + rest
        ratios.append(minutes["CASS"] / minutes["DINO"])
        yield f"| paper, {name} | {times['DINO']} | {times['CASS']} | {ratios[-1]:.2f} |"
    what = 'paper, mean of the ratios (its "69 % less time" would be 0.31)'
    yield f"| {what} | | | {np.mean(ratios):.2f} |"
    for cell in done:
        arms = {}
        for line in cell["log"]:
            arms.setdefault(line["arms"], []).append(line["seconds"])
        seconds[cell["row"]][cell["seed"]] = sum(map(np.median, arms.values()))
    if both := sorted(seconds["DINO"].keys() & seconds["CASS"]):
        dino, ours = (np.array([seconds[m][s] for s in both]) for m in ("DINO", "CASS"))
        means = f"{dino.mean():.1f} | {ours.mean():.1f} | {np.mean(ours / dino):.3f}"
        yield f"| **this code**, seconds per epoch, n = {len(both)} | {means} |"


def score_lines(args, rows, done, summary, about, metric):
    """The scores of both arms and of their mean, beside the paper's. done: finished cells."""
    theirs = f" (paper: {about['metric']})" if about["metric"] else ""
    yield (
        f"Score: {metric.replace('_', ' ')} on the test split{theirs}; mean ± standard deviation "
        "(n − 1) over seeds. *Mean of both*: the probabilities of both arms averaged, which the "
        "paper does not do.\n\n| | arm | labels | paper | this code | "
        "time: pre-training, fine-tuning |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        arms = (*row.arms, "mean") if len(row.arms) == 2 else row.arms
        label = row.label + f" (here {epochs_of(args, row)})" * (args.table in ("7", "15"))
        for frac, arm in product(row.fracs, arms):
            key, seconds, ours = f"{row.label}|{arm}|{frac:g}", [], "not run"
            these = [c for c in done if (c["row"], c["arm"], c["frac"]) == (row.label, arm, frac)]
            for part in ("pretrain_seconds", "finetune_seconds"):
                times = [cell[part] for cell in these if part in cell]
                seconds.append(f"{np.mean(times):.0f} s" if times else "–")
            if values := [*summary.get(key, {}).values()]:
                std = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
                ours = f"{np.mean(values):.4f}{std} (n = {len(values)})"
            name = "mean of both" if arm == "mean" else model_of(args, row, arm)[0]
            figures = f"{about['cells'].get(key, '–')} | {ours} | {', '.join(seconds)}"
            yield f"| {label} | {name} | {frac:.0%} | {figures} |"


def heading(args, about, done):
    """Title, command, data, scale, hardware and versions."""
    table = "Table " * args.table.isdigit() + args.table
    command = portable(args, shlex.join(["python", "-m", "tools.experiments", *sys.argv[1:]]))
    yield f"# {table}: {about['title']} (section {about['section']})\n\n`{command}`\n"
    size, epochs, _ = SCALES[args.scale]
    of = Path(args.data).name + ", de-duplicated" * args.dedup
    of += f", grouped by {args.group_col}" if args.group_col else ""
    scale = f"**{args.scale}**, epochs of pre-training: {args.epochs or epochs}, at {size} px"
    scale += ", small arms from random weights: not the paper's" * (args.scale == "small")
    scale += ", from warm arms" if args.warm else ""
    machines = "; ".join(sorted({cell["hardware"] for cell in done}))
    versions = ", ".join(f"{k} {v}" for k, v in VERSIONS.items())
    yield f"Data: {of}. Scale: {scale}. {machines}; {versions}.\n"


def write_scores(file, cells):
    """table.csv: a row per cell, with all scores."""
    keys = "row arm frac seed status pretrain_seconds finetune_seconds".split()
    scores = [*product(("test", "test_without_duplicates"), SHOWN)]
    names, rows = [score + part.removeprefix("test") for part, score in scores], []
    for cell in cells:
        metrics = cell.get("metrics", {})
        values = [(metrics.get(part) or {}).get(score) for part, score in scores]
        rows.append([*map(cell.get, keys), *values, cell.get("error")])
    write_csv(file, [*keys, *names, "error"], rows)


def write_table(args, paper, metric):
    """table.csv, table.json and table.md from cells/*.json. Returns the text of table.md."""
    rows = rows_of(args.table)
    order = {row.label: i for i, row in enumerate(rows)}
    cells = [json.loads(file.read_text()) for file in (args.out / "cells").glob("*.json")]
    cells = [c for c in cells if c["row"] in order]
    cells.sort(key=lambda c: (order[c["row"]], c["frac"], c["arm"], c["seed"]))
    write_scores(args.out / "table.csv", cells)
    summary, done = summarize(cells, metric), [c for c in cells if c["status"] == "done"]
    means = {key: float(np.mean([*seeds.values()])) for key, seeds in summary.items()}
    table = {"scale": args.scale, "epochs": args.epochs, "warm": bool(args.warm), "metric": metric}
    table |= {"means": means, "values": summary}
    write_json(args.out / "table.json", table)
    ours = {"title": "Objectives beside equation 1", "section": "not in it"}
    about = {"metric": "", "cells": {}} | paper.get(args.table, ours)
    lines = [*heading(args, about, done)]
    if args.table == "1":
        lines += time_lines(args, done, paper)
    else:
        lines += score_lines(args, rows, done, summary, about, metric)
    if args.table in "2345":
        lines += gain_lines(args, table, paper)
    if {"CASS", "Supervised"} <= order.keys():
        lines += paired_lines(rows, summary)
    failed = "Failed: {row}, {arm}, {frac:g}, seed {seed}: {error}"
    lines += ["", *(failed.format(**c) for c in cells if c["status"] == "failed")]
    text = "\n".join(lines).rstrip() + "\n"
    with atomic_open(args.out / "table.md") as file:
        file.write(text)
    return text


def seconds_per_image(args, name, kwargs):
    """Of a training step of one arm."""
    size, device = SCALES[args.scale][0], cli.pick_device(args.device)
    n = 16 if args.scale == "small" or device.type == "cuda" else 2
    model, amp = build_arm(name, size, **kwargs).to(device), cli.pick_amp("auto", device)
    x = torch.randn(n, 3, size, size, device=device)
    return seconds_per_step(lambda x: model(x).float().square().mean(), x, model, device, amp) / n


def estimate(args, rows, images):
    """Print every command and about how long they take, from a timed step of each arm."""
    n, seen, total = len(images), set(), 0.0
    n_test = int((images.given == "test").sum()) or round(0.2 * n)
    n_val = int((images.given == "val").sum()) or round((n - n_test) / 8)
    n_train, small_crops = n - n_test - n_val, 4 if args.scale == "small" else 8
    crops = 2 + small_crops * (96 / 224) ** 2 + 2 / 3  # of DINO; its teacher goes forward only
    models = [model_of(args, row, arm) for row in rows for arm in row.arms]
    timed = {key: seconds_per_image(args, *m) for key, m in {str(m): m for m in models}.items()}
    for row, _, arm, frac, runs in jobs_of(args, rows):
        for words, folder in (run for run in runs if run[1] not in seen):
            seen.add(folder)
            passes = n_train * epochs_of(args, row) * (crops if row.method == "dino" else 1)
            arms = row.arms
            if words[0] == "finetune.py":
                arms, passes = [arm], 50 * (max(frac * n_train, 1) + n_val / 3) + n_test / 3
            seconds = passes * sum(timed[str(model_of(args, row, a))] for a in arms)
            finished = (folder / "finished").exists()
            total += 0 if finished else seconds
            state = "finished" if finished else f"~ {seconds / 60:.1f} min"
            print(f"{shown(words, folder)}    # {state}")
    note = "fine-tuning stops early, and is counted with all its epochs"
    print(f"{len(seen)} runs, about {total / 3600:.1f} hours here; {note}")


def refuse_other_configuration(args, images):
    """Write config.json; raise UserError where the folder holds results of something else."""
    config = {"table": args.table, "scale": args.scale, "epochs": args.epochs}
    config["settings"] = [*SCALES[args.scale], *SMALL_DINO]
    config["data"] = portable(args, shlex.join(data_flags(args)))
    config |= {"images": len(images), "classes": images.classes}
    config["digest"] = digest("".join(images.names), np.ascontiguousarray(images.labels))
    weights = [w["state_dict"].values() for w in args.warm_weights]
    config["warm"] = [digest(*(tensor.numpy() for tensor in tensors)) for tensors in weights]
    file = args.out / "config.json"
    if file.exists() and json.loads(file.read_text()) != config:
        raise cli.UserError(f"{file}: is of another configuration; give another folder with --out")
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    write_json(file, config)


def pick_metric(args, images):
    """The score of table.md. Raises UserError where these images have none."""
    refuse_unlabelled(images)
    if images.multilabel and args.metric in ("balanced_accuracy", "accuracy"):
        fix = "several labels per image: take macro_f1, micro_f1 or auroc"
        raise cli.UserError(f"--metric {args.metric}: {images.path} has {fix}")
    of_isic = args.table == "5" and not images.multilabel
    return args.metric or ("balanced_accuracy" if of_isic else "macro_f1")


def main():
    args, rows = parse_arguments()
    images = read(args.data, **data.options(args))
    metric = pick_metric(args, images)
    if args.dry_run:
        return estimate(args, rows, images)
    refuse_other_configuration(args, images)
    jobs = list(jobs_of(args, rows))
    errors = run_cells(args, jobs)
    paper = json.loads((ROOT / "tools/paper.json").read_text())["tables"]
    print(write_table(args, paper, metric))
    if errors:
        raise cli.Stopped(1, f"{errors} of {len(jobs)} cells failed; run it again to retry them")


if __name__ == "__main__":
    cli.run(main)
