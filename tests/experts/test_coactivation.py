"""Clusters of units: planted groups are found, sizes are equal, all clusters together are the dense layer."""

import itertools

import pytest
import torch
from experts.correlated import DENSE, calibrated, correlated

from megatron_l0moe.experts.construction import ConstructionSettings, construct_layer
from megatron_l0moe.experts.unit_choice import (
    Calibration,
    assign_evenly,
    balanced_clusters,
    cluster_of,
    number_shared,
)

FFN, HIDDEN = DENSE
# products of float32 weights with factors of 2 and sums of 24 terms
FLOAT32_ATOL = 1e-4


@pytest.mark.parametrize(
    ("width", "experts", "channels", "share", "expected"),
    [
        (1024, 64, 14336, 0.5, 813),  # (65536 - 14336) / 63 = 812.7
        (192, 8, 1536, 0.5, 96),
        (192, 8, 1536, 0.0, 0),  # 8 clusters tile the layer
        (48, 2, 48, 0.0, 48),  # full width: nothing is left to cluster
        (16, 2, 48, 1.0, 16),
    ],
)
def test_number_of_shared_units(width, experts, channels, share, expected):
    found = number_shared(width, experts, channels, share)
    assert found == expected
    assert experts * (width - found) <= channels - found


def planted(groups, size, tokens=90):
    """Patterns [T, N] of groups that are active on tokens of their own, and whose units are mixed up."""
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(groups * size, generator=generator)
    group = (torch.arange(groups * size) % groups)[order]
    token_group = torch.arange(tokens) % groups
    noise = torch.rand(tokens, groups * size, generator=generator) < 0.1
    return (token_group[:, None] == group) ^ noise, group


def test_planted_clusters_are_found():
    patterns, group = planted(3, 5)
    counts = patterns.double().T @ patterns.double()
    length = counts.diagonal().sqrt()
    labels = balanced_clusters(counts / torch.outer(length, length), 3)
    found = {frozenset((labels == c).nonzero().flatten().tolist()) for c in range(3)}
    assert found == {frozenset((group == g).nonzero().flatten().tolist()) for g in range(3)}
    shuffled = torch.roll(group, 1)  # control
    assert found != {frozenset((shuffled == g).nonzero().flatten().tolist()) for g in range(3)}


def test_even_assignment_by_hand():
    """Three units want cluster 0, which has room for two: the nearest two get it."""
    near = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.95, 0.2], [0.1, 0.3]])
    assert assign_evenly(near, 2).tolist() == [0, 1, 0, 1]


def test_clusters_are_no_worse_than_any_other_split_of_a_small_case():
    patterns, _ = planted(2, 3, tokens=40)
    counts = patterns.double().T @ patterns.double()
    length = counts.diagonal().sqrt()
    similarity = counts / torch.outer(length, length)

    def quality(first):
        second = [j for j in range(6) if j not in first]
        return sum(float(similarity[part][:, part].sum()) for part in (list(first), second))

    labels = balanced_clusters(similarity, 2)
    best = max(quality(first) for first in itertools.combinations(range(6), 3))
    assert quality((labels == 0).nonzero().flatten().tolist()) == pytest.approx(best)


def experts_of(share, width, count):
    inputs, activations, fc2 = correlated()
    calibration = calibrated(inputs, activations, "coactivation", fc2, width)
    made = [
        construct_layer(
            ConstructionSettings(
                method="coactivation", width=width, expert=k, num_experts=count, top_k=count, damping=0.01,
                shared=share, seed=1,
            ),
            0,
            calibration,
            fc2,
        )
        for k in range(count)
    ]  # fmt: skip
    return made, activations, fc2


@pytest.mark.parametrize(("share", "width"), [(0.0, 8), (0.0, 12), (0.4, 12)])
def test_all_experts_with_equal_weights_are_the_dense_layer(share, width):
    """Three experts that cover all 24 units, and top-3: the mean of their outputs is the dense layer's output."""
    made, activations, fc2 = experts_of(share, width, 3)
    assert set(torch.cat([expert.units for expert in made]).tolist()) == set(range(FFN))
    mean = sum(activations @ _whole(expert, fc2).T for expert in made) / 3
    torch.testing.assert_close(mean, activations @ fc2.T, atol=FLOAT32_ATOL, rtol=0)
    one = activations @ _whole(made[0], fc2).T
    assert (one - activations @ fc2.T).abs().max() > 100 * FLOAT32_ATOL  # control


def _whole(expert, fc2):
    whole = torch.zeros_like(fc2)
    whole[:, expert.units] = expert.down.to(fc2.dtype)
    return whole


def test_experts_share_the_most_active_units_and_nothing_else():
    made, _, _ = experts_of(0.5, 10, 3)
    sets = [set(expert.units.tolist()) for expert in made]
    assert [len(s) for s in sets] == [10, 10, 10]
    common = set.intersection(*sets)
    assert len(common) == 5 == made[0].numbers["shared_units"]
    assert all(a & b == common for a, b in itertools.combinations(sets, 2))


def test_the_router_starts_from_the_tokens_that_a_cluster_is_active_on():
    """Units 0, 1 are active on inputs (1, 0), units 2, 3 on (0, 1): the centres are these inputs."""
    patterns = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]]).float()
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    calibration = Calibration(
        tokens=3,
        input_mean=inputs.mean(0),
        activation_squares=patterns.sum(0).double(),
        pairs=patterns.T @ patterns,
        pattern_inputs=patterns.T @ inputs,
    )
    found = [cluster_of(calibration, expert=k, experts=2, width=2, share=0.0) for k in (0, 1)]
    assert [sorted(cluster.own.tolist()) for cluster in found] == [[0, 1], [2, 3]]
    assert [cluster.centre.tolist() for cluster in found] == [[1.0, 0.0], [0.0, 1.0]]


def test_units_that_are_never_active_do_no_harm():
    inputs, activations, fc2 = correlated()
    activations[:, 12:] = 0
    calibration = calibrated(inputs, activations, "coactivation", fc2, 8)
    for k in range(3):
        cluster = cluster_of(calibration, expert=k, experts=3, width=8, share=0.0)
        assert cluster.centre.isfinite().all()
        assert cluster.centre.shape == (HIDDEN,)
