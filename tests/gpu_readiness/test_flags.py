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
from gpu_readiness.models_7b import CONFIGS, EXAMPLES, GPUS, architecture, recipe_on

from megatron_l0moe.chain import training_commands
from megatron_l0moe.chain.training_commands import construct_job
from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.recipe.recipe import load_recipe
from megatron_l0moe.runs.stages import Run

pytestmark = pytest.mark.slow  # most cases start a process with Megatron

HERE = Path(__file__).parent


class Size(NamedTuple):
    """A recipe's layout of one stage, and what must follow from it; worked by hand."""

    world: int
    """GPUs of a job."""
    data: int
    """Data-parallel size of attention and dense layers."""
    micro_batches: int
    """Of a step on each data-parallel rank: 64 sequences in the expert stage, 2 x 64 in the moe stage."""
    tensor: int = 1
    pipeline: int = 1
    chunks: int | None = None
    """Of each pipeline rank."""
    expert: int = 1
    expert_tensor: int = 1


SIZES = {
    ("llama3_8b", "expert", 8): Size(2, 2, 32),
    ("llama3_8b", "expert", 64): Size(2, 2, 32),
    ("llama3_8b", "expert", 512): Size(8, 8, 8),
    ("llama3_8b", "moe", 8): Size(8, 4, 32, tensor=2, expert=8),
    ("llama3_8b", "moe", 64): Size(64, 8, 16, tensor=2, pipeline=4, chunks=2, expert=8),
    ("llama3_8b", "moe", 512): Size(512, 128, 1, tensor=4, expert=64, expert_tensor=4),
    ("mistral_7b", "expert", 8): Size(2, 2, 32),
    ("mistral_7b", "expert", 64): Size(2, 2, 32),
    ("mistral_7b", "expert", 512): Size(8, 8, 8),
    ("mistral_7b", "moe", 8): Size(8, 4, 32, pipeline=2, chunks=4, expert=4),
    ("mistral_7b", "moe", 64): Size(64, 8, 16, pipeline=8, chunks=4),
    ("mistral_7b", "moe", 512): Size(512, 128, 1, tensor=4, expert=64, expert_tensor=4),
    ("qwen2_7b", "expert", 8): Size(4, 4, 16),
    ("qwen2_7b", "expert", 64): Size(4, 4, 16),
    ("qwen2_7b", "expert", 512): Size(8, 8, 8),
    ("qwen2_7b", "moe", 8): Size(8, 4, 32, pipeline=2, chunks=2, expert=4),
    ("qwen2_7b", "moe", 64): Size(64, 16, 8, tensor=2, pipeline=2, chunks=2, expert=8),
    ("qwen2_7b", "moe", 512): Size(512, 128, 1, tensor=4, expert=64, expert_tensor=4),
}
CASES = [(recipe, stage, gpus) for recipe in CONFIGS for stage in ("expert", "moe") for gpus in GPUS]
IDS = [f"{recipe}-{stage}-{gpus}" for recipe, stage, gpus in CASES]

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
    "recompute_granularity": None,
    "context_parallel_size": 1,
    "ddp.use_distributed_optimizer": True,
    "ddp.grad_reduce_in_fp32": True,
    "optimizer.use_distributed_optimizer": True,
    "optimizer.optimizer": "adam",
    "optimizer.bf16": True,
    "optimizer.clip_grad": 1.0,
    "optimizer.weight_decay": 0.1,
    "optimizer.adam_beta2": 0.95,
    "optimizer.lr": 1e-4,  # Table 7, and the next three
    "seq_length": 4096,
    "lr_decay_style": "WSD",
    "lr_wsd_decay_style": "cosine",
    "checkpoint.ckpt_format": "torch_dist",
    "checkpoint.dist_ckpt_optim_fully_reshardable": True,
    "checkpoint.fully_parallel_save": True,
}
OF_STAGE: dict[str, dict[str, Any]] = {
    "expert": {
        "stage": "expert",
        "global_batch_size": 64,
        "train_iters": 187_500_000 // (64 * 4096),
        "lr_warmup_iters": 143,  # 0.2 of 715 steps
        "lr_wsd_decay_iters": 72,  # 0.1 of them
        "save_retain_interval": 1000,
        "num_moe_experts": None,
        # open and frozen gates get no gradient, which overlapping would wait for
        "ddp.overlap_grad_reduce": False,
        "ddp.overlap_param_gather": False,
    },
    "moe": {
        "stage": "moe",
        "global_batch_size": 524_288 // 4096,
        "train_iters": 20 * 1716,  # 0.9 billion tokens are 1716.6 steps
        "lr_warmup_iters": 2059,  # 0.06 of 34,320
        "lr_wsd_decay_iters": 3432,
        "save_retain_interval": 10_000,
        "num_moe_experts": 64,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.01,
        "moe_z_loss_coeff": 0.003,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_token_dispatcher_type": "alltoall",
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


def flags_of(name: str, stage: str, gpus: int) -> list[str]:
    """Return the flags of the training program, as `l0moe` renders them on any machine."""
    run = Run(recipe=recipe_on(name, gpus), recipe_file=EXAMPLES / f"{name}.yaml", runs_dir=Path("runs"))
    model = architecture(name)
    job = (
        training_commands.expert_job(run, model, 0)
        if stage == "expert"
        else training_commands.moe_job(run, model)
    )
    assert job.env["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "NVIDIA_TF32_OVERRIDE" not in job.env
    return job.command[job.command.index(training_commands.PRETRAIN) + 1 :]


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
    tasks = [(SIZES[case].world, flags_of(*case)) for case in CASES]
    return dict(zip(IDS, resolve("te", tasks), strict=True))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    return {name: (found[name], value) for name, value in expected.items() if found[name] != value}


@pytest.mark.parametrize(("recipe", "stage", "gpus"), CASES, ids=IDS)
def test_resolved(
    resolved: dict[str, dict[str, Any]], recipe: str, stage: str, gpus: int, request: pytest.FixtureRequest
) -> None:
    found = resolved[request.node.callspec.id]
    assert differences(found, ON_GPU | OF_STAGE[stage] | OF_MODEL[recipe]) == {}
    size = SIZES[recipe, stage, gpus]
    layout = {
        "world_size": size.world,
        "tensor_model_parallel_size": size.tensor,
        "sequence_parallel": size.tensor > 1,
        "pipeline_model_parallel_size": size.pipeline,
        "virtual_pipeline_model_parallel_size": size.chunks,
        "expert_model_parallel_size": size.expert,
        "expert_tensor_parallel_size": size.expert_tensor,
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
    (found,) = resolve(machine, [(8, flags_of("llama3_8b", "moe", 8))])
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
    trial = training_commands.Trial(layout=Layout(), steps=10, folder=Path("trial"))
    for job in (
        training_commands.expert_job(run, model, 0, trial=trial),
        training_commands.moe_job(run, model, trial=trial),
        construct_job(run, model, 0),
    ):
        assert job.env["NVIDIA_TF32_OVERRIDE"] == "0"
        assert "--bf16" not in job.command
    parity = training_commands.logits_job(run, model)
    assert parity.env["CUDA_VISIBLE_DEVICES"] == ""  # on the CPU, whatever the machine has
    assert "--bf16" not in parity.command
