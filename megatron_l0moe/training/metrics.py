"""Per-step metrics as JSON lines and for Megatron's TensorBoard and W&B; one table of names and units.

| name | meaning |
|---|---|
| iteration, consumed_samples, tokens | after this step |
| lm_loss | nats a token, mean over the global batch |
| grad_norm | of the weights, before the clip |
| learning_rate | of the weights |
| seconds | of the step, with what came between it and the step before; of the first one from its first micro-batch on |
| tokens_per_second | of all processes together |
| mfu | model FLOPs, as `l0moe plan` counts them, over the GPUs' peak in bf16; null without a GPU of known peak |
| retention_target, retention | r of eq. 2, and r-hat by layer; of MoM the activated fraction |
| lambda1, lambda2 | by layer |
| frozen | the hard top-k mask is in force |
| load | fraction of routed tokens by layer and expert, global batch; of MoM by layer and mask, global batch before |
| domain_load | fraction of a domain's routed tokens by domain and expert, mean over layers, global batch; every `--l0-domain-load-interval` steps |
| own_expert | fraction of a domain's routed tokens that its own expert takes, mean over domains, by layer; in the same steps |
| balance_loss, z_loss | eq. 3, mean over layers and the global batch, without their coefficients |
| active_fraction | of DSMoE's blocks that a token uses, by layer, mean over the global batch |
| sparsity_loss | eq. 17-19 of DSMoE by layer, mean over the global batch, without its coefficient |

What the gates and routers of all layers say about a step is the same on every rank of the last pipeline stage. Tokens a
second and MFU follow the formulas of `l0moe plan`. The writers get a few scalars of the record: few enough to look at,
also for 64 experts.

Shapes: L = MoE layers of a model chunk, D = domains, K = experts.
"""  # noqa: E501 - rows of a table

import argparse
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer

from megatron_l0moe.modules.trained_part import Metrics, parts_by_kind
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.runtime.hardware import gpu_name
from megatron_l0moe.sizes.architecture import Architecture
from megatron_l0moe.sizes.flops import Recompute, stage_model, training_flops
from megatron_l0moe.sizes.gpu_models import gpu_of_device
from megatron_l0moe.training.arguments import JobSettings

logger = logging.getLogger(__name__)


COUNTED = ("expert", "moe")
"""Stages whose FLOPs have a formula."""


class Throughput:
    """Speed of the whole job; MFU is null where no peak is known, which is said once."""

    def __init__(self, args: argparse.Namespace, settings: JobSettings) -> None:
        self._peak: float | None = None
        name = gpu_name()
        gpu = gpu_of_device(name) if name else None
        if settings.plan.stage not in COUNTED:
            logger.warning(
                "MFU is not recorded: the FLOPs of the stage %s are not counted.", settings.plan.stage
            )
        elif gpu is None:
            reason = f"the peak of {name} is not known" if name else "there is no GPU"
            logger.warning("MFU is not recorded: %s.", reason)
        else:
            self._peak = args.world_size * gpu.bf16_flops
            self._flops = flops_per_token(args, settings)

    def of_step(self, tokens: int, seconds: float) -> dict[str, float | None]:
        """Return `tokens_per_second` of all GPUs together, and `mfu`: the share of their peak in bf16."""
        rate = tokens / seconds
        mfu = None if self._peak is None else round(rate * self._flops / self._peak, 5)
        return {"tokens_per_second": round(rate, 2), "mfu": mfu}


def flops_per_token(args: argparse.Namespace, settings: JobSettings) -> float:
    """Return the FLOPs that a training token needs, forward and backward; what is recomputed does not count.

    `args` are Megatron's, the stage is `expert` or `moe`.
    """
    stage = settings.plan.stage
    assert stage in ("expert", "moe"), "the caller has checked it"
    is_moe = stage == "moe"
    architecture = Architecture(
        family="qwen2" if args.add_qkv_bias else "llama",
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocab_size=args.padded_vocab_size,
        rms_norm_eps=1e-5,  # this and RoPE's base cost nothing
        rotary_base=10000.0,
        rope_scaling=None,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        qkv_bias=args.add_qkv_bias,
        max_position_embeddings=args.max_position_embeddings,
    )
    model = stage_model(
        architecture,
        stage,
        dense_layers=settings.plan.dense_layers,
        num_experts=args.num_experts if is_moe else 1,
        expert_ffn=args.moe_ffn_hidden_size if is_moe else args.ffn_hidden_size,
        top_k=args.moe_router_topk if is_moe else 1,
        trains_weights=settings.stage.l0_train_weights == "on",
    )
    return training_flops(model, args.seq_length, Recompute()).model


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


DIGITS = 5
"""The digits that the load by domain is rounded to, K * K numbers in each record."""


def layer_metrics(chunks: Sequence[torch.nn.Module]) -> Metrics:
    """Return the metrics of all layers, whichever pipeline stage holds them; all ranks have to call this."""
    local = [kind.metrics(parts) for chunk in chunks for kind, parts in parts_by_kind(chunk).items()]
    return _merged(_gather_over_pipeline(local))


def _gather_over_pipeline(local: list[Metrics]) -> list[Metrics]:
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return local
    gathered: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(gathered, local, group=group)
    return [metrics for stage in gathered for metrics in stage]


def _merged(parts: list[Metrics]) -> Metrics:
    """Put the layers together; losses and the load by domain become means over them."""
    merged: Metrics = {}
    for metrics in parts:
        for name, value in metrics.items():
            if isinstance(value, dict):
                merged.setdefault(name, {}).update(value)
            else:
                merged[name] = value
    for name in ("balance_loss", "z_loss"):
        if name in merged:
            merged[name] = sum(merged[name].values()) / len(merged[name])
    if "domain_load" in merged:
        sums = torch.tensor(list(merged["domain_load"].values()), dtype=torch.float64).sum(dim=0)
        mean = (sums / len(merged["load"])).tolist()
        merged["domain_load"] = [[round(x, DIGITS) for x in row] for row in mean]
    return merged


class MetricsWriter:
    """Makes one record after each step, to which every pipeline stage contributes its layers.

    The first rank of the last stage appends it to the file. Megatron's writers live on the very last rank, which
    belongs to that stage too and makes the same record, so nothing is sent between the two.
    """

    def __init__(self, path: Path | None, settings: JobSettings) -> None:
        """Write to `path`, None for Megatron's writers alone."""
        self._path = path
        self._settings = settings
        self._throughput: Throughput | None = None
        self._last = time.perf_counter()
        self._has_dropped_records = False
        self.models: list[torch.nn.Module] = []

    def start_clock(self) -> None:
        """Count the first step's time from here."""
        self._last = time.perf_counter()

    def see(self, given: Mapping[str, Any]) -> None:
        """Record the step whose results Megatron's loop is about to log."""
        self.write(given["loss_dict"], given["learning_rate"], given["iteration"], given["grad_norm"])

    def write(
        self, losses: dict[str, torch.Tensor], learning_rate: float, iteration: int, grad_norm: float
    ) -> None:
        """Record a step; all ranks have to call this."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        layers = layer_metrics(self.models)
        tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
        has_file = self._path is not None and _is_writer()
        if not (has_file or tensorboard or wandb):
            return
        args = get_args()
        self._throughput = self._throughput or Throughput(args, self._settings)
        tokens = get_current_global_batch_size() * args.seq_length
        record: dict[str, Any] = {
            "iteration": iteration,
            "consumed_samples": args.consumed_train_samples,
            "tokens": args.consumed_train_samples * args.seq_length,
            "lm_loss": float(losses["lm loss"]),
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "learning_rate": learning_rate,
            "seconds": round(seconds, 4),
            **self._throughput.of_step(tokens, seconds),
            **layers,
        }
        if has_file:
            self._append(record)
        if (tensorboard or wandb) and iteration % args.tensorboard_log_interval == 0:
            send(scalars(record), iteration, tensorboard=tensorboard, wandb=wandb)

    def _append(self, record: dict[str, Any]) -> None:
        assert self._path is not None
        if not self._has_dropped_records:
            self._drop_from(self._path, record["iteration"])
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _drop_from(self, path: Path, iteration: int) -> None:
        """Remove the records of steps that this run, resumed from an earlier checkpoint, does again."""
        self._has_dropped_records = True
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _iteration_of(line) < iteration]
        write_text(path, "".join(f"{line}\n" for line in kept))


def _is_writer() -> bool:
    return bool(
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def _iteration_of(line: str) -> int:
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError):  # the last line of a killed run may be cut short
        return 2**62
