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
"""  # noqa: E501 - rows of a table

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer
from megatron.training import training as megatron_training

from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.training import scalars
from megatron_l0moe.training.arguments import Settings
from megatron_l0moe.training.layer_metrics import layer_metrics
from megatron_l0moe.training.throughput import Throughput


class MetricsWriter:
    """Makes one record after each step, to which every pipeline stage contributes its layers.

    The first rank of the last stage appends it to the file. Megatron's writers live on the very last rank, which
    belongs to that stage too and makes the same record, so nothing is sent between the two.
    """

    def __init__(self, path: Path | None, settings: Settings) -> None:
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
            scalars.send(scalars.scalars(record), iteration, tensorboard=tensorboard, wandb=wandb)

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
