"""A step's record as scalars for Megatron's TensorBoard and W&B writers: few enough to look at, also for 64 experts.

Shapes: D = domains, K = experts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

PREFIX = "l0moe"
BY_LAYER = ("retention", "lambda1", "lambda2", "own_expert")
PLAIN = ("retention_target", "frozen", "balance_loss", "z_loss", "tokens_per_second", "mfu")


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalars of a record of metrics.jsonl by name; what Megatron writes itself is left out.

    Of K loads in each layer the largest, the smallest and the entropy are kept (in units of log K: 1 is an even load);
    of D * K loads by domain the share of each domain's own expert and the entropy.
    """
    values: dict[str, float] = {}
    for name in PLAIN:
        if record.get(name) is not None:
            values[name] = float(record[name])
    for name in BY_LAYER:
        values |= _with_mean(name, record.get(name, {}))
    loads: Mapping[str, Sequence[float]] = record.get("load", {})
    for name, measure in (("load_max", max), ("load_min", min), ("load_entropy", entropy)):
        values |= _with_mean(name, {layer: measure(load) for layer, load in loads.items()})
    for domain, load in enumerate(record.get("domain_load", [])):
        values[f"domain_entropy/domain_{domain}"] = entropy(load)
        if "own_expert" in record:
            values[f"own_expert/domain_{domain}"] = load[domain]
    return {f"{PREFIX}/{name}": value for name, value in values.items()}


def send(values: Mapping[str, float], iteration: int, *, tensorboard: Any, wandb: Any) -> None:
    """Hand scalars to Megatron's writers, each of which may be None."""
    if tensorboard:
        for name, value in values.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb:
        wandb.log(dict(values), iteration)


def entropy(load: Sequence[float]) -> float:
    """Return the entropy of a load that sums to 1, in units of log K: 0 is one expert for all, 1 an even load."""
    if len(load) < 2:
        return 0.0
    return -sum(share * math.log(share) for share in load if share > 0) / math.log(len(load))


def _with_mean(name: str, by_layer: Mapping[str, float]) -> dict[str, float]:
    if not by_layer:
        return {}
    mean = sum(by_layer.values()) / len(by_layer)
    return {f"{name}/mean": mean} | {f"{name}/layer_{layer}": value for layer, value in by_layer.items()}
