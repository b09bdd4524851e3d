"""Which experts, or blocks of a DSMoE, the held-out text used, as the summary has it."""

import math

from megatron_l0moe.reports.collect import Json


def router_numbers(load: Json) -> Json:
    """Return which experts the held-out text was sent to, from evaluate/router_load.json."""
    experts = len(next(iter(next(iter(load.values())).values())))
    return {
        "load": load,
        "mean_load": _mean_load(load),
        "largest_share": _largest_share(load),
        "uniform_share": 1.0 / experts,
    }


def block_numbers(found: Json) -> Json:
    """Return where a DSMoE's blocks are open: means over the layers, and the open share of each layer."""
    layers = found["layers"]
    count = len(next(iter(next(iter(layers.values())).values())))
    return {
        **found,
        "count": count,
        "open_share": found["mean_open"] / count,
        "by_domain": _mean_load(layers),
        "by_layer": {
            layer: {domain: math.fsum(shares) / count for domain, shares in domains.items()}
            for layer, domains in layers.items()
        },
    }


def _mean_load(load: Json) -> Json:
    """Return {domain: [K shares]}, the mean over MoE layers."""
    layers = list(load.values())
    return {
        domain: [
            math.fsum(column) / len(layers)
            for column in zip(*(layer[domain] for layer in layers), strict=True)
        ]
        for domain in layers[0]
    }


def _largest_share(load: Json) -> Json:
    """Return {layer: {domain: share of the busiest expert}}."""
    return {
        layer: {domain: max(shares) for domain, shares in domains.items()} for layer, domains in load.items()
    }
