"""What real (tiny) Megatron models of both stages take on the CPU: parameters, state, kept activations, FLOPs.

Run as a program; prints one JSON object {case: numbers}. Fused SwiGLU, as on a GPU; as many KV heads as heads, since
the local attention, which has no grouped kernel, would repeat the others.
"""

import json
import sys
from typing import Any

from megatron_l0moe.runtime import cpu

cpu.install_training()

import torch  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.training import training as megatron_training  # noqa: E402
from megatron_models import transformer_config  # noqa: E402
from planning_cases import CASES, SIZES  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from megatron_l0moe.modules.hard_concrete import HardConcreteConfig, HardConcreteGate  # noqa: E402
from megatron_l0moe.modules.layer_specs import LayerPlan, block_spec  # noqa: E402
from megatron_l0moe.modules.retention import GateStep, Phase, RetentionConfig  # noqa: E402
from megatron_l0moe.modules.router import RouterConfig  # noqa: E402
from megatron_l0moe.modules.trained_part import parts  # noqa: E402
from megatron_l0moe.training.arguments import JobSettings, StageConfig  # noqa: E402
from megatron_l0moe.training.model import group_overrides, prepare_for_training  # noqa: E402


def build(stage: str, *, tied: bool, bf16: bool, trains: str, recompute: dict[str, Any]) -> GPTModel:
    """Return a model as a training job of the stage has it."""
    z = SIZES
    dtype = torch.bfloat16 if bf16 else torch.float32
    moe: dict[str, Any] = {}
    if stage == "moe":
        moe = {
            "num_moe_experts": z["experts"],
            "moe_ffn_hidden_size": z["expert_ffn"],
            "moe_router_topk": z["top_k"],
            "moe_layer_freq": [0] * z["dense"] + [1] * (z["layers"] - z["dense"]),
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.01,
            "moe_z_loss_coeff": 0.003,
            "moe_token_dispatcher_type": "allgather",
            "moe_router_dtype": "fp32",
        }
    config = transformer_config(
        num_layers=z["layers"],
        hidden_size=z["hidden"],
        ffn_hidden_size=z["ffn"],
        num_attention_heads=z["heads"],
        num_query_groups=z["heads"],
        bias_activation_fusion=True,
        params_dtype=dtype,
        bf16=bf16,
        **moe,
        **recompute,
    )
    plan = LayerPlan(
        stage=stage,  # type: ignore[arg-type]
        dense_layers=z["dense"],
        gate=HardConcreteConfig(),
        retention=RetentionConfig(l0_expert_ffn=z["expert_ffn"]),
        router=RouterConfig(),
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, plan),
        vocab_size=z["vocab"],
        max_sequence_length=z["sequence"],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    if bf16:
        model.bfloat16()
    stage_config = StageConfig(l0_stage=stage, l0_train_weights=trains)  # type: ignore[arg-type]
    prepare_for_training([model], JobSettings(stage_config, plan))
    return model.train()


def measure(
    stage: str,
    *,
    tied: bool = True,
    bf16: bool = False,
    trains: str = "on",
    recompute: dict[str, Any] | None = None,
) -> dict[str, Any]:
    model = build(stage, tied=tied, bf16=bf16, trains=trains, recompute=recompute or {})
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=bf16),
        Float16Module(model.config, model) if bf16 else model,
    )
    options = OptimizerConfig(optimizer="adam", lr=1e-5, bf16=bf16, params_dtype=model.config.params_dtype)
    overrides = group_overrides(StageConfig(l0_stage=stage, l0_train_weights=trains))  # type: ignore[arg-type]
    optimizer = megatron_training.get_megatron_optimizer(options, [wrapped], config_overrides=overrides)
    z = SIZES
    tokens = torch.arange(z["batch"] * z["sequence"]).reshape(z["batch"], -1) * 7 % z["vocab"]
    positions = torch.arange(z["sequence"]).expand_as(tokens)
    for gate in parts(model, HardConcreteGate):
        gate.begin_iteration(GateStep(iteration=5, phase=Phase.LEARN, retention=0.7, penalty_scale=1.0))

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = wrapped(tokens, positions, None, labels=tokens.roll(-1, 1)).mean()
    activations = sum(kept.values())
    loss.backward()
    wrapped.finish_grad_sync()
    optimizer.step()
    wrapped.zero_grad_buffer()
    with counter:
        wrapped(tokens, positions, None, labels=tokens.roll(-1, 1)).mean().backward()
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    state = [t for one in optimizers for s in one.optimizer.state.values() for t in s.values()]
    held = [p for one in optimizers for group in one.optimizer.param_groups for p in group["params"]]
    mains = [p for p in held if p.untyped_storage().data_ptr() not in own]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weights": _bytes(model.parameters()) + _bytes(model.buffers()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": _bytes([t for t in state if torch.is_tensor(t)]) + _bytes(mains),
        "activations": activations,
        "flops": {str(op): n for op, n in counter.get_flop_counts()["Global"].items()},
    }


def _bytes(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def main() -> None:
    torch.manual_seed(0)
    with cpu.one_process_group():
        found = {name: measure(**case) for name, case in CASES.items()}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
