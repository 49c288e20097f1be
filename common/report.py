"""What an ImageSet holds, printed and as rows of the CSV files that a run writes."""

from collections import Counter

import numpy as np

from common.cli import preview
from common.splits import cross_split_duplicates, duplicates

SPLIT_HEADER = ("path", "split", "labels", "label_used")
DUPLICATES_HEADER = ("group", "path", "split", "labels")


def label_text(classes, has):
    """The names of the classes that an image has, as the CSV files hold them."""
    return "|".join(c for c, h in zip(classes, has) if h)


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

    def groups(before, mask):
        return "" if data.groups is None else f"{before} {len(np.unique(data.groups[mask]))} groups"

    kind = ", several or none per image" if data.multilabel else ""
    labels = f"{len(data.classes)} classes{kind}" if data.classes else "no labels"
    print(f"{data.path}: {len(data)} images, {labels}{groups(',', slice(None))}")
    for name in ("train", "val", "test"):
        mask = split == name
        if mask.any():
            counts = ", ".join(f"{c} {n}" for c, n in class_counts(data, mask).items())
            print(f"  {name:5} {mask.sum():6}{groups(' in', mask)}  {counts}")
    _print_pixels(data, split)
    _print_duplicates(data, split)
    for note in data.notes:
        print(f"  {note}")


def _print_pixels(data, split):
    """Sizes and modes of the files; mean and standard deviation of some training images."""
    table, modes = data.table, Counter(data.table["mode"].tolist()).most_common()
    sizes = [f"{key}s {table[key].min()} to {table[key].max()}" for key in ("width", "height")]
    modes = ", ".join(f"{name} {n}" for name, n in modes)
    print(f"  {', '.join(sizes)} pixels; modes {modes}")
    train = np.flatnonzero(split == "train")
    sample = np.stack([data.images[i] for i in train[:: len(train) // 100 + 1]]) / np.float32(255)
    moments = sample.mean((0, 2, 3)), sample.std((0, 2, 3))
    mean, std = (" ".join(f"{x:.3f}" for x in values) for values in moments)
    imagenet = "0.485 0.456 0.406, 0.229 0.224 0.225"
    print(f"  mean {mean}, standard deviation {std} (ImageNet: {imagenet})")


def _print_duplicates(data, split):
    """How many images are exact duplicates, across splits too, and which of them disagree."""
    same = duplicates(data)
    if same:
        n, later = sum(map(len, same)), cross_split_duplicates(data, split).sum()
        print(f"  {n} images have exact duplicates; {later} of them have one in an earlier split")
    odd = [group for group in same if (data.labels[group] != data.labels[group[0]]).any()]
    if odd:
        pairs = preview(" = ".join(data.names[i] for i in group[:2]) for group in odd)
        print(f"  {len(odd)} sets of exact duplicates have different labels: {pairs}")
