"""Single files: CSV of images and labels, or of a split, as people write them; MedMNIST's .npz."""

import csv
import os
import re
import unicodedata
from collections import Counter, defaultdict
from io import StringIO
from itertools import accumulate, chain, compress
from pathlib import Path

import numpy as np

from common import dicom
from common.cli import UserError, preview, refusing
from common.folders import EXTENSIONS, SPLITS, list_images
from common.readers import ImageSet

IMAGE_NAMES = {"image", "images", "image_id", "img", "file", "filename", "file_name", "path"}
_what = "(patient|subject|person|case|study|lesion)s?[ _-]?(id|nr|no|num|number|name|index|.*uid)?"
GROUPS = re.compile(rf"(.*[ _-])?{_what}|pid", re.I)  # names of columns
ENDINGS = EXTENSIONS + dicom.ENDINGS
OF_ROWS = (".csv", ".tsv", ".tab", ".txt", "")  # endings of tables
NUMBER = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", re.I)
MISSING = {"", "nan", "na", "n/a", "#n/a", "<na>", "null"}  # cells that say nothing
FINDINGS = {"true": 1, "false": 0, **dict.fromkeys(MISSING)}  # and numbers
UNCERTAIN = "--uncertain negative or positive (what -1 means), or skip (no label); blank: negative"


class Table:
    def __init__(self, file, own=False):  # own: of a run, which writes names of any bytes
        """A CSV file (comma, semicolon or tab): columns {name: (N,) of str}, and the N lines."""
        self.file, self.own, self.notes = file, own, []
        with refusing(f"{file}: is no CSV file in UTF-8:", (OSError, ValueError, csv.Error)):
            lines = [*StringIO(self._text(Path(file).read_bytes()), newline=""), ""]  # at least one
            if any("\0" in line for line in lines):
                raise csv.Error("it holds NUL characters")
            told = re.fullmatch('"?sep=(.)"?\\s*', lines[0])  # Excel's
            sep = told[1] if told else max(",;\t", key=lines[0].count)
            lines[0] = "" if told else lines[0]  # an empty line is no row
            reader = csv.reader(lines, delimiter=sep, strict=True)
            head = [c.strip() for c in next(filter(any, reader), [])]
            n, least = len(head), max((i for i, c in enumerate(head, 1) if c), default=0)
            self.lines, widths, cells = [], [], []  # flat: lists cost the collector time
            for row in filter(any, reader):
                self.lines.append(reader.line_num)
                widths.append(n if len(row) >= least and not any(row[n:]) else len(row))
                cells += (row + [""] * n)[:n]  # commas may be missing behind the last name
        if not cells or len(set(filter(None, head))) < sum(map(bool, head)):
            raise UserError(f"{file}: needs rows below distinct column names: {preview(head)}")
        self.refuse(widths, [width != n for width in widths], f"need {n} cells")
        cells = cells if own else list(map(str.strip, cells))
        self.columns = {c: np.array(cells[i::n], object) for i, c in enumerate(head) if c}

    def _text(self, content):
        """The bytes of a file as text: UTF-8, UTF-16 with its mark or, said, Windows-1252."""
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        try:
            return content.decode(encoding, "surrogateescape" if self.own else "strict")
        except UnicodeDecodeError:
            self.notes.append(f"{self.file}: is not UTF-8, and read as Windows-1252")
            return content.decode("cp1252")

    def column(self, name, flag):  # the N cells below a name that the flag gave
        if name not in self.columns:
            raise UserError(f"{self.file}: no column {name} ({flag}), only {preview(self.columns)}")
        return self.columns[name].tolist()

    def refuse(self, cells, bad, what):
        """Raise UserError, with `what` as its predicate, if any of N cells is bad (N bools)."""
        if any(bad):
            odd = [f"line {n}: {x or 'empty'}" for n, x in compress(zip(self.lines, cells), bad)]
            raise UserError(f"{self.file}: {len(odd)} of {len(bad)} rows {what}: {preview(odd)}")

    def sides(self, column):
        """(N,) of the splits that a column names. Raises UserError."""
        cells = [cell.strip().lower() for cell in self.column(column, "--split")]
        self.refuse(cells, [c not in SPLITS for c in cells], "name neither train, val nor test")
        return np.array([SPLITS[cell] for cell in cells], "U5")


def read_csv(file, root=None, whole=False, split=None, image_col=None, group_col=None, **more):
    """The images that a CSV file names, below root (None: its folder); whole: and all others there,
    without a label. The rest as the data flags; more: skip_bad, and of _labels. UserError."""
    table, index = Table(file), Index(Path(root or Path(file).parent))
    image_col, paths = _image_paths(table, index, image_col, more.pop("skip_bad", False))
    told = {image_col, group_col, split, *(more.get("label_col") or ())}
    others = {c: x for c, x in table.columns.items() if c not in told}
    asked = [c for c, x in others.items() if SPLITS.keys() >= set(map(str.lower, x))]
    if split is None and asked:
        fix = f"give --split {asked[0]!r} to keep them, or --split none to draw others"
        raise UserError(f"{file}: the column {asked[0]} names splits; {fix}")
    sides = table.sides(split) if split in table.columns else np.full(len(paths), "", "U5")
    hints = {c: x for c, x in others.items() if GROUPS.fullmatch(c) and 1 < len({*x}) < len(x)}
    others = [c for c in others if c not in hints]
    columns, labels, labelled, classes = _labels(table, others, **more)
    if unused := [c for c in others if c not in columns]:
        table.notes.append(f"columns that are not used: {preview(unused, 9)}")
    cells = table.columns.get(group_col, [""] * len(paths))
    groups = np.array([p if x.lower() in MISSING else x for p, x in zip(paths, cells)])
    first = {}  # path -> its first row
    origin = np.array([first.setdefault(path, i) for i, path in enumerate(paths)])
    if more.get("multilabel") is True and len(columns) == 1:  # a row per finding
        np.logical_or.at(labels, origin, labels.copy())
        labels = labels[origin]
    differ = np.any([x != x[origin] for x in (*labels.T, labelled, groups, sides)], 0)
    fix = "keep one" + ", or give --multilabel" * (len(columns) == 1)
    table.refuse(paths, differ, f"contradict an earlier one of the same image; {fix}")
    kept, rows = np.unique(origin, return_inverse=True)
    if n := len(paths) - len(kept):
        table.notes.append(f"{n} rows repeat an image")
    rest = [path for path in index.list() if path not in first] if whole else []
    names, n = [*first, *rest], len(rest)
    data = ImageSet(str(file), names, [os.path.join(index.root, name) for name in names])
    data.labels, data.classes = np.pad(labels[kept], ((0, n), (0, 0))), classes
    data.labelled = np.pad(labelled[kept], (0, n))
    data.given, data.rows = np.append(sides[kept], [""] * n), rows
    if group_col in table.columns:
        data.groups, hints = np.append(groups[kept], rest), {}
    data.hints = {c: np.append(x[kept], rest) for c, x in hints.items()}
    data.notes, data.columns = table.notes + index.notes * whole, tuple(table.columns)
    nothing = [re.fullmatch("no[ _]finding", c, re.I) is not None for c in classes]
    if n := (labels[:, nothing].any(1) & (labels.sum(1) > 1)).sum():
        data.notes.append(f"{n} images have No Finding, counted as a class, and another label")
    return data


class Index:
    """The images below a folder, by what a file may call them."""

    def __init__(self, root):
        if not root.is_dir():
            raise UserError(f"{root}: there is no such folder (--images)")
        self.root, self.base, self.paths, self.notes = root, os.path.abspath(root), None, []

    def list(self):  # once, where it is needed
        if self.paths is None:
            self.paths, self.notes = list_images(self.root)
            self.alike = _by_ends(self.paths)
        return self.paths

    def find(self, name):
        """The paths that a name fits, in other case or Unicode form, with another ending of images
        or none, and with folders missing in front."""
        path = os.path.relpath(os.path.join(self.base, name), self.base).replace(os.sep, "/")
        if not path.startswith("../") and os.path.isfile(os.path.join(self.base, path)):
            return [path]
        self.list()
        hits, bare = self.alike.get(_alike(path), []), os.path.splitext(path)[0]
        return [x for x in hits if os.path.splitext(x)[0].endswith(bare)] or hits

    def find_all(self, names):
        """For each name its paths, without folders in front of all names that are not here."""
        parts = [name.replace("\\", "/").split("/") for name in names]
        lead = os.path.commonprefix([p[:-1] for p in parts])
        for n, folder in enumerate([*lead, "test"]):
            if any(hits := [self.find("/".join(p[n:])) for p in parts]) or folder.lower() in SPLITS:
                return hits


def _by_ends(paths):  # {what the end of a path is like: the paths}
    found = defaultdict(list)
    for path in paths:
        for end in accumulate(_alike(path).split("/")[::-1], "{1}/{0}".format):
            found[end].append(path)
    return found


def _alike(path):
    bare, ending = os.path.splitext(path)
    path = bare if ending.lower() in ENDINGS else path
    return unicodedata.normalize("NFC", path).casefold().strip()


def _image_paths(table, index, column, skip_bad):
    """The column that names images (None: found out), and N paths below the root. UserError."""
    if column is None:
        found = {c: index.find_all(x[:20]) for c, x in table.columns.items()}
        one = [c for c, x in found.items() if np.mean([len(paths) == 1 for paths in x]) > 0.5]
        some = [c for c, x in found.items() if np.mean([bool(paths) for paths in x]) > 0.5]
        likely = one or some or [c for c in found if c.lower() in IMAGE_NAMES]
        if len(likely) != 1:
            what = f"{'more than one' if likely else 'no'} column names images in {index.root}"
            fix = "their folder: --images DIR, or the column: --image-col"
            raise UserError(f"{table.file}: {what}; give {fix} (line 1: {preview(found)})")
        (column,) = likely
    if column.lower() not in IMAGE_NAMES and len(index.find(column.replace("\\", "/"))) == 1:
        raise UserError(f"{table.file}: line 1 names an image, {column}: put column names above it")
    names = table.column(column, "--image-col")
    found = index.find_all(names)
    lost = np.array([not paths for paths in found])
    if skip_bad and 0 < lost.sum() < len(lost):
        table.notes.append(f"left out, no such image: {preview(compress(names, lost))}")
        table.lines = list(compress(table.lines, ~lost))
        table.columns = {c: cells[~lost] for c, cells in table.columns.items()}
        names, found = (list(compress(x, ~lost)) for x in (names, found))
    texts = [f"{name}, {len(paths)} images" for name, paths in zip(names, found)]
    what = f"name no image in {index.root}, or several (--images, --image-col, --skip-bad)"
    table.refuse(texts, [len(paths) != 1 for paths in found], what)
    pairs = [(re.split(r"[/\\]", name)[-1], path) for name, (path,) in zip(names, found)]
    if odd := [(x, p) for x, p in pairs if x.lower().endswith(ENDINGS) and not p.endswith(x)]:
        table.notes.append(f"names that differ from their file: {preview(map(' = '.join, odd))}")
    return column, [path for _, path in pairs]


def _labels(table, others, label_col=None, multilabel=False, uncertain=None):
    """The columns (label_col None: found out, of others), labels (N, C) bool, (N,) bool of the rows
    that have some, C class names. Raises UserError."""
    named = [c for c in others if c.lower() in ("label", "labels", "class", "target")]
    columns = named if len(named) == 1 else others
    columns = columns if label_col is None else [c.strip() for c in label_col if c != "none"]
    cells = {c: table.column(c, "--label-col") for c in columns}
    found = set(map(_finding, set(chain(*cells.values()))))
    if label_col is None and columns[1:] and not found <= {0, 1, -1, None}:
        raise UserError(f"{table.file}: give --label-col (of {preview(columns, 9)}), or none")
    if len(columns) != 1 or {0, 1, -1, None} >= found >= {1, -1}:
        return columns, *_findings(table, cells, uncertain)
    return columns, *_classes(table, *columns, label_col is not None, multilabel, uncertain)


def _finding(cell):  # 0, 1, -1, None for nothing said, or another text
    return float(cell) if NUMBER.fullmatch(cell) else FINDINGS.get(cell.lower(), cell)


def _findings(table, cells, uncertain):
    """Labels, labelled and classes of {column: N cells}: 0, 1, -1 (uncertain) or blank (unmentioned
    and negative); a row of blanks alone has no label. Raises UserError."""
    values = np.full((len(table.lines), len(cells)), np.nan)
    for column, (name, texts) in zip(values.T, cells.items()):
        meaning = {text: _finding(text) for text in {*texts}}
        found = [meaning[text] for text in texts]
        odd = [x not in (0, 1, -1, None) for x in found]
        table.refuse(texts, odd, f"are not 0, 1 or -1 in {name}")
        column[:] = found
    unsure, blank = values == -1, np.isnan(values)
    labelled = ~blank.all(1)
    if n := unsure.sum() + blank[labelled].sum():
        what = f"{unsure.sum()} labels are -1, {n - unsure.sum()} blank"
        if uncertain is None:
            raise UserError(f"{table.file}: {what}; give {UNCERTAIN}")
        table.notes.append(f"{what}: --uncertain {uncertain}; blank is negative")
    labelled &= ~unsure.any(1) | (uncertain != "skip")
    labels = ((values == 1) | unsure & (uncertain == "positive")) & labelled[:, None]
    used, columns = labels.any(0), list(cells)
    if empty := list(compress(columns, ~used)):
        table.notes.append(f"label column without any image dropped: {preview(empty, 9)}")
    return labels[:, used], labelled, list(compress(columns, used))


def _classes(table, column, told, multilabel, uncertain):
    """Labels, labelled, classes of a column (told: by the user) of one or several. UserError."""
    cells, sep = table.columns[column], multilabel if isinstance(multilabel, str) else ""
    if all(cell[:1] + cell[-1:] in ("[]", "") for cell in cells):  # lists, as Python prints them
        cells, sep = [re.sub(r"[]['\"]", "", cell) for cell in cells], sep or ","
    if not sep:
        seps = [sep for sep in "|;," if any(sep in cell for cell in cells)]
        if len(seps) > 1 or seps == [","]:
            raise UserError(f"{table.file}: give --label-sep, one of {seps}, or none")
        sep = "".join(seps) or "none"
    blank = np.array([cell.lower() in MISSING for cell in cells])
    if blank.any() and sep != "none" and uncertain is None:
        fix = "--uncertain negative, if no label applies there, or skip, if they have no label"
        raise UserError(f"{table.file}: {blank.sum()} label cells are blank; give {fix}")
    labelled = ~blank | (sep != "none" and uncertain != "skip")
    cells = ["" if none else cell for cell, none in zip(cells, blank)]
    parts = [{x.strip() for x in (c.split(sep) if sep != "none" else [c])} - {""} for c in cells]
    # texts that are alike -> as most have it
    spelled = {_as_class(x): x for x, _ in Counter(chain(*parts)).most_common()[::-1]}
    if same := sorted(set().union(*parts) - {*spelled.values()}):
        same = [f"{text} = {spelled[_as_class(text)]}" for text in same]
        table.notes.append(f"counted as one class: {preview(same)}")
    numbers = all(map(NUMBER.fullmatch, spelled.values()))
    classes = sorted(spelled.values(), key=float if numbers else None)
    many, n = 0 if told else len(classes), labelled.sum()
    if many > max(n / 2, 9) or numbers and (many > 20 or any(float(c) % 1 for c in classes)):
        what = f"{len(classes)} different texts in {n} rows, such as {preview(classes[-3:])}"
        raise UserError(f"{table.file}: {column} has {what}; no classes? --label-col, or none")
    parts = [{spelled[_as_class(text)] for text in part} for part in parts]
    return np.array([[c in part for c in classes] for part in parts], bool), labelled, classes


def _as_class(text):  # what is alike: numbers of one value, texts that differ in case
    number = NUMBER.fullmatch(text)
    return str(float(text)) if number else unicodedata.normalize("NFC", text).casefold()


def read_split(file, names):
    """(N,) sides by a CSV file of path and split, as a run writes; "" without. Raises UserError."""
    table, known = Table(file, own=True), set(names)
    paths = table.column("path", "--split")
    alike = {} if known.issuperset(paths) else _by_ends(names)
    found = {p: alike.get(_alike(p.strip()), ()) for p in {*paths} - known}
    paths = [found[p][0] if len(found.get(p, ())) == 1 else p for p in paths]
    sides, count = table.sides("split"), Counter(paths)
    table.refuse(paths, [p not in known for p in paths], "name no image of the data")
    table.refuse(paths, [count[p] > 1 for p in paths], "name an image twice; keep one of each")
    given = dict(zip(paths, sides))
    return np.array([given.get(name, "") for name in names])


def read_npz(file, unlabelled=False):
    """A MedMNIST file: {train,val,test}_images (N, H, W[, 3]) uint8, and ..._labels (N, C) int."""
    with refusing(f"{file}: needs plain arrays: {{train,val,test}}_images, _labels"):
        with np.load(file, allow_pickle=False) as arrays:
            splits = [s for s in ("train", "val", "test") if f"{s}_images" in arrays]
            images = [arrays[f"{s}_images"] for s in splits]
            labels = [np.zeros((len(x), 0), bool) for x in images]
            labels = labels if unlabelled else [arrays[f"{s}_labels"] for s in splits]
            sizes, width = list(map(len, images)), labels[0].shape[1:]
    for x, y in zip(images, labels):
        fits = x.dtype == np.uint8 and x.ndim > 2 and x.shape[3:] in ((), (3,)) and x.size
        if x.ndim > 3 and x.shape[3:] != (3,):
            raise UserError(f"{file}: images of shape {x.shape}: volumes cannot be read")
        if not fits or y.dtype.kind not in "iub" or y.shape != (len(x), *width) or len(width) > 1:
            raise UserError(f"{file}: needs images (N, H, W[, 3]) uint8, labels (N, C) int, one N")
    labels = np.concatenate(labels).reshape(sum(sizes), -1)
    if labels.shape[1] > 1 and not np.isin(labels, (0, 1)).all():
        raise UserError(f"{file}: several columns of labels must hold 0 and 1 alone")
    classes = np.unique(labels) if labels.shape[1] == 1 else np.arange(labels.shape[1])
    labels = labels == (classes if labels.shape[1] == 1 else 1)
    names = [f"{s}/{i}" for s, n in zip(splits, sizes) for i in range(n)]
    given = np.repeat(splits if splits != ["train"] else [""], sizes)
    return ImageSet(str(file), names, [*chain(*images)], labels, [*map(str, classes)], given)
