"""Build the models of a GPU with the fake Transformer Engine, and compare them with those of the local spec.

Started by test_te_spec.py with `fakes/` on PYTHONPATH. Prints one JSON object: for each case the class in every slot,
the differences of the checkpoint keys, and those of loss and gradients after loading a checkpoint of the local model.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_l0moe.runtime import cpu

cpu.install()

import torch  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.mapping import (  # noqa: E402
    ShardedObject,
    ShardedTensor,
    apply_factories,
)
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from megatron.core.extensions.transformer_engine import HAVE_TE  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.parallel_state import get_data_parallel_group  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron_models import DENSE, LAYERS, SEQUENCE, VOCAB, plan, transformer_config  # noqa: E402

from megatron_l0moe.modules.hard_concrete import HardConcreteGate  # noqa: E402
from megatron_l0moe.modules.layer_specs import block_spec  # noqa: E402
from megatron_l0moe.modules.retention import GateStep, Phase  # noqa: E402
from megatron_l0moe.modules.trained_part import parts  # noqa: E402

EXPERTS = 3
# What runtime/platform.py asks for with CUDA and Transformer Engine.
GPU = {
    "transformer_impl": "transformer_engine",
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    "moe_token_dispatcher_type": "alltoall",
    "apply_rope_fusion": True,
    "bias_activation_fusion": True,
}
LOCAL = {"transformer_impl": "local", "moe_token_dispatcher_type": "allgather"}
SLOTS = (
    "input_layernorm",
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "pre_mlp_layernorm",
    "mlp",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.router",
    "mlp.experts",
    "mlp.experts.linear_fc1",
    "mlp.experts.linear_fc2",
)


def build(stage: str, machine: dict[str, Any], *, qkv_bias: bool) -> GPTModel:
    """Return a float32 model as `training/model.py` would build it on a machine."""
    machine = dict(machine)
    moe: dict[str, Any] = {"num_moe_experts": None}
    if stage == "moe":
        moe = {
            "num_moe_experts": EXPERTS,
            "moe_ffn_hidden_size": 24,
            "moe_router_topk": 2,
            "moe_layer_freq": [0] * DENSE + [1] * (LAYERS - DENSE),
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.01,
            "moe_router_dtype": "fp32",
        }
    else:
        machine = {name: value for name, value in machine.items() if not name.startswith("moe_")}
    config = transformer_config(
        add_qkv_bias=qkv_bias,
        **machine,
        **moe,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, plan(stage)),
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=not qkv_bias,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def slots(model: GPTModel) -> dict[str, str]:
    """Return the class in every slot of every layer."""
    found = {"final_layernorm": type(model.decoder.final_layernorm).__name__}
    for number, layer in enumerate(model.decoder.layers):
        for slot in SLOTS:
            module: Any = layer
            for part in slot.split("."):
                module = getattr(module, part, None)
            if module is not None:
                found[f"{number}.{slot}"] = type(module).__name__
    return found


def state_of(model: GPTModel) -> dict[str, Any]:
    return model.sharded_state_dict(
        metadata={"dp_cp_group": get_data_parallel_group(with_context_parallel=True)}
    )


def stored(model: GPTModel) -> tuple[dict[str, str], set[str]]:
    """Return what a checkpoint of the model holds: tensors with their place and shape, and objects."""
    state = state_of(model)
    apply_factories(state)
    tensors: dict[str, str] = {}
    objects: set[str] = set()
    for entry in _leaves(state):
        if isinstance(entry, ShardedTensor):
            place = f"{entry.key} @ {entry.global_offset}"
            tensors[place] = f"{entry.dtype} {entry.local_shape} of {entry.global_shape}"
        elif isinstance(entry, ShardedObject):
            objects.add(entry.key)
    return tensors, objects


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def te_name(name: str, te_names: set[str]) -> str:
    """Return the name of a local parameter in the model of Transformer Engine."""
    name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    if name not in te_names:
        name = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    if "local_experts." in name:
        head, tail = name.split("local_experts.")
        expert, rest = tail.split(".", 1)
        name = f"{head}{rest}{expert}"
    return name


def step(model: GPTModel, phase: Phase) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients of one step, and what the gates saw."""
    model.zero_grad()
    for gate in parts(model, HardConcreteGate):
        gate.begin_iteration(GateStep(iteration=5, phase=phase, retention=0.7, penalty_scale=1.0))
    tokens = torch.arange(2 * SEQUENCE).reshape(2, SEQUENCE) * 7 % VOCAB
    positions = torch.arange(SEQUENCE).expand(2, SEQUENCE)
    loss = model(tokens, positions, None, labels=tokens.roll(-1, 1)).mean()
    loss.backward()
    found = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    found |= {f"gate{gate.layer}.input_mean": gate.input_mean for gate in parts(model, HardConcreteGate)}
    return {"loss": loss.detach(), **found}


def largest_difference(local: dict[str, torch.Tensor], te: dict[str, torch.Tensor]) -> tuple[float, str]:
    names = {name: te_name(name, set(te)) for name in local}
    assert set(names.values()) == set(te), set(names.values()) ^ set(te)
    return max((float((local[name] - te[other]).abs().max()), name) for name, other in names.items())


def case(stage: str, qkv_bias: bool, folder: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    local = build(stage, LOCAL, qkv_bias=qkv_bias)
    with torch.no_grad():  # norms of ones and zero biases would hide an exchange of the two
        for parameter in local.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    torch.manual_seed(2)
    te = build(stage, GPU, qkv_bias=qkv_bias)
    local_tensors, local_objects = stored(local)
    te_tensors, te_objects = stored(te)
    before = step(te, Phase.LEARN)  # loading writes into the parameters
    dist_checkpointing.save(state_of(local), str(folder))
    loaded = dist_checkpointing.load(state_of(te), str(folder), strict=StrictHandling.LOG_UNEXPECTED)
    te.load_state_dict(loaded, strict=False)
    phases = (Phase.OPEN, Phase.LEARN, Phase.FROZEN) if stage in ("expert", "mom") else (Phase.LEARN,)
    differences = {phase.name: largest_difference(step(local, phase), step(te, phase)) for phase in phases}
    return {
        "slots": slots(te),
        "local_slots": slots(local),
        "fc2_hooks": {
            number: len(layer.mlp.linear_fc2._forward_pre_hooks)
            for number, layer in enumerate(te.decoder.layers)
            if hasattr(layer.mlp, "linear_fc2")
        },
        "tensors": len(te_tensors),
        "other_tensors": sorted(set(local_tensors.items()) ^ set(te_tensors.items())),
        "other_objects": sorted(local_objects ^ te_objects),
        "differences": differences,
        "before_loading": largest_difference(step(local, Phase.LEARN), before)[0],
    }


def main() -> None:
    assert HAVE_TE, "the fake package is not on the path"
    found = {}
    with cpu.one_process_group(), tempfile.TemporaryDirectory() as folder:
        for stage in ("dense", "expert", "moe", "dsmoe", "mom"):
            for qkv_bias in (False, True):
                name = f"{stage}{'_qkv_bias' if qkv_bias else ''}"
                place = Path(folder) / name
                place.mkdir()
                found[name] = case(stage, qkv_bias, place)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
