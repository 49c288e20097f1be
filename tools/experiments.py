"""The paper's tables, one command each, its figures beside ours.

    python -m tools.experiments --table 4 --data /path --dry-run    (prints commands and time)
    python -m tools.experiments --table 4 --data /path              (the paper's size: a GPU)
    python -m tools.experiments --table 4 --data /path --scale small --seeds 0 1 2    (a CPU)

A row is a pre-training (supervised: of no epoch) and, for each label fraction, a fine-tuning of its
arms. Called again, it skips finished cells and resumes or retries the others. --out: config.json,
cells/*.json, table.csv, .json and .md; --work: weights and logs of the runs, shared by all tables:
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from itertools import groupby, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
from cass import build_arm
from common import cli, decode, readers, results, splits, starts
from common.checkpoint import atomic_open, read_json, write_csv, write_json
from common.run import seconds_per_step
from pretrain import VERSIONS

PAPER = read_json(Path(__file__).with_name("paper.json"))
MODELS = PAPER["models"]  # the paper's name: [timm's, arguments] at its size and at one for a CPU
SCALES = {"paper": (384, 100, []), "small": (32, 3, ["--init", "random"])}  # px, epochs, flags
SMALL_DINO = ["--outputs", "4096", "--crops", "4"]


def rows_of(table, scale="paper", only=None, fracs=None, epochs=None):
    """The rows of a table, each a pre-training of two arms and the cells of its fine-tunings, as
    paper.json describes them. only: their labels; fracs: of labels; epochs: of pre-training."""
    about, epochs = PAPER["tables"][table], epochs or SCALES[scale][1]
    fracs = [frac for frac in about["fracs"] if frac in (fracs or about["fracs"])]
    labels = [label for label in about["rows"] if label in (only or about["rows"])]
    rows = [SimpleNamespace(label=x, **PAPER["row"] | PAPER["rows"].get(x, {})) for x in labels]
    for row in rows:
        row.epochs = 0 if row.method == "supervised" else max(1, round(epochs * row.epochs))
        row.models = {arm: MODELS[getattr(row, arm)][scale == "small"] for arm in ("cnn", "vit")}
        arms = [*row.arms, "mean"] if len(row.arms) == 2 else row.arms
        row.cells = list(product(fracs, arms)) or [(0, "both")]
    return rows


def data_flags(args):
    """The data flags that were given, as words to hand on."""
    return starts.words_of(data.options(args, data.OPTIONS))


def jobs_of(args, rows):
    """(row, cell, its runs) of all cells: what its file begins with; commands and their folders.
    The name of a pre-training's folder stands for all its words."""
    size, _, flags = SCALES[args.scale]
    for seed, row in product(args.seeds, rows):
        words = [PAPER["scripts"].get(row.method, "pretrain.py"), "--epochs", str(row.epochs)]
        words += SMALL_DINO * (row.method == "dino" and args.scale == "small")
        words += ["--img-size", str(size), *flags, *row.flags.split()]  # the last of a flag counts
        for arm, (name, kwargs) in row.models.items():
            pairs = [f"{key}={value}".replace(" ", "") for key, value in kwargs.items()]
            words += [f"--{arm}", name] + [f"--{arm}-kwargs", *pairs] * bool(pairs)
        words += [*data_flags(args), "--seed", str(seed), "--device", args.device]
        digest = decode.digest(shlex.join(words))
        folder = Path(args.work) / f"{row.method}_seed{seed}_{digest:016x}"
        tuning = ["finetune.py", "--ckpt", *(str(folder / f"{arm}.pt") for arm in row.arms)]
        tuning += ["--device", args.device, "--frac"]
        for frac, arm in row.cells:
            out = folder / f"finetune_{'_'.join(row.arms)}_{frac:g}"
            runs = [(words, folder), ([*tuning, f"{frac:g}"], out)]
            cell = {"row": row.label, "arm": arm, "frac": frac, "seed": seed}
            yield row, cell, runs if frac else runs[:1]


def shown(words, folder):
    """A command as one would type it."""
    module = ["-m"] * words[0].startswith("tools.")
    return shlex.join(["python", *module, *words, "--out", str(folder)])


def portable(args, text):
    """Without what comes before the data and the runs on this machine."""
    for path in filter(None, [args.data, args.images, args.split, args.work, str(args.out)]):
        text = text.replace(os.path.normpath(path), os.path.basename(os.path.normpath(path)))
    return text


def run_script(words, output):
    """Run a script; its exit status. A signal to this process is handed on, and waited for."""
    command = [sys.executable, "-m", words[0].removesuffix(".py"), *map(str, words[1:])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    streams = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
    with subprocess.Popen(command, env=environment, **streams) as process:  # waits on leaving
        try:
            return process.wait()
        except cli.Stopped as stop:
            process.send_signal(stop.args[0] - 128)
            how = "the interrupted run resumes when the command is called again"
            raise cli.Stopped(stop.args[0], how) from None


def call(words, folder, failed):
    """Run a script into its folder, unless it is finished, or has failed already: {folder: its last
    line}. Returns that line, else None. UserError: another command was finished there."""
    mark = folder / "finished"
    if mark.exists() and mark.read_text() != shlex.join(words):
        raise cli.UserError(f"{folder}: was made with other flags; give another --out")
    if folder not in failed and not mark.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "w") as output:
            status = run_script([*words, "--out", folder, "--resume", "--overwrite"], output)
        if status:
            said = (folder / "output.txt").read_text(errors="replace").strip()
            failed[folder] = said.split("\n")[-1] or f"status {status}"
        else:
            mark.write_text(shlex.join(words))
            (folder / "last.pt").unlink(missing_ok=True)
    return failed.get(folder)


def hardware(device):
    """The name of the GPU, or of the CPU and how many threads it runs."""
    if cli.pick_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return f"{[*names, platform.processor()][0]}, {torch.get_num_threads()} threads"


def results_of(row, arm, runs):
    """Seconds and metrics of a cell's finished runs, for its record."""
    result, (_, folder), *tuned = {}, *runs
    if row.epochs:
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        result["pretrain_seconds"] = round(sum(epoch["seconds"] for epoch in log), 1)
        result |= {} if tuned else {"log": log}
    for _, out in tuned:
        arms = [arm] if arm in row.arms else row.arms  # mean: of both
        places = [out / x if len(row.arms) > 1 else out for x in (arm, *arms)]
        found, *each = (read_json(place / "metrics.json") for place in places)
        result["finetune_seconds"] = round(sum(x["seconds"] for x in each), 1)
        result["metrics"] = {key: x for key, x in found.items() if key != "ckpt"}
    return result


def section(note, rows, **values):
    """A note of paper.json and a table in Markdown. rows: the texts of its cells."""
    text, *header = PAPER["notes"][note]
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join([text.format(**values), "", *lines])


def heading(args, cells):
    """Title, command, scale, hardware and versions."""
    command = portable(args, shlex.join(["python", "-m", "tools.experiments", *sys.argv[1:]]))
    size, epochs, _ = SCALES[args.scale]
    scale = f"**{args.scale}**, {size} px, epochs of pre-training: {args.epochs or epochs}"
    scale += " for the paper's 100; small arms, not the paper's" * (args.scale == "small")
    versions = {", ".join(map(" ".join, cell["versions"].items())) for cell in cells}
    machines = "; ".join(sorted({cell["hardware"] for cell in cells} | versions))
    return f"# {PAPER['tables'][args.table]['title']}\n\n`{command}`\n\nScale: {scale}. {machines}."


def times_section(cells):
    """Table 1: the times of both methods, ours the median over epochs, arms summed; their ratio."""
    rows, ratios, ours = [], [], {"DINO": {}, "CASS": {}}
    for name, times in PAPER["tables"]["1"]["times"].items():
        parts = [re.findall(r"\d+", times[method]) for method in ours]  # 1 Hour 13 Mins
        dino, cass = (60 * sum(map(int, hours)) + int(rest) for *hours, rest in parts)
        ratios.append(cass / dino)
        rows.append([f"paper, {name}", *times.values(), f"{ratios[-1]:.2f}"])
    rows.append(["paper, mean of the ratios", "", "", f"{np.mean(ratios):.2f}"])
    for c in (cell for cell in cells if "log" in cell):
        arms = groupby(c["log"], lambda row: row["arms"])  # one arm, or both, after the other
        ours[c["row"]][c["seed"]] = sum(np.median([x["seconds"] for x in log]) for _, log in arms)
    if both := ours["DINO"].keys() & ours["CASS"]:
        dino, cass = (np.array([times[seed] for seed in both]) for times in ours.values())
        figures = f"{dino.mean():.1f}", f"{cass.mean():.1f}", f"{np.mean(cass / dino):.3f}"
        rows.append([f"**this code**, seconds per epoch, n = {len(both)}", *figures])
    return section("times", rows)


def scores_section(args, scored):
    """The scores of both arms and of their mean, beside the paper's. scored: as in write_table."""
    about, lines = PAPER["tables"][args.table], []
    columns = args.metric, "pretrain_seconds", "finetune_seconds"
    for row in rows_of(args.table, args.scale):
        for frac, arm in row.cells:
            name = "mean of both" if arm == "mean" else row.models[arm][0]
            key = f"{row.label}|{arm}|{frac:g}"
            runs, printed = scored.get(key, ()), about["cells"].get(key, "–")
            scores, *times = ([r[c] for r in runs if r[c] is not None] for c in columns)
            std = f" ± {np.std(scores, ddof=1):.4f}" if len(scores) > 1 else ""
            ours = f"{np.mean(scores):.4f}{std} (n = {len(scores)})" if scores else "not run"
            seconds = [f"{np.mean(x):.0f} s" if x else "–" for x in times]
            lines.append([row.label, name, f"{frac:.0%}", printed, ours, *seconds])
    return section("scores", lines, metric=args.metric.replace("_", " "), paper=about["metric"])


def record(cell):
    """{column of table.csv: value} of a cell, with all its scores."""
    keys = "row arm frac seed status pretrain_seconds finetune_seconds".split()
    values, scores = {key: cell.get(key) for key in keys}, cell.get("metrics", {})
    for part, key in product(("test", "test_without_duplicates"), results.SCORES):
        values[key + part.removeprefix("test")] = (scores.get(part) or {}).get(key)
    return values | {"error": cell.get("error")}


def write_table(args):
    """table.csv, table.json and table.md from cells/*.json. Returns the text of table.md."""
    order, metric, scored = PAPER["tables"][args.table]["rows"], args.metric, {}
    cells = [read_json(file) for file in (args.out / "cells").glob("*.json")]
    cells.sort(key=lambda c: (order.index(c["row"]), c["frac"], c["arm"], c["seed"]))
    records = [record(cell) for cell in cells]
    write_csv(args.out / "table.csv", records[0], (r.values() for r in records))
    for r in (r for r in records if r[metric] is not None):  # {row|arm|frac: records}
        scored.setdefault("{row}|{arm}|{frac:g}".format(**r), []).append(r)
    values = {key: {r["seed"]: r[metric] for r in runs} for key, runs in scored.items()}
    means = {key: float(np.mean([*seeds.values()])) for key, seeds in values.items()}
    table = {"scale": args.scale, "epochs": args.epochs, "metric": metric}
    write_json(args.out / "table.json", table | {"means": means, "values": values})
    main = times_section(cells) if args.table == "1" else scores_section(args, scored)
    failed = "Failed: {row}, {arm}, {frac:g}, seed {seed}: {error}"
    failed = [failed.format(**r) for r in records if r["status"] == "failed"]
    text = "\n\n".join([heading(args, cells), main, *failed]) + "\n"
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
    """Print every command and about how long it still takes, from a timed step of each arm."""
    n_val, n_test = ((images.given == k).sum() or x * len(images) for k, x in splits.SHARES.items())
    n_train, todo = len(images) - n_test - n_val, {}  # {command: seconds}
    models = {str(model): model for row in rows for model in row.models.values()}
    timed = {key: seconds_per_image(args, *model) for key, model in models.items()}
    for row, cell, runs in jobs_of(args, rows):  # DINO: two large crops, small ones, the teacher's
        passes = n_train * row.epochs * (4 if row.method == "dino" else 1)
        tuning = 50 * (max(cell["frac"] * n_train, 1) + n_val / 3) + n_test / 3
        for (words, folder), n in zip(runs, (passes, tuning)):
            n *= not (folder / "finished").exists()
            todo[shown(words, folder)] = n * sum(timed[str(row.models[arm])] for arm in row.arms)
    for command, seconds in todo.items():
        print(f"{command}    # ~ {seconds / 60:.1f} min")
    hours = sum(todo.values()) / 3600
    print(f"{len(todo)} runs, about {hours:.1f} hours here if no fine-tuning stops early")


def main():
    parser = cli.Parser(__doc__ + "\n".join(table["title"] for table in PAPER["tables"].values()))
    add = parser.add_argument
    add("--table", required=True, choices=[*PAPER["tables"]], metavar="N", help="of the paper")
    data.add_arguments(parser)
    add("--scale", default="paper", choices=list(SCALES), help="small: 32 px, 3 epochs, for a CPU")
    add("--epochs", type=cli.positive, help="of pre-training, instead of the scale's")
    add("--seeds", type=cli.count, nargs="+", default=[0, 1, 2, 3, 4], metavar="N", help="of runs")
    add("--fracs", type=cli.fraction, nargs="+", metavar="F", help="only these label fractions")
    add("--only", nargs="+", metavar="ROW", help="only these rows, by their names in the table")
    add("--metric", choices=results.SCORES, help="in table.md (macro_f1; 5: balanced_accuracy)")
    add("--out", metavar="DIR", help="folder of the table (default: runs/tableN)")
    add("--work", default="runs", metavar="DIR", help="folder of the runs (default: %(default)s)")
    add("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    add("--dry-run", action="store_true", help="print every command and an estimate of the time")
    args = parser.parse_args()
    about = PAPER["tables"][args.table]
    if args.data is None:
        parser.error("--data PATH is missing")
    for flag, known in (("only", about["rows"]), ("fracs", about["fracs"])):
        if unknown := set(vars(args)[flag] or ()) - set(known):
            there = ", ".join(map(str, known)) or "none"
            parser.error(f"--{flag} {cli.preview(unknown)}: not in the table, which has: {there}")
    args.metric = args.metric or about.get("ours", "macro_f1")
    args.out = Path(args.out or f"runs/{'table' * args.table.isdigit()}{args.table}")
    cli.refuse_overwrite(args.out, (), False)  # it may be no folder
    rows = rows_of(args.table, args.scale, args.only, args.fracs, args.epochs)
    images = readers.read(args.data, **data.options(args))
    results.refuse_unlabelled(images)
    if images.multilabel and args.metric in ("balanced_accuracy", "accuracy"):
        fix = "has several labels per image: give --metric macro_f1, micro_f1 or auroc"
        raise cli.UserError(f"--metric {args.metric}: {images.path} {fix}")
    if args.dry_run:
        return estimate(args, rows, images)
    config = {"table": args.table, "scale": args.scale, "epochs": args.epochs}
    config |= {"settings": [*SCALES[args.scale], *SMALL_DINO], "images": len(images)}
    config |= {"data": portable(args, shlex.join(data_flags(args))), "classes": images.classes}
    config["digest"] = decode.digest("".join(images.names), np.ascontiguousarray(images.labels))
    file = args.out / "config.json"
    if file.exists() and read_json(file) != config:
        raise cli.UserError(f"{file}: is of another configuration; give another folder with --out")
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    write_json(file, config)
    jobs, failed, machine = list(jobs_of(args, rows)), {}, hardware(args.device)
    for row, cell, runs in cli.progress(jobs, "cell", desc=f"table {args.table}"):
        name = re.sub(r"[^\w.-]+", "_", "{row}_{arm}_{frac:g}_seed{seed}".format(**cell))
        file = args.out / "cells" / f"{name}.json"
        cell |= {"status": "done", "commands": [portable(args, shown(*run)) for run in runs]}
        if file.exists() and cell.items() <= read_json(file).items():
            continue
        cell |= {"hardware": machine, "versions": VERSIONS}
        if error := next(filter(None, (call(*run, failed) for run in runs)), None):
            cell |= {"status": "failed", "error": portable(args, error)}
            print(f"failed: {name}: {cell['error']}", file=sys.stderr)
        else:
            cell |= results_of(row, cell["arm"], runs)
        write_json(file, cell)
    print(write_table(args))
    if errors := sum(cell["status"] == "failed" for _, cell, _ in jobs):
        raise cli.Stopped(1, f"{errors} of {len(jobs)} cells failed; run it again to retry them")


if __name__ == "__main__":
    cli.run(main)
