"""The paper's tables, one command each, its figures beside ours.

    python -m tools.experiments --table 4 --data /path --dry-run      (commands and time; runs nothing)
    python -m tools.experiments --table 4 --data /path                (the paper's size: a GPU)
    python -m tools.experiments --table 4 --data /path --scale small --seeds 0 1 2     (small arms, 32 px)

Every cell is a pre-training and a fine-tuning through the scripts, with one seed. When the command is
called again, finished cells are skipped, interrupted ones are resumed, failed ones are tried again.
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
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

import data
from cass import build_arm
from common import cli
from common.checkpoint import atomic_open, load_weights, write_csv, write_json
from common.cli import UserError
from common.decode import digest
from common.readers import read
from common.run import seconds_per_step
from pretrain import VERSIONS
from tools import ensemble

ROOT = Path(__file__).parents[1]
SMALL = {"patch_size": 8, "depth": 6}
SMALL_SWIN = {"window_size": 4, "embed_dim": 48, "depths": (2, 2, 2), "num_heads": (3, 6, 12)}
SWIN = "swin_base_patch4_window12_384.ms_in22k_ft_in1k"
MODELS = {  # the paper's name: (timm's, arguments) at the paper's size, and at one for a CPU
    name: ((paper, {}), (small, kwargs))
    for name, paper, small, kwargs in (
        ("ResNet-50", "resnet50.a1_in1k", "resnet10t", {}),
        ("ResNet-18", "resnet18.a1_in1k", "test_resnet", {}),
        ("ResNet-200", "resnet200d", "resnet18", {}),  # 64.69 M parameters
        ("DenseNet-161", "densenet161.tv_in1k", "densenet121", {"growth_rate": 8}),
        ("ViT-B/16", "vit_base_patch16_384.augreg_in21k_ft_in1k", "vit_tiny_patch16_224", SMALL),
        ("ViT-L/16", "vit_large_patch16_384.augreg_in21k_ft_in1k", "vit_small_patch16_224", SMALL),
        ("DeiT-B/16", "deit_base_patch16_384.fb_in1k", "deit_tiny_patch16_224", SMALL),
        ("Swin-B", SWIN, "swin_tiny_patch4_window7_224", SMALL_SWIN),
    )
}
SCALES = {"paper": (384, 100, []), "small": (32, 3, ["--init", "random"])}  # px, epochs, flags
SMALL_DINO = ["--outputs", "4096", "--crops", "4"]
OTHER_ARMS = "10 11 12 13 16 17 18 19 20".split()  # tables that change arms or start
SCORES = ("macro_f1", "micro_f1", "balanced_accuracy", "accuracy", "auroc")
PARTS = ("test", "test_without_duplicates")


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


def methods(*fracs):
    """DINO, CASS and no pre-training at these label fractions."""
    return [Row(label, label.lower(), fracs=fracs) for label in ("DINO", "CASS", "Supervised")]


def variants(rows):
    """CASS with other flags. rows: {label: flags as one would type them}."""
    return [Row(label, flags=flags.split()) for label, flags in rows.items()]


def pairs(*names):
    """CASS with other arms. names: of a CNN and a Transformer (or what takes its place)."""
    start = {"ResNet-200": ["--init-cnn", "random"]}
    return [Row(f"{cnn} + {vit}", cnn=cnn, vit=vit, flags=start.get(cnn, [])) for cnn, vit in names]


def alone(arm, *names):
    """Supervised training of one arm."""
    start = {"ResNet-200": ["--init", "random"]}
    rows = [Row(name, "supervised", arms=(arm,), flags=start.get(name, [])) for name in names]
    return [replace(row, **{arm: row.label}) for row in rows]


def rows_of(table):
    """The rows of a table of the paper, None where there is no such table."""
    resnets, vits = ("ResNet-18", "ResNet-50", "ResNet-200"), ("ViT-B/16", "ViT-L/16")
    two, deits = ("ResNet-50", "ViT-B/16"), ("DeiT-B/16", *vits)
    batch = variants({"batch 8": "--bs 8", "batch 16": "", "batch 32": "--bs 32"})
    epochs = [Row(f"{round(100 * e)} epochs", epochs=e) for e in (0.5, 1, 2, 3)]
    vicreg = {"flags": "--objective vicreg --lr 3e-4".split()}  # rate: best on validation images
    blur, solarize = "CASS + Gaussian blur", "--ablation blur solarize"
    augmentations = {"CASS only": "", "CASS + Solarize": "--ablation solarize"}
    augmentations |= {blur: "--ablation blur", f"{blur} + Solarize": solarize}
    activations = {"without": "", "sigmoid": "--ablation sigmoid", "softmax": "--ablation softmax"}
    tables = {
        "1": methods()[:2],
        "2": methods(0.1, 1.0),
        "4": methods(0.01, 0.1, 1.0),
        "6": batch,
        "7": epochs,
        "8": variants(augmentations),
        "9": variants({"Adam": "", "SGD": "--ablation sgd"}),
        "10": pairs(two, ("ResNet-50", "ViT-L/16")),
        "11": alone("cnn", "ResNet-50") + alone("vit", *vits),
        "12": pairs(*((cnn, "ViT-B/16") for cnn in resnets)),
        "13": alone("cnn", *resnets),
        "17": pairs(*(("ResNet-50", vit) for vit in deits)),
        "18": pairs(two, ("ResNet-50", "DenseNet-161")),
        "19": pairs(two, ("Swin-B", "ViT-B/16")),
        "20": variants({"random": "--init random", "ImageNet": "--init imagenet"}),
        "21": variants(activations),
        "objectives": [*methods(0.01, 0.1), Row("CASS, vicreg", fracs=(0.01, 0.1), **vicreg)],
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
    seeds = {"type": cli.count, "nargs": "+", "default": [0, 1, 2, 3, 4], "metavar": "N"}
    add("--seeds", **seeds, help="each is a pre-training and a fine-tuning of its own")
    fracs = {"type": cli.fraction, "nargs": "+", "metavar": "F"}
    add("--fracs", **fracs, help="only these label fractions of the table")
    add("--only", nargs="+", metavar="ROW", help="only these rows, by their names in the table")
    metric = "in table.md (default: macro_f1; Table 5: balanced_accuracy); table.csv has all"
    add("--metric", choices=SCORES, help=metric)
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
    names, fracs = [row.label for row in rows], sorted({f for row in rows for f in row.fracs})
    for name in args.only or ():
        if name not in names:
            parser.error(f"--only {name}: no row of the table, which has {', '.join(names)}")
    for frac in args.fracs or ():
        if frac not in fracs:
            known = ", ".join(f"{f:g}" for f in fracs) or "none"
            parser.error(f"--fracs {frac:g}: not in the table, which has {known}")
    if args.warm and args.table in OTHER_ARMS:
        parser.error(f"--warm brings its own arms, which Table {args.table} changes")
    rows = [row for row in rows if not args.only or row.label in args.only]
    for row in rows:
        row.fracs = tuple(f for f in row.fracs if not args.fracs or f in args.fracs)
    args.warm_weights = [load_weights(path) for path in args.warm or ()]
    data.make_absolute(args)
    name = f"table{args.table}" if args.table.isdigit() else args.table
    args.out = Path(args.out or f"results/{name}")
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
    kwargs = {k: v for k, v in weights["model_kwargs"].items() if k != "img_size"}
    return weights["arch"], {**kwargs, "num_classes": weights["num_classes"]}


def model_flags(args, row, arm, prefix):
    """--cnn NAME --cnn-kwargs KEY=VALUE … (prefix: cnn, vit or arch)."""
    name, kwargs = model_of(args, row, arm)
    leave_out = "num_classes" if prefix == "arch" else None
    words = [f"{k}={v}".replace(" ", "") for k, v in kwargs.items() if k != leave_out]
    return [f"--{prefix}", name, *([f"--{prefix}-kwargs", *words] if words else [])]


def epochs_of(args, row):
    """Epochs of a row's pre-training."""
    return max(1, round((args.epochs or SCALES[args.scale][1]) * row.epochs))


def with_folder(args, row, seed, words):
    """A command and the folder of its run, named after it."""
    name = hashlib.sha256("\0".join(words).encode()).hexdigest()[:10]
    return words, Path(args.work) / f"{row.method}_seed{seed}_{name}"


def supervised(args, row, seed, arm, frac, device):
    """The fine-tuning of a model that CASS has not trained, and its folder."""
    size, _, flags = SCALES[args.scale]
    start = ["--init", args.warm[arm == "vit"]] if args.warm else [*flags, *row.flags]
    words = ["finetune.py", *model_flags(args, row, arm, "arch"), *start]
    words += f"--img-size {size} --frac {frac:g} --seed {seed}".split()
    return with_folder(args, row, seed, [*words, *data_flags(args), *device])


def pretraining(args, row, seed, device):
    """The pre-training of a row, and its folder."""
    size, _, flags = SCALES[args.scale]
    words = ["tools.dino" if row.method == "dino" else "pretrain.py"]
    words += model_flags(args, row, "cnn", "cnn") + model_flags(args, row, "vit", "vit")
    words += f"--img-size {size} --epochs {epochs_of(args, row)}".split()
    words += [*flags, *row.flags]  # of two settings of one flag the last counts
    if row.method == "dino" and args.scale == "small":
        words += SMALL_DINO
    if args.warm:
        words += ["--init-cnn", args.warm[0], "--init-vit", args.warm[1]]
    words += ["--seed", str(seed), *data_flags(args), *device]
    return with_folder(args, row, seed, words)


def commands(args, row, seed):
    """(pre-training or None, {(arm, frac): fine-tuning}), each a list of words and its folder."""
    device = ["--device", args.device] if args.device != "auto" else []
    cells = list(product(row.arms, row.fracs))
    if row.method == "supervised":
        return None, {cell: supervised(args, row, seed, *cell, device) for cell in cells}
    words, folder = pretraining(args, row, seed, device)
    cache, tunings = ["--cache", args.cache] if args.cache else [], {}
    for arm, frac in cells:
        tuning = ["finetune.py", "--ckpt", str(folder / f"{arm}.pt"), "--frac", f"{frac:g}"]
        tunings[arm, frac] = [*tuning, *cache, *device], folder / f"finetune_{arm}_{frac:g}"
    return (words, folder), tunings


def shown(words, folder):
    """A command as one would type it."""
    module = ["-m"] if words[0].startswith("tools.") else []
    return shlex.join(["python", *module, *words, "--out", str(folder)])


def portable(args, text):
    """Without what comes before the data and the runs on this machine."""
    warm = args.warm or ()
    for path in filter(None, (args.data, args.images, args.split, args.work, str(args.out), *warm)):
        before = os.path.dirname(os.path.dirname(path) if path in warm else os.path.normpath(path))
        text = text.replace(path, path.removeprefix(before).lstrip("/"))
    return text


def commands_of(args, runs):
    """The commands of a cell, for its record."""
    return [portable(args, shown(*run)) for run in runs]


class Failed(Exception):
    """A script left with another status than 0; the text is its last line."""


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
        said = (folder / "output.txt").read_text(errors="replace").replace("\r", "\n").split("\n")
        failed[folder] = next((line for line in said[::-1] if line.strip()), f"status {status}")
        raise Failed(failed[folder])
    (folder / "finished").touch()
    (folder / "last.pt").unlink(missing_ok=True)


def hardware(device):
    """In words."""
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
    if len(tunings) == 2:
        *_, result["metrics"] = ensemble.score(ensemble.read_equal(tunings, tunings))[0]
    return result


def run_cell(args, row, seed, arm, frac, runs, failed):
    """The record of a cell, for cells/*.json. runs: (words, folder) of a pre-training, of a
    fine-tuning, or of both arms' for the mean of their probabilities."""
    cell = {"row": row.label, "arm": arm, "frac": frac, "seed": seed, "status": "done"}
    cell |= {"commands": commands_of(args, runs), "hardware": hardware(args.device)}
    cell["versions"] = VERSIONS
    try:
        for run in runs:
            call(*run, failed)
        cell |= results_of(row, runs)
    except Failed as error:
        cell |= {"status": "failed", "error": portable(args, str(error))}
    return cell


def summarize(cells, metric):
    """{row|arm|frac: {seed: score}} of finished cells, in the order they come."""
    summary = {}
    for cell in cells:
        value = cell.get("metrics", {}).get("test", {}).get(metric)
        if value is not None:
            key = f"{cell['row']}|{cell['arm']}|{cell['frac']:g}"
            summary.setdefault(key, {})[cell["seed"]] = value
    return summary


def means_of(summary):
    """{row|arm|frac: mean over seeds}."""
    return {key: float(np.mean(list(values.values()))) for key, values in summary.items()}


def gain(means, frac, over):
    """Points that CASS gains over `over` on one data set (G.0.3): summed over both arms."""
    keys = [f"{row}|{arm}|{frac}" for row in ("CASS", over) for arm in ("cnn", "vit")]
    if not all(key in means for key in keys):
        return None
    a, b, c, d = (means[key] for key in keys)
    return 100 * (a + b - c - d)


def mean_gain(means, tables, frac, over):
    """The mean gain over those of these tables that have one, in words. means: of each table."""
    gains = [gain(means[n], frac, over) for n in tables if n in means]
    gains = [g for g in gains if g is not None]
    return f"{np.mean(gains):+.1f} ({len(gains)} data sets)" if gains else "not run"


def settings(args):
    """What tables must have in common to be averaged."""
    return {"scale": args.scale, "epochs": args.epochs, "warm": bool(args.warm)}


def line(*cells):
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def gain_lines(args, summary, paper):
    """For Tables 2 to 5: the gain per label fraction, of this table and over the finished ones, from
    the paper's figures and from ours (G.0.3: the sum over both arms and the data sets, divided by the
    number of data sets)."""
    printed = {n: {k: float(v.split("±")[0]) for k, v in paper[n]["cells"].items()} for n in "2345"}
    ours = {args.table: means_of(summary)}
    for n in set("2345") - {args.table}:
        file = args.out.parent / f"table{n}" / "table.json"
        if args.out.name == f"table{args.table}" and file.exists():
            other = json.loads(file.read_text())
            if all(other[key] == value for key, value in settings(args).items()):
                ours[n] = other["means"]
    yield (
        "\nGain in points (G.0.3: summed over both arms, mean over data sets). The paper's own "
        "figures do not give the +3.8 and +5.9 of its abstract.\n"
    )
    columns = "paper, this table", "paper, Tables 2–5", "this code, this table"
    yield f"| {line(*columns, 'this code, Tables 2–5')}\n|---|---|---|---|---|"
    for over, frac in product(("DINO", "Supervised"), ("0.01", "0.1", "1")):
        of = product((printed, ours), ([args.table], "2345"))
        gains = [mean_gain(means, tables, frac, over) for means, tables in of]
        yield line(f"CASS over {over}, {float(frac):.0%}", *gains)


def paired(summary, frac, row, other):
    """Mean and standard error over seeds of the difference of two rows, the mean of their arms; n."""
    sides = []
    for name in (row, other):
        cnn, vit = (summary.get(f"{name}|{arm}|{frac}", {}) for arm in ("cnn", "vit"))
        sides.append({seed: (cnn[seed] + vit[seed]) / 2 for seed in cnn.keys() & vit})
    both = np.array([sides[0][s] - sides[1][s] for s in sorted(sides[0].keys() & sides[1])])
    return (both.mean(), both.std(ddof=1) / len(both) ** 0.5, len(both)) if len(both) > 1 else None


def paired_lines(rows, summary):
    """The differences of all rows from Supervised and from CASS."""
    yield "\nPaired by seed, mean of both arms' scores: difference ± standard error.\n"
    yield "| | labels | over Supervised | over CASS |\n|---|---|---|---|"
    for row, frac in product(rows, sorted({f for row in rows for f in row.fracs})):
        differences = []
        for other in ("Supervised", "CASS"):
            got = paired(summary, f"{frac:g}", row.label, other) if other != row.label else None
            differences.append("{:+.3f} ± {:.3f} (n = {})".format(*got) if got else "")
        yield line(row.label, f"{frac:.0%}", *differences)


def minutes(text):
    """Of "1 Hour 13 Mins"."""
    found = re.findall(r"(\d+) ([hm])", text.lower())
    return sum(int(n) * (60 if unit == "h" else 1) for n, unit in found)


def epoch_seconds(cell):
    """Seconds of an epoch, the median over epochs, of the arms that were trained one by one summed."""
    arms = {}
    for row in cell["log"]:
        arms.setdefault(row["arms"], []).append(row["seconds"])
    return sum(map(np.median, arms.values()))


def time_lines(args, cells, paper):
    """Table 1: seconds per epoch of both methods."""
    small = " At this scale with 4,096 outputs and 4 local crops." if args.scale == "small" else ""
    yield (
        "DINO trains one arm after the other, CASS both at once. The paper took DINO from another "
        "implementation with other settings (student temperature 0.9, 65,336 outputs, two full-size "
        f"local views); here it is the original's for Transformers, for both arms.{small}\n"
    )
    yield "| data set | DINO | CASS | CASS / DINO |\n|---|---|---|---|"
    ratios = []
    for name, times in paper["1"]["times"].items():
        ratios.append(minutes(times["CASS"]) / minutes(times["DINO"]))
        yield line(f"paper, {name}", times["DINO"], times["CASS"], f"{ratios[-1]:.2f}")
    mean = 'paper, mean of the ratios (its "69 % less time" would be 0.31)'
    yield f"| {mean} | | | {np.mean(ratios):.2f} |"
    seconds = {"DINO": {}, "CASS": {}}
    for cell in cells:
        if cell["status"] == "done":
            seconds[cell["row"]][cell["seed"]] = epoch_seconds(cell)
    both = sorted(seconds["DINO"].keys() & seconds["CASS"])
    if both:
        dino, ours = (np.array([seconds[m][s] for s in both]) for m in ("DINO", "CASS"))
        what = f"**this code**, seconds per epoch, n = {len(both)}"
        yield line(what, f"{dino.mean():.1f}", f"{ours.mean():.1f}", f"{np.mean(ours / dino):.3f}")


def mean_and_std(values):
    """In words."""
    if not values:
        return "not run"
    std = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{std} (n = {len(values)})"


def score_line(args, cells, summary, printed, row, arm, frac):
    """One line of table.md."""
    key, seconds = f"{row.label}|{arm}|{frac:g}", []
    this = [c for c in cells if (c["row"], c["arm"], c["frac"]) == (row.label, arm, frac)]
    for part in ("pretrain_seconds", "finetune_seconds"):
        values = [c[part] for c in this if c["status"] == "done" and part in c]
        seconds.append(f"{np.mean(values):.0f} s" if values else "–")
    name = "mean of both" if arm == "mean" else model_of(args, row, arm)[0]
    here = f" (here {epochs_of(args, row)})" if args.table in ("7", "15") else ""
    ours = mean_and_std(list(summary.get(key, {}).values()))
    figures = printed.get(key, "–"), ours, ", ".join(seconds)
    return line(row.label + here, name, f"{frac:.0%}", *figures)


def score_lines(args, rows, cells, summary, about, metric):
    """The table itself."""
    theirs = f" (paper: {about['metric']})" if about["metric"] else ""
    yield (
        f"Score: {metric.replace('_', ' ')} on the test split{theirs}; mean ± standard deviation "
        "(n − 1) over seeds. *Mean of both*: the probabilities of both arms averaged, which the "
        "paper does not do.\n"
    )
    yield "| | arm | labels | paper | this code | time: pre-training, fine-tuning |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        arms = (*row.arms, "mean") if len(row.arms) == 2 else row.arms
        for frac, arm in product(row.fracs, arms):
            yield score_line(args, cells, summary, about["cells"], row, arm, frac)


def heading(args, about, cells):
    """Title, command, data, scale, hardware and versions."""
    size, epochs, _ = SCALES[args.scale]
    table = f"Table {args.table}" if args.table.isdigit() else args.table
    yield f"# {table}: {about['title']} (section {about['section']})\n"
    command = ["python", "-m", "tools.experiments", *sys.argv[1:]]
    yield f"`{portable(args, shlex.join(command))}`\n"
    groups = f", grouped by {args.group_col}" if args.group_col else ""
    of = f"{Path(args.data).name}{', de-duplicated' if args.dedup else ''}{groups}"
    scale = f"**{args.scale}**, epochs of pre-training: {args.epochs or epochs}, at {size} px"
    if args.scale == "small":
        scale += ", small arms from random weights: not the paper's"
    if args.warm:
        scale += ", from warm arms"
    machines = "; ".join(sorted({c["hardware"] for c in cells if c["status"] == "done"}))
    versions = ", ".join(f"{k} {v}" for k, v in VERSIONS.items())
    yield f"Data: {of}. Scale: {scale}. {machines}; {versions}.\n"


def write_csv_table(file, cells):
    """table.csv: a line per cell, with all scores."""
    known = "row arm frac seed status pretrain_seconds finetune_seconds".split()
    scores = [(part, score) for part in PARTS for score in SCORES]
    rows = []
    for cell in cells:
        metrics = cell.get("metrics", {})
        values = [(metrics.get(part) or {}).get(score) for part, score in scores]
        rows.append([*(cell.get(key) for key in known), *values, cell.get("error")])
    names = [score + part.removeprefix("test") for part, score in scores]
    write_csv(file, [*known, *names, "error"], rows)


def write_table(args, rows, cells, paper, metric):
    """table.csv, table.json and table.md from the cells that there are. Returns the lines of it."""
    write_csv_table(args.out / "table.csv", cells)
    summary = summarize(cells, metric)
    values = {key: {str(s): x for s, x in scores.items()} for key, scores in summary.items()}
    scores = {"metric": metric, "means": means_of(summary), "values": values}
    write_json(args.out / "table.json", settings(args) | scores)

    ours = {"title": "Objectives beside equation 1", "section": "not in it"}
    about = {"metric": "", "cells": {}} | paper.get(args.table, ours)
    lines = [*heading(args, about, cells)]
    if args.table == "1":
        lines += time_lines(args, cells, paper)
    else:
        lines += score_lines(args, rows, cells, summary, about, metric)
    if args.table in "2345":
        lines += gain_lines(args, summary, paper)
    if {"DINO", "CASS", "Supervised"} <= {row.label for row in rows}:
        lines += paired_lines(rows, summary)
    lines.append("")
    for c in cells:
        if c["status"] == "failed":
            where = f"{c['row']}, {c['arm']}, {c['frac']:g}, seed {c['seed']}"
            lines.append(f"Failed: {where}: {c['error']}")
    with atomic_open(args.out / "table.md") as file:
        file.write("\n".join(lines).rstrip() + "\n")
    return lines


def seconds_per_image(name, kwargs, size, device, n):
    """Forward and backward through one arm in training, in batches of n images."""
    model = build_arm(name, size, **kwargs).to(device)
    images, amp = torch.randn(n, 3, size, size, device=device), cli.pick_amp("auto", device)

    def step(images):
        return model(images).float().square().mean()

    return seconds_per_step(step, images, model, device, amp) / n


def timed_runs(args, rows, n_train, n_val, n_test):
    """((words, folder), seconds) of every run: a step of each arm is timed, and a fine-tuning counted
    with all of its 50 epochs."""
    size, device, known = SCALES[args.scale][0], cli.pick_device(args.device), {}
    batch = 16 if args.scale == "small" or device.type == "cuda" else 2
    crops = 2 + (4 if args.scale == "small" else 8) * (96 / 224) ** 2  # of DINO
    passes = {"cass": 1, "dino": crops + 2 / 3}  # its teacher goes forward only

    def per_image(row, arm):
        name, kwargs = model_of(args, row, arm)
        key = name, str(kwargs)
        if key not in known:
            known[key] = seconds_per_image(name, kwargs, size, device, batch)
        return known[key]

    for seed, row in product(args.seeds, rows):
        pretraining, tunings = commands(args, row, seed)
        if pretraining:
            images = n_train * epochs_of(args, row) * passes[row.method]
            yield pretraining, images * (per_image(row, "cnn") + per_image(row, "vit"))
        for (arm, frac), tuning in tunings.items():
            images = 50 * (max(frac * n_train, 1) + n_val / 3) + n_test / 3
            yield tuning, images * per_image(row, arm)


def estimate(args, rows, images):
    """Print every command, and about how long they take."""
    n = len(images)
    test = int((images.given == "test").sum()) or round(0.2 * n)
    val = int((images.given == "val").sum()) or round((n - test) / 8)
    total, seen = 0.0, set()
    for (words, folder), seconds in timed_runs(args, rows, n - test - val, val, test):
        if folder in seen:
            continue
        seen.add(folder)
        finished = (folder / "finished").exists()
        total += 0 if finished else seconds
        state = "finished" if finished else f"~ {seconds / 60:.1f} min"
        print(f"{shown(words, folder)}    # {state}")
    note = "fine-tuning stops early, and is counted with all its epochs"
    print(f"{len(seen)} runs, about {total / 3600:.1f} hours here; {note}")


def jobs_of(args, rows):
    """What run_cell takes of each cell, but for `failed`."""
    for seed, row in product(args.seeds, rows):
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
        "data": portable(args, shlex.join(data_flags(args))),
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
        raise UserError(f"{file}: results of another configuration; name another folder with --out")
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    write_json(file, config)


def pick_metric(args, images):
    """The score of table.md. Raises UserError where these images have none."""
    if not images.classes or len(images.classes) == 1 and not images.multilabel:
        fix = "give each class a folder of its own, or a CSV file"
        raise UserError(f"{images.path}: has no labels, which the tables need; {fix}")
    if images.multilabel and args.metric in ("balanced_accuracy", "accuracy"):
        fix = "several labels per image: take macro_f1, micro_f1 or auroc"
        raise UserError(f"--metric {args.metric}: {images.path} has {fix}")
    isic = args.table == "5" and not images.multilabel
    return args.metric or ("balanced_accuracy" if isic else "macro_f1")


def run_cells(args, jobs):
    """Run the cells that are not done; how many failed."""
    failed, errors = {}, 0
    for job in cli.progress(jobs, unit="cell", desc=f"table {args.table}"):
        row, seed, arm, frac, runs = job
        name = re.sub(r"[^\w.-]+", "_", f"{row.label}_{arm}_{frac:g}_seed{seed}")
        file = args.out / "cells" / f"{name}.json"
        before = json.loads(file.read_text()) if file.exists() else {"status": None}
        if before["status"] == "done" and before["commands"] == commands_of(args, runs):
            continue
        cell = run_cell(args, *job, failed)
        write_json(file, cell)
        if cell["status"] == "failed":
            errors += 1
            print(f"failed: {name}: {cell['error']}", file=sys.stderr)
    return errors


def read_cells(folder, rows):
    """The records of all cells of these rows, in the order of the table."""
    order = {row.label: i for i, row in enumerate(rows)}
    cells = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    cells = [c for c in cells if c["row"] in order]
    return sorted(cells, key=lambda c: (order[c["row"]], c["frac"], c["arm"], c["seed"]))


def main():
    args, rows = parse_arguments()
    images = read(args.data, **data.options(args))
    metric = pick_metric(args, images)
    if args.dry_run:
        return estimate(args, rows, images)
    refuse_other_configuration(args, images)
    jobs = list(jobs_of(args, rows))
    errors = run_cells(args, jobs)
    paper = json.loads(Path(__file__).with_name("paper.json").read_text())["tables"]
    every = rows_of(args.table)
    cells = read_cells(args.out / "cells", every)
    print("\n".join(write_table(args, every, cells, paper, metric)))
    if errors:
        way_out = "the same command tries them again"
        print(f"error: {errors} of {len(jobs)} cells failed; {way_out}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
