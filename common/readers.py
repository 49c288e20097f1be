"""Images and labels as people have them (data.py lists the layouts) -> one table, an ImageSet. What
the files do not tell is an error, never a guess. Single files: see tables.py."""

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
    """N images, their labels and the split that came with them."""

    path: str
    names: list  # relative to the folder they were found in
    sources: list  # what decode() of common.decode takes: paths or arrays
    labels: np.ndarray  # (N, C) bool, C = 0 without labels
    classes: list
    given: np.ndarray  # (N,) str, their split, "" where none came with them
    groups: np.ndarray = None  # (N,) str, of --group-col
    multilabel: bool = False  # some image has another number of labels than one, or so told
    notes: list = field(default_factory=list)
    table: np.ndarray = None  # (N,) of common.decode.ROW, and
    images: DecodedImages = None  # the pixels: both set by decode()

    def __len__(self):
        return len(self.names)

    def decode(self, img_size, cache, skip_bad=False):
        """Set table and images, of img_size pixels a side. Raises UserError unless all are read."""
        self.table, self.images, bad = decode_all(self.sources, img_size, self.path, cache)
        if bad:
            reasons = preview([f"{self.names[i]} ({bad[i]})" for i in sorted(bad)], 100)
            if not skip_bad or len(bad) == len(self):
                n = f"{len(bad)} of {len(self)}"
                raise UserError(f"{self.path}: {n} images cannot be read: {reasons}; --skip-bad?")
            self.notes.append(f"left out because they cannot be read: {reasons}")
            self.keep(~np.isin(np.arange(len(self)), list(bad)))
        if several := list(compress(self.names, self.table["frames"] > 1)):
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
    found, seen, errors = [], {}, []
    for folder, folders, files in os.walk(root, onerror=errors.append, followlinks=True):
        first = seen.setdefault(os.path.realpath(folder), folder) == folder
        for names in (folders, files):
            names[:] = sorted(n for n in names if first and not n.startswith((".", "__MACOSX")))
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
    for error in errors:
        raise UserError(f"{error.filename}: the folder cannot be read") from error
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
    given = np.array([SPLITS.get(p[0].lower(), "") for p in parts])
    if len({*given} - {""}) < 2:
        given[:] = ""
    elif not unlabelled:
        if beside := list(compress(names, given == "")):
            raise UserError(f"{root}: {preview(beside)}: in no split; move, or use --split FILE")
        parts = [p[1:] for p in parts]
    classes = [] if unlabelled or {*map(len, parts)} != {2} else sorted({p[0] for p in parts})
    classes = classes if len(classes) > 1 else []
    labels = np.array([p[:1] for p in parts]) == np.array(classes, str)
    notes = [f"not read: {others}"] if others else []
    sources = [os.path.join(root, name) for name in names]
    return ImageSet(str(root), names, sources, labels, classes, given, notes=notes)


def read(path, multilabel=False, split=None, **table):
    """The ImageSet at `path`, by the data flags; `table`: those of read_csv. Raises UserError."""
    from common import tables  # which imports this module

    path, none = Path(path), ["none"]
    unused = [f"--{k.replace('_', '-')}" for k, value in table.items() if value and value != none]
    if path.suffix.lower() in (".csv", ".tsv", ".txt") and os.path.isfile(path):
        data = tables.read_csv(path, **table)
    elif unused and os.path.exists(path):
        raise UserError(f"{path}: {preview(unused, 9)} need a CSV file as --data")
    elif os.path.isdir(path):
        data = read_folder(path, table.get("label_col") == none)
    elif path.suffix.lower() == ".npz" and os.path.isfile(path):
        data = tables.read_npz(path, table.get("label_col") == none)
    else:
        raise UserError(f"{path}: there is no such file or folder, or not .csv, .npz (--data)")
    data.multilabel = multilabel or bool(data.classes and (data.labels.sum(1) != 1).any())
    if split:
        data.given = tables.read_split(split, data.names)
        if unnamed := list(compress(data.names, data.given == "")):
            data.notes.append(f"left out because {split} does not name them: {preview(unnamed)}")
        data.keep(data.given != "")
    return data
