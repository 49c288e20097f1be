"""The paper's figures (v6) from any of our weights files, and curves of a run, as PNG (--out).

    python -m tools.visualize attention --ckpt vit.pt --compare best.pt  (Figures 3, 7, 9, 12, 13)
    python -m tools.visualize features --ckpt cnn.pt --layers 5          (Figures 4, 6)
    python -m tools.visualize cka --cnn cnn.pt --vit vit.pt              (how alike the layers are)
    python -m tools.visualize curves RUN_FOLDER ...                      (log.jsonl)
    python -m tools.visualize confusion RUN_FOLDER                       (confusion.csv)

Images come from the test split of the checkpoint's data, or are named by --image and data flags.
"""

import contextlib
import csv
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

import data
from common import cli
from common.arms import make_arm
from common.checkpoint import atomic_open
from common.cli import UserError
from common.decode import decode, normalize
from common.readers import read
from common.report import class_counts
from common.splits import stratified_order
from common.starts import fill_in, from_checkpoint, load_weights, seen_in_pretraining
from tools import introspect
from tools import plotting as draw

SIDE = 240  # pixels of an image with attention


def parse_arguments():
    """The flags of one figure; args.figure is the function that draws it."""
    parser = cli.Parser(__doc__)
    commands, add = parser.add_subparsers(dest="WHAT", required=True), {}
    for figure in (attention, features, cka, curves, confusion):
        command = commands.add_parser(figure.__name__, doc=None)
        command.set_defaults(figure=figure, image=None)
        add[figure], png = command.add_argument, f"{figure.__name__}.png"
        add[figure]("--out", default=png, metavar="FILE", help=f"PNG to write (default: {png})")
        if figure in (attention, features, cka):
            data.add_arguments(command)
            add[figure]("--device", default="auto", help="auto: CUDA, then MPS, then the CPU")
    for figure in (attention, features):
        add[figure]("--ckpt", required=True, metavar="FILE", help="cnn.pt, vit.pt or best.pt")
        add[figure]("--compare", metavar="FILE", help="another, on the same colour scale")
        add[figure]("--image", metavar="FILE", help="this image instead of those of the data")
    add[attention]("--n", type=cli.positive, help="images (30; 100 if a class is rare; E.3.4)")
    add[attention]("--block", type=cli.positive, default=1, help="attention block, the first is 1")
    add[features]("--layers", type=cli.positive, default=1, help="convolutions; Figure 6 shows 5")
    before = "its weights before training: imagenet, random or FILE (default: as the file says)"
    for arm in ("cnn", "vit"):
        add[cka](f"--{arm}", required=True, metavar="FILE", help=f"weights file, as {arm}.pt")
        add[cka](f"--before-{arm}", metavar="WHAT", help=before)
    add[cka]("--n", type=cli.positive, default=128, help="test images (default: %(default)s)")
    add[cka]("--bs", type=cli.positive, default=32, help="images per minibatch, at least 4")
    add[curves]("run", metavar="RUN_FOLDER", nargs="+", help="what a run wrote")
    add[curves]("--only", nargs="+", metavar="TEXT", help="panels with such names, as: spread rank")
    add[confusion]("run", metavar="RUN_FOLDER", help="what a run wrote")
    return parser.parse_args()


def load(args, path, check=lambda model, images: None):
    """A weights file: model, metadata and label. Its data and seed fill in args where these lack.
    check(model, images) raises ValueError where the model cannot be drawn."""
    start = from_checkpoint(path)
    fill_in(args, start.data)
    args.seed = getattr(args, "seed", start.seed)
    start.device = cli.pick_device(args.device)
    start.model = start.make().to(start.device).eval()
    start.path, start.size = path, start.metadata["img_size"]
    start.label = f"{short(path)}: {start.metadata['arch']}"
    try:
        check(start.model, torch.zeros(1, 3, start.size, start.size, device=start.device))
    except ValueError as error:
        raise UserError(f"{path}: {start.metadata['arch']} {error}") from error
    return start


def choose(args, starts, n):
    """--image, or n images of the test split, if possible none that a model has seen (n None: 30,
    or 100 where 30 would hardly hold every class). Returns their sources, and them in words."""
    if args.image:
        return [args.image], short(args.image)
    images = read(args.data, **data.options(args))
    images.decode(starts[0].size, data.cache_dir(args.cache), args.skip_bad)
    seen = seen_in_pretraining(starts[0].seen, images)
    split = data.split_and_report(images, args.seed, args.dedup, seen, allow_seen=True)
    part = "test" if (split == "test").any() else "train"
    seen = torch.cat([s.seen for s in starts if s.seen is not None] or [torch.zeros(0)])
    unseen = (split == part) & ~seen_in_pretraining(seen, images)
    index = np.flatnonzero(unseen if unseen.any() else split == part)
    rarest = images.labels[index].sum(0).min(initial=len(index))
    n = n or (30 if 30 * rarest >= len(index) else 100)
    index = index[sample(images.labels[index], n, args.seed)]
    several = len(index) > 1
    classes = [f"{c} {k}" if several else c for c, k in class_counts(images, index).items() if k]
    what = f"{len(index)} images" if several else images.names[index[0]]
    origin = "test split" if part == "test" else "training split, for want of a test split"
    what += f" of the {origin}" + (f": {cli.preview(classes, 8)}" if classes else "")
    return [images.sources[i] for i in index], what


def short(path):
    """The last two parts of a path."""
    return "/".join(Path(path).resolve().parts[-2:])


def sample(labels, n, seed):
    """n of the images with labels (N, C) bool: every class at least once, else as in the whole."""
    order, _ = stratified_order(labels, np.arange(len(labels)), np.random.default_rng([seed, 3]))
    return order[:n]


def pixels(sources, size):
    """Image files or arrays -> (N, 3, size, size) uint8. Raises UserError."""
    try:
        with cli.progress(sources) as bar:
            return torch.from_numpy(np.stack([decode(source, size)[0] for source in bar]))
    except ValueError as error:
        raise UserError(f"{cli.preview(sources)}: cannot be read ({error})") from error


def batches(start, sources, batch_size=16):
    """Images as a model wants them: (n, 3, S, S) float, normalized, on its device."""
    for images in pixels(sources, start.size).tensor_split(max(1, len(sources) // batch_size)):
        yield normalize(images.to(start.device), start.metadata["mean"], start.metadata["std"])


def attention(args):
    """Figures 3, 7, 9, 12 and 13: attention of one or two Transformers to an image, or a mean."""
    check = partial(introspect.attention_map, block=args.block)
    starts = [load(args, path, check) for path in (args.ckpt, args.compare) if path]
    sources, what = choose(args, starts, args.n)
    maps = [introspect.mean_attention(s.model, batches(s, sources), args.block) for s in starts]
    maps = [m * m.numel() for m in maps]  # 1 is an equal share, whatever the number of patches
    low, high = min(m.min() for m in maps).item(), max(m.max() for m in maps).item()
    mean = pixels(sources, starts[0].size).double().mean(0).round().byte()
    image = to_pil_image(mean).resize((SIDE, SIDE))
    over = "heads and images" if len(sources) > 1 else "the heads"
    what = f"Mean of {what}" if len(sources) > 1 else f"The image: {what}"
    note = draw.text(f"{what}.\nAttention: mean over {over}.", SIDE)
    border = (0, 0, SIDE - note.width, max(SIDE - note.height, 0))
    panels = [draw.above(image, ImageOps.expand(note, border, "white"))]
    for start, values in zip(starts, maps):
        kind = "no class token: mean attention that each patch receives"
        kind = kind if getattr(start.model, "cls_token", None) is None else "class token"
        blocks = len(introspect.attention_names(start.model))
        title = f"{start.label}\nblock {args.block} of {blocks}, {kind}"
        rgb = draw.colours(resized(values, SIDE), low, high)
        over = 0.4 * np.asarray(image.convert("L"))[..., None] + 0.6 * rgb
        pictures = [Image.fromarray(x.round().astype(np.uint8)) for x in (over, rgb)]
        panels.append(draw.above(draw.text(title, SIDE), *pictures))
    return draw.beside(*panels, draw.colour_bar(low, high, SIDE, "attention (1: an equal share)"))


def resized(values, size):
    """An (h, w) map of patches -> (size, size), with each value over the middle of its patch."""
    return interpolate(values[None, None], (size, size), mode="bilinear")[0, 0]


def features(args):
    """Figures 4 and 6: channels of the first convolutions of one or two CNNs, for one image."""
    check = partial(introspect.feature_maps, layers=args.layers)
    starts = [load(args, path, check) for path in (args.ckpt, args.compare) if path]
    sources, what = choose(args, starts, 1)
    found = [check(s.model, images) for s in starts for images in batches(s, sources)]
    n, rows = 64 if args.layers == 1 else 16, []
    for layer in zip(*found):  # the same convolution of each model
        shown = [maps[0, :n].float().cpu() for _, maps in layer]
        low, high = min(c.min() for c in shown).item(), max(c.max() for c in shown).item()
        tile = min(max(shown[0].shape[-1], 44), 96)
        grids = []
        for start, (name, maps), channels in zip(starts, layer, shown):
            c, h, w = channels.shape
            title = "" if rows else f"{start.label}\n"
            title += f"{name}: {c} of {maps.shape[1]} channels, {h} x {w}"
            tiles = torch.from_numpy(draw.colours(channels, low, high)).permute(0, 3, 1, 2).float()
            tiles = interpolate(tiles, (tile, tile), mode="area" if w > tile else "nearest")
            grid = to_pil_image(make_grid(tiles.round().byte(), pad_value=255))
            grids.append(draw.above(draw.text(title, grid.width), grid))
        rows.append(draw.beside(*grids, draw.colour_bar(low, high, grid.height, "output")))
    image = to_pil_image(pixels(sources, starts[0].size)[0]).resize((160, 160))
    what = draw.text(what, rows[0].width - 160 - draw.GAP)
    return draw.above(draw.beside(image, what), *rows, gap=draw.GAP)


def before_training(args, arm, start):
    """`start` with what training began with, or --before-cnn or --before-vit, and what that is."""
    config = load_weights(start.path).get("config", {})
    began = [config[key] for key in (f"init_{arm}", "init", "ckpt") if config.get(key)]
    flag, what = f"--before-{arm}", getattr(args, f"before_{arm}") or [*began, "random"][0]
    kwargs = {key: v for key, v in start.metadata["model_kwargs"].items() if key != "img_size"}
    torch.manual_seed(args.seed)
    try:
        model = make_arm(flag, start.metadata["arch"], what, start.size, **kwargs)
    except UserError as error:
        raise UserError(f"{what}: cannot be loaded; give {flag} FILE, or {flag} random") from error
    before = SimpleNamespace(**vars(start) | {"model": model.to(start.device).eval()})
    return before, what if what in ("random", "imagenet") else short(what)


def cka(args):
    """CKA between the blocks of both arms, before and after training: the paper's premise (3.1) is
    that a CNN and a Transformer see differently, after Raghu et al. (arXiv 2108.08810)."""
    files = (args.cnn, args.vit)
    after = [load(args, path, lambda model, _: introspect.layer_names(model)) for path in files]
    before, began = zip(*map(partial(before_training, args), ("cnn", "vit"), after))
    sources, what = choose(args, after, args.n)
    if min(len(sources), args.bs) < 4:
        raise UserError(f"{len(sources)} images, --bs {args.bs}: CKA needs 4 images in a minibatch")
    origin = began[0] if len({*began}) == 1 else "{} (rows), {} (columns)".format(*began)
    names = [introspect.layer_names(start.model) for start in after]
    pairs = {f"before training: {origin}": before, "after training": after}
    panels, note = [], ""
    for title, pair in pairs.items():
        grams = []
        for start, layers in zip(pair, names):
            look = partial(introspect.layer_grams, start.model, names=layers)
            grams.append(list(map(look, batches(start, sources, args.bs))))
        values = introspect.minibatch_cka(zip(*grams)).numpy()
        labels = [["-" if np.isnan(v) else f"{v:.2f}" for v in row] for row in values]
        table, height = draw.matrix(values, *names, labels, 0, 1)
        panels.append(draw.above(draw.text(title, table.width), table))
        if np.isnan(values).any():
            note = "\nGrey: a layer that gives the same for every image."
    figure = draw.beside(*panels, draw.colour_bar(0, 1, height, "linear CKA"), gap=2 * draw.GAP)
    note = f"Rows: {after[0].label}. Columns: {after[1].label}.\n{what}{note}"
    return draw.above(figure, draw.text(note, figure.width))


def curves(args):
    """The numbers in log.jsonl over the epochs; of several runs, a colour for each."""
    runs, panels = [short(run) for run in args.run], {}
    several = len(runs) > 1
    if len(runs) > len(draw.MORE):
        raise UserError(f"{len(runs)} runs: only {len(draw.MORE)} can be told apart in one picture")
    for run, path in zip(runs, args.run):
        with lines_of(path, "log.jsonl") as lines:
            for title, found in series(map(json.loads, lines), several).items():
                panels.setdefault(title, {}).update({run: found[""]} if several else found)
    only = args.only or [""]
    panels = {title: panels[title] for title in panels if any(word in title for word in only)}
    if not panels:
        none = f"nothing is called {' or '.join(only)}" if args.only else "holds no finished epoch"
        raise UserError(f"{cli.preview(args.run)}/log.jsonl: {none}")
    palette = dict(zip(runs, draw.MORE)) if several else draw.COLOURS
    plots = [draw.plot(title, lines, palette) for title, lines in panels.items()]
    width = max(p.width for p in plots)
    plots = [ImageOps.expand(p, (0, 0, width - p.width, 0), "white") for p in plots]
    rows = [draw.beside(*plots[i : i + 3], gap=2 * draw.GAP) for i in range(0, len(plots), 3)]
    head = [draw.text("by epoch:" if several else f"{runs[0]}, by epoch")]
    head += draw.legend(runs, palette) if several else []
    return draw.above(draw.beside(*head), *rows, gap=draw.GAP)


def series(rows, parted=False):
    """Rows of a log -> {panel: {name of COLOURS: [(epoch, number), ...]}}. The losses of train and
    val share a panel, and so do the arms, unless parted; a row of DINO's log is of one arm."""
    panels = {}
    for i, row in enumerate(rows, 1):
        nested = [(key, value) for key, value in row.items() if isinstance(value, dict)]
        inner = {f"{key}_{k}": v for key, value in nested for k, v in value.items()}
        alone = row["arms"] if row.get("arms") in draw.COLOURS else ""
        for key, value in (row | inner).items():
            if isinstance(value, (int, float)) and key not in ("epoch", "iteration"):
                parts = key.split("_")
                line = next((part for part in parts if part in draw.COLOURS), alone)
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
        names, labels = [row[0] for row in rows], counts.astype(str).tolist()
        table, height = draw.matrix(shares, names, columns, labels, 0, 1)
    grey = "" if counts.any(1).all() else "; grey: no such image"
    note = f"{counts.sum()} test images; rows: true classes; columns: predicted ones{grey}"
    if columns == ["tp", "fp", "fn", "tn"]:
        note = f"{counts[0].sum()} test images; rows: labels; true/false positives/negatives"
    figure = draw.beside(table, draw.colour_bar(0, 1, height, "share of row"))
    note = draw.text(note, max(figure.width, SIDE))
    return draw.above(draw.text(short(args.run)), figure, note)


@contextlib.contextmanager
def lines_of(run, name):
    """An open file of a run folder. Missing or of another kind, it gives a one-line error."""
    file = Path(run) / name
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            yield lines
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give the folder of one run") from error
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
    figure = ImageOps.expand(args.figure(args), draw.GAP, "white")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(out, "wb") as file:
        figure.save(file, "PNG", optimize=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main)
