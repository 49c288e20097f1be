"""Images and labels as people have them (data.py lists the layouts) -> one table, an ImageSet. What
cannot be told from the files is an error, never a guess. Single files: see tables.py."""

import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np

from common.cli import UserError, preview
from common.decode import DecodedImages, decode_all

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
SPLITS = {"train": "train", "val": "val", "test": "test"}
SPLITS |= {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


@dataclass
class ImageSet:
    """N images: `names` relative to the folder they were found in; `labels` (N, C) bool, C = 0
    without labels; `given` the split that came with them, "" where none did."""

    path: str
    names: list
    sources: list  # what decode() of common.decode takes: paths or arrays
    labels: np.ndarray
    classes: list
    given: np.ndarray
    groups: np.ndarray = None  # (N,) str, of --group-col
    multilabel: bool = field(init=False)  # some image has another number of labels than one
    notes: list = field(default_factory=list)
    table: np.ndarray = None  # (N,) of common.decode.ROW, and
    images: DecodedImages = None  # the pixels: both set by decode()

    def __post_init__(self):
        self.multilabel = bool(self.classes) and bool((self.labels.sum(1) != 1).any())

    def __len__(self):
        return len(self.names)

    def decode(self, img_size, cache, skip_bad=False):
        """Set table and images, of img_size pixels a side; cache: folder or None. Raises UserError
        naming the images that cannot be read, unless they are to be left out."""
        root = os.path.abspath(self.path)
        self.table, self.images, bad = decode_all(self.sources, img_size, root, cache)
        if bad:
            reasons = preview([f"{self.names[i]} ({bad[i]})" for i in sorted(bad)], 100)
            if not skip_bad or len(bad) == len(self):
                what = f"{self.path}: {len(bad)} of {len(self)} images cannot be read: {reasons}"
                raise UserError(f"{what}; fix them, or leave them out with --skip-bad")
            self.notes.append(f"left out because they cannot be read: {reasons}")
            self.keep(~np.isin(np.arange(len(self)), list(bad)))
        several = list(compress(self.names, self.table["frames"] > 1))
        if several:
            self.notes.append(f"only the first page or frame is read of {preview(several)}")

    def keep(self, mask):
        """Leave out the images where the (N,) bool mask is False."""
        self.names, self.sources = (list(compress(x, mask)) for x in (self.names, self.sources))
        for key in ("labels", "given", "groups", "table"):
            if getattr(self, key) is not None:
                setattr(self, key, getattr(self, key)[mask])
        if self.images is not None:
            self.images.keep(mask)


def list_files(root):
    """Relative paths of all files below root, sorted; hidden ones skipped, links followed once."""
    found, seen, stack = [], set(), [""]
    while stack:
        start = stack.pop()  # a folder, with its slash
        stat = os.stat(os.path.join(root, start))
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        try:
            entries = list(os.scandir(os.path.join(root, start)))
        except PermissionError as error:
            raise UserError(f"{error.filename}: the folder cannot be read") from error
        for entry in entries:
            if not entry.name.startswith((".", "__MACOSX")):
                is_folder = os.path.isdir(entry.path)
                (stack if is_folder else found).append(start + entry.name + "/" * is_folder)
    return sorted(found)


def read_folder(root, unlabelled=False):
    """Images below a folder. Subfolders (of train, test, ..., if these exist) count as classes if
    there are at least two and every image is directly inside one."""
    files = list_files(root)
    names = [f for f in files if f.lower().endswith(EXTENSIONS)]
    endings = Counter(Path(f).suffix.lower() or "no ending" for f in files)
    others = preview(f"{n} {e}" for e, n in endings.most_common() if e not in EXTENSIONS)
    if not names:
        raise UserError(f"{root}: holds {others or 'nothing'}, but no images {EXTENSIONS}")
    parts = [name.split("/") for name in names]
    given = [SPLITS.get(p[0].lower(), "") if len(p) > 1 else "" for p in parts]
    if len(set(given) - {""}) < 2:
        given = [""] * len(names)
    elif not unlabelled:
        if "" in given:
            beside = preview(name for name, split in zip(names, given) if not split)
            problem = f"has images beside its train and test folders: {beside}"
            raise UserError(f"{root}: {problem}; move them, or name all splits with --split FILE")
        parts = [p[1:] for p in parts]
    classes = sorted({p[0] for p in parts})
    if unlabelled or len(classes) < 2 or any(len(p) != 2 for p in parts):
        classes = []
    labels = np.array([p[:1] for p in parts]) == np.array(classes, str)
    notes = [f"not read: {others}"] if others else []
    sources = [os.path.join(root, name) for name in names]
    return ImageSet(str(root), names, sources, labels, classes, np.array(given), notes=notes)


def read(path, label_col=None, multilabel=False, split=None, **table):
    """The ImageSet at `path`; the others are the data flags, `table` those of read_csv alone
    (label_col ["none"]: no labels). Raises UserError."""
    from common import tables  # which imports this module

    path, unlabelled = Path(path), label_col == ["none"]
    if not os.path.exists(path):
        raise UserError(f"{path}: there is no such file or folder (--data)")
    told = {**table, "label_col": None if unlabelled else label_col}
    unused = [f"--{key.replace('_', '-')}" for key, value in told.items() if value]
    if path.suffix.lower() in (".csv", ".tsv", ".txt") and path.is_file():
        data = tables.read_csv(path, label_col=label_col, **table)
    elif unused:
        raise UserError(f"{path}: {preview(unused, 9)} need a CSV file as --data")
    elif path.is_dir():
        data = read_folder(path, unlabelled)
    elif path.suffix.lower() == ".npz":
        data = tables.read_npz(path, unlabelled)
    else:
        raise UserError(f"{path}: is neither a folder nor a .csv or .npz file (--data)")
    data.multilabel |= multilabel
    if split:
        data.given = tables.read_split(split, data.names)
        unnamed = list(compress(data.names, data.given == ""))
        if unnamed:
            data.notes.append(f"left out because {split} does not name them: {preview(unnamed)}")
            data.keep(data.given != "")
    return data
