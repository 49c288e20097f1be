"""The paper's figures (v6) from any of our weights files, and curves of a run, as PNG (--out).

    python -m tools.visualize attention --ckpt vit.pt --compare best.pt  (Figures 3, 7, 9, 12, 13)
    python -m tools.visualize features --ckpt cnn.pt --layers 5          (Figures 4, 6)
    python -m tools.visualize curves RUN_FOLDER ...                      (log.jsonl)
    python -m tools.visualize confusion RUN_FOLDER                       (confusion.csv)
    python -m tools.visualize reliability RUN_FOLDER                     (predictions.csv)

Images come from the test split of the checkpoint's data, or are named by --image and data flags.
Needs matplotlib: pip install -r requirements-extra.txt
"""

import contextlib
import csv
import json
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.utils import make_grid

import data
from common import cli, metrics, pixels, readers, splits
from common.checkpoint import TEXT, atomic_open
from common.cli import UserError, refusing
from common.results import read_test
from common.run import on_device
from common.starts import fill_in, from_checkpoint
from tools import introspect

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:
    matplotlib = None  # main() says so

STYLE = {"font.size": 9, "axes.titlesize": 9, "figure.titlesize": 9, "text.parse_math": False}
STYLE |= {"lines.markersize": 4, "legend.frameon": False}
OKABE_ITO = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]
COLOURS = {"train": "#0072b2", "val": "#d55e00", "cnn": "#56b4e9", "vit": "#e69f00", "": "black"}


def parse_arguments():
    """The flags of one figure; args.figure is the function that draws it."""
    parser, add = cli.Parser(__doc__), {}
    commands = parser.add_subparsers(dest="WHAT", required=True)
    for figure in (attention, features, curves, confusion, reliability):
        command = commands.add_parser(figure.__name__, doc=None)
        command.set_defaults(figure=figure, image=None)
        add[figure] = command.add_argument
        add[figure]("--out", default=f"{figure.__name__}.png", metavar="FILE", help="PNG to write")
        if figure in (attention, features):
            data.add_arguments(command)
            add[figure]("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
            add[figure]("--ckpt", required=True, metavar="FILE", help="cnn.pt, vit.pt or best.pt")
            add[figure]("--compare", metavar="FILE", help="another, on the same colour scale")
            add[figure]("--image", metavar="FILE", help="this image instead of those of the data")
        else:
            nargs = "+" if figure is curves else None
            add[figure]("run", metavar="RUN_FOLDER", nargs=nargs, help="what a run wrote")
    add[attention]("--n", type=cli.positive, help="images (30; 100 if a class is rare; E.3.4)")
    add[attention]("--block", type=cli.positive, default=1, help="attention block, the first is 1")
    add[features]("--layers", type=cli.positive, default=1, help="convolutions; Figure 6 shows 5")
    add[curves]("--only", nargs="+", metavar="TEXT", help="panels with such names, as: spread rank")
    return parser.parse_args()


def load(args, path, check):
    """A weights file with its model and label; its data flags fill in args without --data.
    check(model, images) raises ValueError for what cannot be drawn."""
    start = from_checkpoint(path)
    fill_in(args, start.data)
    start.label = f"{short(path)}: {start.metadata['arch']}"
    start.size, start.device = start.metadata["img_size"], cli.pick_device(args.device)
    start.model = start.make().to(start.device).eval()
    try:
        check(start.model, torch.zeros(1, 3, start.size, start.size, device=start.device))
    except ValueError as error:
        raise UserError(f"{start.label} {error}") from error
    return start


def choose(args, starts, n):
    """--image, or n images of the test split, if possible none that a model has seen (n None: 30,
    or 100 where 30 would hardly hold every class). Returns their sources, and them in words."""
    if args.image:
        return [args.image], short(args.image)
    images, seed = readers.read(args.data, **data.options(args)), starts[0].seed
    images.decode(starts[0].size, data.cache_dir(args.cache), args.skip_bad)
    split = data.split_and_report(images, seed, args.dedup, starts[0].carried, allow_seen=True)
    part = "test" if (split == "test").any() else "train"
    seen, side = torch.cat([start.carried for start in starts], 1)
    unseen = (split == part) & ~np.isin(images.table["hash"].view("int64"), seen[side < 2])
    index = np.flatnonzero(unseen if unseen.any() else split == part)
    rarest = images.labels[index].sum(0).min(initial=len(index))
    n = n or (30 if 30 * rarest >= len(index) else 100)
    index = index[sample(images.labels[index], n, seed)]
    what = images.names[index[0]] if len(index) == 1 else f"{len(index)} images"
    return [images.sources[i] for i in index], f"{what} of the {part} split"


def short(path):
    """The last two parts of a path."""
    return "/".join(Path(path).resolve().parts[-2:])


def sample(labels, n, seed):
    """n of the images with labels (N, C) bool: every class at least once, else as in the whole."""
    rng, unit = np.random.default_rng([seed, 3]), np.arange(len(labels))
    return splits.stratified_order(labels, unit, rng)[0][:n]


def fold(text, inches):
    """Text in lines of so many inches; ? for the bytes of a file's name that are no UTF-8."""
    lines = text.encode(errors="replace").decode().split("\n")
    return "\n".join(textwrap.fill(line, int(11 * inches)) for line in lines)


def beside_images(args, check, n, columns):
    """The models of --ckpt and --compare, each with the `batches` of n images that it wants, (m, 3,
    S, S) float, normalized; a figure; its axes, a row to a model: (models, 1 + columns), the mean
    image in front; the images in words. check: as of load. Raises UserError."""
    starts = [load(args, path, check) for path in (args.ckpt, args.compare) if path]
    sources, what = choose(args, starts, n)
    figure = Figure((3 * columns + 4, 3.6 * len(starts) + 1), layout="compressed")
    bare = {"frame_on": False, "xticks": [], "yticks": []}
    axes = figure.subplots(len(starts), 1 + columns, squeeze=False, subplot_kw=bare)
    for ax, start in zip(axes[:, 0], starts):
        with refusing(f"{cli.preview(sources)}: cannot be read:", ValueError):
            images = np.stack([pixels.decode(source, start.size)[0] for source in sources])
        ax.imshow(images.mean(0).transpose(1, 2, 0) / 255)
        ax.set_title(fold(start.label, 3))
        norm = start.metadata["mean"], start.metadata["std"]
        start.batches = on_device(torch.from_numpy(images).split(16), start.device, *norm)
    return starts, figure, axes, what


def attention(args):
    """Figures 3, 7, 9, 12 and 13: attention of one or two Transformers to an image, or a mean."""
    check = partial(introspect.attention_map, block=args.block)
    starts, figure, axes, what = beside_images(args, check, args.n, 2)
    maps = [introspect.mean_attention(s.model, s.batches, args.block) for s in starts]
    maps = [m.numpy() * m.numel() for m in maps]  # 1: an equal share, of however many patches
    scale = {"vmin": min(m.min() for m in maps), "vmax": max(m.max() for m in maps)}
    for (image, over, alone), start, values in zip(axes, starts, maps):
        token = getattr(start.model, "cls_token", None) is not None
        kind = "class token" if token else "no class token: mean attention that each patch receives"
        over.set_title(fold(f"block {args.block}, {kind}", 3))
        over.imshow(image.images[0].get_array().mean(-1), cmap="gray")
        scale |= {"extent": image.images[0].get_extent(), "interpolation": "bilinear"}
        over.imshow(values, alpha=0.6, **scale)
        drawn = alone.imshow(values, **scale)
    figure.colorbar(drawn, ax=axes, label="attention (1: an equal share)")
    return figure, f"{what}. Mean over the images, attention also over the heads."


def features(args):
    """Figures 4 and 6: channels of the first convolutions of one or two CNNs, for one image."""
    check = partial(introspect.feature_maps, layers=args.layers)
    starts, figure, axes, what = beside_images(args, check, 1, args.layers)
    found = [check(start.model, *start.batches) for start in starts]
    side = 8 if args.layers == 1 else 4
    for column, *layer in zip(axes.T[1:], *found):  # the same convolution of each model
        shown = [maps[0, : side**2, None].float().cpu() for _, maps in layer]
        scale = {"vmin": min(m.min() for m in shown), "vmax": max(m.max() for m in shown)}
        for ax, (name, maps), tiles in zip(column, layer, shown):
            _, c, h, w = maps.shape
            ax.set_title(fold(f"{name}: {len(tiles)} of {c} channels, {h}x{w}", 3))
            grid = make_grid(tiles, nrow=side, padding=1 + w // 20, pad_value=np.nan)
            drawn = ax.imshow(grid[0].numpy(), **scale)
        figure.colorbar(drawn, ax=column, label="output")
    return figure, f"The image: {what}"


def curves(args):
    """The numbers in log.jsonl over the epochs; of several runs, a colour for each."""
    runs, several, only, panels, drawn = args.run, len(args.run) > 1, args.only or [""], {}, {}
    if len(runs) > len(OKABE_ITO):
        raise UserError(f"{len(runs)} runs: only {len(OKABE_ITO)} can be told apart in one picture")
    for run in runs:
        with lines_of(run, "log.jsonl") as lines:
            for title, found in series(map(json.loads, lines), several).items():
                if any(word in title for word in only):
                    panels.setdefault(title, {}).update({run: found[""]} if several else found)
    if not panels:
        none = f"nothing is called {' or '.join(only)}" if args.only else "holds no finished epoch"
        raise UserError(f"{cli.preview(runs)}/log.jsonl: {none}")
    palette = dict(zip(runs, OKABE_ITO)) if several else COLOURS
    rows, columns = -(-len(panels) // 3), min(3, len(panels))
    figure = Figure((4 * columns + 1, 2.3 * rows + 0.6), layout="constrained")
    for i, (title, lines) in enumerate(panels.items(), 1):
        ax = figure.add_subplot(rows, columns, i, title=fold(title, 3))
        ax.locator_params("x", integer=True, min_n_ticks=1)
        for name, points in lines.items():
            (drawn[name],) = ax.plot(*zip(*points), ".-", color=palette[name], label=fold(name, 2))
    figure.legend(handles=[drawn[name] for name in drawn if name], loc="outside right upper")
    return figure, "by epoch" if several else f"{short(runs[0])}, by epoch"


def series(rows, parted=False):
    """Rows of a log -> {panel: {name of COLOURS: [(epoch, number), ...]}}. The losses of train and
    val share a panel, and so do the arms, unless parted; a row of DINO's log is of one arm."""
    panels = {}
    for i, row in enumerate(rows, 1):
        inner = {f"{a}_{b}": v for a, x in row.items() if isinstance(x, dict) for b, v in x.items()}
        alone = row["arms"] if row.get("arms") in COLOURS else ""
        for key, value in (row | inner).items():
            if isinstance(value, (int, float)) and key not in ("epoch", "iteration"):
                parts = key.split("_")
                line = next((part for part in parts if part in COLOURS), alone)
                panel = "_".join(part for part in parts if part != line) or key
                if parted and line:
                    line, panel = "", f"{line}_{panel}"
                points = panels.setdefault(panel, {}).setdefault(line, [])
                points.append((row.get("epoch", i), value))
    return panels


def confusion(args):
    """A fine-tuned run's confusion.csv: counts in the cells, coloured by their share of the row."""
    with lines_of(args.run, "confusion.csv") as lines:
        (_, *columns), *rows = csv.reader(lines)
        counts = np.array([row[1:] for row in rows], int).reshape(len(rows), len(columns))
        shares = counts / np.where(counts.any(1), counts.sum(1), np.nan)[:, None]
    names, columns = ([fold(x, 2.5) for x in xs] for xs in ([row[0] for row in rows], columns))
    cell = max(0.6, 0.17 * (1 + max(x.count("\n") for x in names + columns)), 3 / len(columns))
    figure = Figure((cell * len(columns) + 4, cell * len(rows) + 4), layout="compressed")
    ax = figure.add_subplot(facecolor="lightgrey")
    drawn = ax.imshow(shares, vmin=0, vmax=1)
    ax.set_xticks(range(len(columns)), columns, rotation=90)
    ax.set_yticks(range(len(rows)), names)
    for (r, c), share in np.ndenumerate(shares):
        ink = "white" if share < 0.6 else "black"
        ax.text(c, r, counts[r, c], color=ink, ha="center", va="center")
    figure.colorbar(drawn, ax=ax, label="share of row; grey: no such image")
    note = f"{counts.sum()} test images; rows: true classes; columns: predicted ones"
    if columns == ["tp", "fp", "fn", "tn"]:
        note = f"{counts[0].sum()} test images; rows: labels; true/false positives/negatives"
    return figure, f"{short(args.run)}\n{note}"


def reliability(args):
    """How often a prediction of some confidence is right: of the sigmoids as trained, and of the
    calibrated probabilities. Below: how many there are."""
    test, found = read_test(Path(args.run))
    _, labels, *both, multilabel = test.arrays()
    figure, scores = Figure((8, 5), layout="constrained"), found["test"]
    axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    T = f", temperature {found['temperature']:.2g}" if "temperature" in found else ""
    titles = {"_uncalibrated": "sigmoids, as trained", "": f"calibrated{T}"}
    edges = np.linspace(0, 1, metrics.BINS + 1)
    for (above, below), p, (key, title) in zip(axes.T, both, titles.items()):
        confidence, right = (x.ravel() for x in metrics.decisions(labels, p, multilabel))
        n = below.hist(confidence, edges, color=OKABE_ITO[0])[0]
        sums = [np.histogram(confidence, edges, weights=1.0 * w)[0] for w in (confidence, right)]
        above.plot([0, 1], [0, 1], color="grey", linestyle="--")
        above.plot(*(x[n > 0] / n[n > 0] for x in sums), "o-", color=OKABE_ITO[1])
        numbers = [f"{name} {scores[name + key]:.3f}" for name in ("ece", "brier")]
        above.set(title=f"{title}: {', '.join(numbers)}", xlim=(0, 1), ylim=(0, 1))
        below.set(xlabel="probability of " + ("each label" if multilabel else "what is predicted"))
    axes[0, 0].set(ylabel="share that has the label" if multilabel else "share that is right")
    axes[1, 0].set(ylabel="how many")
    return figure, f"{short(args.run)}, {len(test.names)} test images; dashed: perfectly calibrated"


@contextlib.contextmanager
def lines_of(run, name):
    """An open file of a run folder. Missing or of another kind, it gives a one-line error."""
    file, odd = Path(run) / name, (ValueError, AttributeError, csv.Error)
    with refusing(f"{file}: is not as pretrain.py or finetune.py writes it", odd):
        with refusing(f"no folder of one run: {file}:", OSError), open(file, **TEXT) as lines:
            yield lines


def main():
    args = parse_arguments()
    if matplotlib is None:
        raise UserError("figures need matplotlib: pip install -r requirements-extra.txt")
    out = Path(args.out)
    cli.refuse_overwrite(out.parent, (), False)  # it may be no folder
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UserError(f"{out}: is no name for a .png file (--out)")
    cli.refuse_inputs([out], args.image)
    with matplotlib.rc_context(STYLE):
        figure, note = args.figure(args)
        figure.suptitle(fold(note, figure.get_figwidth() - 1), x=0.02, ha="left")
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(out, "wb") as file:
            figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main)
