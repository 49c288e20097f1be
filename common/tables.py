"""CSV files of images and labels, and of splits, as people and programs write them."""

import csv
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from common.cli import UserError, preview
from common.readers import SPLITS, ImageSet, is_image, list_files

LABEL_NAMES = {"label", "labels", "class", "target"}


def read_csv(file, images=None, image_col=None, label_col=None, label_sep=None, group_col=None):
    """Images and labels of a CSV file (comma, semicolon or tab; UTF-8).

    images: the folder of the images (default: the CSV's); names may lack the ending and may lie in
    folders below. label_col: list of one column of labels, or several 0/1 columns, or ["none"].
    label_sep: what parts several labels in one cell, or "none". What is not told and cannot be
    told from the file raises UserError.
    """
    header, rows, lines = _csv_rows(file)
    where = {column: i for i, column in enumerate(header)}
    for flag, columns in (
        ("--image-col", [image_col]),
        ("--group-col", [group_col]),
        ("--label-col", [c for c in label_col or () if c != "none"]),
    ):
        missing = [c for c in columns if c is not None and c not in where]
        if missing:
            raise UserError(
                f"{file}: has no column {preview(missing)} ({flag}); "
                f"its columns are {', '.join(header)}"
            )
    find = _Finder(Path(images) if images else Path(file).parent)
    if image_col is None:
        image_col = _image_column(file, header, rows, find)
    paths = [find(row[where[image_col]]) for row in rows]
    for problem, kind in (([], "missing"), (None, "ambiguous"), ("", "outside")):
        bad = [
            f"line {line}: {row[where[image_col]] or '(empty)'}"
            for row, line, path in zip(rows, lines, paths)
            if path == problem
        ]
        if bad:
            text = {
                "missing": f"no image in {find.root}",
                "ambiguous": f"several images in {find.root}",
                "outside": f"an image outside {find.root}",
            }[kind]
            raise UserError(
                f"{file}: {len(bad)} of {len(rows)} rows name {text} ({preview(bad)}); "
                f"--images DIR and --image-col say where the images are"
            )
    if label_col == ["none"]:
        columns = []
    elif label_col:
        columns = label_col
    else:
        columns = _label_columns(
            file, [c for c in header if c not in (image_col, group_col)], rows, where
        )
    labels, classes, notes = _labels(file, columns, rows, lines, where, label_sep)
    groups = [row[where[group_col]] for row in rows] if group_col else None
    first = {}  # several rows of one image must agree
    for i, path in enumerate(paths):
        j = first.setdefault(path, i)
        if (labels[i] != labels[j]).any() or groups and groups[i] != groups[j]:
            raise UserError(
                f"{file}: lines {lines[j]} and {lines[i]} contradict each other on "
                f"{path}; keep one of them"
            )
    if len(first) < len(paths):
        notes.append(f"{len(paths) - len(first)} rows repeat an image with the same labels")
    kept = list(first.values())
    if groups:  # an image without a group is a group of its own
        groups = np.array([groups[i] or f"(none) {paths[i]}" for i in kept])
    return ImageSet(
        str(file),
        list(first),
        [str(find.root / p) for p in first],
        labels[kept],
        classes,
        np.full(len(kept), "", "U5"),
        groups,
        notes=notes,
    )


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
        raise UserError(
            f"{file}: needs a first line of column names, each once and none empty"
            + (f" (twice: {preview(twice)})" if twice else "")
        )
    if not rows:
        raise UserError(f"{file}: holds no rows below its column names")
    ragged = [f"line {line}: {len(row)}" for row, line in rows if len(row) != len(header)]
    if ragged:
        raise UserError(
            f"{file}: has {len(header)} columns, but {len(ragged)} rows have another "
            f"number of cells ({preview(ragged)})"
        )
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
        named = [
            c
            for c in header
            if c.lower()
            in {"image", "images", "image_id", "img", "file", "filename", "file_name", "path"}
        ]
    if len(named) != 1:
        raise UserError(
            f"{file}: cannot tell which column names the images "
            f"({', '.join(named or header)}); say so with --image-col"
            + ("" if named else f", and where they are with --images (looked in {find.root})")
        )
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
    raise UserError(
        f"{file}: cannot tell which columns hold the labels ({', '.join(columns)}); say "
        f"so with --label-col NAME (several names for 0/1 columns, none for no labels)"
    )


def _labels(file, columns, rows, lines, where, label_sep):
    """(N, C) bool, the C class names, and what is to be said about them."""
    if not columns:
        return np.zeros((len(rows), 0), bool), [], []
    cells = [[row[where[c]] for c in columns] for row in rows]
    if len(columns) > 1:
        numbers = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
        bad = [
            f"line {line}"
            for row, line in zip(cells, lines)
            if not all(cell in numbers for cell in row)
        ]
        if bad:
            raise UserError(
                f"{file}: the columns {preview(columns)} must hold 0 or 1 ({preview(bad)})"
            )
        labels = np.array([[numbers[cell] for cell in row] for row in cells], bool)
        empty = [c for c, n in zip(columns, labels.sum(0)) if n == 0]
        notes = [f"label column without any image dropped: {preview(empty, 9)}"] if empty else []
        return labels[:, labels.any(0)], [c for c in columns if c not in empty], notes
    values = [cell for (cell,) in cells]
    if label_sep is None:
        seps = [sep for sep in "|;," if any(sep in value for value in values)]
        if len(seps) > 1 or seps == [","]:
            raise UserError(
                f"{file}: cannot tell whether {' or '.join(map(repr, seps))} parts "
                f"several labels in {columns[0]}; say so with --label-sep (or none)"
            )
        label_sep = seps[0] if seps else "none"
    if label_sep == "none":
        lists = [[value] for value in values]
        bad = [f"line {line}" for value, line in zip(values, lines) if not value]
        if bad:
            raise UserError(
                f"{file}: {len(bad)} rows have no label in {columns[0]} ({preview(bad)}); "
                f"fill them in or take the rows out"
            )
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


def read_split(file, names):
    """(N,) "train", "val" or "test" of a CSV file with the columns path and split, such as a run
    writes; "" for images that it does not name. Raises UserError where it names others."""
    header, rows, lines = _csv_rows(file)
    if not {"path", "split"} <= set(header):
        raise UserError(f"{file}: needs the columns path and split (--split)")
    path, split = header.index("path"), header.index("split")
    bad = [
        f"line {line}: {row[split]}"
        for row, line in zip(rows, lines)
        if row[split].lower() not in SPLITS
    ]
    if bad:
        raise UserError(f"{file}: a split is train, val or test, not {preview(bad)}")
    given = {row[path]: SPLITS[row[split].lower()] for row in rows}
    if len(given) < len(rows):
        twice = [p for p, n in Counter(row[path] for row in rows).items() if n > 1]
        raise UserError(f"{file}: names images twice: {preview(twice)}")
    known = set(names)
    missing = [path for path in given if path not in known]
    if missing:
        raise UserError(
            f"{file}: names {len(missing)} images that are not there: {preview(missing)}"
        )
    return np.array([given.get(name, "") for name in names])
