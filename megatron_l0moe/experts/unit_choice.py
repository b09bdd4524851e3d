"""Four ways to choose the units of an expert from one calibration pass, without training; fp64.

The pass keeps of one MLP sums over the tokens of a domain, never the tokens themselves. All sums add up over
data-parallel ranks, and their rows over tensor-parallel ranks.

Least squares: fc2 after units were removed, refitted to the inputs, and what is lost.

Optimal Brain Surgeon for whole units: which to remove when fc2's other columns may make up for it. Removing unit r
costs |W_r|^2 / Q_rr, and the best repair is W -= W_r Q_r: / Q_rr, after which Q -= Q_:r Q_r: / Q_rr (Optimal Brain
Compression, structured: all rows of fc2 lose the same column, so the costs of the rows add up). One unit goes at a
time; the rank-one updates of Q and W are collected and applied for BLOCK units together.

Truncated SVD: units that span what a whitened, truncated SVD of the layer keeps. A rank-r factorisation of an FFN's
matrices is no SwiGLU of r units: the nonlinearity acts on units. So the SVD says what to keep, and units are chosen to
reproduce it. W L = U D V^T is the map of whitened activations to the output; the r directions U_r of largest D hold the
most of the output's energy. Of the targets U_r^T W a, the unit that explains the most of what is left is taken, again
and again: QR with column pivoting of the whitened activations, which a pivoted Cholesky factorisation of G does without
the activations.

Coactivation: experts as clusters of units that are active on the same tokens, from the text of all domains (after
CMoE). An expert is s units that all experts have, those active most often, and one cluster of E - s others. Weights of
the chosen experts sum to 1, so shared units count once; a cluster's columns of fc2 are multiplied by top_k, so that
with equal weights the sum over the chosen experts is that of the dense layer's units.

T = tokens of a micro-batch, F = FFN channels, f = F / p, the channels of one tensor-parallel rank, E = units of an
expert, H = hidden, K = experts, W = fc2 [H, F], G = sum a a^T = L L^T [F, F] over the tokens, a = activations, r =
min(E, H), n = units left, Q = (G + lambda I)^-1 [n, n], S = the units kept, R = the others, N = units that are
clustered, C [F, F] = numbers of tokens on which two units are both active, whose diagonal is the number of tokens on
which each is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_l0moe.errors import L0MoEError

Pairs = Literal["none", "activations", "patterns"]
"""Products of pairs of units: none, of their activations, or of whether both are active on a token."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The sums of one layer over all tokens of the pass, on one process."""

    tokens: int
    input_mean: Tensor
    """fp32 [H], mean of the MLP's normalised input, which is the router's."""
    activation_squares: Tensor
    """fp64 [F], sum over the tokens of a_j^2, a = silu(gate x) * (up x), the input of fc2."""
    pairs: Tensor | None = None
    """fp32 [F, F]: sum of a a^T, or numbers of tokens on which both units are active."""
    pattern_inputs: Tensor | None = None
    """fp32 [F, H]: sum of the inputs of the tokens on which a unit is active."""


class CalibrationSums:
    """Collects the sums of one layer on one rank, in fp64 (vectors) and fp32 (matrices).

    Args:
        hidden: H.
        local: f.
        width: F.
        pairs: which matrix [f, F] is kept; `patterns` also keeps [f, H].
        active: units that count as active on a token, for `patterns`.
        device: where the sums lie.
    """

    def __init__(
        self, *, hidden: int, local: int, width: int, pairs: Pairs, active: int, device: torch.device
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._kind, self._active = pairs, active
        self.tokens = zeros(1, dtype=torch.float64)
        self.input_sum = zeros(hidden, dtype=torch.float64)
        self.activation_squares = zeros(local, dtype=torch.float64)
        self.pairs = zeros(local, width) if pairs != "none" else None
        self.pattern_inputs = zeros(local, hidden) if pairs == "patterns" else None

    def add(
        self, inputs: Tensor, activations: Tensor, full: Tensor | None, sizes: Tensor | None, first: int = 0
    ) -> None:
        """Add a micro-batch.

        Args:
            inputs: [T, H], the MLP's normalised input.
            activations: [T, f], the input of fc2.
            full: [T, F], the same of all tensor-parallel ranks; needed for pairs.
            sizes: [F], length of each unit's column of fc2; needed for patterns.
            first: the first of this rank's channels.
        """
        self.tokens += inputs.shape[0]
        self.input_sum += inputs.sum(0, dtype=torch.float64)
        self.activation_squares += activations.double().square().sum(0)
        if self._kind == "none":
            return
        assert full is not None
        assert self.pairs is not None
        if self._kind == "activations":
            self.pairs.addmm_(activations.float().T, full.float())
            return
        assert sizes is not None
        assert self.pattern_inputs is not None
        active = active_units(full, sizes, self._active)
        own = active[:, first : first + activations.shape[1]]
        self.pairs.addmm_(own.T, active)
        self.pattern_inputs.addmm_(own.T, inputs.float())

    def reduce(self, add_up: Callable[[Tensor], None]) -> None:
        """Add the sums of the data-parallel ranks; `add_up` does so in place."""
        for tensor in (
            self.tokens,
            self.input_sum,
            self.activation_squares,
            self.pairs,
            self.pattern_inputs,
        ):
            if tensor is not None:
                add_up(tensor)

    def gather(self, rows: Callable[[Tensor], Tensor], layer: int) -> Calibration:
        """Return the layer's calibration; `rows` puts the rows of the tensor-parallel ranks together.

        Raises:
            L0MoEError: the dense model gave NaN or infinite numbers, or no unit of the layer is ever active.
        """
        squares = rows(self.activation_squares)
        if not bool(self.input_sum.isfinite().all() and squares.isfinite().all()):
            raise L0MoEError(
                f"The dense model's activations of layer {layer} are not finite on the calibration text; check the "
                "model with `l0moe convert` and the text with `l0moe inspect`."
            )
        if not bool((squares > 0).any()):
            raise L0MoEError(
                f"All units of layer {layer} are 0 on the whole calibration text, so nothing can be chosen among them; "
                "raise expert_training.calibration.tokens, or keep the layer dense (model.dense_layers)."
            )
        return Calibration(
            tokens=int(self.tokens.item()),
            input_mean=(self.input_sum / self.tokens).float(),
            activation_squares=squares,
            pairs=None if self.pairs is None else rows(self.pairs),
            pattern_inputs=None if self.pattern_inputs is None else rows(self.pattern_inputs),
        )


def active_units(activations: Tensor, sizes: Tensor, active: int) -> Tensor:
    """Return the activation pattern fp32 [T, F]: 1 for the `active` units of a token that add most to its output."""
    most = (activations.float().abs() * sizes).topk(active, dim=1).indices
    return torch.zeros_like(activations, dtype=torch.float32).scatter_(1, most, 1.0)


ROUNDS = 20


@dataclass(frozen=True, kw_only=True)
class UnitCluster:
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


def cluster_of(
    calibration: Calibration, *, expert: int, experts: int, width: int, share: float
) -> UnitCluster:
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
        return UnitCluster(shared=shared, own=rest, centre=calibration.input_mean)
    length = rate[rest].double().sqrt()
    similarity = counts[rest][:, rest].double() / torch.outer(length, length).clamp(min=1.0)
    own = rest[balanced_clusters(similarity, experts) == expert]
    active = float(rate[own].sum())
    centre = inputs[own].double().sum(0) / active if active else calibration.input_mean
    return UnitCluster(shared=shared, own=own, centre=centre.float())


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


ESCALATIONS = 4
"""How often the damping may be made ten times larger where rounding made the damped matrix indefinite."""


@dataclass(frozen=True, kw_only=True)
class Refit:
    """New columns of fc2 for the units kept."""

    down: Tensor
    """fp64 [H, E]."""
    damping: float
    """Fraction of the mean of G's diagonal that was added to it."""


def damped_cholesky(gram: Tensor, damping: float, scale: float) -> tuple[Tensor, float]:
    """Return the lower Cholesky factor of gram + damping * scale * I, and the damping that it took.

    Args:
        gram: fp64 [n, n], positive semidefinite up to rounding.
        damping: a fraction, made ten times larger where the factorisation fails.
        scale: what it is a fraction of, the mean of G's diagonal.
    """
    for escalation in range(ESCALATIONS + 1):
        tried = damping * 10.0**escalation
        damped = gram.clone()
        damped.diagonal().add_(tried * scale)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(factor.isfinite().all()):
            return factor, tried
    raise L0MoEError(
        f"The sums of the units' activations cannot be inverted with a damping of {tried:g}; raise "
        "expert_training.calibration.tokens and expert_training.calibration.damping."
    )


def refit(fc2: Tensor, gram: Tensor, units: Tensor, damping: float) -> Refit:
    """Return the columns V [H, E] that minimise sum |W a - V a_S|^2 + lambda |V - W_S|^2.

    V = W_S + W_R G_RS (G_SS + lambda I)^-1, lambda = damping * mean(diag G): what Optimal Brain Compression's updates
    add up to when R is removed, in whatever order, with H = G + lambda I. Without units in R, V is W.

    Args:
        fc2: fp64 [H, F].
        gram: fp64 [F, F].
        units: int64 [E], the units kept.
        damping: a fraction, see `damped_cholesky`.
    """
    removed = torch.ones(gram.shape[0], dtype=torch.bool, device=gram.device)
    removed[units] = False
    if not bool(removed.any()):
        return Refit(down=fc2[:, units], damping=damping)
    factor, used = damped_cholesky(gram[units][:, units], damping, float(gram.diagonal().mean()))
    lost = fc2[:, removed] @ gram[removed][:, units]  # [H, E]
    down = fc2[:, units] + torch.cholesky_solve(lost.T, factor).T
    return Refit(down=down, damping=used)


def relative_error(fc2: Tensor, gram: Tensor, units: Tensor, down: Tensor) -> float:
    """Return sum |W a - V a_S|^2 / sum |W a|^2 over the calibration tokens, from G alone.

    Args:
        fc2: fp64 [H, F].
        gram: fp64 [F, F].
        units: int64 [E].
        down: V, fp64 [H, E].
    """
    difference = fc2.clone()
    difference[:, units] -= down
    energy = float(((fc2 @ gram) * fc2).sum())
    error = float(((difference @ gram) * difference).sum())
    return max(error, 0.0) / energy if energy > 0 else 0.0


RELATIVE_FLOOR = 1e-10
"""A unit whose activation is by so much of its energy a combination of chosen ones has nothing to add."""


def keep_by_svd(fc2: Tensor, gram: Tensor, width: int) -> Tensor:
    """Return the chosen units; int64 [width], ascending.

    Where fewer than `width` units are linearly independent, the largest of the others fill up. Cost: F^2 H for the
    targets, H^3 for the SVD, and E F (E + r) multiplications for the choice.

    Args:
        fc2: fp64 [H, F].
        gram: fp64 [F, F].
        width: E.
    """
    seen = fc2 @ gram  # [H, F]
    rank = min(width, fc2.shape[0])
    # left singular vectors of W L: eigenvectors of W G W^T
    directions = torch.linalg.eigh(seen @ fc2.T).eigenvectors[:, -rank:]  # [H, r]
    left = directions.T @ seen  # [r, F], covariances of targets and units
    rest = gram.diagonal().clone()  # of each unit, the energy that the chosen ones do not explain
    floor = (RELATIVE_FLOOR * rest).clamp(min=RELATIVE_FLOOR * float(rest.max()))
    whitened = gram.new_zeros(gram.shape[0], width)
    free = torch.ones_like(rest, dtype=torch.bool)
    for i in range(width):
        gain = torch.where(free & (rest > floor), left.square().sum(0) / rest, -1.0)
        j = int(gain.argmax())
        if float(gain[j]) <= 0:
            break
        free[j] = False
        column = (gram[:, j] - whitened[:, :i] @ whitened[j, :i]) / rest[j].sqrt()
        whitened[:, i] = column
        left = left - torch.outer(left[:, j] / rest[j].sqrt(), column)
        rest = rest - column.square()
    chosen = (~free).nonzero().flatten()
    if chosen.numel() < width:
        size = torch.where(free, fc2.square().sum(0) * gram.diagonal(), -1.0)
        more = torch.sort(size, descending=True, stable=True).indices[: width - chosen.numel()]
        chosen = torch.cat([chosen, more])
    return chosen.sort().values


BLOCK = 128


def keep_by_obs(fc2: Tensor, gram: Tensor, width: int, damping: float, *, block: int = BLOCK) -> Tensor:
    """Return the units that are left when the cheapest one was removed again and again; int64 [width], ascending.

    Cost: F^3 multiplications for Q, F^3 / 3 for its updates and F^2 H for the costs.

    Args:
        fc2: fp64 [H, F].
        gram: fp64 [F, F].
        width: units to keep.
        damping: lambda as a fraction of G's mean diagonal.
        block: updates that are collected; it changes no choice.
    """
    units = torch.arange(gram.shape[0], device=gram.device)
    if width == units.numel():
        return units
    factor, _ = damped_cholesky(gram, damping, float(gram.diagonal().mean()))
    inverse, weights = torch.cholesky_inverse(factor), fc2.clone()
    while units.numel() > width:
        count = min(block, units.numel() - width)
        left, columns, updates = _remove(inverse, weights, count)
        units = units[left]
        columns = columns[left]
        inverse = inverse[left][:, left] - columns @ columns.T
        weights = weights[:, left] - updates @ columns.T
    return units


def _remove(inverse: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose `count` units one after another.

    Returns:
        bool [n], which are left; [n, count] and [H, count], the scaled columns of Q and of W when each was removed:
        their products are what Q and W lose.
    """
    total = inverse.shape[0]
    left = torch.ones(total, dtype=torch.bool, device=inverse.device)
    columns, updates = inverse.new_zeros(total, count), weights.new_zeros(weights.shape[0], count)
    diagonal, squares = inverse.diagonal().clone(), weights.square().sum(0)
    for i in range(count):
        cost = torch.where(left, squares.clamp(min=0) / diagonal, torch.inf)
        r = int(cost.argmin())
        left[r] = False
        column = inverse[:, r] - columns[:, :i] @ columns[r, :i]
        update = weights[:, r] - updates[:, :i] @ columns[r, :i]
        scale = column[r].sqrt()
        column, update = column / scale, update / scale
        # |W_j - update column_j|^2 for every unit j
        along = weights.T @ update - columns[:, :i] @ (updates[:, :i].T @ update)
        squares = squares - 2 * along * column + update.square().sum() * column.square()
        # Q stays positive definite; rounding must not say otherwise
        diagonal = (diagonal - column.square()).clamp(min=torch.finfo(diagonal.dtype).tiny)
        columns[:, i], updates[:, i] = column, update
    return left, columns, updates
