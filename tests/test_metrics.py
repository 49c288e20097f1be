"""Every score against scikit-learn, every interval against SciPy and slow loops."""

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from sklearn import metrics as sk

from common import metrics
from common.metrics import measures, score
from tools.compare import mcnemar


def drawn(seed, n=60, classes=4, multilabel=False):
    """Labels (N, C) bool, sigmoids and a distribution that know something of them; multilabel."""
    rng = np.random.default_rng(seed)
    labels = np.eye(classes, dtype=bool)[rng.integers(0, classes, n)]
    if multilabel:
        labels = rng.random((n, classes)) < np.linspace(0.2, 0.7, classes)
    logits = torch.from_numpy(2 * labels + rng.normal(0, 1.5, labels.shape))
    return labels, *metrics.probabilities_of(logits, 1.3, multilabel), multilabel


@pytest.mark.parametrize("seed", range(5))
def test_multiclass_scores(seed):
    labels, p, q, _ = drawn(seed)
    true, predicted = labels.argmax(1), p.argmax(1)
    ours = score(None, labels, p, q, False, list("abcd"))
    assert ours["macro_f1"] == pytest.approx(sk.f1_score(true, predicted, average="macro"))
    assert ours["micro_f1"] == pytest.approx(sk.f1_score(true, predicted, average="micro"))
    assert ours["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(true, predicted))
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(true, predicted))
    assert ours["auroc"] == pytest.approx(sk.roc_auc_score(labels, p, average="macro"))
    assert ours["brier"] == pytest.approx(sum(sk.brier_score_loss(*x) for x in zip(labels.T, q.T)))
    assert ours["confusion"] == sk.confusion_matrix(true, predicted).tolist()
    precision, recall, f1, support = sk.precision_recall_fscore_support(true, predicted)
    for i, row in enumerate(ours["per_class"]):
        assert (row["precision"], row["recall"], row["f1"], row["support"]) == pytest.approx(
            (precision[i], recall[i], f1[i], support[i])
        )


@pytest.mark.parametrize("seed", range(5))
def test_multilabel_scores(seed):
    labels, p, q, _ = drawn(seed, multilabel=True)
    ours, predicted = score(None, labels, p, q, True, list("abcd")), p >= 0.5
    for average in ("macro", "micro"):
        expected = sk.f1_score(labels, predicted, average=average)
        assert ours[f"{average}_f1"] == pytest.approx(expected)
    assert ours["auroc"] == pytest.approx(sk.roc_auc_score(labels, p, average="macro"))
    assert ours["exact_match"] == pytest.approx(sk.accuracy_score(labels, predicted))
    each = [sk.brier_score_loss(*x) for x in zip(labels.T, q.T)]
    assert ours["brier"] == pytest.approx(np.mean(each))
    for (tn, fp), (fn, tp), ours_row in zip(
        *np.moveaxis(sk.multilabel_confusion_matrix(labels, predicted), 1, 0), ours["confusion"]
    ):
        assert ours_row == [tp, fp, fn, tn]


def test_auroc_shares_ties():
    rng = np.random.default_rng(0)
    positive, scores = rng.integers(0, 2, 200) > 0, rng.integers(0, 5, 200)
    (ours,) = metrics.auroc(positive, scores, np.ones((1, 200)))
    assert ours == pytest.approx(sk.roc_auc_score(positive, scores))


@pytest.mark.parametrize("multilabel", [False, True])
def test_expected_calibration_error_is_a_loop_over_the_bins(multilabel):
    labels, p, q, _ = what = drawn(3, 400, multilabel=multilabel)
    ours = measures(*what, np.ones((1, 400)))[0]
    for key, x in (("ece", q), ("ece_uncalibrated", p)):
        confidence = x.ravel() if multilabel else x.max(1)
        right = labels.ravel() if multilabel else labels[np.arange(400), x.argmax(1)]
        gaps = 0
        for b in range(15):
            inside = (confidence * 15 >= b) & (confidence * 15 < b + 1)
            if inside.any():
                gaps += abs(confidence[inside].mean() - right[inside].mean()) * inside.mean()
        assert ours[key][0] == pytest.approx(gaps)


def of_indices(true, predicted, classes):
    one_hot = np.eye(len(classes), dtype=bool)
    found = one_hot[predicted] + 0.0
    return score(None, one_hot[true], found, found, False, classes)


def test_absent_classes_are_defined():
    ours = of_indices([0, 0, 1], [0, 1, 1], list("abcd"))
    assert ours["balanced_accuracy"] == pytest.approx(0.75)  # of the two classes that are there
    assert ours["macro_f1"] == pytest.approx(
        sk.f1_score([0, 0, 1], [0, 1, 1], labels=range(4), average="macro", zero_division=0)
    )
    assert ours["per_class"][3]["auroc"] is None
    assert of_indices([0, 0], [0, 0], list("ab"))["auroc"] is None


def test_confusion_matrix_has_true_classes_in_rows():
    assert of_indices([0, 0, 1], [1, 1, 1], list("ab"))["confusion"] == [[0, 2], [0, 1]]


# probabilities


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("scale", [0.4, 3.0])
def test_the_temperature_is_scipys_and_changes_no_prediction(multilabel, scale):
    labels, *_ = drawn(5, 500, multilabel=multilabel)
    rng = np.random.default_rng(1)
    logits = scale * (2 * labels + rng.normal(0, 1.5, labels.shape))

    def loss(T):
        z = logits / T
        if multilabel:
            return np.where(labels, np.logaddexp(0, -z), np.logaddexp(0, z)).mean()
        return (np.log(np.exp(z).sum(1)) - z[labels]).mean()

    best = optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded").x
    ours = metrics.fit_temperature(torch.from_numpy(logits).float(), labels, multilabel)
    assert ours == pytest.approx(best, rel=0.02)
    p, q = metrics.probabilities_of(torch.from_numpy(logits), ours, multilabel)
    same = metrics.predicted_labels(p, multilabel) == metrics.predicted_labels(q, multilabel)
    plain = special.expit(logits / ours) if multilabel else special.softmax(logits / ours, 1)
    assert same.all() and np.allclose(p, special.expit(logits)) and np.allclose(q, plain)
    before, after = (measures(labels, p, x, multilabel, np.ones((1, 500)))[0] for x in (p, q))
    assert multilabel or after["brier"] < before["brier"]


# intervals


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_resample_scores_as_its_images_repeated(multilabel):
    """The weighted scores of every resample against the plain ones of the images, repeated."""
    what, units = drawn(7, 40, 3, multilabel), np.repeat(range(10), 4)
    labels, p, q, _ = what
    replicates, each = metrics.bootstrap(units, *what)
    draws = np.random.default_rng(0).multinomial(10, np.full(10, 0.1), 100)  # the first block
    for i, draw in enumerate(draws[:20]):
        index = np.repeat(np.arange(40), draw[units])
        plain = score(None, labels[index], p[index], q[index], multilabel, list("abc"))
        present = labels[index].any(0)
        for key in replicates.keys() - {"macro_f1"}:  # without the classes that are not drawn
            value = plain[key]
            assert replicates[key][i] == pytest.approx(
                np.nan if value is None else value, nan_ok=True
            )
        assert replicates["macro_f1"][i] == pytest.approx(plain["macro_f1_present"])
        f1 = [row["f1"] for row in plain["per_class"]]
        np.testing.assert_allclose(each["f1"][i][present], np.array(f1)[present])


def test_limits_reach_as_far_as_a_t_interval():
    normal = np.random.default_rng(0).normal(size=200_000)
    for U in (10, 20, 100):
        reach = stats.t.ppf(0.975, U - 1) * np.sqrt(U / (U - 1))
        assert metrics.limits(normal, U) == pytest.approx([-reach, reach], abs=0.05)


def test_intervals_are_scipys_but_for_their_reach():
    what, units = drawn(2, 300), np.arange(300)
    ours = score(units, *what, list("abcd"))["ci95"]
    right = what[0].argmax(1) == what[1].argmax(1)
    how = {"n_resamples": 4000, "method": "percentile", "random_state": 1}
    theirs = stats.bootstrap((right,), np.mean, **how).confidence_interval
    assert ours["accuracy"] == pytest.approx(theirs, abs=0.008)

    def auroc(index):
        return sk.roc_auc_score(what[0][index], what[1][index], average="macro")

    how |= {"n_resamples": 400, "vectorized": False}
    theirs = stats.bootstrap((np.arange(300),), auroc, **how).confidence_interval
    assert ours["auroc"] == pytest.approx(theirs, abs=0.01)


def test_patients_make_intervals_wider():
    labels, p, q, _ = drawn(4, 60)
    copies = [np.repeat(x, 5, 0) for x in (labels, p, q)]  # of each patient five equal images
    plain = score(np.arange(60), labels, p, q, False, list("abcd"))
    patients = score(np.repeat(range(60), 5), *copies, False, list("abcd"))
    images = score(np.arange(300), *copies, False, list("abcd"))
    assert patients["n_units"] == 60 and patients["n"] == 300
    assert patients["ci95"]["accuracy"] == pytest.approx(plain["ci95"]["accuracy"])
    widths = [np.diff(x["ci95"]["accuracy"]) for x in (patients, images)]
    assert widths[0] > 2 * widths[1]


def test_three_of_four_intervals_hold_the_truth_and_more():
    """A quick look; results/intervals measures it."""
    held, truth = [], stats.norm.cdf(1)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels = np.eye(2, dtype=bool)[rng.integers(0, 2, 80)]
        margin = rng.normal(1, 1, 80) * np.where(labels[:, 1], 1, -1)
        p = stats.norm.cdf(np.stack([-margin, margin], 1))
        low, high = score(np.arange(80), labels, p, p, False, list("ab"))["ci95"]["accuracy"]
        held.append(low <= truth <= high)
    assert 0.87 < np.mean(held)


def test_too_few_have_no_interval():
    labels, p, q, _ = drawn(0, 60)
    labels[:], labels[5:, 0], labels[:5, 1] = False, True, True  # five images of b
    found = score(np.arange(60), labels, p, q, False, list("abcd"))
    assert found["ci95"]["accuracy"] and found["ci95"]["ece"] is None
    assert found["ci95"]["macro_f1"] is None and found["ci95"]["balanced_accuracy"] is None
    of_a, of_b = (row["ci95"] for row in found["per_class"][:2])
    assert of_a["recall"] and of_a["auroc"] is None and of_b["recall"] is None
    few = score(np.arange(60) % 19, labels, p, q, False, list("abcd"))
    assert set(few["ci95"].values()) == {None} and few["n_units"] == 19
    one = score(np.zeros(60, int), labels, p, q, False, list("abcd"))  # a single patient
    assert set(one["ci95"].values()) == {None} and one["n_units"] == 1
    perfect = score(np.arange(60), labels, labels + 0.0, labels + 0.0, False, list("abcd"))
    assert perfect["accuracy"] == 1 and perfect["ci95"]["accuracy"] is None  # nothing varies


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (3, 9), (12, 1), (400, 450)])
def test_mcnemars_test_is_the_binomial_one(only_a, only_b):
    right = np.zeros((2, 1000), bool)
    right[0, :only_a], right[1, only_a : only_a + only_b], right[:, 900:] = True, True, True
    labels = np.ones((1000, 1), bool)
    found = mcnemar(labels, *right[:, :, None])
    assert (found["only_a"], found["only_b"]) == (only_a, only_b)
    n = only_a + only_b
    assert found["p"] == pytest.approx(stats.binomtest(only_a, n).pvalue if n else 1)
