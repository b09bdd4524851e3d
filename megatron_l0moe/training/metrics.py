"""Per-step metrics as JSON lines, for the report and for users who plot themselves; one table of names and units.

| name | meaning |
|---|---|
| iteration, consumed_samples, tokens | after this step |
| lm_loss | nats a token, mean over the global batch |
| grad_norm | of the weights, before the clip |
| learning_rate | of the weights |
| seconds | of the step |
| retention_target, retention | r of eq. 2, and r-hat by layer |
| lambda1, lambda2 | by layer |
| frozen | the hard top-k mask is in force |
| load | fraction of routed tokens by layer and expert, global batch |
| active_fraction | of DSMoE's blocks that a token uses, by layer, mean over the global batch |
| sparsity_loss | eq. 17-19 of DSMoE by layer, mean over the global batch, without its coefficient |
| balance_loss, z_loss | eq. 3, mean over layers, last micro-batch of this rank, without their coefficients |
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.training import get_args
from megatron.training import training as megatron_training

from megatron_l0moe.data.manifest import write_text
from megatron_l0moe.training.model import block_gates, gates, routers


class MetricsWriter:
    """Appends one JSON object after each step; every pipeline stage contributes its layers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = time.perf_counter()
        self._has_dropped_records = False
        self.models: list[torch.nn.Module] = []

    def write(
        self, losses: dict[str, torch.Tensor], learning_rate: float, iteration: int, grad_norm: float
    ) -> None:
        """Write the step's metrics on the last pipeline stage's first rank."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        layers = _gather_over_pipeline([_layer_metrics(model) for model in self.models])
        if not _is_writer():
            return
        if not self._has_dropped_records:
            self._drop_from(iteration)
        args = get_args()
        record: dict[str, Any] = {
            "iteration": iteration,
            "consumed_samples": args.consumed_train_samples,
            "tokens": args.consumed_train_samples * args.seq_length,
            "lm_loss": float(losses["lm loss"]),
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "learning_rate": learning_rate,
            "seconds": round(seconds, 4),
            **_merge(layers),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _drop_from(self, iteration: int) -> None:
        """Remove the records of steps that this run, resumed from an earlier checkpoint, does again."""
        self._has_dropped_records = True
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _iteration_of(line) < iteration]
        write_text(self._path, "".join(f"{line}\n" for line in kept))


def install_metrics(writer: MetricsWriter) -> None:
    """Call the writer after each step, where Megatron's loop logs (training/training.py:3985)."""
    original: Callable[..., Any] = megatron_training.training_log

    def training_log(
        loss_dict: dict[str, torch.Tensor],
        total_loss_dict: dict[str, Any],
        learning_rate: float,
        iteration: int,
        loss_scale: float,
        report_memory_flag: bool,
        skipped_iter: int,
        grad_norm: float,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        writer.write(loss_dict, learning_rate, iteration, grad_norm)
        return original(
            loss_dict,
            total_loss_dict,
            learning_rate,
            iteration,
            loss_scale,
            report_memory_flag,
            skipped_iter,
            grad_norm,
            *args,
            **kwargs,
        )

    megatron_training.training_log = training_log


def _layer_metrics(model: torch.nn.Module) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for gate in gates(model):
        layer = str(gate.layer)
        metrics["retention_target"] = gate.step.retention
        metrics["frozen"] = gate.is_frozen
        metrics.setdefault("retention", {})[layer] = gate.expected_retention()
        if not gate.controller.uses_budget:
            lambda_1, lambda_2 = gate.controller.lambdas.tolist()
            metrics.setdefault("lambda1", {})[layer] = lambda_1
            metrics.setdefault("lambda2", {})[layer] = lambda_2
    for router in routers(model):
        layer = str(router.layer_number - 1)
        counts = router.expert_load.counts
        metrics.setdefault("load", {})[layer] = (counts / counts.sum().clamp_min(1)).tolist()
        for name, loss in router.last_losses.items():
            metrics.setdefault(name, {})[layer] = float(loss)
    for block_gate in block_gates(model):
        layer = str(block_gate.layer)
        active, loss, tokens = _over_all_tokens(block_gate.sums).tolist()
        metrics.setdefault("active_fraction", {})[layer] = active / max(tokens, 1.0)
        metrics.setdefault("sparsity_loss", {})[layer] = loss / max(tokens, 1.0)
    return metrics


def _over_all_tokens(sums: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks that hold the global batch; without sequence parallelism TP ranks count the same tokens."""
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    total = sums.to(device=torch.cuda.current_device())
    if group.size() > 1:
        torch.distributed.all_reduce(total, group=group)
    return total


def _gather_over_pipeline(local: list[dict[str, Any]]) -> list[dict[str, Any]]:
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return local
    gathered: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(gathered, local, group=group)
    return [metrics for stage in gathered for metrics in stage]


def _merge(layers: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for metrics in layers:
        for name, value in metrics.items():
            if isinstance(value, dict):
                merged.setdefault(name, {}).update(value)
            else:
                merged[name] = value
    for name in ("balance_loss", "z_loss"):
        if name in merged:
            merged[name] = sum(merged[name].values()) / len(merged[name])
    return merged


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
