"""Single files: CSV of images and labels, or of a split, as people write them; MedMNIST's .npz."""

import csv
import os
import re
import unicodedata
from collections import Counter, defaultdict
from io import StringIO
from itertools import chain, compress
from pathlib import Path

import numpy as np

from common.cli import UserError, preview
from common.folders import EXTENSIONS, SPLITS, list_images
from common.readers import ImageSet

IMAGE_NAMES = {"image", "images", "image_id", "img", "file", "filename", "file_name", "path"}
LABEL_NAMES = {"label", "labels", "class", "target"}
_what = "(patient|subject|person|case|study|lesion)s?[ _-]?(id|nr|no|num|number|name|index|.*uid)?"
GROUPS = re.compile(rf"(.*[ _-])?{_what}|pid", re.I)  # names of columns
ENDINGS = (*EXTENSIONS, ".dcm", ".dicom")
MISSING = {"", "nan", "na", "n/a", "#n/a", "<na>", "null"}  # cells that say nothing
NUMBERS = {"true": 1.0, "false": 0.0, **dict.fromkeys(MISSING, np.nan)}


def is_table(path):
    """Whether this is a file of rows, by its ending."""
    return Path(path).suffix.lower() in (".csv", ".tsv", ".txt") and os.path.isfile(path)


class Table:
    def __init__(self, file, own=False):  # own: of a run, which writes names of any bytes
        """A CSV file (comma, semicolon or tab; UTF-8): columns {name: N cells}, and the N lines."""
        self.file, self.notes = file, []
        try:
            if not os.path.isfile(file):
                raise FileNotFoundError("there is no such file")
            lines = list(StringIO(self._text(Path(file).read_bytes(), own), newline=""))
            if any("\0" in line for line in lines):
                raise csv.Error("it holds NUL characters")
            told = re.fullmatch('"?sep=(.)"?\\s*', lines[0]) if lines else None  # as Excel has it
            first, start = lines[bool(told) :][:1], bool(told)
            delimiter = told[1] if told else max(",;\t", key="".join(first).count)
            reader = csv.reader(lines[start:], delimiter=delimiter, strict=True)
            head = [c.strip() for c in next(reader, [])]
            rows = [(reader.line_num + start, row) for row in reader if any(row)]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{file}: is no CSV file in UTF-8 ({error})") from error
        if names := [c for c in head if c.lower().endswith(EXTENSIONS)]:
            raise UserError(f"{file}: line 1 names an image, {names[0]}: put column names above it")
        named = [c for c in head if c]
        if not rows or not named or len(set(named)) < len(named):
            raise UserError(f"{file}: needs rows below distinct column names: {preview(head)}")
        least = 1 + max(i for i, c in enumerate(head) if c)  # commas may be missing behind it
        self.lines, rows = zip(*rows)
        odd = [len(r) < least or any(r[len(head) :]) for r in rows]
        self.refuse(map(len, rows), odd, f"need {len(head)} cells")
        rows = [(row + [""] * len(head))[: len(head)] for row in rows]
        self.columns = {c: cells for c, cells in zip(head, zip(*rows)) if c}
        self.own = own

    def _text(self, content, own):
        """The bytes of a file as text: UTF-8, UTF-16 with its mark or, said, Windows-1252."""
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return content.decode("utf-16")
        try:
            return content.decode("utf-8-sig", "surrogateescape" if own else "strict")
        except UnicodeDecodeError:
            self.notes.append(f"{self.file}: is not UTF-8, and read as Windows-1252")
            return content.decode("cp1252")

    def column(self, name, flag):  # the N cells below a name that the flag gave
        if name not in self.columns:
            raise UserError(
                f"{self.file}: no column {name} ({flag}), only {preview(self.columns, 9)}"
            )
        return list(self.columns[name] if self.own else map(str.strip, self.columns[name]))

    def refuse(self, cells, bad, what):
        """Raise UserError, with `what` as its predicate, if any of N cells is bad (N bools)."""
        if any(bad):
            odd = [f"line {n}: {x or 'empty'}" for n, x in compress(zip(self.lines, cells), bad)]
            raise UserError(f"{self.file}: {len(odd)} of {len(bad)} rows {what}: {preview(odd)}")

    def keep(self, mask):
        """Leave out the rows where the N bools are False."""
        self.lines = tuple(compress(self.lines, mask))
        self.columns = {name: tuple(compress(x, mask)) for name, x in self.columns.items()}


def read_csv(file, root, whole, split=None, image_col=None, group_col=None, skip_bad=False, **kw):
    """The images that a CSV file names; root: their folder (None: the file's); whole: and all the
    others below it, without a label. The rest as the data flags; kw: of _labels. UserError."""
    table = Table(file)
    index = Index(Path(root or Path(file).parent))
    image_col, paths = _image_paths(table, index, image_col, skip_bad)
    sides = _splits(table, image_col, split)
    told = {image_col, group_col, split, *(kw["label_col"] or ())}
    hints = {c: np.array(x) for c, x in table.columns.items() if GROUPS.fullmatch(c)}
    hints = {c: x for c, x in hints.items() if c not in told and 1 < len({*x}) < len(paths)}
    columns, labels, labelled, classes = _labels(table, told | hints.keys(), **kw)
    if unused := [c for c in table.columns if c not in {*told, *hints, *columns}]:
        table.notes.append(f"columns that are not used: {preview(unused, 9)}")
    groups = np.array(paths)
    if group_col in table.columns:
        cells, hints = table.column(group_col, "--group-by"), {}
        groups = np.array([p if x.lower() in MISSING else x for p, x in zip(paths, cells)])
    first = {}  # path -> its first row
    origin = np.array([first.setdefault(path, i) for i, path in enumerate(paths)])
    if kw["multilabel"] is True and len(columns) == 1:  # a row per finding
        np.logical_or.at(labels, origin, labels.copy())
        labels = labels[origin]
    differ = (labels != labels[origin]).any(1) | (labelled != labelled[origin])
    differ |= (groups != groups[origin]) | (sides != sides[origin])
    fix = "; keep one, or --multilabel" if len(columns) == 1 and len(classes) > 2 else "; keep one"
    table.refuse(paths, differ, f"contradict an earlier one of the same image{fix}")
    if n := len(paths) - len(first):
        table.notes.append(f"{n} rows repeat an image")
    sources = [os.path.join(index.root, path) for path in paths]
    groups = groups if group_col in table.columns else None
    data = ImageSet(
        str(file), paths, sources, labels, classes, sides, groups, labelled, hints=hints
    )
    data.notes, data.columns = table.notes, tuple(table.columns)
    data.rows = np.arange(len(paths))
    data.keep(origin == data.rows)
    data.rows = np.unique(origin, return_inverse=True)[1]
    return data.extend(index) if whole else data


class Index:
    """The images below a folder, by what a file may call them."""

    def __init__(self, root):
        if not root.is_dir():
            raise UserError(f"{root}: there is no such folder (--images)")
        self.root, self.base, self.paths = root, os.path.abspath(root), None

    def list(self):
        """All of them are listed once, where a name is not a path below the folder."""
        if self.paths is None:
            self.paths, self.notes = list_images(self.root)
            self.alike = defaultdict(list)
            for path in self.paths:
                parts = _alike(path).split("/")
                for i in range(len(parts)):
                    self.alike["/".join(parts[i:])].append(path)
        return self.paths

    def find(self, name):
        """The paths that a name fits, which may lack ending or folders, or differ in case."""
        for text in (name, name.strip().replace("\\", "/")):
            path = os.path.relpath(os.path.join(self.base, text), self.base).replace(os.sep, "/")
            if not path.startswith("../") and os.path.isfile(os.path.join(self.base, path)):
                return [path]
        self.list()
        hits = self.alike[_alike(path)] if path != "." else []
        bare = os.path.splitext(path)[0] if path.lower().endswith(ENDINGS) else path
        return [hit for hit in hits if os.path.splitext(hit)[0].endswith(bare)] or hits

    def find_all(self, names):
        """For each name its paths; folders that all have in front, which are not here, left out."""
        folders = [name.strip().replace("\\", "/").split("/")[:-1] for name in names]
        lead, found = os.path.commonprefix(folders), list(map(self.find, names))
        for n, folder in enumerate(lead, 1):
            if any(found) or folder.lower() in SPLITS:
                break
            short = ["/".join(name.strip().replace("\\", "/").split("/")[n:]) for name in names]
            found = list(map(self.find, short))
        return found


def _alike(path):
    bare, ending = os.path.splitext(path)
    return unicodedata.normalize("NFC", bare if ending.lower() in ENDINGS else path).casefold()


def _image_paths(table, index, column, skip_bad):
    """The column that names images (None: found out), and N paths below the root. UserError."""
    if column is None:
        heads = {c: index.find_all(v[:20]) for c, v in table.columns.items()}
        hits = {c: np.mean([len(paths) == 1 for paths in found]) for c, found in heads.items()}
        fits = [c for c in hits if hits[c] > 0.5] or [c for c in hits if c.lower() in IMAGE_NAMES]
        if len(fits) != 1:
            raise UserError(f"{table.file}: give --image-col ({preview(fits or hits)}) or --images")
        (column,) = fits
    if column.lower() not in IMAGE_NAMES and len(index.find(column)) == 1:
        raise UserError(f"{table.file}: line 1 names an image, {column}: put column names above it")
    table.column(column, "--image-col")
    names = table.columns[column]
    found = index.find_all(names)
    lost = [not paths for paths in found]
    if skip_bad and any(lost) and not all(lost):
        table.notes.append(f"left out, no such image: {preview(compress(names, lost))}")
        table.keep([not x for x in lost])
        names, found = table.columns[column], list(filter(None, found))
    texts = [f"{name}, {len(paths)} images" for name, paths in zip(names, found)]
    what = f"name no image in {index.root}, or several (--images, --image-col, --skip-bad)"
    table.refuse(texts, [len(paths) != 1 for paths in found], what)
    pairs = [(name.strip(), path) for name, (path,) in zip(names, found)]
    odd = [f"{x} = {p}" for x, p in pairs if not p.endswith(x) and x.lower().endswith(ENDINGS)]
    if odd := [
        x for x in odd if x.partition(" = ")[0].rpartition("/")[2] not in x.partition(" = ")[2]
    ]:
        table.notes.append(f"names that differ from their file: {preview(odd)}")
    return column, [path for _, path in pairs]


def _splits(table, image_col, split):
    """(N,) sides that a column of this name gives, "" without. UserError: one is there, unused."""
    likely = {c: {x.strip().lower() for x in cells} for c, cells in table.columns.items()}
    likely = [c for c, cells in likely.items() if c != image_col and cells <= SPLITS.keys()]
    if split is None and likely:
        fix = f"give --split {likely[0]} to keep them, or --split none to draw others"
        raise UserError(f"{table.file}: the column {likely[0]} names splits; {fix}")
    if split not in table.columns:
        return np.full(len(table.lines), "", "U5")
    cells = [cell.lower() for cell in table.column(split, "--split")]
    table.refuse(cells, [c not in SPLITS for c in cells], "name neither train, val nor test")
    return np.array([SPLITS[cell] for cell in cells], "U5")


def _labels(table, others, label_col=None, multilabel=False, uncertain=None):
    """The columns (label_col None: found out), labels (N, C) bool, (N,) bool of the rows that have
    some, C class names. UserError."""
    columns = label_col
    if columns is None:
        columns = [c for c in table.columns if c not in others]
        named = [c for c in columns if c.lower() in LABEL_NAMES]
        if len(named) == 1:
            columns = named
        elif columns[1:] and not all(map(_is_findings, map(table.columns.get, columns))):
            raise UserError(f"{table.file}: give --label-col (of {preview(columns, 9)}), or none")
    columns = [c for c in columns if columns != ["none"]]
    cells = [table.column(c, "--label-col") for c in columns]
    if len(cells) != 1:
        return columns, *_findings(table, columns, cells, uncertain)
    labels, labelled, classes = _classes(table, cells[0], multilabel, uncertain)
    if all(map(_is_number, classes)) and (
        not all(float(c).is_integer() for c in classes) or label_col is None and len(classes) > 20
    ):
        what = f"{columns[0]} holds {len(classes)} numbers such as {preview(classes[-3:])}"
        raise UserError(f"{table.file}: {what}, which are no classes; --label-col, or none")
    if label_col is None and len(classes) > max(labelled.sum() / 2, 2):
        what = f"{columns[0]} holds {len(classes)} different texts in {labelled.sum()} rows"
        raise UserError(f"{table.file}: {what}: are these classes? --label-col, or none")
    return columns, labels, labelled, classes


def _is_number(text):
    return re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", text, re.I) is not None


def _value(cell):  # 0, 1, -1, or NaN for nothing; None for all else
    cell = cell.strip().lower()
    value = float(cell) if _is_number(cell) else NUMBERS.get(cell)
    return None if value not in (0, 1, -1) and value == value else value


def _is_findings(cells):
    values = {*map(_value, cells)}
    return None not in values and bool(values & {0.0, 1.0})


def _findings(table, columns, cells, uncertain):
    """Labels, labelled and classes of columns of 0, 1, -1 (uncertain) or blank (not mentioned and so
    negative); a row of blanks alone has no label. cells: C lists of N. UserError."""
    for c, column in zip(columns, cells):
        table.refuse(column, [_value(x) is None for x in column], f"are not 0, 1 or -1 in {c}")
    values = np.array([[_value(x) for x in column] for column in cells], float)
    values = values.reshape(len(cells), len(table.lines)).T
    unsure, blank = values == -1, np.isnan(values)
    labelled = ~blank.all(1) if columns else np.zeros(len(values), bool)
    blank[~labelled] = False
    if unsure.any() or blank.any():
        what = f"{unsure.sum()} labels are -1, {blank.sum()} blank"
        if uncertain is None:
            fix = "--uncertain negative or positive for -1, or skip: such images have no label"
            raise UserError(f"{table.file}: {what}; give {fix}; blank counts as negative")
        table.notes.append(f"{what}: --uncertain {uncertain}; blank counts as negative")
    if uncertain == "skip":
        labelled &= ~unsure.any(1)
    labels = ((values == 1) | unsure & (uncertain == "positive")) & labelled[:, None]
    used = labels.any(0)
    if not used.all():
        empty = preview(compress(columns, ~used), 9)
        table.notes.append(f"label column without any image dropped: {empty}")
    nothing = [i for i, c in enumerate(columns) if c.lower().replace("_", " ") == "no finding"]
    if n := (labels[:, nothing].any(1) & (labels.sum(1) > 1)).sum():
        table.notes.append(f"{n} rows have No Finding, which counts as a class, and another label")
    return labels[:, used], labelled, list(compress(columns, used))


def _classes(table, cells, multilabel, uncertain):
    """Labels, labelled and classes of one column of N cells, which may hold several. UserError."""
    if all(cell.startswith("[") and cell.endswith("]") or not cell for cell in cells):
        cells = [re.sub(r"[]['\"]", "", cell) for cell in cells]  # a list, as Python prints it
        multilabel = "," if multilabel in (None, False, True) else multilabel
    sep = multilabel if isinstance(multilabel, str) else ""
    if not sep:
        seps = [sep for sep in "|;," if any(sep in cell for cell in cells)]
        if len(seps) > 1 or seps == [","]:
            raise UserError(f"{table.file}: give --label-sep, one of {seps}, or none")
        sep = "".join(seps) or "none"
    blank = np.array([cell.lower() in MISSING for cell in cells])
    if blank.any() and sep != "none" and uncertain is None:
        fix = "--uncertain negative, if none of the labels applies, or skip, if they have no label"
        raise UserError(f"{table.file}: {blank.sum()} cells hold nothing; give {fix}")
    labelled = ~blank if sep == "none" or uncertain == "skip" else np.ones(len(cells), bool)
    sep = "\0" if sep == "none" else sep  # which no cell holds
    parts = [{v.strip() for v in cell.split(sep)} - {""} for cell in cells]
    parts = [set() if empty else part for part, empty in zip(parts, blank)]
    spelled = {}  # what is alike -> as most have it
    for text, _ in Counter(chain(*parts)).most_common():
        spelled.setdefault(_as_class(text), text)
    texts = set().union(*parts) - {*spelled.values()}
    if same := [f"{spelled[_as_class(text)]} = {text}" for text in sorted(texts)]:
        table.notes.append(f"counted as one class: {preview(same)}")
    classes = sorted(spelled.values())
    if all(map(_is_number, classes)):
        classes.sort(key=float)
    number = {text: i for i, text in enumerate(classes)}
    labels = np.zeros((len(cells), len(classes)), bool)
    for row, part in zip(labels, parts):
        row[[number[spelled[_as_class(text)]] for text in part]] = True
    return labels, labelled, classes


def _as_class(text):  # what is alike: numbers of one value, texts that differ in case
    number = _is_number(text)
    return f"{float(text):g}" if number else unicodedata.normalize("NFC", text).casefold()


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
