"""Splits and label fractions: stratified, nested, seeded, leak-free; printed and as CSV files."""

from collections import Counter
from itertools import compress

import numpy as np
import torch

from common.checkpoint import write_csv
from common.cli import UserError, preview

SIDES = ("train", "val", "test")
FEW, TOO_FEW = 10, 3  # images: to judge by; to stop training on
SHARES = {"val": 0.1, "test": 0.2}  # of all images; the rest is for training (section 4.3)


def duplicates(data):
    """Lists of the indices of exact duplicates, images with equal pixels."""
    same = {}
    for i, key in enumerate(data.table["hash"].tolist()):
        same.setdefault(key, []).append(i)
    return [group for group in same.values() if len(group) > 1]


def near_duplicates(data):
    """(P, 3) int: two images that look alike (of exact duplicates the first), their distance."""
    if data.pairs is None:
        from common.near import near_pairs

        first = np.sort(np.unique(data.table["hash"], return_index=True)[1])
        data.pairs = near_pairs(data.table["near"][first])
        data.pairs[:, :2] = first[data.pairs[:, :2]]
    return data.pairs


def cross_split_duplicates(data, split, near=False):
    """(N,) bool: images with an exact (near: or near-) duplicate in an earlier split of SIDES."""
    rank = np.array([SIDES.index(side) for side in split])
    _, unit = np.unique(data.table["hash"], return_inverse=True)
    least = np.full(len(data), 3)  # of units
    np.minimum.at(least, unit, rank)
    if near:
        i, j = unit[near_duplicates(data)[:, :2].T]
        np.minimum.at(least, np.append(i, j), least[np.append(j, i)])
    return rank > least[unit]


def indivisible_units(data):
    """(N,) int: images that must not be parted: of one group, exact duplicates, or asked for."""
    parent = list(range(len(data)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for keys in (x.tolist() for x in (data.table["hash"], data.groups) if x is not None):
        first = {}
        for i, key in enumerate(keys):
            parent[root(i)] = root(first.setdefault(key, i))
    for i, j, _ in near_duplicates(data).tolist() if data.group_near else ():
        parent[root(i)] = root(j)
    return np.unique([root(i) for i in range(len(data))], return_inverse=True)[1]


def stratified_order(labels, unit, rng):
    """The U unit numbers in an order of which every prefix is stratified, and how many of the first
    cover all classes, rarest first. labels: (N, C) bool; unit: (N,) int in 0..U-1. A stratum, of
    units with the same rarest label or none, is shuffled and spread evenly over the whole order."""
    U, C = unit.max() + 1, labels.shape[1]
    size, rarest_first = np.bincount(unit), np.argsort(labels.sum(0), kind="stable")
    has = np.zeros((U, C), bool)
    np.logical_or.at(has, unit, labels)
    stratum = np.append(rarest_first, C)[np.c_[has[:, rarest_first], np.ones(U)].argmax(1)]
    shuffled, position = rng.permutation(U), np.empty(U)
    for s in np.unique(stratum):
        members = shuffled[stratum[shuffled] == s]
        end = np.cumsum(size[members])
        position[members] = (end - size[members] * rng.random()) / end[-1]
    cover = []
    for c in rarest_first:
        if has[:, c].any() and not has[cover, c].any():
            cover.append(shuffled[has[shuffled, c].argmax()])
    position[cover] = np.arange(len(cover)) - C - 1
    return shuffled[np.argsort(position[shuffled], kind="stable")], len(cover)


def carried(data, split, *before):
    """(2, M) int64, sorted: hashes, and indices in SIDES, of these images and splits `before`."""
    own = np.stack([data.table["hash"].view("int64"), [SIDES.index(x) for x in split.tolist()]])
    return torch.unique(torch.cat([torch.from_numpy(own), *before], 1), dim=1)


def make_split(data, seed, known=None, allow_seen=False):
    """(N,) "train", "val" or "test": as given, else drawn, 70/10/20 of the labelled images in whole
    units, stratified; "train" without labels (F.2.1). A unit stays on the earliest side of its
    images in `known`, of carried(). Raises UserError where none is left to train or test on."""
    split = data.given.astype("U5")
    drawn = {name: share for name, share in SHARES.items() if not (split == name).any()}
    split[split == ""] = "train"
    pool = split == "train"
    if not pool.any():
        raise UserError(f"{data.path}: the given split leaves no image for training")
    groups = [] if data.groups is None else data.groups.tolist()
    if parted := _parted(groups, split.tolist()):
        what = f"the given split parts {len(parted)} of {len({*groups})} groups ({preview(parted)})"
        raise UserError(f"{data.path}: {what}; give another, or leave out --group-by")
    if not drawn or not (drawable := pool & data.labelled).any():
        return split
    units, rank = indivisible_units(data), np.full(len(data), 3)  # of units; 3: side not known
    hashes = data.table["hash"].view("int64")
    known = {} if known is None else dict(sorted(zip(*known.tolist()), reverse=True))
    np.minimum.at(rank, units[pool], [known.get(h, 3) for h in hashes[pool].tolist()])
    numbers, unit = np.unique(units[drawable], return_inverse=True)
    order, _ = stratified_order(data.labels[drawable], unit, np.random.default_rng([seed, 0]))
    size, rank = np.bincount(unit), rank[numbers]
    side = _cut(order, size, drawn)
    if (rank == 0).all():
        if "test" in drawn and not allow_seen:
            fix = "pre-train with --labels FILE, which holds some out, add images, or --allow-seen"
            raise UserError(f"{data.path}: pre-training saw every labelled image; {fix}")
        data.notes.append(f"pre-training saw every image: {' and '.join(drawn)} hold such images")
    elif (side != rank)[rank < 3].any():
        key = np.choose(rank, (0, 2, 3, 1))  # known training units first, others before known
        order = order[np.argsort(key[order], kind="stable")]
        side = np.where(rank < 3, rank, _cut(order, size, drawn, size[rank == 0].sum()))
    sides = np.zeros(len(data), int)  # of units; those without a label: training
    sides[numbers] = side
    split[pool] = np.array(SIDES)[sides[units[pool]]]
    for name in drawn:
        if (n := (split == name).sum()) < FEW:
            of = f", of {len(numbers)} groups and duplicates" if len(numbers) < n else ""
            data.notes.append(f"drawn for {name}: {n or 'none'}, too few to judge by{of}")
    return split


def _parted(groups, split):  # groups with images on several sides, in the order of both lists
    sides = Counter(group for group, _ in dict.fromkeys(zip(groups, split)))
    return [group for group, n in sides.items() if n > 1]


def _cut(order, size, drawn, n_train=0):
    """(U,) indices in SIDES: the last in the order for what is drawn, not the first n_train."""
    middle = np.cumsum(size[order]) - size[order] / 2
    total, side = sum(drawn.values()), np.zeros(len(order), int)
    start = max(size.sum() * (1 - total / (1 + total - sum(SHARES.values()))), n_train)
    rest = size.sum() - start
    for name, share in drawn.items():
        side[order[middle >= start]] = SIDES.index(name)
        start += rest * share / total
    return side


def label_fraction(data, train, frac, seed):
    """(N,) bool: the share `frac` of the training images, (N,) bool, whose labels are used, nested,
    stratified, in whole units and with every class. Raises UserError where it is too small."""
    used = train & data.labelled
    if absent := list(compress(data.classes, ~data.labels[used].any(0))):
        raise UserError(f"{data.path}: no training image has the label {preview(absent)}")
    unit = np.unique(indivisible_units(data)[used], return_inverse=True)[1]
    order, n_cover = stratified_order(data.labels[used], unit, np.random.default_rng([seed, 1]))
    end = np.cumsum(np.bincount(unit)[order])
    wanted = np.floor(frac * len(unit) + 0.5)
    if wanted < end[n_cover - 1]:
        smallest = np.ceil((end[n_cover - 1] - 0.5) / len(unit) * 1e5) / 1e5
        raise UserError(f"--frac {frac:g}: the smallest fraction with every class is {smallest:g}")
    used[used] = np.isin(unit, order[end <= wanted])
    return used


def label_text(classes, has):
    """The names of the classes that an image has, as the CSV files hold them."""
    return "|".join(compress(classes, has))


def class_counts(data, mask):
    """{class: images} among the masked ones."""
    return dict(zip(data.classes, data.labels[mask].sum(0).tolist()))


def write_split(out, data, split, used=None):
    """split.csv with used labels, (N,) bool; duplicates.csv: equal images; near pairs, distance."""
    labels = [label_text(data.classes, has) for has in data.labels]
    flags = np.zeros(len(data), int) if used is None else used.astype(int)
    rows = list(zip(data.names, split, labels, flags if data.classes else [""] * len(data)))
    write_csv(out / "split.csv", ("path", "split", "labels", "label_used"), rows)
    alike = [(group, 0) for group in duplicates(data)]
    alike += [(pair, distance) for *pair, distance in near_duplicates(data).tolist()]
    same = [(n, *rows[i][:3], x) for n, (group, x) in enumerate(alike) for i in group]
    write_csv(out / "duplicates.csv", ("group", "path", "split", "labels", "distance"), same)


def print_report(data, split):
    """Print what the set holds, how it is split and what is odd about it."""
    unlabelled, grouped = (~data.labelled).sum(), data.groups is not None
    labels = f"{len(data.classes)} classes" if data.classes else "no labels"
    labels += f", {unlabelled} images without a label" if data.classes and unlabelled else ""
    labels += ", several or none per image" if data.multilabel and data.classes else ""
    labels += f", {len(np.unique(data.groups))} groups" if grouped else ""
    print(f"{data.path}: {len(data)} images, {labels}")
    for name in SIDES:
        if (mask := split == name).any():
            counts = class_counts(data, mask)
            n = f" in {len(np.unique(data.groups[mask]))} groups" if grouped else ""
            shown = ", ".join(f"{c} {n}" for c, n in counts.items())
            print(f"  {name:5} {mask.sum():6}{n}  {shown}")
            if name != "train" and (absent := [c for c in counts if not counts[c]]):
                what = "0 in macro_f1, left out of macro_f1_present and auroc"
                print(f"  no {name} image of {preview(absent)}: {what}")
    for column, cells in data.hints.items():
        n, parted = len({*cells}), len(_parted(cells.tolist(), split.tolist()))
        what = f"column {column} is not used: {n} texts, of which the split parts {parted}"
        print(f"  {what}; are these patients or lesions? --group-by {column!r}")
    if data.table["width"].any():  # not of a --dry-run
        _print_pixels(data, split)
    for note in data.notes:
        print(f"  {note}")


def _print_pixels(data, split):
    table, train = data.table, np.flatnonzero(split == "train")
    sizes = [f"{key}s {table[key].min()} to {table[key].max()}" for key in ("width", "height")]
    modes = ", ".join(f"{mode} {n}" for mode, n in Counter(table["mode"].tolist()).most_common())
    print(f"  {', '.join(sizes)} pixels; modes {modes}")
    sample = np.stack([data.images[i] for i in train[:: len(train) // 100 + 1]]) / np.float32(255)
    mean, std = (" ".join(f"{x:.3f}" for x in m((0, 2, 3))) for m in (sample.mean, sample.std))
    print(f"  mean {mean}, std {std} (ImageNet: 0.485 0.456 0.406, 0.229 0.224 0.225)")
    exact, both = (cross_split_duplicates(data, split, near).sum() for near in (False, True))
    if same := duplicates(data):
        n = sum(map(len, same))
        print(f"  {n} images have exact duplicates; {exact} of them have one in an earlier split")
    if n := len(np.unique(near_duplicates(data)[:, :2])):
        what = f"{both - exact} more have one in an earlier split"
        what += "; --group-near draws splits without" * bool(both > exact and not data.group_near)
        print(f"  {n} images have near-duplicates; {what}")
    if odd := [group for group in same if (data.labels[group] != data.labels[group[0]]).any()]:
        pairs = preview(" = ".join(data.names[i] for i in group[:2]) for group in odd)
        print(f"  {len(odd)} sets of exact duplicates have different labels: {pairs}")
