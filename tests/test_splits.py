from collections import Counter

import numpy as np
import pytest
import torch

from common.cli import UserError
from common.readers import ImageSet
from common.splits import (
    carried,
    cross_split_duplicates,
    indivisible_units,
    label_fraction,
    make_split,
    stratified_order,
)


def a_set(labels, given=None, groups=None, hashes=None):
    """What splits needs of an ImageSet; labels (N, C) or class indices."""
    labels = np.asarray(labels)
    if labels.ndim == 1:
        labels = np.eye(labels.max() + 1, dtype=bool)[labels]
    n = len(labels)
    table = np.zeros(n, [("hash", "u8")])
    table["hash"] = np.arange(n) if hashes is None else hashes
    return ImageSet(
        "set",
        [str(i) for i in range(n)],
        [],
        labels.astype(bool),
        [str(c) for c in range(labels.shape[1])],
        np.array(given or [""] * n),
        None if groups is None else np.array(groups),
        table=table,
    )


def seen(images, mask):
    """What weights files carry of a pre-training that saw the masked images."""
    hashes = torch.from_numpy(images.table["hash"][mask].view("int64"))
    return torch.stack([hashes, torch.zeros_like(hashes)])


def long_tailed(n=1000, seed=0):
    return np.random.default_rng(seed).choice(5, n, p=[0.6, 0.2, 0.1, 0.07, 0.03])


def test_split_is_70_10_20_in_every_class():
    labels = long_tailed()
    split = make_split(a_set(labels), 0)
    assert Counter(split) == {"train": 700, "val": 100, "test": 200}
    for c in range(5):
        n = (labels == c).sum()
        for name, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
            assert abs((split[labels == c] == name).sum() - share * n) <= 1.5


def test_split_is_seeded():
    images = a_set(long_tailed())
    assert (make_split(images, 0) == make_split(images, 0)).all()
    assert (make_split(images, 0) != make_split(images, 1)).any()


def test_a_given_test_split_stays_and_validation_is_an_eighth_of_the_rest():
    labels, given = long_tailed(), ["test" if i < 200 else "train" for i in range(1000)]
    split = make_split(a_set(labels, given), 0)
    assert (split[:200] == "test").all()
    assert Counter(split[200:]) == {"train": 700, "val": 100}


def test_a_given_validation_split_stays_too():
    given = ["val" if i < 100 else "train" for i in range(1000)]
    split = make_split(a_set(long_tailed(), given), 0)
    assert (split[:100] == "val").all()
    assert Counter(split[100:]) == {"train": 700, "test": 200}


def test_images_without_labels_are_all_for_training():
    images = a_set(np.zeros((10, 0)))
    assert (make_split(images, 0) == "train").all()


def test_groups_and_identical_images_stay_together():
    rng = np.random.default_rng(0)
    groups, hashes = rng.integers(0, 300, 1000), np.arange(1000)
    hashes[500:520] = hashes[:20]
    images = a_set(long_tailed(), groups=[f"p{g}" for g in groups], hashes=hashes)
    split = make_split(images, 0)
    for keys in (groups, hashes):
        for key in np.unique(keys):
            assert len(set(split[keys == key])) == 1
    assert not cross_split_duplicates(images, split).any()
    assert 680 <= (split == "train").sum() <= 720 and 180 <= (split == "test").sum() <= 220


def test_a_given_split_that_parts_groups_is_refused():
    given = ["test" if i % 5 == 0 else "train" for i in range(100)]
    images = a_set(long_tailed(100), given, groups=[f"p{i // 2}" for i in range(100)])
    with pytest.raises(UserError, match="parts 20 of 50 groups.*p0.*--group-by"):
        make_split(images, 0)


def test_a_split_without_training_images_is_refused():
    with pytest.raises(UserError, match="no image for training"):
        make_split(a_set(long_tailed(10), ["test"] * 10), 0)


def test_units_join_what_is_linked_in_a_chain():
    images = a_set([0] * 6, groups=list("aabbcd"), hashes=[1, 2, 2, 3, 4, 5])
    unit = indivisible_units(images)
    assert len({unit[0], unit[1], unit[2], unit[3]}) == 1
    assert len(set(unit)) == 3


@pytest.mark.parametrize("seed", range(3))
def test_fractions_are_nested_stratified_and_hold_every_class(seed):
    labels = long_tailed()
    images = a_set(labels)
    train = make_split(images, 0) == "train"
    previous = np.zeros(1000, bool)
    for frac in (0.01, 0.05, 0.1, 0.5, 1.0):
        used = label_fraction(images, train, frac, seed)
        assert not (used & ~train).any() and not (previous & ~used).any()
        assert used.sum() == round(frac * train.sum())
        counts = np.bincount(labels[used], minlength=5)
        assert (counts >= 1).all()
        for c, n in enumerate(counts):
            expected = frac * (labels[train] == c).sum()
            assert n == 1 or abs(n - expected) <= 5
        previous = used
    assert (previous == train).all()


def test_another_seed_draws_other_labels():
    images = a_set(long_tailed())
    train = np.ones(1000, bool)
    assert (label_fraction(images, train, 0.1, 0) != label_fraction(images, train, 0.1, 1)).any()


def test_multilabel_fraction_holds_every_label():
    rng = np.random.default_rng(0)
    labels = rng.random((400, 4)) < [0.7, 0.3, 0.02, 0.1]
    images = a_set(labels)
    assert (label_fraction(images, np.ones(400, bool), 0.01, 0) @ labels >= 1).all()
    split = make_split(images, 0)
    for name, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert np.abs(labels[split == name].mean(0) - labels.mean(0)).max() < 0.1
        empty = ~labels.any(1)
        assert abs((empty & (split == name)).sum() - share * empty.sum()) <= 2


def test_the_smallest_possible_fraction_is_named_and_works():
    images = a_set(long_tailed(100))
    train = np.ones(100, bool)
    with pytest.raises(UserError, match="smallest fraction") as error:
        label_fraction(images, train, 0.01, 0)
    smallest = float(str(error.value).split()[-1])
    assert (label_fraction(images, train, smallest, 0) @ images.labels >= 1).all()
    with pytest.raises(UserError):
        label_fraction(images, train, smallest - 1e-3, 0)


def test_a_class_without_a_training_image_is_named():
    images = a_set([0, 0, 1, 1])
    with pytest.raises(UserError, match="label 1"):
        label_fraction(images, np.array([True, True, False, False]), 1.0, 0)


def test_every_prefix_of_the_order_is_stratified():
    labels = long_tailed(500)
    order, n_cover = stratified_order(
        np.eye(5, dtype=bool)[labels], np.arange(500), np.random.default_rng(0)
    )
    assert sorted(order) == list(range(500)) and n_cover == 5
    assert set(labels[order[:5]]) == set(range(5))
    for k in (50, 100, 333):
        share = np.bincount(labels[order[:k]], minlength=5) / k
        assert np.abs(share - np.bincount(labels) / 500).max() < 5 / k


def test_what_pre_training_saw_is_neither_for_validation_nor_for_test():
    images = a_set(long_tailed())
    for share in (0.3, 0.7, 0.9):
        mask = np.random.default_rng(0).random(1000) < share
        split = make_split(images, 0, seen(images, mask))
        assert (split[mask] == "train").all()
        assert (split == "test").any() and (split == "val").any()
    same = make_split(images, 0)
    assert (make_split(images, 0, seen(images, same == "train")) == same).all()
    other = make_split(images, 1)
    assert (make_split(images, 0, carried(images, other)) == other).all()


def test_where_everything_was_seen_there_is_no_honest_test():
    images = a_set(long_tailed())
    with pytest.raises(UserError, match="--allow-seen"):
        make_split(images, 0, seen(images, np.ones(1000, bool)))
    known = seen(images, np.ones(1000, bool))
    assert Counter(make_split(images, 0, known, allow_seen=True))["test"] == 200
    given = a_set(long_tailed(), ["test" if i < 200 else "train" for i in range(1000)])
    known = seen(given, np.arange(1000) >= 200)  # validation has nothing unseen to take
    split = make_split(given, 0, known)
    assert Counter(split) == {"train": 700, "val": 100, "test": 200}
    assert "validation" not in split and given.notes
