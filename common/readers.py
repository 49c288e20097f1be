"""Images and labels as people have them -> an ImageSet. What they do not tell is asked for."""

import os
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np

from common.cli import UserError, preview
from common.decode import ROW, DecodedImages, decode_all


@dataclass
class ImageSet:
    """N images, their labels and the split that came with them."""

    path: str
    names: list  # relative to the folder they were found in
    sources: list  # what decode() of common.decode takes: paths or arrays
    labels: np.ndarray = None  # (N, C) bool, C = 0 without labels
    classes: list = ()
    given: np.ndarray = None  # (N,) str, their split, "" where none came with them
    groups: np.ndarray = None  # (N,) str, of --group-by
    labelled: np.ndarray = None  # (N,) bool; the others are for pre-training alone
    multilabel: bool = False  # some image has another number of labels than one, or so told
    notes: list = field(default_factory=list)
    columns: tuple = ()  # of the CSV file
    hints: dict = field(default_factory=dict)  # {column: (N,) str} that may be groups
    rows: np.ndarray = None  # numbers of the images that the rows of a file name
    table: np.ndarray = None  # (N,) of common.decode.ROW, and
    images: DecodedImages = None  # the pixels: both set by decode()
    group_near: bool = False  # whether drawn splits keep near-duplicates together
    pairs: np.ndarray = None  # of splits.near_duplicates

    def __post_init__(self):
        if self.labelled is None:
            self.labelled = np.full(len(self), bool(self.classes))

    def __len__(self):
        return len(self.names)

    def decode(self, img_size, cache, skip_bad=False, dry_run=False):
        """Set table and images, of img_size pixels a side. Raises UserError unless all are read.
        dry_run: each image is read when it is asked for, and counts as different from others."""
        where = f"{3e-6 * img_size**2 * len(self):,.1f} MB in {cache}" if cache else "no disk space"
        print(f"{self.path}: {len(self)} images at {img_size} px, decoded, need {where}")
        if dry_run:
            self.table = np.zeros(len(self), ROW)
            self.table["hash"] = np.arange(len(self))
            self.images = DecodedImages(self.sources, img_size)
            return
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
        for key in ("labels", "given", "groups", "labelled", "table"):
            if getattr(self, key) is not None:
                setattr(self, key, getattr(self, key)[mask])
        self.pairs = self.pairs if mask.all() else None
        self.hints = {column: cells[mask] for column, cells in self.hints.items()}
        if self.rows is not None:
            self.rows = (np.cumsum(mask) - 1)[self.rows[mask[self.rows]]]
        if self.images is not None:
            self.images.rows = self.images.rows[mask]


def read(path, images=None, label_col=None, multilabel=False, group_col=None, split=None, **more):
    """The ImageSet at `path`, by the data flags. images: the other half of a folder or CSV file of
    labels; more: group_near and, of CSV files, image_col, uncertain, skip_bad. Raises UserError."""
    from common import folders, tables  # which import this module

    level, group_near = label_col[0] if label_col else None, more.pop("group_near", False)
    files = [x for x in (path, images) if x and os.path.isfile(x)]
    table = next((x for x in files if Path(x).suffix.lower() in tables.OF_ROWS), None)
    flags = {"--labels": images, **{f"--{k.replace('_', '-')}": x for k, x in more.items()}}
    flags |= {"--label-sep": isinstance(multilabel, str), "--skip-bad": False}
    if table is not None:
        more |= {"label_col": label_col, "multilabel": multilabel, "group_col": group_col}
        root = images if table is path else path
        data = tables.read_csv(table, root, whole=table is images, split=split, **more)
    elif images and not os.path.exists(images):
        raise UserError(f"{images}: there is no such file (--labels)")
    elif unused := [flag for flag, value in flags.items() if value and os.path.exists(path)]:
        raise UserError(f"{path}: {preview(unused, 9)} need a CSV file as --data or --labels")
    elif os.path.isdir(path):
        data = folders.read_folder(path, level, split)
    elif Path(path).suffix.lower() == ".npz" and os.path.isfile(path):
        data = tables.read_npz(path, level == "none")
    else:
        what = "is neither an image folder nor a .csv, .tsv, .txt or .npz file"
        what = what if os.path.exists(path) else "there is no such file or folder"
        raise UserError(f"{path}: {what} (--data)")
    told, data.group_near = multilabel not in (False, None, "none"), group_near
    data.multilabel = told or bool(data.classes and (data.labels[data.labelled].sum(1) != 1).any())
    folders.set_groups(data, group_col)
    if split == "none":
        data.given[:] = ""
    elif split is None and data.columns:
        parts = {part for name in data.names for part in name.split("/")[:-1]}
        if len(found := sorted(x for x in parts if x.lower() in folders.SPLITS)) > 1:
            fix = "to keep that give --split PATTERN (1: the first folder), else --split none"
            raise UserError(f"{data.path}: its images lie in {preview(found)}; {fix}")
    elif split is not None and split not in data.columns:
        if os.path.isfile(split):
            sides = tables.read_split(split, data.names)
        else:
            found = folders.by_path(data.names, split, "--split (no file)")
            sides = np.array([folders.SPLITS.get(text.lower(), "") for text in found])
        if unnamed := list(compress(data.names, sides == "")):
            data.notes.append(f"left out, given no split by --split {split}: {preview(unnamed)}")
        if len(unnamed) == len(data):
            raise UserError(f"--split {split}: names neither train, val nor test of any image")
        data.given = sides
        data.keep(sides != "")
    return data
