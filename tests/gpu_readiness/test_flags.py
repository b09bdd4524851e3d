"""What the recipes of the 7-8B models make of Megatron on 8, 64 and 512 GPUs, by Megatron's own parser and checks.

No GPU is used: the jobs' flags are completed as on a machine with CUDA and resolved in a subprocess (resolve_flags.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gpu_readiness.models_7b import CONFIGS, architecture

from megatron_l0moe.launch import jobs
from megatron_l0moe.launch.stages import Run
from megatron_l0moe.planning.layouts import Layout
from megatron_l0moe.recipe import Recipe, load_recipe

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
TENSOR = 4  # in every layout: Qwen2 has 4 KV heads


class Size(NamedTuple):
    """A layout of one stage and what must follow from it."""

    gpus: int
    pipeline: int
    data: int
    """Data-parallel size of attention and dense layers."""
    micro_batches: int
    """Of a step on each data-parallel rank: 64 sequences in the expert stage, 2 x 64 in the moe stage."""


SIZES = {
    "expert": (Size(8, 1, 2, 32), Size(64, 1, 16, 4), Size(512, 2, 64, 1)),
    "moe": (Size(8, 1, 2, 64), Size(64, 1, 16, 8), Size(512, 2, 64, 2)),
}
CASES = [(recipe, stage, size) for recipe in CONFIGS for stage, sizes in SIZES.items() for size in sizes]
SHIPPED = {"expert": 8, "moe": 64}
"""The size that the recipes have; the others differ from it in processes, nodes and pipeline only."""
IDS = [f"{recipe}-{stage}-{size.gpus}" for recipe, stage, size in CASES]

ON_GPU = {
    "transformer_impl": "transformer_engine",
    "distributed_backend": "nccl",
    "apply_rope_fusion": True,
    "bias_activation_fusion": True,
    "use_cpu_initialization": None,
    "normalization": "RMSNorm",
    "bf16": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "hetereogenous_dist_checkpoint": True,
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
    "context_parallel_size": 1,
    "tensor_model_parallel_size": TENSOR,
    "sequence_parallel": True,
    "ddp.use_distributed_optimizer": True,
    "ddp.grad_reduce_in_fp32": True,
    "optimizer.use_distributed_optimizer": True,
    "optimizer.optimizer": "adam",
    "optimizer.bf16": True,
    "optimizer.clip_grad": 1.0,
    "optimizer.weight_decay": 0.1,
    "optimizer.adam_beta2": 0.95,
    "optimizer.lr": 1e-4,
    "checkpoint.ckpt_format": "torch_dist",
    "checkpoint.dist_ckpt_optim_fully_reshardable": True,
    "checkpoint.fully_parallel_save": True,
}
OF_STAGE: dict[str, dict[str, Any]] = {
    "expert": {
        "stage": "expert",
        "num_moe_experts": None,
        "expert_model_parallel_size": 1,
        # open and frozen gates get no gradient, which overlapping would wait for
        "ddp.overlap_grad_reduce": False,
        "ddp.overlap_param_gather": False,
    },
    "moe": {
        "stage": "moe",
        "num_moe_experts": 64,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.01,
        "moe_z_loss_coeff": 0.003,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": 8,
        "expert_tensor_parallel_size": 1,
        "ddp.overlap_grad_reduce": True,
        "ddp.overlap_param_gather": True,
    },
}
OF_MODEL: dict[str, dict[str, Any]] = {
    "llama3_8b": {"num_layers": 32, "hidden_size": 4096, "num_query_groups": 8, "add_qkv_bias": False},
    "mistral_7b": {"num_layers": 32, "hidden_size": 4096, "num_query_groups": 8, "add_qkv_bias": False},
    "qwen2_7b": {"num_layers": 28, "hidden_size": 3584, "num_query_groups": 4, "add_qkv_bias": True},
}
DENSE_LAYERS = {"llama3_8b": 8, "mistral_7b": 8, "qwen2_7b": 4}
EXPERT_FFN = {"llama3_8b": 1024, "mistral_7b": 1024, "qwen2_7b": 1280}


def recipe_for(name: str, stage: str, size: Size) -> Recipe:
    """Return a recipe of examples/ with the stage's number of GPUs changed."""
    recipe = load_recipe(EXAMPLES / f"{name}.yaml")
    raw = recipe.model_dump()
    parallel = raw["expert_training" if stage == "expert" else "moe_training"]["parallel"]
    parallel |= {"processes": size.gpus, "nodes": size.gpus // 8, "pipeline": size.pipeline}
    changed = Recipe.model_validate(raw)
    assert (changed == recipe) == (size.gpus == SHIPPED[stage]), "the table and the recipe differ"
    return changed


def flags_of(name: str, stage: str, size: Size) -> list[str]:
    """Return the flags of the training program, as `l0moe` renders them on any machine."""
    file = EXAMPLES / f"{name}.yaml"
    run = Run(recipe=recipe_for(name, stage, size), recipe_file=file, runs_dir=Path("runs"))
    model = architecture(name)
    job = jobs.expert_job(run, model, 0) if stage == "expert" else jobs.moe_job(run, model)
    assert job.env["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "NVIDIA_TF32_OVERRIDE" not in job.env
    return job.command[job.command.index(jobs.PRETRAIN) + 1 :]


def resolve(machine: str, tasks: list[tuple[int, list[str]]]) -> list[dict[str, Any]]:
    """Run resolve_flags.py; Transformer Engine's fake is there for the machine `te` only."""
    path = [str(HERE / "fakes")] if machine == "te" else []
    done = subprocess.run(
        [sys.executable, str(HERE / "resolve_flags.py"), machine],
        input=json.dumps(tasks),
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path),
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def resolved() -> dict[str, dict[str, Any]]:
    """All cases on a machine with Transformer Engine, by one process."""
    tasks = [(size.gpus, flags_of(recipe, stage, size)) for recipe, stage, size in CASES]
    return dict(zip(IDS, resolve("te", tasks), strict=True))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    return {name: (found[name], value) for name, value in expected.items() if found[name] != value}


@pytest.mark.parametrize(("recipe", "stage", "size"), CASES, ids=IDS)
def test_resolved(
    resolved: dict[str, dict[str, Any]], recipe: str, stage: str, size: Size, request: pytest.FixtureRequest
) -> None:
    found = resolved[request.node.callspec.id]
    assert differences(found, ON_GPU | OF_STAGE[stage] | OF_MODEL[recipe]) == {}
    layout = {
        "world_size": size.gpus,
        "pipeline_model_parallel_size": size.pipeline,
        "data_parallel_size": size.data,
        "micro_batches": size.micro_batches,
    }
    assert differences(found, layout) == {}
    if stage == "moe":
        dense, layers = DENSE_LAYERS[recipe], found["num_layers"]
        assert found["moe_layer_freq"] == [0] * dense + [1] * (layers - dense)
        assert found["moe_ffn_hidden_size"] == EXPERT_FFN[recipe]


def test_a_difference_would_be_seen(resolved: dict[str, dict[str, Any]]) -> None:
    found = resolved["llama3_8b-moe-64"]
    assert differences(found, {"expert_model_parallel_size": 4, "bf16": True}) == {
        "expert_model_parallel_size": (8, 4)
    }


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        # Fused RoPE and permutation are Transformer Engine's; with them Megatron refuses the config.
        (
            "gpu",
            {
                "transformer_impl": "local",
                "distributed_backend": "nccl",
                "moe_token_dispatcher_type": "alltoall",
                "bias_activation_fusion": True,
                "use_cpu_initialization": None,
            },
        ),
        (
            "cpu",
            {
                "transformer_impl": "local",
                "distributed_backend": "gloo",
                "moe_token_dispatcher_type": "allgather",
                "bias_activation_fusion": False,
                "use_cpu_initialization": True,
            },
        ),
    ],
)
def test_other_machines(machine: str, expected: dict[str, Any]) -> None:
    """The same command on a machine without Transformer Engine, and without a GPU."""
    size = SIZES["moe"][0]
    (found,) = resolve(machine, [(size.gpus, flags_of("llama3_8b", "moe", size))])
    without_te = {
        "apply_rope_fusion": False,
        "moe_grouped_gemm": False,
        "moe_permute_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    assert differences(found, expected | without_te) == {}


def test_fp32_that_is_compared_is_fp32() -> None:
    """Transformer Engine multiplies fp32 matrices in TF32 (common/gemm/cublaslt_gemm.cu:448 of 2.17.1)."""
    file = EXAMPLES / "llama3_8b.yaml"
    run = Run(recipe=load_recipe(file), recipe_file=file, runs_dir=Path("runs"))
    model = architecture("llama3_8b")
    trial = jobs.Trial(layout=Layout(), steps=10, folder=Path("trial"))
    for job in (
        jobs.expert_job(run, model, 0, trial=trial),
        jobs.moe_job(run, model, trial=trial),
        jobs.logits_job(run, model),
    ):
        assert job.env["NVIDIA_TF32_OVERRIDE"] == "0"
        assert "--bf16" not in job.command
