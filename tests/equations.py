"""Naive float64 references of the paper's equations, written with loops and without torch's vector operations."""

import math
from dataclasses import dataclass


def hard_concrete(u: float, log_alpha: float, *, b: float, gamma: float, zeta: float) -> float:
    """Eq. 1 for one gate."""
    s = 1.0 / (1.0 + math.exp(-(math.log(u) - math.log(1.0 - u) + log_alpha) / b))
    stretched = s * (zeta - gamma) + gamma
    return min(1.0, max(0.0, stretched))


def open_probability(log_alpha: float, *, b: float, gamma: float, zeta: float) -> float:
    """P(z != 0) of one gate: the probability that the stretched sample exceeds 0."""
    return 1.0 / (1.0 + math.exp(-(log_alpha - b * math.log(-gamma / zeta))))


def lagrangian(lambda_1: float, lambda_2: float, estimate: float, retention: float) -> float:
    """Eq. 2."""
    return lambda_1 * (estimate - retention) + lambda_2 * (estimate - retention) ** 2


def balance_loss(counts: list[int], top_k: int, tokens: int) -> float:
    """L_balance of eq. 3 with counts normalised to sum 1."""
    experts = len(counts)
    return sum((c / (top_k * tokens) - 1.0 / experts) ** 2 for c in counts)


def z_loss(logits: list[list[float]], *, squared: bool) -> float:
    """L_z of eq. 3: mean logsumexp, squared as in the cited source or as printed."""
    total = 0.0
    for row in logits:
        log_z = math.log(sum(math.exp(x) for x in row))
        total += log_z**2 if squared else log_z
    return total / len(logits)


def swiglu(
    x: list[float], gate: list[list[float]], up: list[list[float]], down: list[list[float]]
) -> list[float]:
    """down @ (silu(gate @ x) * (up @ x)); gate and up are [F][H], down is [H][F]."""
    hidden = []
    for g_row, u_row in zip(gate, up, strict=True):
        g = sum(w * v for w, v in zip(g_row, x, strict=True))
        u = sum(w * v for w, v in zip(u_row, x, strict=True))
        hidden.append(g / (1.0 + math.exp(-g)) * u)
    return [sum(w * h for w, h in zip(row, hidden, strict=True)) for row in down]


@dataclass(frozen=True)
class BlockGates:
    """DSMoE's gates of one token; equations of Lv et al., 2025."""

    scores: list[float]
    is_open: list[bool]

    @property
    def factor(self) -> float:
        """Of eq. 8."""
        return len(self.scores) / sum(self.is_open)

    @property
    def weights(self) -> list[float]:
        """Eq. 7 and 8."""
        return [
            self.factor * score if open_ else 0.0
            for score, open_ in zip(self.scores, self.is_open, strict=True)
        ]

    @property
    def loss(self) -> float:
        """One token's and layer's part of eq. 17-19."""
        return sum(score for score, open_ in zip(self.scores, self.is_open, strict=True) if open_) / len(
            self.scores
        )

    def gradient(self, upstream: list[float], loss_gradient: float) -> list[float]:
        """Of the logits, for gradients of the weights and of the loss: the estimator of eq. 10, then the sigmoid."""
        found = []
        for score, open_, up in zip(self.scores, self.is_open, upstream, strict=True):
            of_score = self.factor * up + (loss_gradient / len(self.scores) if open_ else 0.0)
            found.append(of_score * score * (1.0 - score))
        return found


def block_gates(logits: list[float], threshold: float) -> BlockGates:
    """Gate one token; with no score above the threshold its highest opens."""
    scores = [1.0 / (1.0 + math.exp(-x)) for x in logits]
    is_open = [score > threshold for score in scores]
    if not any(is_open):
        is_open[scores.index(max(scores))] = True
    return BlockGates(scores, is_open)


@dataclass(frozen=True)
class MaskMixture:
    """Mixture-of-Masks of one token, in our reading: the weight of each mask and the factor of each channel."""

    chosen: list[int]
    weights: list[float]
    factors: list[float]


def mix_masks(logits: list[float], masks: list[list[float]], k: int) -> MaskMixture:
    """Softmax over the k highest logits, then sum_e p_e z_e channel by channel."""
    chosen = sorted(sorted(range(len(logits)), key=lambda e: -logits[e])[:k])
    total = sum(math.exp(logits[e]) for e in chosen)
    weights = [math.exp(logits[e]) / total if e in chosen else 0.0 for e in range(len(logits))]
    factors = [
        sum(weights[e] * masks[e][channel] for e in range(len(masks))) for channel in range(len(masks[0]))
    ]
    return MaskMixture(chosen, weights, factors)


def activated_fraction(open_probability: list[list[float]], choices: list[list[int]]) -> float:
    """Mean over tokens and channels of the probability that one of a token's masks is open there."""
    channels = len(open_probability[0])
    total = 0.0
    for chosen in choices:
        for channel in range(channels):
            closed = 1.0
            for mask in chosen:
                closed *= 1.0 - open_probability[mask][channel]
            total += 1.0 - closed
    return total / (len(choices) * channels)
