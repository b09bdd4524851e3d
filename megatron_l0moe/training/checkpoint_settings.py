"""Our settings inside every checkpoint, under the key `l0moe` of its common state."""

from collections.abc import Callable
from typing import Any

from megatron.training import checkpointing

from megatron_l0moe.checkpoints.torch_dist import SETTINGS_KEY
from megatron_l0moe.training.arguments import Settings, settings_as_dict


def install_settings(settings: Settings) -> None:
    """Add the settings to what Megatron saves (training/checkpointing.py:752).

    `ModelConfig.extra_checkpoint_metadata` promises that, but in 0.19.2 nothing reads it (training/models/base.py:66).
    When loading, Megatron takes only shards from this dictionary, so the key does no harm there.
    """
    original: Callable[..., dict[str, Any]] = checkpointing.generate_state_dict

    def generate_state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = original(*args, **kwargs)
        state[SETTINGS_KEY] = settings_as_dict(settings)
        return state

    checkpointing.generate_state_dict = generate_state_dict
