"""Every function of Megatron's training loop and of its checkpoints that we put ours around; for megatron-core 0.19.2.

The loop has no other seam for them: it calls these functions by the names of their modules. Each one is asked first
whether it is there and has the parameters that ours read, so that another Megatron is told by name. Functions that are
put around the same one of Megatron run in the opposite order: the last one first.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from megatron.training import checkpointing
from megatron.training import training as megatron_training

Given = Mapping[str, Any]
"""The arguments of a call by their names."""


def add_to_checkpoints(entries: Callable[[], Mapping[str, Any]]) -> None:
    """Add entries to what Megatron saves (training/checkpointing.py:752).

    `ModelConfig.extra_checkpoint_metadata` promises that, but in 0.19.2 nothing reads it (training/models/base.py:66).
    When loading, Megatron takes only shards from this dictionary, so further keys do no harm there.
    """

    def generate_state_dict(original: Callable[[], dict[str, Any]], given: Given) -> dict[str, Any]:
        return {**original(), **entries()}

    _put_around(checkpointing, "generate_state_dict", (), generate_state_dict)


def add_to_optimizer(overrides: Mapping[Any, Any]) -> None:
    """Add parameter groups where the loop asks for the optimizer's config (training/training.py:1962)."""

    def get_megatron_optimizer_config(
        original: Callable[[], tuple[Any, Any]], given: Given
    ) -> tuple[Any, Any]:
        config, upstream = original()
        return config, {**upstream, **overrides}

    _put_around(megatron_training, "get_megatron_optimizer_config", (), get_megatron_optimizer_config)


def before_log(see: Callable[[Given], None]) -> None:
    """Show the results of each step before the loop logs and saves them (training/training.py:3985).

    Args:
        see: takes `loss_dict`, `learning_rate`, `iteration`, `skipped_iter` and `grad_norm`, and others.
    """

    def training_log(original: Callable[[], Any], given: Given) -> Any:
        see(given)
        return original()

    needed = ("loss_dict", "learning_rate", "iteration", "skipped_iter", "grad_norm")
    _put_around(megatron_training, "training_log", needed, training_log)


def around_exit(decide: Callable[[Callable[[], bool], int], bool]) -> None:
    """Stand around the question after each step whether the run ends here (training/training.py:4079).

    Args:
        decide: takes Megatron's own answer as a function, and the step; returns whether the run ends.
    """

    def checkpoint_and_decide_exit(original: Callable[[], bool], given: Given) -> bool:
        return decide(original, int(given["iteration"]))

    _put_around(megatron_training, "checkpoint_and_decide_exit", ("iteration",), checkpoint_and_decide_exit)


def _put_around(
    module: Any, name: str, parameters: tuple[str, ...], ours: Callable[[Callable[[], Any], Given], Any]
) -> None:
    original: Callable[..., Any] | None = getattr(module, name, None)
    assert original is not None, f"{module.__name__}.{name} is not there; written for megatron-core 0.19.2"
    signature = inspect.signature(original)
    missing = set(parameters) - set(signature.parameters)
    assert not missing, f"{module.__name__}.{name} has no {missing}; written for megatron-core 0.19.2"

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        return ours(functools.partial(original, *args, **kwargs), given)

    setattr(module, name, replacement)
