"""Cut an expert's units out of a dense MLP, and recognise that MLP again.

F = FFN channels, E = units kept, H = hidden.
"""

import hashlib

import torch

FINGERPRINT_DIGITS = 16


def cut_units(
    fc1: torch.Tensor, fc2: torch.Tensor, units: torch.Tensor, z: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return `gate` [E, H], `up` [E, H] and `down` [H, E] of the chosen units.

    A unit's gate z scales its activation silu(gate x) * (up x), so it can be multiplied into the unit's row of `up`.

    Args:
        fc1: [2F, H], gate then up.
        fc2: [H, F].
        units: int [E].
        z: fp32 [E]; None for 1, which copies the weights as they are.
    """
    gate, up = (part[units] for part in fc1.chunk(2))
    if z is not None:
        up = (up.float() * z[:, None]).to(up.dtype)  # in fp32 and rounded once; exact where z is 1
    return {"gate": gate, "up": up, "down": fc2[:, units]}


def fingerprint(fc1: torch.Tensor, fc2: torch.Tensor) -> str:
    """Return a digest of an MLP's weights, the same in float32 and bfloat16.

    They are rounded to bfloat16 first, as Megatron rounds the dense model when an expert run trains in bfloat16.
    """
    digest = hashlib.sha256()
    for tensor in (fc1, fc2):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().data)
    return digest.hexdigest()[:FINGERPRINT_DIGITS]
