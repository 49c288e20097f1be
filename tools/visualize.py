"""The paper's figures (v6) from any of our weights files (cnn.pt, vit.pt, best.pt), as PNG.

    python -m tools.visualize attention --ckpt vit.pt --compare supervised/best.pt  (Figures 7, 9, 12, 13)
    python -m tools.visualize attention --ckpt vit.pt --image FILE --block 1        (Figure 3)
    python -m tools.visualize features --ckpt cnn.pt --compare supervised/best.pt   (Figure 4)
    python -m tools.visualize features --ckpt cnn.pt --image FILE --layers 5        (Figure 6)
    python -m tools.visualize cka --cnn cnn.pt --vit vit.pt         (how alike the layers of the arms are)
    python -m tools.visualize curves RUN_FOLDER ...                 (log.jsonl of either script)
    python -m tools.visualize confusion RUN_FOLDER                  (confusion.csv of finetune.py)

Each writes one PNG (--out). Images come from the test split of the checkpoint's data, as
finetune.py makes it, unless --image or the data flags say otherwise; --help after WHAT lists the
flags. What is shown is computed in introspect.py.
"""

import contextlib
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

import data
from common import cli
from common.arms import make_arm
from common.checkpoint import atomic_open, load_weights
from common.cli import UserError
from common.decode import decode, normalize
from common.readers import read
from common.report import class_counts
from common.splits import stratified_order
from common.starts import fill_in, from_checkpoint, seen_in_pretraining
from tools.introspect import (
    attention_map,
    attention_names,
    feature_maps,
    has_class_token,
    layer_grams,
    layer_names,
    mean_attention,
    minibatch_cka,
)
from tools.plotting import (
    COLOURS,
    GAP,
    MORE,
    above,
    beside,
    colour_bar,
    colours,
    legend,
    matrix,
    picture,
    plot,
    text,
)

SIDE = 240  # pixels of an image with attention


def subparser(prog, **_):
    """For argparse, which makes the parsers of the subcommands itself."""
    parser = cli.Parser(None)
    parser.prog = prog
    return parser


def parse_arguments():
    """The arguments of one subcommand; `draw` is the function that makes its figure."""
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(
        dest="what",
        metavar="WHAT",
        required=True,
        parser_class=subparser,
        help="attention, features, cka, curves or confusion",
    )

    def command(name, draw):
        sub = commands.add_parser(name)
        sub.set_defaults(draw=draw, image=None)
        sub.add_argument(
            "--out",
            default=f"{name}.png",
            metavar="FILE",
            help="PNG to write (default: %(default)s)",
        )
        if name in ("curves", "confusion"):
            sub.add_argument(
                "run",
                metavar="RUN_FOLDER",
                help="what a run wrote",
                nargs="+" if name == "curves" else None,
            )
        else:
            data.add_arguments(sub)
            sub.add_argument("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
        return sub.add_argument

    for name, draw in (("attention", draw_attention), ("features", draw_features)):
        add = command(name, draw)
        add("--ckpt", required=True, metavar="FILE", help="cnn.pt, vit.pt or best.pt")
        add("--compare", metavar="FILE", help="another, beside it on the same colour scale")
        add("--image", metavar="FILE", help="this image instead of those of the data")
        if name == "attention":
            add(
                "--n",
                type=cli.positive,
                help="average over so many test images (default: 30, or "
                "100 where 30 would hardly hold every class; E.3.4)",
            )
            add("--block", type=cli.positive, default=1, help="attention block, the first is 1")
        else:
            add(
                "--layers",
                type=cli.positive,
                default=1,
                help="how many convolutions: 1 as in Figure 4, 5 as in Figure 6",
            )
    add = command("cka", draw_cka)
    for arm in ("cnn", "vit"):
        add(f"--{arm}", required=True, metavar="FILE", help=f"weights file, such as {arm}.pt")
        add(
            f"--before-{arm}",
            metavar="WHAT",
            help="its weights before training: imagenet, random "
            "or a weights file (default: what the file says that it began with)",
        )
    add("--n", type=cli.positive, default=128, help="test images (default: %(default)s)")
    add("--bs", type=cli.positive, default=32, help="of them in a minibatch, at least 4")
    command("curves", draw_curves)(
        "--only", nargs="+", metavar="TEXT", help="only what is called so, such as: spread rank"
    )
    command("confusion", draw_confusion)
    return parser.parse_args()


def load(args, path):
    """A weights file to look into: its model on the device, its metadata and its label. Where the data
    flags in args name no data, they become the file's."""
    start = from_checkpoint(path)
    fill_in(args, start.data)
    args.seed = start.seed
    start.device = cli.pick_device(args.device)
    start.model = start.make().to(start.device).eval()
    start.path, start.size = path, start.metadata["img_size"]
    start.label = f"{short(path)}: {start.metadata['arch']}"
    return start


def load_all(args, look):
    """--ckpt and --compare. look(model, images) is tried on each, before any image is read."""
    compared = [load(SimpleNamespace(**vars(args)), args.compare)] if args.compare else []
    starts = [load(args, args.ckpt), *compared]
    for start in starts:
        with naming(start):
            look(start.model, torch.zeros(1, 3, start.size, start.size, device=start.device))
    return starts


def short(path):
    """The last two parts of a path."""
    return "/".join(Path(path).resolve().parts[-2:])


@contextlib.contextmanager
def naming(start):
    """What cannot be done with a model, in a line that names its file."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{start.path}: {start.metadata['arch']} {error}") from error


def choose(args, starts, n):
    """--image, or n images of the test split that no model has seen, the same ones for the same
    seed; n None: 30, or 100 where 30 would hardly hold every class. Returns their sources, and what
    they are in words."""
    if args.image:
        return [args.image], short(args.image)
    images = read(args.data, **data.options(args))
    images.decode(starts[0].size, data.cache_dir(args.cache), args.skip_bad)
    split = data.split_and_report(
        images, args.seed, args.dedup, seen_in_pretraining(starts[0].seen, images), allow_seen=True
    )
    part = "test" if (split == "test").any() else "train"
    of_part = split == part
    seen = np.any(
        [seen_in_pretraining(start.seen, images) for start in starts if start.seen is not None]
        or [~of_part],
        axis=0,
    )
    index = np.flatnonzero(of_part & ~seen if (of_part & ~seen).any() else of_part)
    rarest = images.labels[index].sum(0).min(initial=len(index))
    n = n or (30 if 30 * rarest >= len(index) else 100)
    index = index[sample(images.labels[index], n, args.seed)]
    origin = "test split" if part == "test" else "training split, for want of a test split"
    classes = [
        c if len(index) == 1 else f"{c} {k}" for c, k in class_counts(images, index).items() if k
    ]
    what = f"{len(index)} images" if len(index) > 1 else images.names[index[0]]
    return (
        [images.sources[i] for i in index],
        f"{what} of the {origin}" + (f": {cli.preview(classes, 8)}" if classes else ""),
    )


def sample(labels, n, seed):
    """n of the images with labels (N, C) bool: every class at least once, else as in the whole."""
    order, _ = stratified_order(labels, np.arange(len(labels)), np.random.default_rng([seed, 3]))
    return order[:n]


def pixels(sources, size):
    """Image files or arrays -> (N, 3, size, size) uint8. Raises UserError."""
    try:
        return torch.from_numpy(np.stack([decode(source, size)[0] for source in sources]))
    except ValueError as error:
        raise UserError(f"{cli.preview(sources)}: cannot be read ({error})") from error


def batches(starts, sources, batch_size=16):
    """The same images as each model wants them: tuples of (n, 3, S, S) normalized."""
    with cli.progress(total=len(sources)) as bar:
        for part in np.array_split(np.arange(len(sources)), max(1, len(sources) // batch_size)):
            chosen = [sources[i] for i in part]
            yield tuple(
                normalize(
                    pixels(chosen, start.size).to(start.device),
                    start.metadata["mean"],
                    start.metadata["std"],
                )
                for start in starts
            )
            bar.update(len(part))


def draw_attention(args):
    """Figures 3, 7, 9, 12 and 13: the attention of one or two Transformers for one image or, as the
    mean over several, beside their mean image; laid over it, and by itself below."""
    starts = load_all(args, lambda model, images: attention_map(model, images, args.block))
    sources, what = choose(args, starts, args.n)
    maps = []
    for start in starts:
        images = (images for (images,) in batches([start], sources))
        maps.append(mean_attention(start.model, images, args.block))
    maps = [m * m.numel() for m in maps]  # 1 is an equal share, whatever the number of patches
    low, high = min(m.min().item() for m in maps), max(m.max().item() for m in maps)
    mean = pixels(sources, starts[0].size).double().mean(0).round().byte()
    image = picture(mean).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    note = (
        f"The image: {what}.\nAttention: mean over the heads."
        if len(sources) == 1
        else f"Mean of {what}.\nAttention: mean over heads and images."
    )
    note = text(note, SIDE)
    caption = Image.new("RGB", (SIDE, max(SIDE, note.height)), "white")
    caption.paste(note)
    panels = [above(image, caption)]
    for start, m in zip(starts, maps):
        kind = (
            "class token"
            if has_class_token(start.model)
            else "no class token: mean attention that each patch receives"
        )
        title = f"{start.label}\nblock {args.block} of {len(attention_names(start.model))}, {kind}"
        rgb = colours(resized(m, SIDE), low, high)
        over = 0.4 * np.asarray(image.convert("L"))[..., None] + 0.6 * rgb
        over = Image.fromarray(over.round().astype(np.uint8))
        panels.append(above(text(title, SIDE), over, Image.fromarray(rgb)))
    return beside(*panels, colour_bar(low, high, SIDE, "attention (1: an equal share)"))


def resized(values, size):
    """An (h, w) map of patches -> (size, size), with each value over the middle of its patch."""
    return interpolate(values[None, None], (size, size), mode="bilinear")[0, 0]


def draw_features(args):
    """Figures 4 and 6: channels of the first convolutions of one or two CNNs, for one image."""
    starts = load_all(args, lambda model, images: feature_maps(model, images, args.layers))
    sources, what = choose(args, starts, 1)
    found = [
        feature_maps(start.model, images, args.layers)
        for start in starts
        for (images,) in batches([start], sources)
    ]
    shown, rows = 64 if args.layers == 1 else 16, []
    for layer in zip(*found):  # the same convolution of each model
        channels = [maps[0, :shown].float().cpu() for _, maps in layer]
        low, high = min(c.min().item() for c in channels), max(c.max().item() for c in channels)
        tile = min(max(channels[0].shape[-1], 44), 96)
        grids = []
        for start, (name, maps), c in zip(starts, layer, channels):
            tiles = torch.from_numpy(colours(c, low, high)).permute(0, 3, 1, 2).float()
            mode = "area" if c.shape[-1] > tile else "nearest"
            tiles = interpolate(tiles, (tile, tile), mode=mode).round().byte()
            grid = picture(make_grid(tiles, nrow=8, padding=2, pad_value=255))
            title = f"{name}: {len(c)} of {maps.shape[1]} channels, {c.shape[-2]} x {c.shape[-1]}"
            title = title if rows else f"{start.label}\n{title}"
            grids.append(above(text(title, grid.width), grid))
        rows.append(beside(*grids, colour_bar(low, high, grid.height, "output")))
    image = picture(pixels(sources, starts[0].size)[0]).resize((160, 160), Image.Resampling.BICUBIC)
    return above(beside(image, text(what, rows[0].width - 160 - GAP)), *rows, gap=GAP)


def before_training(args, arm, start):
    """`start` with the weights that training began with, or those of --before-cnn and --before-vit,
    and what these are."""
    config = load_weights(start.path).get("config", {})
    what = getattr(args, f"before_{arm}") or next(
        (config[key] for key in (f"init_{arm}", "init", "ckpt") if config.get(key)), "random"
    )
    kwargs = {key: v for key, v in start.metadata["model_kwargs"].items() if key != "img_size"}
    torch.manual_seed(args.seed)
    try:
        model = make_arm(f"--before-{arm}", start.metadata["arch"], what, start.size, **kwargs)
    except UserError as error:
        raise UserError(
            f"{start.path}: what it began with, {what}, cannot be had here; name other "
            f"weights with --before-{arm} FILE, or --before-{arm} random"
        ) from error
    before = SimpleNamespace(**{**vars(start), "model": model.to(start.device).eval()})
    return before, what if what in ("random", "imagenet") else short(what)


def draw_cka(args):
    """CKA between the blocks of the two arms, before and after training. The paper's premise (3.1),
    after Raghu et al. (arXiv 2108.08810), is that a CNN and a Transformer see differently."""
    vit, cnn = load(SimpleNamespace(**vars(args)), args.vit), load(args, args.cnn)
    names = []
    for start in (cnn, vit):
        with naming(start):
            names.append(layer_names(start.model))
    cnn_before, cnn_from = before_training(args, "cnn", cnn)
    vit_before, vit_from = before_training(args, "vit", vit)
    sources, what = choose(args, (cnn, vit), args.n)
    if min(len(sources), args.bs) < 4:
        raise UserError(f"{len(sources)} images, --bs {args.bs}: CKA needs 4 images in a minibatch")
    origin = cnn_from if cnn_from == vit_from else f"{cnn_from} (rows), {vit_from} (columns)"
    panels, note = [], ""
    for pair, title in (
        ((cnn_before, vit_before), f"before training: {origin}"),
        ((cnn, vit), "after training"),
    ):
        values = minibatch_cka(
            [
                layer_grams(start.model, batch, layers)
                for start, batch, layers in zip(pair, both, names)
            ]
            for both in batches(pair, sources, args.bs)
        ).numpy()
        labels = [["-" if np.isnan(v) else f"{v:.2f}" for v in row] for row in values]
        table, height = matrix(values, *names, labels, 0, 1)
        panels.append(above(text(title, table.width), table))
        if np.isnan(values).any():
            note = "\nGrey: a layer that gives the same for every image."
    figure = beside(*panels, colour_bar(0, 1, height, "linear CKA"), gap=2 * GAP)
    note = f"Rows: {cnn.label}. Columns: {vit.label}.\n{what}{note}"
    return above(figure, text(note, figure.width))


def draw_curves(args):
    """The numbers in a run's log.jsonl over the epochs; of several runs, a colour for each."""
    found = {}
    for run in args.run:
        file = Path(run) / "log.jsonl"
        with reading(file):
            rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            found[short(run)] = series(rows, parted=len(args.run) > 1)
    panels, palette = next(iter(found.values())), COLOURS
    if len(found) > 1:
        if len(found) > len(MORE):
            raise UserError(
                f"{len(found)} runs are too many for one picture; {len(MORE)} can be told apart"
            )
        palette = dict(zip(found, MORE))
        titles = dict.fromkeys(title for of_run in found.values() for title in of_run)
        panels = {
            title: {run: of_run[title][""] for run, of_run in found.items() if title in of_run}
            for title in titles
        }
    panels = {
        title: lines
        for title, lines in panels.items()
        if not args.only or any(word in title for word in args.only)
    }
    if not panels:
        raise UserError(
            f"{cli.preview(args.run)}/log.jsonl: "
            + (
                f"nothing there is called {' or '.join(args.only)} (--only)"
                if args.only
                else "holds no finished epoch"
            )
        )
    plots = [plot(title, lines, palette) for title, lines in panels.items()]
    width = max(p.width for p in plots)
    plots = [ImageOps.expand(p, (0, 0, width - p.width, 0), "white") for p in plots]
    rows = [beside(*plots[i : i + 3], gap=2 * GAP) for i in range(0, len(plots), 3)]
    head = (
        [text(f"{short(args.run[0])}, by epoch")]
        if len(found) == 1
        else [text("by epoch:"), *legend(found, palette)]
    )
    return above(beside(*head), *rows, gap=GAP)


def series(rows, parted=False):
    """Rows of a log -> {panel: {name of COLOURS: [(epoch, number), ...]}}: train_loss and val_loss
    are lines of one panel, and so are the arms, unless parted. Of DINO, which trains one arm after
    the other, every number belongs to one of them."""
    panels = {}
    for i, row in enumerate(rows, 1):
        inner = {
            f"{key}_{k}": v
            for key, value in row.items()
            if isinstance(value, dict)
            for k, v in value.items()
        }
        alone = row["arms"] if row.get("arms") in COLOURS else ""
        for key, value in {**row, **inner}.items():
            if isinstance(value, (int, float)) and key not in ("epoch", "iteration"):
                parts = key.split("_")
                line = next((part for part in parts if part in COLOURS), alone)
                panel = "_".join(part for part in parts if part != line) or key
                if parted and line:
                    line, panel = "", f"{line}_{panel}"
                points = panels.setdefault(panel, {}).setdefault(line, [])
                points.append((row.get("epoch", i), value))
    return panels


def draw_confusion(args):
    """A fine-tuned run's confusion.csv: counts in the cells, coloured by their share of the row."""
    file = Path(args.run) / "confusion.csv"
    with reading(file), open(file, encoding="utf-8", newline="") as opened:
        (_, *columns), *rows = csv.reader(opened)
        counts = np.array([row[1:] for row in rows], int).reshape(len(rows), len(columns))
        shares = counts / np.where(counts.any(1), counts.sum(1), np.nan)[:, None]
        names = [row[0] for row in rows]
        table, height = matrix(shares, names, columns, counts.astype(str).tolist(), 0, 1)
    figure = beside(table, colour_bar(0, 1, height, "share of row"))
    if columns == ["tp", "fp", "fn", "tn"]:
        note = (
            f"{counts[0].sum()} test images; rows: labels; tp, fp: given rightly, wrongly; "
            f"tn, fn: withheld rightly, wrongly"
        )
    else:
        note = (
            f"{counts.sum()} test images; rows: true classes; columns: predicted ones"
            + "; grey: no such image" * (not counts.any(1).all())
        )
    return above(text(short(args.run)), figure, text(note, max(figure.width, SIDE)))


@contextlib.contextmanager
def reading(file):
    """A file of a run folder that is not there, or is no such file, in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}; give the folder of one run (of several seeds, "
            f"one of seed0, ...)"
        ) from error
    except (ValueError, AttributeError, csv.Error) as error:
        raise UserError(f"{file}: is not as pretrain.py or finetune.py writes it") from error


def main():
    args = parse_arguments()
    out = Path(args.out)
    cli.refuse_overwrite(out.parent, (), False)  # it may be no folder
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UserError(f"{out}: is no name for a .png file (--out)")
    if args.image and out.exists() and Path(args.image).exists() and out.samefile(args.image):
        raise UserError(f"{out}: is the image to look at; write elsewhere with --out")
    figure = ImageOps.expand(args.draw(args), GAP, "white")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(out, "wb") as file:
        figure.save(file, "PNG", optimize=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main)
