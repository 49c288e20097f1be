"""Images and labels as people have them on disk -> one table, an ImageSet. Nothing is decoded here.

A folder of images at any depth (no labels); one folder per class, CLASS/a.png; the splits above the
classes, train/CLASS/a.png; a CSV file of image names with one label, a list of labels, or a 0/1
column per label; a MedMNIST .npz file. What cannot be told is an error, never a guess.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.cli import UserError, preview
from common.decode import DecodedImages, decode_all

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


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

    def decode(self, img_size, cache, skip_bad=False):
        """Check and decode all images to squares of img_size pixels (decode_all); sets table and
        images. cache: folder, or None. Raises UserError naming every unreadable image, unless they
        are to be left out."""
        self.table, self.images, bad = decode_all(
            self.sources, img_size, os.path.abspath(self.path), cache
        )
        if bad:
            listed = [f"{self.names[i]} ({reason})" for i, reason in sorted(bad.items())]
            if not skip_bad or len(bad) == len(self):
                raise UserError(
                    f"{self.path}: {len(bad)} of {len(self)} images cannot be read: "
                    f"{preview(listed, 100)}; fix them, or leave them out with "
                    f"--skip-bad"
                )
            self.notes.append(f"left out because they cannot be read: {preview(listed, 100)}")
            self.keep(~np.isin(np.arange(len(self)), list(bad)))
        several = [name for name, n in zip(self.names, self.table["frames"]) if n > 1]
        if several:
            self.notes.append(f"only the first page or frame is read of {preview(several)}")

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
    others = Counter(
        os.path.splitext(f)[1].lower() or "no ending" for f in files if not is_image(f)
    )
    others = preview(f"{n} {ending}" for ending, n in others.most_common())
    if not names:
        raise UserError(
            f"{root}: holds no images ({', '.join(sorted(EXTENSIONS))})"
            + (f", but {others}" if others else "")
        )
    parts = [name.split("/") for name in names]
    given = [SPLITS.get(p[0].lower(), "") if len(p) > 1 else "" for p in parts]
    if len(set(given) - {""}) > 1:
        outside = [name for name, split in zip(names, given) if not split]
        if outside and not unlabelled:
            raise UserError(
                f"{root}: has images beside its train and test folders: {preview(outside)};"
                f" move them away, or name the split of each with --split FILE"
            )
        parts = [p[1:] for p in parts]
    else:
        given = [""] * len(names)
    folders = sorted({p[0] for p in parts if len(p) == 2})
    labelled = all(len(p) == 2 for p in parts) and len(folders) > 1 and not unlabelled
    classes = folders if labelled else []
    labels = np.array([[p[0] == c for c in classes] for p in parts], bool)
    notes = [f"not read: {others}"] if others else []
    return ImageSet(
        str(root),
        names,
        [os.path.join(root, n) for n in names],
        labels,
        classes,
        np.array(given),
        notes=notes,
    )


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
        raise UserError(
            f"{file}: needs the arrays train_images and train_labels (and val_, test_), "
            f"but holds {preview(arrays, 9) or 'none'}"
        )
    sizes = {s: (len(arrays[f"{s}_images"]), len(arrays[f"{s}_labels"])) for s in splits}
    if any(a != b for a, b in sizes.values()):
        raise UserError(f"{file}: has another number of labels than of images: {sizes}")
    images = [a for s in splits for a in arrays[f"{s}_images"]]
    labels = np.concatenate(
        [arrays[f"{s}_labels"].reshape(len(arrays[f"{s}_images"]), -1) for s in splits]
    )
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


def read(
    path,
    images=None,
    image_col=None,
    label_col=None,
    label_sep=None,
    multilabel=False,
    group_col=None,
    split=None,
):
    """The ImageSet at `path`; the arguments are the data flags. Nothing is decoded yet.

    label_col: ["none"] for no labels, whatever the folders or columns look like; split: a CSV file
    (read_split). Raises UserError.
    """
    path, unlabelled = Path(path), label_col == ["none"]
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder (--data)")
    csv_flags = {
        "--images": images,
        "--image-col": image_col,
        "--label-sep": label_sep,
        "--label-col": None if unlabelled else label_col,
        "--group-col": group_col,
    }
    unused = [flag for flag, value in csv_flags.items() if value]
    if path.suffix.lower() in (".csv", ".tsv", ".txt") and path.is_file():
        from common.tables import read_csv  # CSV files are a third of the reading code

        data = read_csv(path, images, image_col, label_col, label_sep, group_col)
    elif unused:
        raise UserError(f"{path}: {preview(unused, 9)} need a CSV file as --data")
    elif path.is_dir():
        data = read_folder(path, unlabelled)
    elif path.suffix.lower() == ".npz":
        data = read_npz(path, unlabelled)
    else:
        raise UserError(f"{path}: is neither a folder nor a .csv or .npz file (--data)")
    if unlabelled:
        data.labels, data.classes = data.labels[:, :0], []
    if multilabel:
        data.multilabel = True
    if split:
        from common.tables import read_split

        data.given = read_split(split, data.names)
        named = data.given != ""
        if not named.all():
            data.notes.append(
                f"left out because {split} does not name them: "
                f"{preview(np.array(data.names)[~named])}"
            )
            data.keep(named)
    return data
