"""Folders of images: what counts as an image, and which folders are classes, splits or groups."""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from common.cli import UserError, preview
from common.readers import ImageSet

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
SPLITS = {"train": "train", "val": "val", "test": "test"}
SPLITS |= {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
_made = "masks?|seg(mentations?)?|superpixels|annotations?|ground.?truth|thumb(nail)?s?|previews?"
# made from other images: a folder or a whole name, or the end of a name
DERIVED = re.compile(rf"(^|/)(@eadir|{_made})(/|\.\w+$)|[_ -]({_made})([_ -]?\d+)?\.\w+$", re.I)


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


def list_images(root):
    """Relative paths of the images below root, and notes on what else is there. UserError: none."""
    files = list_files(root)
    images = [f for f in files if f.lower().endswith(EXTENSIONS)]
    endings = Counter(Path(f).suffix.lower() or "no ending" for f in set(files).difference(images))
    others = preview(f"{n} {e}" for e, n in endings.most_common())
    if not images:
        raise UserError(f"{root}: holds {others or 'nothing'}, but no images {EXTENSIONS}")
    notes = [f"not read: {others}"] if others else []
    names = [name for name in images if not DERIVED.search(name)] or images
    if left := sorted({*images} - {*names}):
        notes.append(f"left out as masks, thumbnails and the like: {preview(left)}")
    return names, notes


def by_path(names, pattern, flag):
    """For each of N paths the text that a regular expression finds in it, its groups where it has
    some; of a number n, the n-th folder. Raises UserError where some path has none."""
    number = rf"^(?:[^/]+/){{{int(pattern) - 1}}}([^/]+)/" if re.fullmatch("[1-9]", pattern) else ""
    try:
        found = [re.search(number or pattern, name) for name in names]
    except re.error as error:
        raise UserError(f"{flag} {pattern}: no column, nor a regular expression: {error}") from None
    if none := [name for name, match in zip(names, found) if match is None]:
        raise UserError(f"{flag} {pattern}: no column, nor found in {len(none)}: {preview(none)}")
    return ["/".join(filter(None, match.groups())) or match[0] for match in found]


def read_folder(root, level=None):
    """Images below a folder. level: "none", no labels; the level or pattern of the classes, as
    by_path takes it; None: subfolders (of train, test, ..., if these exist) count as classes if
    there are at least two and every image is directly inside one. Raises UserError."""
    names, notes = list_images(root)
    parts = [name.split("/") for name in names]
    given = np.array([SPLITS.get(p[0].lower(), "") if p[1:] else "" for p in parts])
    if level != "none":
        _refuse_unclear_splits(root, parts, given)
    if len({*given} - {""}) > 1 or level == "none":
        parts = [p[given[i] != "" :] for i, p in enumerate(parts)]
    else:
        given[:] = ""
    cells, depths = [], Counter(map(len, parts))
    if level is not None and level != "none":
        cells = by_path(names, level, "--label-col")
    elif level is None and set(depths) == {2}:
        cells = [p[0] for p in parts]
    elif level is None and set(depths) != {1}:
        odd = [n for n, p in zip(names, parts) if len(p) != 2]
        few = odd if len(odd) <= len(names) / 2 else names
        where = (
            "in no folder of a class" if few is odd else f"{min(depths) - 1} or more folders deep"
        )
        fix = "--class-depth N or a pattern tells which folder is the class"
        notes.append(f"no labels, since there are images {where}: {preview(few)}; {fix}")
    classes = sorted(set(cells)) if len(set(cells)) > 1 else []
    if cells and not classes:
        notes.append(f"no labels, since all images are in one folder, {cells[0]}")
    labels = np.array(cells or names)[:, None] == np.array(classes, str)
    sources = [os.path.join(root, name) for name in names]
    return ImageSet(str(root), names, sources, labels, classes, given, notes=notes)


def _refuse_unclear_splits(root, parts, given):
    """Raise UserError where a folder named like a split may hold images to test on, unseen."""
    ignore = "or ignore all labels with --label-col none"
    below = [p for p in parts if any(x.lower() in SPLITS for x in p[1:-1])]
    if len({*given} - {""}) > 1:
        if beside := ["/".join(p) for p, side in zip(parts, given) if side == ""]:
            raise UserError(f"{root}: {preview(beside)}: in no split; move, or use --split FILE")
    elif below:
        what = f"{'/'.join(below[0])}: a folder named like a split, further down"
        raise UserError(f"{root}: has {what}; give the folder above it as --data, {ignore}")
    elif split := {p[0] for p, side in zip(parts, given) if side}:
        others = sorted({p[0] for p in parts} - split)
        what = f"{preview(split)} beside {preview(others)}" if others else f"{preview(split)} alone"
        fix = "name the splits train, val and test, or give one of them as --data"
        raise UserError(f"{root}: holds {what}; {fix}, {ignore}")
