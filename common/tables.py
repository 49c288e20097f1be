"""CSV files of images and labels, and of splits, as people and programs write them."""

import csv
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from common.cli import UserError, preview
from common.readers import EXTENSIONS, SPLITS, ImageSet, list_files

LABEL_NAMES = {"label", "labels", "class", "target"}
ZERO_OR_ONE = {"0", "1", "0.0", "1.0"}
IMAGE_NAMES = {"image", "images", "image_id", "img", "file", "filename", "file_name", "path"}


class Table:
    """A CSV file (comma, semicolon or tab; UTF-8): columns {name: N cells}, and the N lines."""

    def __init__(self, file):
        self.file = file
        try:
            with open(file, encoding="utf-8-sig", newline="") as f:
                head = f.readline()
                f.seek(0)
                reader = csv.reader(f, delimiter=max(",;\t", key=head.count), strict=True)
                header = [c.strip() for c in next(reader, [])]
                rows = [(reader.line_num, [c.strip() for c in row]) for row in reader if any(row)]
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{file}: is no CSV file in UTF-8 ({error})") from error
        if not rows or not all(header):
            raise UserError(f"{file}: needs a first line of column names, and rows below it")
        twice = [c for c, n in Counter(header).items() if n > 1]
        if twice:
            raise UserError(f"{file}: has columns twice: {preview(twice)}; rename one")
        self.lines, rows = zip(*rows)
        bad = {i: len(row) for i, row in enumerate(rows) if len(row) != len(header)}
        self.refuse(bad, f"have more or fewer than {len(header)} cells")
        self.columns = dict(zip(header, zip(*rows)))

    def column(self, name, flag):
        """The N cells below a column name that a flag gave. Raises UserError if there is none."""
        if name not in self.columns:
            there = f"its columns are {preview(self.columns, 99)}"
            raise UserError(f"{self.file}: has no column {name} ({flag}); {there}")
        return self.columns[name]

    def refuse(self, bad, what, fix="correct them"):
        """Raise UserError if there are bad rows, {row: cell}. what: the message's predicate."""
        if bad:
            cells = preview(f"line {self.lines[i]}: {cell or 'empty'}" for i, cell in bad.items())
            rows = f"{len(bad)} of {len(self.lines)} rows"
            raise UserError(f"{self.file}: {rows} {what} ({cells}); {fix}")


def read_csv(file, images=None, image_col=None, label_col=None, label_sep=None, group_col=None):
    """Images and labels of a CSV file.

    images: the folder of the images (default: the CSV's); names may lack the ending or the folders.
    label_col: list of one column of labels, or several 0/1 columns, or ["none"]. label_sep: what
    parts several labels in one cell, or "none". What cannot be told raises UserError.
    """
    table, root = Table(file), Path(images) if images else Path(file).parent
    find = Finder(root)
    image_col = _image_column(table, find) if image_col is None else image_col
    names = table.column(image_col, "--image-col")
    found = [find(name) for name in names]
    bad = {i: f"{names[i]}, {len(p)} images" for i, p in enumerate(found) if len(p) != 1}
    table.refuse(bad, f"name no image in {root}, or several", "correct --images or --image-col")
    columns = [] if label_col == ["none"] else label_col
    if columns is None:
        columns = _label_columns(table, {image_col, group_col})
    labels, classes, notes = _labels(table, columns, label_sep)
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
    sample = {c: [len(find(x)) == 1 for x in cells[:20]] for c, cells in table.columns.items()}
    hits = {c: np.mean(found) for c, found in sample.items()}
    named = [c for c in hits if hits[c] > 0.5] or [c for c in hits if c.lower() in IMAGE_NAMES]
    if len(named) != 1:
        what = f"cannot tell which column names images in {find.root}: {', '.join(named or hits)}"
        raise UserError(f"{table.file}: {what}; say so with --image-col, or correct --images")
    return named[0]


def _label_columns(table, others):
    """The column of labels, or the 0/1 columns. Raises UserError where that cannot be told."""
    columns = [c for c in table.columns if c not in others]
    named = [c for c in columns if c.lower() in LABEL_NAMES]
    if len(columns) > 1 and len(named) == 1:
        return named
    if len(columns) < 2 or all(ZERO_OR_ONE.issuperset(table.columns[c]) for c in columns):
        return columns
    what = f"cannot tell which columns hold the labels ({', '.join(columns)})"
    raise UserError(f"{table.file}: {what}; say so with --label-col (none: without labels)")


def _labels(table, columns, label_sep):
    """N sets of labels, the names of their classes, and what is to be said about them."""
    if len(columns) == 1:
        labels = _split_cells(table, columns[0], label_sep)
        classes = sorted(set().union(*labels))
        if all(c.removeprefix("-").isdecimal() for c in classes):
            classes.sort(key=int)
        return labels, classes, []
    cells = [table.column(c, "--label-col") for c in columns]
    rows = list(zip(*cells)) or [()] * len(table.lines)
    bad = {i: ", ".join(row) for i, row in enumerate(rows) if not ZERO_OR_ONE.issuperset(row)}
    table.refuse(bad, f"hold more than 0 or 1 in {preview(columns)}")
    labels = [{c for c, cell in zip(columns, row) if float(cell)} for row in rows]
    used = set().union(*labels)
    empty = [c for c in columns if c not in used]
    notes = [f"label column without any image dropped: {preview(empty, 9)}"] if empty else []
    return labels, [c for c in columns if c in used], notes


def _split_cells(table, column, label_sep):
    """N sets of labels. Raises UserError where it cannot be told what parts them."""
    cells = table.column(column, "--label-col")
    if label_sep is None:
        seps = [sep for sep in "|;," if any(sep in cell for cell in cells)]
        if len(seps) > 1 or seps == [","]:
            which = f"{' or '.join(map(repr, seps))} parts several labels in {column}"
            raise UserError(f"{table.file}: unclear whether {which}; give --label-sep (or none)")
        label_sep = seps[0] if seps else "none"
    if label_sep == "none":
        bad = {i: cell for i, cell in enumerate(cells) if not cell}
        table.refuse(bad, f"have no label in {column}", "fill them in or take the rows out")
        return [{cell} for cell in cells]
    return [{v.strip() for v in cell.split(label_sep)} - {""} for cell in cells]


def read_split(file, names):
    """(N,) "train", "val" or "test" of a CSV file with the columns path and split, such as a run
    writes; "" for images that it does not name. Raises UserError where it names others."""
    table = Table(file)
    paths, cells = table.column("path", "--split"), table.column("split", "--split")
    bad = {i: cell for i, cell in enumerate(cells) if cell.lower() not in SPLITS}
    table.refuse(bad, "do not name a split (train, val or test)")
    twice = [path for path, n in Counter(paths).items() if n > 1]
    if twice:
        raise UserError(f"{file}: names images twice: {preview(twice)}; keep one row of each")
    given = {path: SPLITS[cell.lower()] for path, cell in zip(paths, cells)}
    missing = sorted(given.keys() - set(names))
    if missing:
        what = f"names {len(missing)} images that are not there: {preview(missing)}"
        raise UserError(f"{file}: {what}; take them out")
    return np.array([given.get(name, "") for name in names])
