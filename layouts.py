"""Images and labels as people have them on disk -> one table, an ImageSet. Nothing is decoded here.

A folder of images at any depth (no labels); one folder per class, CLASS/a.png; the splits above the
classes, train/CLASS/a.png; a CSV file of image names with one label, a list of labels, or a 0/1
column per label; a MedMNIST .npz file. What cannot be told is an error, never a guess.
"""

import csv
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cache import DecodedImages
from cli import UserError, some

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val",
          "validation": "val", "test": "test", "testing": "test"}
LABEL_NAMES = {"label", "labels", "class", "target"}


@dataclass
class ImageSet:
    """N images: `names` relative to the folder they were found in; `labels` (N, C) bool, C = 0
    without labels; `given` the split that came with them, "" where none did."""

    path: str
    names: list
    sources: list  # what cache.decode takes: paths or arrays
    labels: np.ndarray
    classes: list
    given: np.ndarray
    groups: np.ndarray = None  # (N,) str, of --group-col
    multilabel: bool = None  # unless told: some image has another number of labels than one
    notes: list = field(default_factory=list)
    table: np.ndarray = None  # (N,) of cache.ROW, and
    images: DecodedImages = None  # the pixels: both from decode()

    def __len__(self):
        return len(self.names)

    def __post_init__(self):
        if self.multilabel is None:
            self.multilabel = bool(self.classes) and bool((self.labels.sum(1) != 1).any())

    def keep(self, mask):
        """Leave out the images where the (N,) bool mask is False."""
        for key in ("labels", "given", "groups", "table"):
            if getattr(self, key) is not None:
                setattr(self, key, getattr(self, key)[mask])
        for key in ("names", "sources"):
            setattr(self, key, [x for x, kept in zip(getattr(self, key), mask) if kept])
        if self.images is not None:
            self.images.keep(mask)


def list_files(root):
    """Relative paths of all files below root, sorted; hidden ones skipped, links followed once."""
    found, seen, stack = [], set(), [""]
    while stack:
        folder = stack.pop()
        stat = os.stat(os.path.join(root, folder))
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        try:
            entries = list(os.scandir(os.path.join(root, folder)))
        except PermissionError as error:
            raise UserError(f"{os.path.join(root, folder)}: the folder cannot be read") from error
        for entry in entries:
            if not entry.name.startswith((".", "__MACOSX")):
                path = f"{folder}/{entry.name}" if folder else entry.name
                (stack if os.path.isdir(entry.path) else found).append(path)
    return sorted(found)


def is_image(path):
    """By its ending."""
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def read_folder(root, unlabelled=False):
    """Images below a folder. Classes are the folders directly below it (or below train, test, ...)
    where every image lies directly in one of at least two; otherwise there are no labels."""
    files = list_files(root)
    names = [f for f in files if is_image(f)]
    others = Counter(os.path.splitext(f)[1].lower() or "no ending" for f in files if not is_image(f))
    others = some(f"{n} {ending}" for ending, n in others.most_common())
    if not names:
        raise UserError(f"{root}: holds no images ({', '.join(sorted(EXTENSIONS))})" +
                        (f", but {others}" if others else ""))
    parts = [name.split("/") for name in names]
    given = [SPLITS.get(p[0].lower(), "") if len(p) > 1 else "" for p in parts]
    if len(set(given) - {""}) > 1:
        outside = [name for name, split in zip(names, given) if not split]
        if outside and not unlabelled:
            raise UserError(f"{root}: has images beside its train and test folders: {some(outside)};"
                            f" move them away, or name the split of each with --split FILE")
        parts = [p[1:] for p in parts]
    else:
        given = [""] * len(names)
    folders = sorted({p[0] for p in parts if len(p) == 2})
    labelled = all(len(p) == 2 for p in parts) and len(folders) > 1 and not unlabelled
    classes = folders if labelled else []
    labels = np.array([[p[0] == c for c in classes] for p in parts], bool)
    notes = [f"not read: {others}"] if others else []
    return ImageSet(str(root), names, [os.path.join(root, n) for n in names], labels, classes,
                    np.array(given), notes=notes)


def read_csv(file, images=None, image_col=None, label_col=None, label_sep=None, group_col=None):
    """Images and labels of a CSV file (comma, semicolon or tab; UTF-8).

    images: the folder of the images (default: the CSV's); names may lack the ending and may lie in
    folders below. label_col: list of one column of labels, or several 0/1 columns, or ["none"].
    label_sep: what parts several labels in one cell, or "none". What is not told and cannot be
    told from the file raises UserError.
    """
    header, rows, lines = _csv_rows(file)
    where = {column: i for i, column in enumerate(header)}
    for flag, columns in (("--image-col", [image_col]), ("--group-col", [group_col]),
                          ("--label-col", [c for c in label_col or () if c != "none"])):
        missing = [c for c in columns if c is not None and c not in where]
        if missing:
            raise UserError(f"{file}: has no column {some(missing)} ({flag}); "
                            f"its columns are {', '.join(header)}")
    find = _Finder(Path(images) if images else Path(file).parent)
    if image_col is None:
        image_col = _image_column(file, header, rows, find)
    paths = [find(row[where[image_col]]) for row in rows]
    for problem, kind in (([], "missing"), (None, "ambiguous"), ("", "outside")):
        bad = [f"line {line}: {row[where[image_col]] or '(empty)'}"
               for row, line, path in zip(rows, lines, paths) if path == problem]
        if bad:
            text = {"missing": f"no image in {find.root}",
                    "ambiguous": f"several images in {find.root}",
                    "outside": f"an image outside {find.root}"}[kind]
            raise UserError(f"{file}: {len(bad)} of {len(rows)} rows name {text} ({some(bad)}); "
                            f"--images DIR and --image-col say where the images are")
    if label_col == ["none"]:
        columns = []
    elif label_col:
        columns = label_col
    else:
        columns = _label_columns(file, [c for c in header if c not in (image_col, group_col)],
                                 rows, where)
    labels, classes, notes = _labels(file, columns, rows, lines, where, label_sep)
    groups = [row[where[group_col]] for row in rows] if group_col else None
    first = {}  # several rows of one image must agree
    for i, path in enumerate(paths):
        j = first.setdefault(path, i)
        if (labels[i] != labels[j]).any() or groups and groups[i] != groups[j]:
            raise UserError(f"{file}: lines {lines[j]} and {lines[i]} contradict each other on "
                            f"{path}; keep one of them")
    if len(first) < len(paths):
        notes.append(f"{len(paths) - len(first)} rows repeat an image with the same labels")
    kept = list(first.values())
    if groups:  # an image without a group is a group of its own
        groups = np.array([groups[i] or f"(none) {paths[i]}" for i in kept])
    return ImageSet(str(file), list(first), [str(find.root / p) for p in first], labels[kept],
                    classes, np.full(len(kept), "", "U5"), groups, notes=notes)


def _csv_rows(file):
    try:
        with open(file, encoding="utf-8-sig", newline="") as f:
            head = f.readline()
            f.seek(0)
            delimiter = max(",;\t", key=head.count)
            reader = csv.reader(f, delimiter=delimiter, strict=True)
            header = [c.strip() for c in next(reader, [])]
            rows = [([cell.strip() for cell in row], reader.line_num) for row in reader if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: is no CSV file in UTF-8 ({error})") from error
    twice = [c for c, n in Counter(header).items() if n > 1]
    if len(header) < 1 or twice or "" in header:
        raise UserError(f"{file}: needs a first line of column names, each once and none empty" +
                        (f" (twice: {some(twice)})" if twice else ""))
    if not rows:
        raise UserError(f"{file}: holds no rows below its column names")
    ragged = [f"line {line}: {len(row)}" for row, line in rows if len(row) != len(header)]
    if ragged:
        raise UserError(f"{file}: has {len(header)} columns, but {len(ragged)} rows have another "
                        f"number of cells ({some(ragged)})")
    return header, [row for row, _ in rows], [line for _, line in rows]


class _Finder:
    """Image names of a CSV file -> paths below root; [] where there is none, None where there are
    several, "" where it would lie outside."""

    def __init__(self, root):
        self.root, self.index = root, None
        if not root.is_dir():
            raise UserError(f"{root}: there is no such folder (--images)")

    def __call__(self, name):
        if not name:
            return []
        if os.path.isabs(name):
            name = os.path.relpath(name, os.path.abspath(self.root))
        name = os.path.normpath(name.replace("\\", "/")).replace(os.sep, "/")
        if name.startswith("../") or name == "..":
            return ""
        if os.path.isfile(self.root / name):
            return name
        if self.index is None:
            self.index = defaultdict(list)
            for path in filter(is_image, list_files(self.root)):
                base = path.rsplit("/", 1)[-1]
                for key in {path, os.path.splitext(path)[0], base, os.path.splitext(base)[0]}:
                    self.index[key].append(path)
        found = self.index.get(name, [])
        return found[0] if len(found) == 1 else None if found else []


def _image_column(file, header, rows, find):
    """The column whose cells name images. Raises UserError unless there is exactly one."""
    sample = rows[:20]
    hits = {c: sum(bool(find(row[i])) for row in sample) for i, c in enumerate(header)}
    named = [c for c, n in hits.items() if n * 2 > len(sample)]
    if not named:
        named = [c for c in header if c.lower() in
                 {"image", "images", "image_id", "img", "file", "filename", "file_name", "path"}]
    if len(named) != 1:
        raise UserError(f"{file}: cannot tell which column names the images "
                        f"({', '.join(named or header)}); say so with --image-col"
                        + ("" if named else f", and where they are with --images "
                                            f"(looked in {find.root})"))
    return named[0]


def _label_columns(file, columns, rows, where):
    """The column of labels, or the 0/1 columns. Raises UserError where that cannot be told."""
    if len(columns) < 2:
        return columns
    named = [c for c in columns if c.lower() in LABEL_NAMES]
    if len(named) == 1:
        return named
    binary = [c for c in columns if {row[where[c]] for row in rows} <= {"0", "1", "0.0", "1.0"}]
    if binary == columns:
        return columns
    raise UserError(f"{file}: cannot tell which columns hold the labels ({', '.join(columns)}); say "
                    f"so with --label-col NAME (several names for 0/1 columns, none for no labels)")


def _labels(file, columns, rows, lines, where, label_sep):
    """(N, C) bool, the C class names, and what is to be said about them."""
    if not columns:
        return np.zeros((len(rows), 0), bool), [], []
    cells = [[row[where[c]] for c in columns] for row in rows]
    if len(columns) > 1:
        numbers = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
        bad = [f"line {line}" for row, line in zip(cells, lines)
               if not all(cell in numbers for cell in row)]
        if bad:
            raise UserError(f"{file}: the columns {some(columns)} must hold 0 or 1 ({some(bad)})")
        labels = np.array([[numbers[cell] for cell in row] for row in cells], bool)
        empty = [c for c, n in zip(columns, labels.sum(0)) if n == 0]
        notes = [f"label column without any image dropped: {some(empty, 9)}"] if empty else []
        return labels[:, labels.any(0)], [c for c in columns if c not in empty], notes
    values = [cell for cell, in cells]
    if label_sep is None:
        seps = [sep for sep in "|;," if any(sep in value for value in values)]
        if len(seps) > 1 or seps == [","]:
            raise UserError(f"{file}: cannot tell whether {' or '.join(map(repr, seps))} parts "
                            f"several labels in {columns[0]}; say so with --label-sep (or none)")
        label_sep = seps[0] if seps else "none"
    if label_sep == "none":
        lists = [[value] for value in values]
        bad = [f"line {line}" for value, line in zip(values, lines) if not value]
        if bad:
            raise UserError(f"{file}: {len(bad)} rows have no label in {columns[0]} ({some(bad)}); "
                            f"fill them in or take the rows out")
    else:
        lists = [[v.strip() for v in value.split(label_sep) if v.strip()] for value in values]
    classes = {label for labels in lists for label in labels}
    numeric = all(c.lstrip("-").isdigit() for c in classes)
    classes = sorted(classes, key=int if numeric else str)
    column = {c: i for i, c in enumerate(classes)}
    labels = np.zeros((len(rows), len(classes)), bool)
    for i, names in enumerate(lists):
        labels[i, [column[c] for c in names]] = True
    return labels, classes, []


def read_npz(file, unlabelled=False):
    """A MedMNIST file: {train,val,test}_images (N, H, W[, 3]) uint8 and ..._labels (N, C) ints,
    which are not looked at if unlabelled."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            arrays = {key: arrays[key] for key in arrays.files}
    except Exception as error:  # zip files and arrays break in many ways
        raise UserError(f"{file}: is no .npz file of plain arrays") from error
    splits = [s for s in ("train", "val", "test") if f"{s}_images" in arrays]
    if unlabelled:
        arrays |= {f"{s}_labels": np.zeros((len(arrays[f"{s}_images"]), 0)) for s in splits}
    if not splits or not all(f"{s}_labels" in arrays for s in splits):
        raise UserError(f"{file}: needs the arrays train_images and train_labels (and val_, test_), "
                        f"but holds {some(arrays, 9) or 'none'}")
    sizes = {s: (len(arrays[f"{s}_images"]), len(arrays[f"{s}_labels"])) for s in splits}
    if any(a != b for a, b in sizes.values()):
        raise UserError(f"{file}: has another number of labels than of images: {sizes}")
    images = [a for s in splits for a in arrays[f"{s}_images"]]
    labels = np.concatenate([arrays[f"{s}_labels"].reshape(len(arrays[f"{s}_images"]), -1)
                             for s in splits])
    if any(a.dtype != np.uint8 or a.shape[2:] not in ((), (3,)) for a in images):
        raise UserError(f"{file}: the images must be uint8 of shape (N, H, W) or (N, H, W, 3)")
    if labels.shape[1] == 1:
        values = np.unique(labels)
        labels, classes = labels == values, [str(v) for v in values]
    else:
        labels, classes = labels.astype(bool), [str(c) for c in range(labels.shape[1])]
    names = [f"{s}/{i}" for s in splits for i in range(len(arrays[f"{s}_images"]))]
    given = np.array([name.split("/")[0] for name in names])
    if splits == ["train"]:
        given[:] = ""
    return ImageSet(str(file), names, images, labels, classes, given)


def read(args):
    """The ImageSet that the data flags name. Nothing is decoded yet. Raises UserError."""
    path = Path(args.data)
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder (--data)")
    csv_flags = ["images", "image_col", "label_col", "label_sep", "group_col"]
    unused = [f"--{f.replace('_', '-')}" for f in csv_flags if getattr(args, f)]
    if path.is_dir():
        data = read_folder(path, args.unlabelled)
    elif path.suffix.lower() == ".npz":
        data = read_npz(path, args.unlabelled)
    elif path.suffix.lower() in (".csv", ".tsv", ".txt"):
        unused = []
        data = read_csv(path, args.images, args.image_col,
                        ["none"] if args.unlabelled else args.label_col, args.label_sep,
                        args.group_col)
    else:
        raise UserError(f"{path}: is neither a folder nor a .csv or .npz file (--data)")
    if unused:
        raise UserError(f"{path}: {some(unused, 9)} need a CSV file as --data")
    if args.unlabelled:
        data.labels, data.classes = data.labels[:, :0], []
    if args.multilabel:
        data.multilabel = True
    if args.split:
        data.given = read_split(args.split, data.names)
        named = data.given != ""
        if not named.all():
            data.notes.append(f"left out, since {args.split} does not name them: "
                              f"{some(np.array(data.names)[~named])}")
            data.keep(named)
    return data


def read_split(file, names):
    """(N,) "train", "val" or "test" of a CSV file with the columns path and split, such as a run
    writes; "" for images that it does not name. Raises UserError where it names others."""
    header, rows, lines = _csv_rows(file)
    if not {"path", "split"} <= set(header):
        raise UserError(f"{file}: needs the columns path and split (--split)")
    path, split = header.index("path"), header.index("split")
    bad = [f"line {line}: {row[split]}" for row, line in zip(rows, lines)
           if row[split].lower() not in SPLITS]
    if bad:
        raise UserError(f"{file}: a split is train, val or test, not {some(bad)}")
    given = {row[path]: SPLITS[row[split].lower()] for row in rows}
    if len(given) < len(rows):
        twice = [p for p, n in Counter(row[path] for row in rows).items() if n > 1]
        raise UserError(f"{file}: names images twice: {some(twice)}")
    missing = [path for path in given if path not in set(names)]
    if missing:
        raise UserError(f"{file}: names {len(missing)} images that are not there: {some(missing)}")
    return np.array([given.get(name, "") for name in names])
