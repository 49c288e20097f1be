"""Folders of images: what counts as an image, and which folders are classes, splits or groups."""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from common import dicom
from common.cli import UserError, preview, refusing
from common.readers import ImageSet

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
SPLITS = {"train": "train", "val": "val", "test": "test"}
SPLITS |= {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
_made = "seg(mentations?)?|superpixels|annotations?|ground.?truth|thumb(nail)?s?|previews?"
# made from other images: a folder or a whole name, or the end of a name
DERIVED = rf"(^|/)(@eadir|[^/]*masks?|annotations?[^/]*|{_made})(/|\.\w+$)"
DERIVED = re.compile(rf"{DERIVED}|[_ -](masks?|{_made})([_ -]?\d+)?\.\w+$", re.I)
PARTS = re.compile(r"train(ing)?|val(id(ation)?)?|test(ing)?|part[_ -]?\d+", re.I)  # no classes


def list_images(root):
    """Relative paths of the images below root, and notes on what else is there. UserError: none."""
    found, seen, errors = [], {}, []  # hidden files are skipped, links followed once
    for folder, folders, files in os.walk(root, onerror=errors.append, followlinks=True):
        first = seen.setdefault(os.path.realpath(folder), folder) == folder
        for names in (folders, files):
            names[:] = sorted(n for n in names if first and not n.startswith((".", "__MACOSX")))
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
    for error in errors:
        raise UserError(f"{error.filename}: the folder cannot be read") from error
    files = sorted(found)
    images = [f for f in files if f.lower().endswith(EXTENSIONS) or dicom.is_dicom(Path(root, f))]
    endings = Counter(Path(f).suffix.lower() or "no ending" for f in set(files).difference(images))
    others = preview(f"{n} {e}" for e, n in endings.most_common())
    if not images:
        what = f"holds {others or 'nothing'}, but no images {EXTENSIONS}"
        raise UserError(f"{root}: {what}; --images DIR?")
    notes = [f"not read: {others}"] if others else []
    names = [name for name in images if not DERIVED.search(name)] or images
    if left := sorted({*images} - {*names}):
        notes.append(f"left out as masks, thumbnails and the like: {preview(left)}")
    return names, notes


def set_groups(data, what):
    """Set the groups by --group-by, unless a column gave them: by a keyword of DICOM files such as
    PatientID, as numbers, or by a pattern on the paths; and say which they are. UserError."""
    files = (x if isinstance(x, str) and dicom.is_dicom(x) else None for x in data.sources)
    if not what:
        data.notes += ["DICOM: --group-by PatientID keeps a patient on one side"] * any(files)
        return
    if data.groups is None and what.isidentifier():
        texts = [dicom.group(file, what) if file else "" for file in files]
        numbers = np.unique(texts, return_inverse=True)[1]
        groups = [str(n) if text else name for n, text, name in zip(numbers, texts, data.names)]
        data.groups = np.array(groups) if any(texts) else None
    if data.groups is None:
        data.groups = np.array(by_path(data.names, what, "--group-by"))
    groups = [f"{group} {n}" for group, n in Counter(data.groups.tolist()).most_common()]
    shown = preview(groups) if len(groups) < len(data) else "each of one image"
    data.notes.append(f"--group-by {what}: {len(groups)} groups, {shown}")


def by_path(names, pattern, flag):
    """For each of N paths the text that a regular expression finds in it, its groups where it has
    some; of a number n, the n-th folder. Raises UserError where some path has none."""
    number = rf"^(?:[^/]+/){{{int(pattern) - 1}}}([^/]+)/" if re.fullmatch("[1-9]", pattern) else ""
    with refusing(f"{flag} {pattern}: no column, nor a regular expression:", re.error):
        found = [re.search(number or pattern, name) for name in names]
    if none := [name for name, match in zip(names, found) if match is None]:
        what = f"no column, and found in {len(names) - len(none)} of {len(names)} paths, not in"
        raise UserError(f"{flag} {pattern}: {what} {preview(none)}")
    return ["/".join(filter(None, match.groups())) or match[0] for match in found]


def read_folder(root, level=None, split=None):
    """Images below a folder. level: "none", no labels; the level or pattern of the classes, as
    by_path takes it; None: subfolders (of train, test, ..., if these exist) count as classes if
    there are at least two and every image is directly inside one. Raises UserError."""
    names, notes = list_images(root)
    parts = [name.split("/") for name in names]
    given = np.array([SPLITS.get(p[0].lower(), "") if p[1:] else "" for p in parts])
    whole = len({*given} - {""}) > 1
    if level != "none" and split is None:
        _refuse_unclear_splits(root, parts, given, whole)
    given[:] = given if whole else ""
    parts = [p[1:] if side else p for p, side in zip(parts, given)]
    cells, odd = [], [n for n, p in zip(names, parts) if len(p) != 2]
    if level not in (None, "none"):
        cells = by_path(names, level, "--class-depth")
    elif level is None and not odd:
        cells = [p[0] for p in parts]
    elif level is None and any(p[1:] for p in parts):
        fix = "--class-depth N, or a pattern, tells which folder on their path is the class"
        notes.append(f"no labels: not directly inside a class folder: {preview(odd)}; {fix}")
    classes = sorted(set(cells)) if len(set(cells)) > 1 else []
    if cells and not classes:
        notes.append(f"no labels: all images are in one folder, {cells[0]}")
    alike = {PARTS.sub("", c) for c in classes}
    if len(alike) == 1 and (level is None or alike == {""}):
        depth = "--class-depth 1 if they are classes" if level is None else "another --class-depth"
        fix = f"{depth}, --labels FILE, or --label-col none"
        raise UserError(f"{root}: {preview(classes)} are named like parts or splits: give {fix}")
    labels = np.array(cells or names)[:, None] == np.array(classes, str)
    sources = [os.path.join(root, name) for name in names]
    return ImageSet(str(root), names, sources, labels, classes, given, notes=notes)


def _refuse_unclear_splits(root, parts, given, whole):
    """Raise UserError where a folder named like a split may hold images to test on, unseen."""
    beside = ["/".join(p) for p, side in zip(parts, given) if side == ""]
    below = ["/".join(p) for p in parts if any(x.lower() in SPLITS for x in p[1:-1])]
    one = sorted({p[0] for p, side in zip(parts, given) if side})
    what = f"{preview(beside)}: in no split" if whole and beside else ""
    if not whole and (one or below):
        what = f"of the folders train, val and test there is {preview(one)} alone"
        what = what if one else f"{below[0]}: a folder named like a split, further down"
    if what:
        fix = "give the folder of train and test as --data, --split WHAT, or --label-col none"
        raise UserError(f"{root}: {what}; {fix}")
