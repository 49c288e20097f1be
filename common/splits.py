"""Splits and label fractions: stratified, nested, seeded, no patient or picture on two sides."""

import math
from collections import Counter, defaultdict

import numpy as np
import torch

from common.cli import UserError, preview

SIDES = ("train", "val", "test")
FEW, TOO_FEW = 10, 3  # images: to judge by; to stop training on
SHARES = {"val": 0.1, "test": 0.2}  # of all images; the rest is for training (section 4.3)


def duplicates(data):
    """Lists of the indices of exact duplicates, images with equal pixels."""
    same = defaultdict(list)
    for i, key in enumerate(data.table["hash"].tolist()):
        same[key].append(i)
    return [group for group in same.values() if len(group) > 1]


def cross_split_duplicates(data, split):
    """(N,) bool: images with an exact duplicate in an earlier split of train, val, test."""
    rank = np.array([SIDES.index(side) for side in split])
    copy = np.zeros(len(data), bool)
    for group in duplicates(data):
        copy[group] = rank[group] > rank[group].min()
    return copy


def indivisible_units(data):
    """(N,) int: images that must not be parted, sharing a group or being exact duplicates."""
    parent = list(range(len(data)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for keys in (x.tolist() for x in (data.table["hash"], data.groups) if x is not None):
        first = {}
        for i, key in enumerate(keys):
            parent[root(i)] = root(first.setdefault(key, i))
    return np.unique([root(i) for i in range(len(data))], return_inverse=True)[1]


def stratified_order(labels, unit, rng):
    """The U unit numbers in an order of which every prefix is stratified (nested fractions are its
    prefixes), and how many of the first cover all classes, rarest first.

    labels: (N, C) bool; unit: (N,) int in 0..U-1, no number left out. The stratum of a unit is its
    rarest label, or none; its units are shuffled and spread evenly over the whole order.
    """
    U, C = unit.max() + 1, labels.shape[1]
    size, counts = np.bincount(unit), labels.sum(0)
    has = np.zeros((U, C), bool)
    np.logical_or.at(has, unit, labels)
    rarest_first = np.argsort(counts, kind="stable")
    stratum = np.full(U, C)
    for c in rarest_first[::-1]:
        stratum[has[:, c]] = c
    shuffled = rng.permutation(U)
    position = np.empty(U)
    for s in np.unique(stratum):
        members = shuffled[stratum[shuffled] == s]
        end = np.cumsum(size[members])
        position[members] = (end - size[members] * rng.random()) / end[-1]
    cover = []
    for c in rarest_first:
        if counts[c] and not has[cover, c].any():
            cover.append(shuffled[has[shuffled, c].argmax()])
    position[cover] = np.arange(len(cover)) - C - 1
    return shuffled[np.argsort(position[shuffled], kind="stable")], len(cover)


def carried(data, split, *before):
    """(2, M) int64, sorted: hashes and sides (0 train, 1 val, 2 test) of these images and of splits
    carried `before`. So weights files carry a split: by content, without names."""
    hashes = data.table["hash"].view("int64")
    own = np.stack([hashes, [SIDES.index(side) for side in split.tolist()]])
    return torch.unique(torch.cat([torch.from_numpy(own), *before], 1), dim=1)


def sides(data, carried):
    """(N,) "train", "val" or "test" of each image in a carried split, "" where it holds none; of
    several the earliest."""
    known = dict(sorted(zip(*carried.tolist()), reverse=True))
    found = (known.get(h) for h in data.table["hash"].view("int64").tolist())
    return np.array(["" if side is None else SIDES[side] for side in found], "U5")


def make_split(data, seed, known=None, allow_seen=False):
    """(N,) "train", "val" or "test": as given, or drawn, 70/10/20 of a whole, in whole units and
    stratified; images without labels are for training (F.2.1).

    known: (N,) sides in an earlier split, "" for none, or bool: whether pre-training saw it; a unit
    stays on the earliest side of its images. Raises UserError where nothing is left to test on,
    unless allow_seen.
    """
    split = data.given.astype("U5")
    drawn = {name: share for name, share in SHARES.items() if not (split == name).any()}
    split[split == ""] = "train"
    pool = split == "train"
    if not pool.any():
        raise UserError(f"{data.path}: the given split leaves no image for training")
    if data.groups is not None:
        on = Counter(g for g, _ in dict.fromkeys(zip(data.groups.tolist(), split.tolist())))
        parted = [group for group, n in on.items() if n > 1]
        if parted:
            what = f"the given split parts {len(parted)} of {len(on)} groups ({preview(parted)})"
            raise UserError(f"{data.path}: {what}; give another, or leave out --group-col")
    if not drawn or not data.classes:
        return split
    unit = np.unique(indivisible_units(data)[pool], return_inverse=True)[1]
    order, _ = stratified_order(data.labels[pool], unit, np.random.default_rng([seed, 0]))
    size, known = np.bincount(unit), np.zeros(len(data), bool) if known is None else known
    known = np.where(known, "train", "") if known.dtype == bool else known
    rank = np.full(len(size), 3)  # of each unit: its earliest known side, or none
    np.minimum.at(rank, unit, [(*SIDES, "").index(side) for side in known[pool]])
    which = _cut(order, size, drawn)
    if (rank == 0).all():
        if "test" in drawn and not allow_seen:
            raise UserError(f"{data.path}: pre-training saw all; add images or give --allow-seen")
        data.notes.append(f"pre-training saw every image: {' and '.join(drawn)} hold such images")
    elif any((which != side)[rank == i].any() for i, side in enumerate(SIDES)):
        key = np.choose(rank, (0, 2, 3, 1))  # known training units first, others before known
        order = order[np.argsort(key[order], kind="stable")]
        which = _cut(order, size, drawn, size[rank == 0].sum())
        for i, side in enumerate(SIDES):
            which[rank == i] = side
    split[pool] = which[unit]
    for name in drawn:
        if 0 < (n := (split == name).sum()) < FEW:
            data.notes.append(f"only {n} images are drawn for {name}: too few to judge by")
    return split


def _cut(order, size, drawn, n_train=0):
    """(U,) "train", "val" or "test" for units of these sizes, in this order: the last ones for what
    is drawn, {name: share of all images}, and at least the first n_train images for training."""
    middle = np.cumsum(size[order]) - size[order] / 2
    n, kept = size.sum(), sum(SHARES.values()) - sum(drawn.values())
    shares = {name: share / (1 - kept) for name, share in drawn.items()}
    start = max(n * (1 - sum(shares.values())), n_train)
    rest, which = n - start, np.full(len(order), "train")
    for name, share in shares.items():
        which[order[middle >= start]] = name
        start += rest * share / sum(shares.values())
    return which


def label_fraction(data, train, frac, seed):
    """(N,) bool: the training images whose labels are used, a share `frac` of them: stratified, in
    whole units, with every class, and nested (a seed's 1 % are part of its 10 %). Raises UserError
    where the fraction is too small."""
    index = np.flatnonzero(train)
    labels = data.labels[index]
    absent = [c for c, n in zip(data.classes, labels.sum(0)) if n == 0]
    if absent:
        raise UserError(f"{data.path}: no training image has the label {preview(absent)}")
    unit = np.unique(indivisible_units(data)[index], return_inverse=True)[1]
    order, n_cover = stratified_order(labels, unit, np.random.default_rng([seed, 1]))
    end = np.cumsum(np.bincount(unit)[order])
    wanted = math.floor(frac * len(index) + 0.5)
    if wanted < end[n_cover - 1]:
        smallest = math.ceil((end[n_cover - 1] - 0.5) / len(index) * 1e5) / 1e5
        few = f"--frac {frac:g} gives {wanted} images, too few for {len(data.classes)} classes"
        raise UserError(f"{few}; the smallest fraction that holds each is {smallest:g}")
    used = np.zeros(len(data), bool)
    used[index[np.isin(unit, order[end <= wanted])]] = True
    return used
