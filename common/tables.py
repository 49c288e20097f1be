"""Single files: CSV of images and labels, or of a split, as people write them; MedMNIST's .npz."""

import csv
import os
from collections import Counter, defaultdict
from itertools import chain, compress
from pathlib import Path

import numpy as np

from common.cli import UserError, preview
from common.readers import EXTENSIONS, SPLITS, ImageSet, list_files

ZERO_OR_ONE = {"0", "1", "0.0", "1.0"}
IMAGE_NAMES = {"image", "images", "image_id", "img", "file", "filename", "file_name", "path"}


class Table:
    def __init__(self, file, own=False):  # own: of a run, which writes names of any bytes
        """A CSV file (comma, semicolon or tab; UTF-8): columns {name: N cells}, and the N lines."""
        self.file, errors = file, "surrogateescape" if own else "strict"
        try:
            if not os.path.isfile(file):
                raise FileNotFoundError("there is no such file")
            with open(file, encoding="utf-8-sig", errors=errors, newline="") as f:
                lines = [f.readline(), *f]
            if any("\0" in line for line in lines):
                raise csv.Error("it holds NUL characters")
            reader = csv.reader(lines, delimiter=max(",;\t", key=lines[0].count), strict=True)
            head = [c.strip() for c in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if any(row)]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{file}: is no CSV file in UTF-8 ({error})") from error
        if not rows or not all(head) or len(set(head)) < len(head):
            raise UserError(f"{file}: needs rows below distinct column names: {preview(head)}")
        self.lines, rows = zip(*rows)
        self.refuse(map(len, rows), [len(r) != len(head) for r in rows], f"need {len(head)} cells")
        rows = rows if own else [map(str.strip, row) for row in rows]
        self.columns = dict(zip(head, zip(*rows)))

    def column(self, name, flag):  # the N cells below a name that the flag gave
        if name not in self.columns:
            raise UserError(f"{self.file}: no column {name} ({flag}), only {preview(self.columns)}")
        return self.columns[name]

    def refuse(self, cells, bad, what):
        """Raise UserError, with `what` as its predicate, if any of N cells is bad (N bools)."""
        if any(bad):
            odd = [f"line {n}: {x or 'empty'}" for n, x in compress(zip(self.lines, cells), bad)]
            raise UserError(f"{self.file}: {len(odd)} of {len(bad)} rows {what}: {preview(odd)}")


def read_csv(file, images=None, image_col=None, label_col=None, label_sep=None, group_col=None):
    """images: their folder (None: the CSV's); label_col: [one], [several of 0/1] or ["none"]."""
    table, root = Table(file), Path(images) if images else Path(file).parent
    image_col, paths = _image_paths(table, root, image_col)
    labels, classes, notes = _labels(table, label_col, label_sep, {image_col, group_col})
    cells = paths if group_col is None else table.column(group_col, "--group-col")
    groups = np.array([cell or f"(none) {path}" for cell, path in zip(cells, paths)])
    first = {}  # path -> its first row
    origin = np.array([first.setdefault(path, i) for i, path in enumerate(paths)])
    differ = (labels != labels[origin]).any(1) | (groups != groups[origin])
    table.refuse(paths, differ, "contradict an earlier one of the same image; keep one")
    if n := len(paths) - len(first):
        notes.append(f"{n} rows repeat an image with the same labels")
    sources, given = [str(root / path) for path in paths], np.full(len(paths), "", "U5")
    groups = None if group_col is None else groups
    data = ImageSet(str(file), paths, sources, labels, classes, given, groups, notes=notes)
    data.keep(origin == np.arange(len(paths)))
    return data


def _image_paths(table, root, column):
    """The column that names images (None: found out), its N paths below root. Raises UserError."""
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder (--images)")
    base, index = os.path.abspath(root), defaultdict(list)

    def find(name):  # the paths that a name fits, which may lack ending or folders
        name = Path(os.path.relpath(os.path.join(base, name.replace("\\", "/")), base)).as_posix()
        if not name.startswith("../") and os.path.isfile(os.path.join(base, name)):
            return [name]
        if not index:
            index["."] = []  # an empty name fits none; and the files are listed once
            for path in (f for f in list_files(root) if f.lower().endswith(EXTENSIONS)):
                bare = os.path.splitext(path)[0]
                for key in {path, bare, os.path.basename(path), os.path.basename(bare)}:
                    index[key].append(path)
        return index.get(name, [])

    if column is None:
        hits = {c: np.mean([len(find(x)) == 1 for x in v[:20]]) for c, v in table.columns.items()}
        fits = [c for c in hits if hits[c] > 0.5] or [c for c in hits if c.lower() in IMAGE_NAMES]
        if len(fits) != 1:
            raise UserError(f"{table.file}: give --image-col ({preview(fits or hits)}) or --images")
        (column,) = fits
    names = table.column(column, "--image-col")
    found = list(map(find, names))
    texts = [f"{name}, {len(paths)} images" for name, paths in zip(names, found)]
    what = f"name no image in {root}, or several (--images, --image-col)"
    table.refuse(texts, [len(paths) != 1 for paths in found], what)
    return column, [path for (path,) in found]


def _labels(table, columns, label_sep, others):
    """Labels (N, C) bool, C class names, notes; columns None: found out. Raises UserError."""
    if columns is None:
        columns = [c for c in table.columns if c not in others]
        named = [c for c in columns if c.lower() in ("label", "labels", "class", "target")]
        if len(named) == 1:
            columns = named
        elif columns[1:] and not all(ZERO_OR_ONE.issuperset(table.columns[c]) for c in columns):
            raise UserError(f"{table.file}: give --label-col (of {preview(columns, 9)}), or none")
    cells = [table.column(c, "--label-col") for c in columns if columns != ["none"]]
    if len(cells) != 1:
        for c, cell in zip(columns, cells):
            table.refuse(cell, [x not in ZERO_OR_ONE for x in cell], f"are not 0 or 1 in {c}")
        labels = np.array(cells, float).reshape(len(cells), len(table.lines)).T > 0
        used = labels.any(0)
        empty = preview(compress(columns, ~used), 9)
        notes = [f"label column without any image dropped: {empty}"] if empty else []
        return labels[:, used], list(compress(columns, used)), notes
    (cells,) = cells
    if not label_sep:
        seps = [sep for sep in "|;," if any(sep in cell for cell in cells)]
        if len(seps) > 1 or seps == [","] or label_sep == "":
            raise UserError(f"{table.file}: give --label-sep, one of {seps or '|;,'}, or none")
        label_sep = "".join(seps) or "none"
    table.refuse(cells, [label_sep == "none" and not cell for cell in cells], "have no label")
    label_sep = "\0" if label_sep == "none" else label_sep  # which no cell holds
    parts = [{v.strip() for v in cell.split(label_sep)} - {""} for cell in cells]
    classes = sorted(set().union(*parts))
    if all(c.removeprefix("-").isdecimal() for c in classes):
        classes.sort(key=int)
    return np.array([[c in part for c in classes] for part in parts], bool), classes, []


def read_split(file, names):
    """(N,) sides by a CSV file of path and split, as a run writes; "" without. Raises UserError."""
    table, known = Table(file, own=True), set(names)
    paths = [p if p in known else p.strip() for p in table.column("path", "--split")]
    cells = [cell.strip().lower() for cell in table.column("split", "--split")]
    count = Counter(paths)
    table.refuse(cells, [c not in SPLITS for c in cells], "name neither train, val nor test")
    table.refuse(paths, [p not in known for p in paths], "name no image of the data")
    table.refuse(paths, [count[p] > 1 for p in paths], "name an image twice; keep one of each")
    given = {path: SPLITS[cell] for path, cell in zip(paths, cells)}
    return np.array([given.get(name, "") for name in names])


def read_npz(file, unlabelled=False):
    """A MedMNIST file: {train,val,test}_images (N, H, W[, 3]) uint8, and ..._labels (N, C) int."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            splits = [s for s in ("train", "val", "test") if f"{s}_images" in arrays]
            images = [arrays[f"{s}_images"] for s in splits]
            labels = [np.zeros((len(x), 0), bool) for x in images]
            labels = labels if unlabelled else [arrays[f"{s}_labels"] for s in splits]
            sizes, width = list(map(len, images)), labels[0].shape[1:]
    except Exception:  # zip files and arrays break in many ways
        raise UserError(f"{file}: needs plain arrays: {{train,val,test}}_images, _labels") from None
    for x, y in zip(images, labels):
        fits = x.dtype == np.uint8 and x.ndim > 2 and x.shape[3:] in ((), (3,)) and x.size
        if not fits or y.dtype.kind not in "iub" or y.shape != (len(x), *width) or len(width) > 1:
            raise UserError(f"{file}: needs images (N, H, W[, 3]) uint8, labels (N, C) int, one N")
    labels = np.concatenate(labels).reshape(sum(sizes), -1)
    if labels.shape[1] > 1 and not np.isin(labels, (0, 1)).all():
        raise UserError(f"{file}: several columns of labels must hold 0 and 1 alone")
    classes = np.unique(labels) if labels.shape[1] == 1 else np.arange(labels.shape[1])
    labels = labels == classes if labels.shape[1] == 1 else labels.astype(bool)
    names = [f"{s}/{i}" for s, n in zip(splits, sizes) for i in range(n)]
    given = np.repeat(splits if splits != ["train"] else [""], sizes)
    return ImageSet(str(file), names, [*chain(*images)], labels, [*map(str, classes)], given)
