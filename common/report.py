"""What an ImageSet holds, printed and as rows of the CSV files that a run writes."""

from collections import Counter

import numpy as np

from common.cli import preview
from common.metrics import label_text
from common.splits import cross_split_duplicates, duplicates

SPLIT_HEADER = ("path", "split", "labels", "label_used")
DUPLICATES_HEADER = ("group", "path", "split", "labels")


def split_rows(data, split, used=None):
    """Rows of split.csv: path, split, labels, whether the label was used (empty without labels)."""
    for i, name in enumerate(data.names):
        labels = label_text(data.classes, data.labels[i])
        yield name, split[i], labels, "" if not data.classes else int(used is not None and used[i])


def duplicate_rows(data, split):
    """Rows of duplicates.csv: images with one number are exact duplicates."""
    for group, members in enumerate(duplicates(data)):
        for i in members:
            yield group, data.names[i], split[i], label_text(data.classes, data.labels[i])


def class_counts(data, mask):
    """{class: images} among the masked ones."""
    return dict(zip(data.classes, data.labels[mask].sum(0).tolist()))


def print_report(data, split):
    """What the set holds, how it is split and what is odd about it."""
    kind = "" if not data.multilabel else ", several or none per image"
    print(
        f"{data.path}: {len(data)} images, "
        + (f"{len(data.classes)} classes{kind}" if data.classes else "no labels")
        + ("" if data.groups is None else f", {len(np.unique(data.groups))} groups")
    )
    for name in ("train", "val", "test"):
        mask = split == name
        if mask.any():
            counts = ", ".join(f"{c} {n}" for c, n in class_counts(data, mask).items())
            groups = (
                "" if data.groups is None else f" in {len(np.unique(data.groups[mask]))} groups"
            )
            print(f"  {name:5} {mask.sum():6}{groups}  {counts}")
    _print_pixels(data, split)
    same = duplicates(data)
    if same:
        print(
            f"  {sum(map(len, same))} images are exact duplicates of another; "
            f"{cross_split_duplicates(data, split).sum()} of them of one in an earlier split "
            f"(train, val, test)"
        )
    contradicting = [g for g in same if (data.labels[g] != data.labels[g[0]]).any()]
    if contradicting:
        pairs = preview(" = ".join(data.names[i] for i in group[:2]) for group in contradicting)
        print(f"  {len(contradicting)} sets of exact duplicates have different labels: {pairs}")
    for note in data.notes:
        print(f"  {note}")


def _print_pixels(data, split):
    """Sizes and modes of the files; mean and standard deviation of some training images."""
    table = data.table
    modes = ", ".join(f"{mode} {n}" for mode, n in Counter(table["mode"].tolist()).most_common())
    print(
        f"  widths {table['width'].min()} to {table['width'].max()}, heights "
        f"{table['height'].min()} to {table['height'].max()} pixels; modes {modes}"
    )
    train = np.flatnonzero(split == "train")
    sample = [data.images[i] / np.float32(255) for i in train[:: len(train) // 100 + 1]]
    mean = np.mean([x.mean((1, 2)) for x in sample], axis=0)
    std = np.sqrt(np.mean([(x**2).mean((1, 2)) for x in sample], axis=0) - mean**2)
    print(
        "  mean "
        + " ".join(f"{x:.3f}" for x in mean)
        + ", standard deviation "
        + " ".join(f"{x:.3f}" for x in std)
        + " (ImageNet: 0.485 0.456 0.406, 0.229 0.224 0.225)"
    )
