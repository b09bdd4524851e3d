"""Naive float64 references of the paper's equations, written with loops and without torch's vector operations."""

import math


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
