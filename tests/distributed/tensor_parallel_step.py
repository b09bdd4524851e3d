"""One forward and backward pass of the expert stage on any tensor-parallel size; a program for torchrun.

`tensor_parallel_step.py FOLDER lagrangian|budget [rank-noise]`: one process writes the weights and its gradients,
more processes load the weights, split them, and write theirs. With `rank-noise` the gates' noise is drawn by rank,
which must show.
"""

import sys
from pathlib import Path
from typing import Any

from megatron_l0moe.runtime import cpu

LAYERS, DENSE, HIDDEN, FFN, VOCAB, SEQUENCE = 2, 1, 16, 24, 64, 8


def main(folder: Path, control: str, noise: str) -> None:
    cpu.install()
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    model_parallel_cuda_manual_seed(1)
    model = _build(world, control)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    weights = folder / f"weights_{control}"
    if world == 1:
        weights.mkdir()
        dist_checkpointing.save({"model": model.sharded_state_dict(metadata=metadata)}, weights)
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, weights)
    model.load_state_dict(loaded["model"])
    loss = _step(model, rank if noise else 0)
    gradients = {
        name: p.grad for name, p in model.named_parameters() if ".mlp." in name and p.grad is not None
    }
    result = {"loss": loss, "gradients": gradients}
    torch.save(result, folder / f"{control}{noise}_tp{world}_rank{rank}.pt")
    torch.distributed.destroy_process_group()


def _build(world: int, control: str) -> Any:
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_l0moe.modules.hard_concrete import HardConcreteConfig
    from megatron_l0moe.modules.layer_specs import LayerPlan, block_spec
    from megatron_l0moe.modules.retention import RetentionConfig
    from megatron_l0moe.modules.router import RouterConfig

    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=4, num_query_groups=2,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
        bias_activation_fusion=False, bias_dropout_fusion=False, gradient_accumulation_fusion=False,
        transformer_impl="local", hetereogenous_dist_checkpoint=True, tensor_model_parallel_size=world,
        sequence_parallel=world > 1,
    )  # fmt: skip
    plan = LayerPlan(
        stage="expert",
        dense_layers=DENSE,
        gate=HardConcreteConfig(),
        retention=RetentionConfig(l0_expert_ffn=8, l0_retention_control=control),
        router=RouterConfig(),
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, plan),
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def _step(model: Any, noise_shift: int) -> float:
    import torch

    from megatron_l0moe.modules.retention import schedule_step
    from megatron_l0moe.training.model import gates

    for gate in gates(model):
        if not gate.controller.uses_budget:
            gate.controller.lambdas.data.copy_(torch.tensor([0.4, 0.9]))
        step = schedule_step(
            gate.controller.retention_config, iteration=9 + noise_shift, total=20, target=1 / 3
        )
        gate.begin_iteration(step)
    tokens = torch.arange(2 * SEQUENCE).reshape(2, SEQUENCE) * 7 % VOCAB
    positions = torch.arange(SEQUENCE).expand(2, SEQUENCE)
    loss = model(tokens, positions, None, labels=tokens.roll(-1, dims=1)).mean()
    loss.backward()
    return float(loss)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], "".join(sys.argv[3:]))
