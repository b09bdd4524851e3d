"""Random numbers that follow from a key: the same on every rank of every layout, without a state to save."""

import numpy as np
import torch


def keyed_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose numbers follow from ``key`` alone, whichever rank draws them."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(state) & (2**63 - 1))
