"""Logistic regression on frozen features.

This is a convex fit to stored features, solved to convergence, without augmentation or a learning rate. The paper's
protocol (linear.py) is a different one: do not mix their numbers.
"""

# n train rows, m test rows, F feature width

from __future__ import annotations

import logging
import math
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mnclglf.data.splits import per_class_draws
from mnclglf.evaluation.accuracy import Accuracy, accuracy_of_scores
from mnclglf.evaluation.features import check_sets

# scikit-learn's C: a penalty |w|^2 / 2C is added to the summed loss. The best C depends on the representation. Accuracy
# on 800 held-out digits at these three: raw pixels 0.896, 0.904, 0.885; features of a trained encoder 0.866, 0.901,
# 0.917.
C_GRID = (0.01, 0.1, 1.0)
DEFAULT_C = 0.1
SELECTION_ROWS = 10_000  # train rows used to choose C
# Chosen from 0.01 .. 10 at 10 labels per class: the best for raw pixels (0.754) and the untrained encoder (0.585), and
# within 0.023 of the best for the trained one.
FEW_LABELS_C = 0.1
MAX_ITERATIONS = 1000

logger = logging.getLogger(__name__)


def fit_logistic(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    c: float = DEFAULT_C,
    max_iterations: int = MAX_ITERATIONS,
) -> Accuracy:
    """Returns the test accuracy of multinomial logistic regression on standardized features (L-BFGS, L2 penalty).

    Args:
        train_features: train rows [n, F]; each column is standardized by its own mean and deviation.
        train_labels: train labels, int64 [n].
        test_features: test rows [m, F].
        test_labels: test labels, int64 [m].
        classes: number of classes; a class without train labels is never predicted.
        c: scikit-learn's inverse strength of the penalty; see `choose_c`.
        max_iterations: limit of L-BFGS. A fit that has not converged by then is marked in the result's note and logged.

    Raises:
        ValueError: the sets are empty, not finite or do not match, or there are fewer than two classes to learn.
    """
    check_sets(train_features, train_labels, test_features, test_labels, classes)
    train, test = standardize(train_features, test_features)
    return _fit(train, train_labels.cpu().numpy(), test, test_labels.cpu(), classes, c, max_iterations)


def choose_c(features: Tensor, labels: Tensor, *, classes: int) -> float:
    """Returns the C of C_GRID whose fit to four fifths of the rows classifies the rest best; ties go to the least.

    Fewer than five rows leave none to hold out, and a rare class may have no row in the four fifths. If no fit can be
    made there, the default is returned, with a warning.

    Args:
        features: rows [n, F]; a fixed random choice of at most SELECTION_ROWS is used.
        labels: labels, int64 [n].
        classes: number of classes.
    """
    rows = torch.from_numpy(np.random.default_rng(0).permutation(len(labels))[:SELECTION_ROWS])
    fit, held_out = rows[len(rows) // 5 :], rows[: len(rows) // 5]
    if len(held_out) == 0 or len(labels[fit].unique()) < 2:
        logger.warning(
            "C cannot be chosen on %d images, of which the four fifths to fit have %d class(es): taking the default %s",
            len(rows),
            len(labels[fit].unique()),
            DEFAULT_C,
        )
        return DEFAULT_C
    sets = features[fit], labels[fit], features[held_out], labels[held_out]
    return max(C_GRID, key=lambda c: fit_logistic(*sets, classes=classes, c=c).top1)


def few_labels(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    per_class: int = 10,
    draws: int = 5,
    seed: int = 0,
    c: float = FEW_LABELS_C,
) -> list[Accuracy]:
    """Fits with only `per_class` labels per class, once for each of `draws` random choices of labels.

    The choice depends only on the train labels and the seed, so it is the same for every representation. All train
    features are standardized together, as that needs no labels.

    Raises:
        ValueError: see `fit_logistic`; also if a class has fewer than `per_class` images.
    """
    check_sets(train_features, train_labels, test_features, test_labels, classes)
    train, test = standardize(train_features, test_features)
    labels = train_labels.cpu().numpy()
    return [
        _fit(train[rows], labels[rows], test, test_labels.cpu(), classes, c, MAX_ITERATIONS)
        for rows in per_class_draws(labels, classes=classes, per_class=per_class, draws=draws, seed=seed)
    ]


def standardize(train: Tensor, test: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns both sets standardized by the train set's mean and deviation, column by column.

    A deviation is at least a thousandth of the largest one. Otherwise an almost constant column would be divided by
    nearly 0, and one outlying pixel of a test image would outweigh everything else.
    """
    mean, deviation = train.float().mean(dim=0), train.float().std(dim=0, correction=0)
    scale = deviation.clamp_min(1e-3 * float(deviation.max()))
    scale = torch.where(scale > 0, scale, 1.0)
    first, second = ((part.float() - mean).div_(scale).cpu().numpy() for part in (train, test))
    return first, second


def _fit(
    train: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test: NDArray[np.float32],
    test_labels: Tensor,
    classes: int,
    c: float,
    max_iterations: int,
) -> Accuracy:
    if len(np.unique(train_labels)) < 2:
        raise ValueError(f"all {len(train_labels)} train labels are {train_labels[0]}: there is nothing to tell apart")
    model = LogisticRegression(C=c, max_iter=max_iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(train, train_labels)
    unfinished = [warning for warning in caught if issubclass(warning.category, ConvergenceWarning)]
    for warning in caught:
        if warning not in unfinished:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    scores = torch.full((len(test), classes), -math.inf, dtype=torch.float64)
    scores[:, torch.from_numpy(model.classes_)] = torch.from_numpy(_decisions(model, test)).double()
    accuracy = accuracy_of_scores(scores, test_labels)
    if not unfinished:
        return accuracy
    note = f"not converged after {int(model.n_iter_.max())} iterations"
    logger.warning("logistic regression %s: its accuracy may be off", note)
    return Accuracy(top1=accuracy.top1, top5=accuracy.top5, note=note)


def _decisions(model: LogisticRegression, test: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns scores [m, classes seen]; scikit-learn returns a single column for two classes."""
    scores = np.asarray(model.decision_function(test))
    return scores if scores.ndim == 2 else np.stack([-scores, scores], axis=1)
