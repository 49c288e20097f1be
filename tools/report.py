"""One page of runs of pretrain.py and finetune.py, to read, show or print; it needs nothing else.

    python -m tools.report RUN [RUN ...]

shows every run in these folders. File names, which may name patients, are row numbers of split.csv
unless --show-names; classes, folders and commands are shown. Needs matplotlib, jinja2 and, for the
maps of CNNs, captum: pip install -r requirements-extra.txt
"""

import base64
import contextlib
import csv
import io
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
import predict
from common import checkpoint, cli, collapse, metrics, readers, results, splits, starts
from common.run import on_device
from tools import maps

with contextlib.suppress(ImportError):  # main() says so
    import jinja2
    import matplotlib
    from matplotlib.figure import Figure

COLUMNS = ("path", "split", "labels", "label_used")
SHOWN, NEAREST, SEARCHED = 4, 3, 1000  # examples, their nearest training images, of so many
STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.frameon": False, "svg.hashsalt": "0"}
COLOURS = {"train": "#003f6b", "val": "#d55e00", "cnn": "#003f6b", "vit": "#d55e00"}  # in grey, too


def load(folder, show_names):
    """What a run left: config, log, split (of split.csv); of finetune.py also test and found, its
    metrics.json; where they are still at their place, images and arm. Raises UserError."""
    run = SimpleNamespace(title="/".join(folder.parts[-3:]), test=None, found={}, log=[])
    run.images, run.arm, homes = None, None, [folder]
    if (folder / "metrics.json").exists():
        run.test, run.found = results.read_test(folder)
    if "mean of " in (name := run.found.get("arm", "")):  # its settings and split are its arms'
        first = name.split()[2]  # as the folder beside it or, of several seeds, beside its parent
        homes = [folder.parent / first, folder.parent.parent / first / folder.name]
    home = next((x for x in homes if (x / "config.json").exists()), folder)
    with cli.refusing(f"{folder}: its files are damaged, or not of one run:"):
        run.config = checkpoint.read_json(home / "config.json", "command", "arguments")
        with open(home / "split.csv", **checkpoint.TEXT) as lines:
            run.split = [{key: row[key] for key in COLUMNS} for row in csv.DictReader(lines)]
        run.row = {row["path"]: i for i, row in enumerate(run.split)}
        run.tested = [run.row[name] for name in run.test.names] if run.test else []
        if (folder / "log.jsonl").exists():
            rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
            run.log = [{**row, "epoch": int(row["epoch"])} for row in rows]
    run.name = lambda i: run.split[i]["path"] if show_names else f"row {i + 1}"
    run.notes = "The images cannot be read at their place, or are others: this page shows none."
    try:
        read_images(run, SimpleNamespace(**run.config["arguments"]), home, show_names)
        if run.test:
            if not (folder / "best.pt").exists():  # a mean of both arms, k-NN
                raise cli.UserError("this run has no weights of its own")
            run.arm = maps.load(folder / "best.pt", cli.pick_device("auto"))
    except cli.UserError as error:  # which may name files, unless it is about the model
        run.notes += f"No maps, nor nearest images: {error}" if run.images else ""
    return run


def read_images(run, args, home, show_names):
    """The images of a run, in the order of split.csv, and what data.py says of them. Raises
    UserError where there are others now."""
    files = [
        x for x in (home / "best.pt", *(getattr(args, "ckpt", None) or ())) if Path(x).exists()
    ]
    size = starts.load_weights(files[0])["img_size"] if files else args.img_size or 384
    with cli.refusing("of an earlier version", AttributeError):
        images = readers.read(args.data, **data.options(args))
        images.decode(size, data.cache_dir(args.cache), args.skip_bad)
    images.keep(np.array([name in run.row for name in images.names]))
    if images.names != [*run.row]:
        raise cli.UserError("other images")
    images.names = [*map(run.name, range(len(images)))]  # for what is said from here on
    if images.notes and not show_names:
        images.notes = [f"notes, which may name files: {len(images.notes)} (--show-names)"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        splits.print_report(images, np.array([row["split"] for row in run.split]))
    run.images, run.notes = images.images, said.getvalue()


def picture(figure, kind="svg+xml"):
    """A figure as the address of an image."""
    figure.savefig(file := io.BytesIO(), format=kind[:3], dpi=90, bbox_inches="tight")
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def curves(log):
    """A panel for each number in the rows of a log over the epochs, 0 before the first step; train
    and val share one, and so do the arms; a row of DINO's log is of one arm."""
    panels = {}
    for row in log:
        for epoch, numbers in ((0, row.get("start", {})), (row["epoch"], row)):
            for key, x in numbers.items():
                if isinstance(x, (int, float)) and key not in ("epoch", "iteration"):
                    parts = key.split("_")
                    line = next((y for y in (*parts, row.get("arms")) if y in COLOURS), "")
                    lines = panels.setdefault("_".join(y for y in parts if y != line), {})
                    lines.setdefault(line, []).append((epoch, x))
    figure = Figure((10, 2.2 * -(-len(panels) // 3)), layout="constrained")
    for i, (title, lines) in enumerate(panels.items(), 1):
        ax = figure.add_subplot(-(-len(panels) // 3), 3, i, title=title)
        ax.locator_params("x", integer=True, min_n_ticks=1)
        for line, points in lines.items():
            ax.plot(*zip(*points), ".-", color=COLOURS.get(line, "black"), label=line or None)
        if "" not in lines:
            ax.legend()
    return figure


def reliability(test, found):
    """How often a prediction of some confidence is right, and below how many there are: of the
    sigmoids as trained, and of the calibrated probabilities."""
    _, labels, *both, multilabel = test.arrays()
    figure, edges = Figure((6, 5), layout="constrained"), np.linspace(0, 1, metrics.BINS + 1)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="grey", linestyle="--")
    for p, kind, color in zip(both, ("_uncalibrated", ""), COLOURS.values()):
        confidence, right = (x.ravel() for x in metrics.decisions(labels, p, multilabel))
        n = below.hist(confidence, edges, color=color, histtype="step")[0]
        sums = [np.histogram(confidence, edges, weights=1.0 * w)[0] for w in (confidence, right)]
        numbers = [f"{name} {found['test'][name + kind]:.3f}" for name in ("ece", "brier")]
        name = ", ".join(["sigmoids, as trained" if kind else "calibrated", *numbers])
        above.plot(*(x[n > 0] / n[n > 0] for x in sums), "o-", color=color, label=name)
    above.legend()
    above.set(ylabel="share that has the label" if multilabel else "share that is right")
    below.set(ylabel="how many", xlabel="probability of what is said", xlim=(0, 1))
    return figure


def examples(run):
    """(title, an example() each) of the surest errors, and of the least sure successes: of what is
    predicted or, multi-label, of each label."""
    test, used = run.test, [i for i, row in enumerate(run.split) if row["label_used"] == "1"]
    used = np.random.default_rng(0).permutation(used)[:SEARCHED]
    run.known = used, run.arm and features(run, used)
    predicted = metrics.predicted_labels(test.probabilities, test.multilabel)
    sure = np.where(predicted, test.distribution, 1 - test.distribution)
    right, decided = predicted == test.labels, predicted | test.multilabel
    for title, mask, x in (("Surest errors", ~right, -sure), ("Least sure successes", right, sure)):
        order = np.argsort(x[mask & decided], kind="stable")[:SHOWN]
        cells = np.argwhere(mask & decided)[order].tolist()
        yield title, [example(run, i, c, predicted[i, c]) for i, c in cells]


def example(run, i, c, yes):
    """[(caption, address or None)] of a test image with the map of a class, what was said of it;
    and, of an error, the nearest training images."""
    test, row = run.test, run.tested[i]
    true = splits.label_text(test.classes, test.labels[i]) or "no label"
    name, said = test.classes[c], f"its probability {test.distribution[i, c]:.2f}; true {true}"
    caption = f"{run.name(row)}: predicted {'' if yes else 'not '}{name}, {said}"
    if run.images is None:
        return [(caption, None)]
    found = run.arm and maps.explain(run.arm, run.images[row], c)
    words = f"Map of {name}: {found.words}" if found else ""
    drawn = maps.beside([run.images[row]], found and found.heat, words)
    shown = [(f"{caption}. {words}".strip(), picture(drawn, "png"))]
    if run.arm and yes != test.labels[i, c]:
        used, known = run.known
        near = (known @ features(run, [row])[0]).topk(min(NEAREST, len(used)))
        near = [(x, used[j]) for x, j in zip(*(x.tolist() for x in near))]
        names = (f"{run.name(j)} {run.split[j]['labels']} {x:.2f}" for x, j in near)
        caption = f"Nearest of {len(used)} training images, with cosines: {', '.join(names)}"
        shown.append((caption, picture(maps.beside([run.images[j] for _, j in near]), "png")))
    return shown


def features(run, index):
    """(n, D), of length 1, of these images."""
    pixels = torch.from_numpy(np.stack([run.images[i] for i in index]))
    batches = on_device(pixels.split(32), run.arm.device, run.arm.mean, run.arm.std)
    return F.normalize(collapse.embed(run.arm.model, batches)[0], dim=1)


def repeats(run):
    """The commands that repeat a run, and (package, version here, of the first command)."""
    made, lines = [run.config], []
    with contextlib.suppress(cli.UserError, KeyError, TypeError):  # a baseline has no --ckpt
        before = Path(run.config["arguments"]["ckpt"][0]).with_name("config.json")
        made.insert(0, checkpoint.read_json(before, "command", "arguments", "versions"))
    for x in made:
        flags = {k: v for k, v in x["arguments"].items() if k not in cli.MAY_CHANGE - {"out"}}
        path = Path(x["command"][0])
        script = ["-m", f"tools.{path.stem}"] if path.parent.name == "tools" else [path.name]
        lines.append(shlex.join(["python", *script, *starts.words_of(flags)]))
    before, now = made[0].get("versions", {}), checkpoint.versions().items()
    return "\n".join(lines), [(k, x, before.get(k, "not known")) for k, x in now]


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("RUN", type=Path, nargs="+", help="folder of a run, or of several")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="HTML to write")
    parser.add_argument("--show-names", action="store_true", help="file names, not row numbers")
    args, runs = parser.parse_args(), {}
    if "matplotlib" not in globals():
        raise cli.UserError("needs matplotlib, jinja2: pip install -r requirements-extra.txt")
    if Path(args.out).suffix != ".html":
        raise cli.UserError(f"{args.out}: is no name for an .html file (--out)")
    predict.prepare_file(args.out, "--out", True)
    for folder in args.RUN:
        files = [f for x in ("metrics.json", "log.jsonl") for f in folder.resolve().rglob(x)]
        if not files:
            raise cli.UserError(f"{folder}: holds no run (metrics.json or log.jsonl)")
        for run in sorted({f.parent for f in files} - runs.keys()):
            runs[run] = load(run, args.show_names)
    template = jinja2.Environment(autoescape=True, trim_blocks=True)
    template = template.from_string(Path(__file__).with_suffix(".html").read_text())
    command = shlex.join(["python", "-m", "tools.report", *sys.argv[1:]])
    with matplotlib.rc_context(STYLE):  # the template calls functions of this module
        page = template.render({**globals(), "runs": [*runs.values()], "command": command})
    with checkpoint.atomic_open(args.out, "wb") as file:
        file.write(page.encode(errors="replace"))  # file names hold any bytes
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
