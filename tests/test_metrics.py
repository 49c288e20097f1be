"""Every score against scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics as sk

from common.metrics import auroc, score


@pytest.mark.parametrize("seed", range(5))
def test_multiclass_scores(seed):
    rng = np.random.default_rng(seed)
    true, probabilities = (
        rng.integers(0, 4, 60),
        rng.random((60, 4)).round(1) + 1e-3 * rng.random((60, 4)),
    )
    ours = score(np.eye(4, dtype=bool)[true], probabilities, list("abcd"), multilabel=False)
    predicted = probabilities.argmax(1)
    assert ours["macro_f1"] == pytest.approx(sk.f1_score(true, predicted, average="macro"))
    assert ours["micro_f1"] == pytest.approx(sk.f1_score(true, predicted, average="micro"))
    assert ours["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(true, predicted))
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(true, predicted))
    one_hot = np.eye(4)[true]
    assert ours["auroc"] == pytest.approx(sk.roc_auc_score(one_hot, probabilities, average="macro"))
    assert ours["confusion"] == sk.confusion_matrix(true, predicted).tolist()
    precision, recall, f1, support = sk.precision_recall_fscore_support(true, predicted)
    for i, row in enumerate(ours["per_class"]):
        assert (row["precision"], row["recall"], row["f1"], row["support"]) == pytest.approx(
            (precision[i], recall[i], f1[i], support[i])
        )


@pytest.mark.parametrize("seed", range(5))
def test_multilabel_scores(seed):
    rng = np.random.default_rng(seed)
    true, probabilities = rng.random((50, 3)) < [0.5, 0.1, 0.9], rng.random((50, 3))
    ours = score(true, probabilities, list("abc"), multilabel=True)
    predicted = probabilities >= 0.5
    for average in ("macro", "micro"):
        assert ours[f"{average}_f1"] == pytest.approx(sk.f1_score(true, predicted, average=average))
    assert ours["auroc"] == pytest.approx(sk.roc_auc_score(true, probabilities, average="macro"))
    assert ours["exact_match"] == pytest.approx(sk.accuracy_score(true, predicted))
    for (tn, fp), (fn, tp), ours_row in zip(
        *np.moveaxis(sk.multilabel_confusion_matrix(true, predicted), 1, 0), ours["confusion"]
    ):
        assert ours_row == [tp, fp, fn, tn]


def test_auroc_shares_ties():
    rng = np.random.default_rng(0)
    positive, scores = rng.integers(0, 2, 200), rng.integers(0, 5, 200)
    assert auroc(positive, scores) == pytest.approx(sk.roc_auc_score(positive, scores))


def of_indices(true, predicted, classes):
    one_hot = np.eye(len(classes), dtype=bool)
    return score(one_hot[true], one_hot[predicted] + 0.0, classes, multilabel=False)


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
