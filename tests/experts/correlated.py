"""A layer whose units are correlated, and its calibration: what the methods have to tell apart.

T = tokens, H = hidden, F = FFN channels.
"""

import torch

from megatron_l0moe.experts.construction import PAIRS
from megatron_l0moe.experts.unit_choice import Calibration, CalibrationSums

TOKENS, HIDDEN, GROUPS = 400, 6, 6
DENSE = (24, HIDDEN)
"""F and H."""
NOISE = 0.3


def correlated(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs [T, H], activations [T, F] and fc2 [H, F]: F / 6 noisy copies of each of six signals.

    The signals are of different strength, so that the strongest units are copies of one signal: whoever looks at
    units one by one keeps the same thing many times.
    """
    generator = torch.Generator().manual_seed(seed)
    channels = DENSE[0]
    signals = torch.randn(TOKENS, GROUPS, generator=generator) * torch.linspace(1, 3, GROUPS)
    own = torch.randn(TOKENS, channels, generator=generator)
    activations = signals[:, torch.arange(channels) % GROUPS] + NOISE * own
    fc2 = torch.randn(HIDDEN, channels, generator=generator)
    inputs = signals @ torch.randn(GROUPS, HIDDEN, generator=generator) + 1.0
    return inputs, activations, fc2


def calibrated(
    inputs: torch.Tensor, activations: torch.Tensor, method: str, fc2: torch.Tensor, width: int
) -> Calibration:
    """Return what a pass over the tokens keeps for a method."""
    sums = CalibrationSums(
        hidden=inputs.shape[1],
        local=fc2.shape[1],
        width=fc2.shape[1],
        pairs=PAIRS[method],
        active=max(min(width, fc2.shape[1]), 1),
        device=torch.device("cpu"),
    )
    sums.add(inputs, activations, activations, fc2.norm(dim=0))
    return sums.gather(lambda shard: shard, 1)
