"""Equations 4 and 5: numbers worked by hand, then naive float64 loops; matching; order."""

import math

import numpy as np
import pytest

from megatron_l0moe.curate.ccm import (
    ascending_order,
    confusion,
    cosine,
    match_centres,
    semantic_distance,
    training_order,
)

FLOAT64_SUM_ORDER = 1e-12  # numpy sums pairwise, the loops one by one


def naive_sim(a, b) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def naive_confusion(c, new, delta):
    """Equation 4, term by term as printed."""
    k_all = range(len(c))
    f1 = [sum(math.exp(1 - naive_sim(c[i], new[k])) for k in k_all) / len(c) for i in k_all]
    f2 = [sum(math.exp(1 - naive_sim(c[k], new[i])) for k in k_all) / len(c) for i in k_all]
    f3 = [
        delta
        * sum(math.exp(naive_sim(new[k], new[i])) for k in k_all)
        / sum(math.exp(naive_sim(c[k], c[i])) for k in k_all)
        for i in k_all
    ]
    return f1, f2, f3


def test_hand_worked_numbers() -> None:
    """K = 2: C = {x, y}; new centres {x, -x}: sims C x new = [[1, -1], [0, 0]]."""
    e = math.e
    terms = confusion(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[3.0, 0.0], [-1.0, 0.0]]), delta=0.1)
    assert terms.f1 == pytest.approx([(1 + e**2) / 2, e])  # rows: (e^0 + e^2) / 2, (e^1 + e^1) / 2
    assert terms.f2 == pytest.approx(
        [(1 + e) / 2, (e**2 + e) / 2]
    )  # columns: (e^0 + e^1) / 2, (e^2 + e^1) / 2
    ratio = (e + 1 / e) / (e + 1)  # within new: sims 1 and -1; within C: sims 1 and 0
    assert terms.f3 == pytest.approx([0.1 * ratio] * 2)
    expected = [((1 + e**2) / 2 + (1 + e) / 2) * 0.1 * ratio, (e + (e**2 + e) / 2) * 0.1 * ratio]
    assert terms.ccm == pytest.approx(expected)


def test_identical_orthogonal_centres() -> None:
    """f3 = delta and CCM = 2 * delta * (1 + (K - 1) e) / K for every i when nothing moved."""
    terms = confusion(np.eye(3), np.eye(3), delta=0.1)
    assert terms.ccm == pytest.approx([2 * 0.1 * (1 + 2 * math.e) / 3] * 3)


def test_semantic_distance_by_hand() -> None:
    assert semantic_distance(np.array([1.0, 3.0, 2.0]), beta=0.5) == pytest.approx(3.0 + 0.5 / 3 * 6.0)


@pytest.mark.parametrize("k", [2, 5, 16])
def test_against_naive_loops(k: int) -> None:
    rng = np.random.default_rng(k)
    c, new = rng.normal(size=(k, 7)), rng.normal(size=(k, 7))
    terms = confusion(c, new, delta=0.3)
    for found, expected in zip((terms.f1, terms.f2, terms.f3), naive_confusion(c, new, 0.3), strict=True):
        np.testing.assert_allclose(found, expected, rtol=FLOAT64_SUM_ORDER)
    # Controls: swapping the two sets or f1 and f2 must be seen.
    assert not np.allclose(confusion(new, c, delta=0.3).f3, terms.f3)
    assert not np.allclose(terms.f1, terms.f2)


def test_cosine_ignores_length() -> None:
    a = np.array([[1.0, 1.0], [0.0, 5.0]], dtype=np.float32)
    np.testing.assert_allclose(cosine(a, a * 9), [[1, math.sqrt(0.5)], [math.sqrt(0.5), 1]], rtol=1e-6)


def test_matching_undoes_a_permutation() -> None:
    rng = np.random.default_rng(0)
    initial = rng.normal(size=(8, 5))
    shuffle = rng.permutation(8)
    moved = (initial + rng.normal(size=(8, 5)) * 0.05)[shuffle]
    permutation = match_centres(initial, moved, method="hungarian")
    assert shuffle[permutation].tolist() == list(range(8))
    assert match_centres(initial, moved, method="none").tolist() == list(range(8))


def test_matching_is_the_best_sum_not_greedy() -> None:
    """Greedy pairs the first centre with its nearest (0.9) and leaves the second one with -0.5."""
    similarity = np.array([[0.9, 0.8], [0.85, -0.5]])
    initial = np.eye(2)
    new = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 2)))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_l0moe.curate.ccm.cosine", lambda a, b: similarity)
        assert match_centres(initial, new, method="hungarian").tolist() == [1, 0]


def test_order_is_ascending_with_ties_by_number() -> None:
    assert ascending_order([0.3, 0.1, 0.2, 0.1]) == [2, 4, 3, 1]


def test_orders_of_the_ablations() -> None:
    distances = [0.3, 0.1, 0.2, 0.4]
    assert training_order(distances, order="ascending", seed=1) == [2, 3, 1, 4]
    assert training_order(distances, order="descending", seed=1) == [4, 1, 3, 2]
    orders = {tuple(training_order(distances, order="random", seed=seed)) for seed in range(400)}
    assert len(orders) == 24  # every permutation comes up
    again = [training_order(distances, order="random", seed=1) for distances in ([1, 2, 3, 4], [4, 3, 2, 1])]
    assert again[0] == again[1]  # the distances are not looked at
