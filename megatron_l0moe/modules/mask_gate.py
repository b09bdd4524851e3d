"""Mixture-of-Masks: E masks over the channels of one shared FFN, and which of them a token uses.

Our reading of an abstract (Liu et al., ACL 2025 long 768), see docs/methods.md: a token takes the k masks that its
router scores highest, with weights p_e, and its FFN is y = W_down(sum_e p_e z_e * a), a = silu(W_gate x) * W_up x.
A unit is active for a token where at least one of the token's masks keeps it. Plain torch.

Shapes: E = masks, k = masks of a token, F = FFN channels (here also a rank's part of them), C = sets of k masks,
E choose k. Leading dimensions `...` are tokens in any arrangement.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_SETS = 512  # [C, k, F] is held for a layer: 32 masks by two are 496 sets


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Masks and router of Mixture-of-Masks; the abstract gives the target and nothing else."""

    l0_masks: int = 8
    """E: masks over the channels of each shared FFN."""
    l0_masks_top_k: int = 2
    """k: masks that a token uses, from 2 on: the softmax over one alone is 1, and no router learns from that."""
    l0_masks_target: float = 0.5
    """r at the end: fraction of a layer's FFN channels that a token uses, mean over tokens, in (0, 1)."""
    l0_masks_balance_coeff: float = 0.01
    """Weight of the balance loss of the mask routers."""
    l0_masks_init_std: float = 0.02
    """Standard deviation of the mask routers' random start."""
    l0_masks_seed: int = 1234
    """Seed of that start, which is keyed by seed and layer and by nothing else."""

    def __post_init__(self) -> None:
        if not 2 <= self.l0_masks_top_k < self.l0_masks:
            raise ValueError(
                f"l0_masks_top_k must be at least 2 and below l0_masks ({self.l0_masks}), got {self.l0_masks_top_k}"
            )
        sets = math.comb(self.l0_masks, self.l0_masks_top_k)
        if sets > MOST_SETS:
            raise ValueError(
                f"l0_masks ({self.l0_masks}) by l0_masks_top_k ({self.l0_masks_top_k}) make {sets} sets of masks, "
                f"which must be at most {MOST_SETS}; use fewer masks"
            )
        if not 0 < self.l0_masks_target < 1:
            raise ValueError(f"l0_masks_target must be above 0 and below 1, got {self.l0_masks_target}")
        if self.l0_masks_balance_coeff < 0:
            raise ValueError(f"l0_masks_balance_coeff must be at least 0, got {self.l0_masks_balance_coeff}")
        if self.l0_masks_init_std <= 0:
            raise ValueError(
                f"l0_masks_init_std must be above 0, or no mask is ever chosen for a reason, got "
                f"{self.l0_masks_init_std}"
            )


def choose_masks(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return each token's weights, the softmax over its k highest logits, and the masks that these are of.

    Args:
        logits: [..., E].
        k: masks of a token.

    Returns:
        Weights [..., E], 0 for masks that are not chosen, and the chosen masks [..., k], ascending.
    """
    highest, chosen = logits.topk(k, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, chosen, torch.softmax(highest, dim=-1))
    return weights, chosen.sort(dim=-1).values


def channel_factors(weights: Tensor, z: Tensor) -> Tensor:
    """Return what each token's channels are multiplied by, sum_e p_e z_e; weights [..., E], z [E, F] -> [..., F].

    A channel that every mask holds open has the factor 1 and not a rounded sum of weights, so that with all masks open
    the layer is the dense one, bit for bit. Its gradients lack nothing: the weights sum to 1 whatever the router says,
    and z is cut off at 1.
    """
    is_shared = (z == 1).all(dim=0)
    return torch.where(is_shared, 1.0, weights @ z)


def mask_sets(masks: int, k: int) -> Tensor:
    """Return all sets of k masks, int64 [C, k], each ascending, in the order that `set_index` counts them."""
    sets = sorted(itertools.combinations(range(masks), k), key=lambda members: members[::-1])
    return torch.tensor(sets)


def set_places(masks: int, k: int) -> Tensor:
    """Return what the j-th mask of an ascending set adds to the set's row, (mask choose j), j from 1; int64 [E, k]."""
    return torch.tensor([[math.comb(mask, j) for j in range(1, k + 1)] for mask in range(masks)])


def set_index(chosen: Tensor, places: Tensor) -> Tensor:
    """Return the row of `mask_sets` that each token's masks are, by the combinatorial number system.

    Args:
        chosen: [..., k], ascending.
        places: `set_places`, [E, k], on the same device.

    Returns:
        int64 [...].
    """
    return places[chosen, torch.arange(chosen.shape[-1], device=chosen.device)].sum(dim=-1)


def activated(open_probability: Tensor, sets: Tensor, load: Tensor) -> Tensor:
    """Return the probability that a token uses each channel: of a mask of its set being open there.

    The noise of masks is independent, so a set's probability is 1 - prod (1 - P). Sets count by how many tokens choose
    them.

    Args:
        open_probability: [E, F], P(z != 0); or masks of 0 and 1.
        sets: [C, k].
        load: [C], fraction of the tokens that choose a set.

    Returns:
        [F]; its mean over all channels is the expected activated fraction r-hat.
    """
    closed = (1 - open_probability[sets]).unbind(dim=1)  # shape: (C, k, F) -> k of (C, F)
    of_sets = 1 - functools.reduce(torch.mul, closed)  # the gradient of prod() would wait for the device
    return load.to(of_sets.dtype) @ of_sets


def hard_masks(log_alpha: Tensor, sets: Tensor, load: Tensor, target: float) -> Tensor:
    """Return masks of 0 and 1 whose activated fraction is the largest one that does not exceed the target.

    The entries with the highest log_alpha are open, across all masks of the layer: a mask is as wide as it has
    learned to be. Equal scores go to the lower channel, then to the lower mask, so that no mask is filled before
    another where many lie at log_alpha's upper clamp; one entry at least is open.

    Args:
        log_alpha: [E, F], all channels of a layer.
        sets: [C, k].
        load: [C], fraction of the tokens that choose a set.
        target: activated fraction.

    Returns:
        float32 [E, F].
    """
    order = torch.sort(log_alpha.T.flatten(), descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    rank = rank.view(log_alpha.T.shape).T

    def fraction(count: int) -> float:
        return float(activated((rank < count).double(), sets, load).mean())

    few, many = 1, order.numel() + 1  # the fraction grows with the count; `many` is taken as too many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if fraction(middle) <= target + 1e-9 else (few, middle)
    return (rank < few).float()
