"""Experts as clusters of units that are active on the same tokens, from the text of all domains (after CMoE).

F = FFN channels, E = units of an expert, K = experts, N = units that are clustered, C [F, F] = numbers of tokens on
which two units are both active, n = diag C.

An expert is s units that all experts have, those active most often, and one cluster of E - s others. Weights of the
chosen experts sum to 1, so shared units count once; a cluster's columns of fc2 are multiplied by top_k, so that with
equal weights the sum over the chosen experts is that of the dense layer's units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_l0moe.experts.calibration import Calibration

ROUNDS = 20


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The units of one expert."""

    shared: Tensor
    """int64 [s]."""
    own: Tensor
    """int64 [E - s]."""
    centre: Tensor
    """fp32 [H], mean input of the tokens on which the own units are active; the router's direction."""


def number_shared(width: int, experts: int, channels: int, share: float) -> int:
    """Return s: the asked share of E, and so many that K clusters of E - s units do not need more than there are."""
    needed = -(-(experts * width - channels) // (experts - 1))
    return min(max(round(share * width), needed, 0), width)


def cluster_of(calibration: Calibration, *, expert: int, experts: int, width: int, share: float) -> Cluster:
    """Return the units of one expert; every expert's job finds the same clusters from the same text."""
    counts, inputs = calibration.pairs, calibration.pattern_inputs
    assert counts is not None
    assert inputs is not None
    rate = counts.diagonal()
    shared_count = number_shared(width, experts, rate.numel(), share)
    size = width - shared_count
    by_rate = torch.sort(rate, descending=True, stable=True).indices
    shared, rest = by_rate[:shared_count], by_rate[shared_count : shared_count + experts * size]
    if size == 0:
        return Cluster(shared=shared, own=rest, centre=calibration.input_mean)
    length = rate[rest].double().sqrt()
    similarity = counts[rest][:, rest].double() / torch.outer(length, length).clamp(min=1.0)
    own = rest[balanced_clusters(similarity, experts) == expert]
    active = float(rate[own].sum())
    centre = inputs[own].double().sum(0) / active if active else calibration.input_mean
    return Cluster(shared=shared, own=own, centre=centre.float())


def balanced_clusters(similarity: Tensor, clusters: int) -> Tensor:
    """Return the cluster of each unit, all of the same size; int64 [N], N a multiple of `clusters`.

    k-means in the space of activation patterns: a unit is as near to a cluster as its mean cosine to the members.
    Starts from units that are far from each other; of all rounds the one with the highest sum of cosines counts.

    Args:
        similarity: fp64 [N, N], cosines of the units' patterns.
        clusters: how many.
    """
    size = similarity.shape[0] // clusters
    assert size * clusters == similarity.shape[0]
    near = similarity[:, _far_apart(similarity, clusters)]
    best, best_sum = torch.empty(0, dtype=torch.int64), -torch.inf
    for _ in range(ROUNDS):
        labels = assign_evenly(near, size)
        near = similarity @ torch.nn.functional.one_hot(labels, clusters).to(similarity.dtype) / size
        total = float(near.gather(1, labels[:, None]).sum())
        if total <= best_sum:
            break
        best, best_sum = labels, total
    return best


def assign_evenly(near: Tensor, size: int) -> Tensor:
    """Return a cluster for each unit, `size` in each; int64 [N].

    Again and again every unit asks for the nearest cluster that has room, which takes the nearest of those that ask.
    """
    labels = torch.full((near.shape[0],), -1, dtype=torch.int64, device=near.device)
    room = [size] * near.shape[1]
    wish = near.clone()
    while bool((labels < 0).any()):
        waiting = (labels < 0).nonzero().flatten()
        asked = wish[waiting].argmax(1)
        for cluster in range(near.shape[1]):
            asking = waiting[asked == cluster]
            order = torch.sort(near[asking, cluster], descending=True, stable=True).indices
            taken = asking[order[: room[cluster]]]
            labels[taken] = cluster
            room[cluster] -= taken.numel()
            if room[cluster] == 0:
                wish[:, cluster] = -torch.inf
    return labels


def _far_apart(similarity: Tensor, count: int) -> list[int]:
    """Return units to start from: the first, then each time the one least like all before."""
    chosen = [0]
    nearest = similarity[:, 0].clone()
    for _ in range(count - 1):
        nearest[chosen] = torch.inf
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, similarity[:, chosen[-1]])
    return chosen
