"""Tables of methods, one command each: the paper's, beside ours, and our protocol's.

    python -m tools.experiments --table 4 --data /path    (at the paper's size)
    python -m tools.experiments --table 4 --data /path --scale small --seeds 0 1 2    (for a CPU)

A row is a pre-training (supervised: of no epoch) and, for each label fraction, a fine-tuning of its
arms. It says first how long all takes (--dry-run: each run). Called again, it skips finished cells,
a row and a seed each, and resumes or retries others.
--out: DATA.json, cells/*.json, table.csv, table.md; --work: weights and logs of the runs, shared
by all tables. Table 1 takes several data sets, one after the other:
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
from common.checkpoint import atomic_open, read_json, versions, write_csv, write_json
from common.run import seconds_per_step

PAPER = read_json(Path(__file__).with_name("paper.json"))
for _key, _ours in read_json(Path(__file__).with_name("protocol.json")).items():
    PAPER[_key] |= _ours
MODELS = PAPER["models"]  # the paper's name: [timm's, arguments] at its size and at one for a CPU
SCALES = {"paper": (384, 100, "imagenet"), "small": (32, 3, "random")}  # px, epochs, --init
ARMS = {"cnn": "CNN", "vit": "Transformer", "mean": "mean of both"}
SMALL_DINO = ["--outputs", "4096", "--crops", "4"]
ROOT = Path(__file__).parents[1]
OTHERS = ROOT / "tools/dino.py", ROOT / "tests/variants.py"
TRAINING = sorted([*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *filter(Path.exists, OTHERS)])
CODE = f"{decode.digest(*(file.read_bytes() for file in TRAINING)):016x}"


def rows_of(table, scale="paper", only=None, fracs=None, epochs=None):
    """The rows of a table, each a pre-training of two arms and its fine-tunings, as paper.json
    describes them. only: their labels; fracs: of labels; epochs: of pre-training."""
    about = PAPER["tables"][table]
    epochs = epochs or about.get("epochs") or SCALES[scale][1]
    labels = [label for label in about["rows"] if label in (only or about["rows"])]
    usual = PAPER["row"] | about.get("row", {})
    rows = [SimpleNamespace(label=x, **usual | PAPER["rows"].get(x, {})) for x in labels]
    for row in rows:
        row.fracs = [frac for frac in about["fracs"] if frac in (fracs or about["fracs"])]
        row.epochs = 0 if row.method == "supervised" else max(1, round(epochs * row.epochs))
        row.models = {arm: MODELS[getattr(row, arm)][scale == "small"] for arm in ("cnn", "vit")}
        row.parts = [*row.arms, "mean"] if len(row.arms) == 2 else row.arms
    return rows


def data_flags(args):
    """The data flags that were given, as words to hand on."""
    return starts.words_of(data.options(args, data.OPTIONS))


def jobs_of(args, rows):
    """(row, seed, its runs) of all cells; runs: commands and their folders, the pre-training first,
    the name of whose folder stands for all its words."""
    size, _, init = SCALES[args.scale]
    for seed, row in product(args.seeds, rows):
        words = [PAPER["scripts"].get(row.method, row.method), "--epochs", str(row.epochs)]
        words += SMALL_DINO * (row.method == "dino" and args.scale == "small")
        words += ["--img-size", str(row.size or size)]
        words += ["--init", "random"] * ("random" in (row.init or init)) + row.flags.split()
        for arm, (name, kwargs) in row.models.items():
            pairs = [f"{key}={value}".replace(" ", "") for key, value in kwargs.items()]
            words += [f"--{arm}", name] + [f"--{arm}-kwargs", *pairs] * bool(pairs)
            weights = (row.init or "").format(name)
            words += [f"--init-{arm}", weights] * weights.endswith(".pt")
        words += [*data_flags(args), "--seed", str(seed), "--device", args.device]
        digest = decode.digest(shlex.join(words))
        folder = Path(args.work) / f"{row.method.split('.')[-1]}_seed{seed}_{digest:016x}"
        tuning = ["finetune.py", "--ckpt", *(str(folder / f"{arm}.pt") for arm in row.arms)]
        tuning += [*row.tuning.split(), "--device", args.device, "--frac"]
        name = f"finetune_{'_'.join(row.arms)}_"
        tunings = [([*tuning, f"{frac:g}"], folder / f"{name}{frac:g}") for frac in row.fracs]
        yield row, seed, [(words, folder), *tunings]


def shown(words, folder):
    """A command as one would type it."""
    module = ["-m"] * (not words[0].endswith(".py"))
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


def call(words, folder):
    """Run a script into its folder, unless it is finished. Returns None, or its last line where it
    failed. UserError: another command was finished there."""
    mark, made = folder / "finished", f"{CODE} {shlex.join(words)}"
    if mark.exists() and mark.read_text() != made:
        what = "was made with other flags or by other code"
        raise cli.UserError(f"{folder}: {what}; give another folder")
    if mark.exists():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "w") as output:
        status = run_script([*words, "--out", folder, "--resume", "--overwrite"], output)
    if status:
        said = (folder / "output.txt").read_text(errors="replace").strip()
        return said.split("\n")[-1] or f"status {status}"
    mark.write_text(made)
    (folder / "last.pt").unlink(missing_ok=True)
    return None


def hardware(device):
    """The name of the GPU, or of the CPU and how many threads it runs."""
    if cli.pick_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return f"{[*names, platform.processor()][0]}, {torch.get_num_threads()} threads"


def results_of(row, runs):
    """What the record of a cell holds of its finished runs."""
    (_, folder), *tunings = runs
    log = (folder / "log.jsonl").read_text().splitlines() if row.epochs else []
    found = {"log": [json.loads(line) for line in log], "scores": {}}
    found["pretrain_seconds"] = round(sum(epoch["seconds"] for epoch in found["log"]), 1)
    for ((_, out), frac), part in product(zip(tunings, row.fracs), row.parts):
        metrics = read_json((out / part if len(row.arms) > 1 else out) / "metrics.json")
        scores = {x: metrics[x] for x in ("best_epoch", "epochs", "seconds") if x in metrics}
        for side in ("val", "test", "test_without_duplicates"):
            if metrics.get(side) is not None:
                keys = [key for key in ("n", *results.SCORES) if key in metrics[side]]
                scores[side] = {key: metrics[side][key] for key in keys}
                scores[side]["recall"] = [x["recall"] for x in metrics[side]["per_class"]]
        found["scores"][f"{part}|{frac:g}"] = scores
    return found


def section(note, header, rows, **values):
    """A note of paper.json and a table in Markdown. rows: the texts of its cells."""
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join([PAPER["notes"][note].format(**values), "", *lines])


def heading(args, cells):
    """Title, command, scale, hardware and versions."""
    about, (size, epochs, _) = PAPER["tables"][args.table], SCALES[args.scale]
    command = portable(args, shlex.join(["python", "-m", "tools.experiments", *sys.argv[1:]]))
    scale = f"**{args.scale}**, {size} px, epochs of pre-training: {args.epochs or epochs}"
    scale += " for the paper's 100; small arms, not the paper's" * (args.scale == "small")
    versions = {", ".join(map(" ".join, cell["versions"].items())) for cell in cells}
    versions |= {f"training code {cell['code']}" for cell in cells}
    machines = "; ".join(sorted({cell["hardware"] for cell in cells} | versions))
    where = f"Data: {args.name}. Scale: {about.get('scale', scale)}. {machines}."
    return f"# {about['title']}\n\nLast command: `{command}`\n\n{where}"


def times_section(cells):
    """Table 1: the times of both methods, ours the median over epochs, arms summed; their ratio."""
    ours, rows = {}, [[f"paper, {x}", *y] for x, y in PAPER["tables"]["1"]["times"].items()]
    for (name, _), seed in groupby(cells, lambda c: (c["data"], c["seed"])):
        logs = {c["row"]: groupby(c.get("log", []), lambda row: row["arms"]) for c in seed}
        each = {x: [np.median([z["seconds"] for z in y]) for _, y in logs[x]] for x in logs}
        if all(each.get(x) for x in ("DINO", "CASS")):  # one arm after the other, or both at once
            ours.setdefault(name, []).append((sum(each["DINO"]), sum(each["CASS"])))
    for name, (dino, cass) in ((x, np.transpose(y)) for x, y in ours.items()):
        figures = f"{dino.mean():.1f} s", f"{cass.mean():.1f} s", f"{np.mean(cass / dino):.3f}"
        rows.append([f"**{name}, here**, an epoch, n = {len(dino)}", *figures])
    return section("times", ["data set", "DINO", "CASS", "CASS / DINO"], rows)


def scores_section(args, scored):
    """The scores in the rows and columns of the paper. scored: {(row, arm, frac): of its seeds}."""
    about, rows = PAPER["tables"][args.table], rows_of(args.table, args.scale)
    fracs, both = about["fracs"], rows[0].parts

    def text(*key):
        x, printed = scored.get(key, []), about["cells"].get("{}|{}|{:g}".format(*key))
        std = f" ± {np.std(x, ddof=1):.4f}" if len(x) > 1 else ""
        ours = f"{np.mean(x):.4f}{std} (n = {len(x)})" if x else "not run"
        return f"{ours}; paper: {printed}" if printed else ours

    if len(fracs) == 1:
        usual = [ARMS[x] for x in both] if len(both) > 1 else ["score"]
        header = ["", *about.get("columns", usual)]
        lines = [[row.label, *(text(row.label, x, *fracs) for x in row.parts)] for row in rows]
    else:
        header, pairs = ["", "", *(f"{x:.0%}" for x in fracs)], product(ARMS, rows)
        names = [(row, x, row.models.get(x, [ARMS[x]])[0]) for x, row in pairs if x in row.parts]
        lines = [[row.label, y, *(text(row.label, x, z) for z in fracs)] for row, x, y in names]
    paper = f" (the paper's: {about['metric']})" * (about["metric"] != "none")
    values = {"metric": args.metric.replace("_", " "), "paper": paper}
    return section("scores", header, lines, **values)


def write_table(args):
    """table.csv and table.md from cells/*.json. Returns the text of table.md."""
    about, lines, scored = PAPER["tables"][args.table], [], {}
    cells = [read_json(file) for file in (args.out / "cells").glob("*.json")]
    cells.sort(key=lambda c: (c["data"], c["seed"], about["rows"].index(c["row"])))
    found = [(c, *key.split("|"), x) for c in cells for key, x in c.get("scores", {}).items()]
    for c, arm, frac, scores in found:
        scored.setdefault((c["row"], arm, float(frac)), []).append(scores["test"][args.metric])
        for side in (x for x in ("test", "test_without_duplicates") if x in scores):
            values = [scores[side].get(x) for x in results.SCORES]
            lines.append([c["row"], arm, frac, c["seed"], side, *values])
    write_csv(args.out / "table.csv", [*"row arm frac seed images".split(), *results.SCORES], lines)
    main = times_section(cells) if "times" in about else scores_section(args, scored)
    failed = [f"Failed: {c['row']}, seed {c['seed']}: {c['error']}" for c in cells if "error" in c]
    text = "\n\n".join([heading(args, cells), main, *failed]) + "\n"
    with atomic_open(args.out / "table.md") as file:
        file.write(text)
    return text


def seconds_per_image(args, size, name, kwargs):
    """Of a training step of one arm, the median of three."""
    device = cli.pick_device(args.device)
    n = 16 if size < 100 or device.type == "cuda" else 2
    model, amp = build_arm(name, size, **kwargs).to(device), cli.pick_amp("auto", device)
    step = (lambda x: model(x).float().square().mean(), torch.randn(n, 3, size, size).to(device))
    return np.median([seconds_per_step(*step, model, device, amp) for _ in range(3)]) / n


def estimate(args, jobs, images):
    """Print about how long these jobs still take, from timed steps of each arm, and of a dry run
    every command. jobs: of jobs_of()."""
    n_val, n_test = ((images.given == k).sum() or x * len(images) for k, x in splits.SHARES.items())
    n_train, todo, rows = len(images) - n_test - n_val, {}, [row for row, *_ in jobs]
    sizes = {str(x): (y.size or SCALES[args.scale][0], *x) for y in rows for x in y.models.values()}
    timed = {key: seconds_per_image(args, *model) for key, model in sizes.items()}
    for row, _, runs in jobs:  # DINO: two large crops, small ones, the teacher's
        passes = [n_train * row.epochs * (4 if row.method == "dino" else 1)]
        passes += [50 * (max(x * n_train, 1) + n_val / 3) + n_test / 3 for x in row.fracs]
        for (words, folder), n in zip(runs, passes):
            n *= not (folder / "finished").exists()
            todo[shown(words, folder)] = n * sum(timed[str(row.models[arm])] for arm in row.arms)
    for command, seconds in todo.items() if args.dry_run else ():
        print(f"{command}    # ~ {seconds / 60:.1f} min")
    hours = sum(todo.values()) / 3600
    print(f"{len(todo)} runs, about {hours:.1f} hours if none stops early", flush=True)


def unfinished(args, jobs):
    """{file: (its record so far, job)} of the jobs that have no finished cell."""
    found = {}
    for row, seed, runs in jobs:
        cell = {"data": args.name, "row": row.label, "seed": seed, "status": "done"}
        cell["commands"] = [portable(args, shown(*run)) for run in runs]
        name = re.sub(r"[^\w.-]+", "_", f"{args.name}_{row.label}_seed{seed}")
        file = args.out / "cells" / f"{name}.json"
        if not file.exists() or not cell.items() <= read_json(file).items():
            found[file] = cell, (row, seed, runs)
    return found


def main():
    parser = cli.Parser(__doc__ + "\n".join(table["title"] for table in PAPER["tables"].values()))
    add = parser.add_argument
    help = "number of the paper's, or name of the protocol's"
    add("--table", required=True, choices=[*PAPER["tables"]], metavar="N", help=help)
    data.add_arguments(parser)
    add("--scale", default="paper", choices=list(SCALES), help="small: 32 px, 3 epochs, for a CPU")
    add("--epochs", type=cli.positive, help="of pre-training, instead of the scale's")
    add("--seeds", type=cli.count, nargs="+", default=[0, 1, 2, 3, 4], metavar="N", help="of runs")
    add("--fracs", type=cli.fraction, nargs="+", metavar="F", help="only these label fractions")
    add("--only", nargs="+", metavar="ROW", help="only these rows, by their names in the table")
    add("--metric", choices=results.SCORES, help="in table.md (macro_f1; 5: balanced_accuracy)")
    add("--out", metavar="DIR", help="folder of the table (default: runs/tableN)")
    add("--work", default="runs", metavar="DIR", help="folder of the runs")
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
    path = Path(os.path.abspath(args.data))
    folder = path if path.is_dir() else path.parent
    args.name = path.stem if path.suffix == ".npz" else folder.name
    cli.refuse_overwrite(args.out, False, ())  # it may be no folder
    rows = rows_of(args.table, args.scale, args.only, args.fracs, args.epochs)
    images = readers.read(args.data, **data.options(args))
    results.refuse_unlabelled(images)
    if images.multilabel and args.metric in ("balanced_accuracy", "accuracy"):
        fix = "has several labels per image: give --metric macro_f1, micro_f1 or auroc"
        raise cli.UserError(f"--metric {args.metric}: {images.path} {fix}")
    jobs = list(jobs_of(args, rows))
    if args.dry_run:
        return estimate(args, jobs, images)
    config = {"table": args.table, "scale": args.scale, "epochs": args.epochs, "code": CODE}
    config |= {"data": portable(args, shlex.join(data_flags(args))), "images": len(images)}
    config["digest"] = decode.digest("".join(images.names), np.ascontiguousarray(images.labels))
    file = args.out / f"{args.name}.json"
    others = {file, *args.out.glob("*.json")} - {file} if "times" not in about else ()
    if others or file.exists() and read_json(file) != config:
        raise cli.UserError(f"{args.out}: is of another configuration, or code; give another --out")
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    write_json(file, config)
    cells, machine, errors = unfinished(args, jobs), hardware(args.device), 0
    if cells:
        estimate(args, [job for _, job in cells.values()], images)
    bar = cli.progress(cells.items(), "cell", desc=f"table {args.table}")
    for file, (cell, (row, _, runs)) in bar:
        cell |= {"hardware": machine, "versions": versions(), "code": CODE}
        if error := next(filter(None, (call(*run) for run in runs)), None):
            cell |= {"status": "failed", "error": portable(args, error)}
            errors += 1
            print(f"failed: {file.stem}: {cell['error']}", file=sys.stderr)
        else:
            cell |= results_of(row, runs)
        write_json(file, cell)
    print(write_table(args))
    if errors:
        raise cli.Stopped(1, f"{errors} of {len(cells)} cells failed; run it again to retry them")


if __name__ == "__main__":
    cli.run(main)
