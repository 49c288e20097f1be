"""Single files: CSV of images and labels, or of a split, as people write them; MedMNIST's .npz."""

import csv
import os
from collections import Counter, defaultdict
from itertools import compress
from pathlib import Path

import numpy as np

from common.cli import UserError, preview
from common.readers import EXTENSIONS, SPLITS, ImageSet, list_files

LABEL_NAMES = {"label", "labels", "class", "target"}
ZERO_OR_ONE = {"0", "1", "0.0", "1.0"}
IMAGE_NAMES = {"image", "images", "image_id", "img", "file", "filename", "file_name", "path"}


class Table:
    """A CSV file (comma, semicolon or tab; UTF-8): columns {name: N cells}, and the N lines. own: of
    a run, whose names may begin with a space or be no UTF-8."""

    def __init__(self, file, own=False):
        self.file = file
        try:
            if not os.path.isfile(file):
                raise FileNotFoundError("there is no such file")
            errors = "surrogateescape" if own else "strict"
            with open(file, encoding="utf-8-sig", errors=errors, newline="") as f:
                head = f.readline()
                f.seek(0)
                reader = csv.reader(f, delimiter=max(",;\t", key=head.count), strict=True)
                header = [c.strip() for c in next(reader, [])]
                rows = [(reader.line_num, row) for row in reader if any(row)]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{file}: is no CSV file in UTF-8 ({error})") from error
        if not rows or not all(header) or len(set(header)) < len(header):
            raise UserError(
                f"{file}: needs rows below distinct column names ({preview(header, 9)})"
            )
        self.lines, rows = zip(*rows)
        n = [len(row) for row in rows]
        self.refuse(n, [x != len(header) for x in n], f"do not have {len(header)} cells")
        cells = zip(*(row if own else map(str.strip, row) for row in rows))
        self.columns = dict(zip(header, cells))

    def column(self, name, flag):
        """The N cells below a column name that a flag gave. Raises UserError if there is none."""
        if name not in self.columns:
            there = f"its columns are {preview(self.columns, 99)}"
            raise UserError(f"{self.file}: has no column {name} ({flag}); {there}")
        return self.columns[name]

    def refuse(self, cells, bad, what, fix="correct them"):
        """Raise UserError, with `what` as its predicate, if any of N cells is bad (N bools)."""
        if any(bad):
            where = [f"line {n}: {x or 'empty'}" for n, x in compress(zip(self.lines, cells), bad)]
            rows = f"{len(where)} of {len(self.lines)} rows"
            raise UserError(f"{self.file}: {rows} {what} ({preview(where)}); {fix}")


def read_csv(file, images=None, image_col=None, label_col=None, label_sep=None, group_col=None):
    """Images, from the folder `images` (default: the CSV's; names may lack ending or folders), and
    labels. label_col: list of one column of labels, or several 0/1 columns, or ["none"]. label_sep:
    separator of several labels in one cell, or "none". What cannot be told raises UserError."""
    table, root = Table(file), Path(images) if images else Path(file).parent
    find = Finder(root)
    image_col = _image_column(table, find) if image_col is None else image_col
    names = table.column(image_col, "--image-col")
    found = list(map(find, names))
    fits = [f"{name}, {len(paths)} images" for name, paths in zip(names, found)]
    what, fix = f"name no image in {root}, or several", "correct --images or --image-col"
    table.refuse(fits, [len(paths) != 1 for paths in found], what, fix)
    if label_col is None:
        label_col = _label_columns(table, {image_col, group_col})
    elif label_col == ["none"]:
        label_col = []
    labels, classes = _labels(table, label_col, label_sep)
    empty = [c for c in label_col if len(label_col) > 1 and c not in classes]
    notes = [f"label column without any image dropped: {preview(empty, 9)}"] if empty else []
    groups = None if group_col is None else table.column(group_col, "--group-col")
    first = {}  # path -> its first row
    for i, (path,) in enumerate(found):
        j = first.setdefault(path, i)
        if labels[i] != labels[j] or groups and groups[i] != groups[j]:
            lines = f"lines {table.lines[j]} and {table.lines[i]}"
            raise UserError(f"{file}: {lines} contradict each other on {path}; keep one of them")
    if len(first) < len(found):
        notes.append(f"{len(found) - len(first)} rows repeat an image with the same labels")
    if groups:  # an image without a group is a group of its own
        groups = np.array([groups[i] or f"(none) {path}" for path, i in first.items()])
    column = {c: i for i, c in enumerate(classes)}
    has = np.zeros((len(first), len(classes)), bool)
    for row, i in zip(has, first.values()):
        row[[column[label] for label in labels[i]]] = True
    sources, given = [str(root / path) for path in first], np.full(len(first), "", "U5")
    return ImageSet(str(file), list(first), sources, has, classes, given, groups, notes=notes)


class Finder:
    """Image name of a CSV file -> list of the paths below root that it fits."""

    def __init__(self, root):
        self.root, self.index = root, None
        if not root.is_dir():
            raise UserError(f"{root}: there is no such folder (--images)")

    def __call__(self, name):
        if os.path.isabs(name):
            name = os.path.relpath(name, os.path.abspath(self.root))
        name = os.path.normpath(name.replace("\\", "/")).replace(os.sep, "/")
        if not name.startswith("../") and os.path.isfile(os.path.join(self.root, name)):
            return [name]
        if self.index is None:
            self.index = defaultdict(list)
            for path in (f for f in list_files(self.root) if f.lower().endswith(EXTENSIONS)):
                base = os.path.basename(path)
                for key in {path, os.path.splitext(path)[0], base, os.path.splitext(base)[0]}:
                    self.index[key].append(path)
        return self.index.get(name, [])


def _image_column(table, find):
    """The column whose cells name images. Raises UserError unless there is exactly one."""
    hits = {c: np.mean([len(find(x)) == 1 for x in col[:20]]) for c, col in table.columns.items()}
    named = [c for c in hits if hits[c] > 0.5] or [c for c in hits if c.lower() in IMAGE_NAMES]
    if len(named) != 1:
        problem = f"unclear which column names images in {find.root}: {', '.join(named or hits)}"
        raise UserError(f"{table.file}: {problem}; give --image-col, or correct --images")
    return named[0]


def _label_columns(table, others):
    """The column of labels, or the 0/1 columns. Raises UserError where that cannot be told."""
    columns = [c for c in table.columns if c not in others]
    named = [c for c in columns if c.lower() in LABEL_NAMES]
    if len(columns) > 1 and len(named) == 1:
        return named
    if len(columns) < 2 or all(ZERO_OR_ONE.issuperset(table.columns[c]) for c in columns):
        return columns
    problem = f"unclear which columns hold the labels ({', '.join(columns)})"
    raise UserError(f"{table.file}: {problem}; give --label-col (none: without labels)")


def _labels(table, columns, label_sep):
    """N sets of labels, and the names of their classes. Raises UserError where it cannot be told
    what parts several labels in a cell."""
    cells = [table.column(c, "--label-col") for c in columns]
    if len(columns) != 1:
        for c, cell in zip(columns, cells):
            table.refuse(cell, [x not in ZERO_OR_ONE for x in cell], f"are not 0 or 1 in {c}")
        rows = zip(*cells) if columns else [()] * len(table.lines)
        labels = [{c for c, cell in zip(columns, row) if float(cell)} for row in rows]
        used = set().union(*labels)
        return labels, [c for c in columns if c in used]
    (cells,) = cells
    if label_sep == "":
        raise UserError("--label-sep: is empty; give a character, or none")
    if label_sep is None:
        seps = [sep for sep in "|;," if any(sep in cell for cell in cells)]
        if len(seps) > 1 or seps == [","]:
            which = f"{' or '.join(map(repr, seps))} parts several labels in {columns[0]}"
            raise UserError(f"{table.file}: unclear whether {which}; give --label-sep (or none)")
        label_sep = "".join(seps) or "none"
    if label_sep == "none":
        table.refuse(cells, [not cell for cell in cells], f"have no label in {columns[0]}")
        labels = [{cell} for cell in cells]
    else:
        labels = [{v.strip() for v in cell.split(label_sep)} - {""} for cell in cells]
    classes = sorted(set().union(*labels))
    numbers = all(c.removeprefix("-").isdecimal() for c in classes)
    return labels, sorted(classes, key=int) if numbers else classes


def read_split(file, names):
    """(N,) "train", "val" or "test" of a CSV file with the columns path and split, such as a run
    writes; "" for images that it does not name. Raises UserError where it names others."""
    table, known = Table(file, own=True), set(names)
    paths = [p if p in known else p.strip() for p in table.column("path", "--split")]
    cells = [cell.strip().lower() for cell in table.column("split", "--split")]
    table.refuse(cells, [c not in SPLITS for c in cells], "name neither train, val nor test")
    table.refuse(paths, [path not in known for path in paths], "name no image of the data")
    given = {path: SPLITS[cell] for path, cell in zip(paths, cells)}
    twice = [n > 1 for n in map(Counter(paths).get, paths)]
    table.refuse(paths, twice, "name an image twice", "keep one of each")
    return np.array([given.get(name, "") for name in names])


def read_npz(file, unlabelled=False):
    """A MedMNIST file: {train,val,test}_images (N, H, W[, 3]) uint8, and ..._labels (N, C) int."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            arrays = dict(arrays)
    except Exception as error:  # zip files and arrays break in many ways
        raise UserError(f"{file}: is no .npz file of plain arrays") from error
    splits = [s for s in ("train", "val", "test") if f"{s}_images" in arrays]
    if not splits or not (unlabelled or all(f"{s}_labels" in arrays for s in splits)):
        held = preview(arrays, 9) or "none"
        raise UserError(f"{file}: needs arrays {{train,val,test}}_images and _labels, not {held}")
    images = [arrays[f"{s}_images"] for s in splits]
    kinds = {(x.dtype == np.uint8, x.ndim > 2, x.shape[3:], x.size > 0) for x in images}
    if not kinds <= {(True, True, (), True), (True, True, (3,), True)}:
        raise UserError(f"{file}: the images must be uint8 of shape (N, H, W) or (N, H, W, 3)")
    sizes = list(map(len, images))
    none = [np.zeros((n, 0), bool) for n in sizes]
    labels = none if unlabelled else [arrays[f"{s}_labels"] for s in splits]
    shapes = [(x.shape[:1], x.shape[1:], x.dtype.kind in "iub") for x in labels]
    if shapes != [((n,), labels[0].shape[1:], True) for n in sizes] or labels[0].ndim > 2:
        raise UserError(f"{file}: the labels must be whole numbers, (N, C), N as of the images")
    labels = np.concatenate(labels).reshape(sum(sizes), -1)
    if labels.shape[1] > 1 and not np.isin(labels, (0, 1)).all():
        raise UserError(f"{file}: several columns of labels must hold 0 and 1 alone")
    classes = np.unique(labels) if labels.shape[1] == 1 else np.arange(labels.shape[1])
    labels = labels == classes if labels.shape[1] == 1 else labels.astype(bool)
    names = [f"{s}/{i}" for s, n in zip(splits, sizes) for i in range(n)]
    given = np.repeat(splits if splits != ["train"] else [""], sizes)
    sources = [image for x in images for image in x]
    return ImageSet(str(file), names, sources, labels, list(map(str, classes)), given)
