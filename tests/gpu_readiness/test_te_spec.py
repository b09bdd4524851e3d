"""The Transformer Engine spec against the local one, with a fake Transformer Engine: classes, checkpoint, numbers.

Not run on a GPU. The fake has the constructor signatures of the real package and computes by plain torch, so this shows
that Megatron's classes are built as we ask and that both specs are the same function of the same checkpoint; the real
kernels are not shown.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # most cases start a process with Megatron

HERE = Path(__file__).parent
TESTS = HERE.parent
FP32_ATOL = 1e-6  # other order of sums in attention and norm; entries are of size 0.01 to 1
CASES = tuple(
    f"{stage}{bias}" for stage in ("dense", "expert", "moe", "dsmoe", "mom") for bias in ("", "_qkv_bias")
)

ATTENTION = {
    "input_layernorm": "IdentityOp",
    "self_attention.linear_qkv": "TELayerNormColumnParallelLinear",
    "self_attention.core_attention": "TEDotProductAttention",
    "self_attention.linear_proj": "TERowParallelLinear",
}
DENSE_LAYER = {
    "pre_mlp_layernorm": "IdentityOp",
    "mlp": "MLP",
    "mlp.linear_fc1": "TELayerNormColumnParallelLinear",
    "mlp.linear_fc2": "TERowParallelLinear",
}
GATED_LAYER = {
    "pre_mlp_layernorm": "RMSNorm",
    "mlp": "L0MLP",
    "mlp.linear_fc1": "TEColumnParallelLinear",
    "mlp.linear_fc2": "TERowParallelLinear",
}
BLOCKS_LAYER = {**GATED_LAYER, "mlp": "DSMoEMLP"}
MASKS_LAYER = {**GATED_LAYER, "mlp": "MoMMLP"}
MOE_LAYER = {
    "pre_mlp_layernorm": "RMSNorm",
    "mlp": "MoELayer",
    "mlp.router": "L0Router",
    "mlp.experts": "TEGroupedMLP",
    "mlp.experts.linear_fc1": "TEColumnParallelGroupedLinear",
    "mlp.experts.linear_fc2": "TERowParallelGroupedLinear",
}
TOP_LAYER = {
    "dense": DENSE_LAYER,
    "expert": GATED_LAYER,
    "moe": MOE_LAYER,
    "dsmoe": BLOCKS_LAYER,
    "mom": MASKS_LAYER,
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the program saw, by case; one process for all of them."""
    path = os.pathsep.join([str(HERE / "fakes"), str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, str(HERE / "te_spec_program.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_classes(found: dict[str, Any], case: str) -> None:
    """One dense layer at the bottom, two of the stage above it."""
    top = TOP_LAYER[case.removesuffix("_qkv_bias")]
    expected = {"final_layernorm": "RMSNorm"}
    for number, layer in enumerate((DENSE_LAYER, top, top)):
        expected |= {f"{number}.{slot}": name for slot, name in (ATTENTION | layer).items()}
    assert found[case]["slots"] == expected
    gated = 1 if top in (GATED_LAYER, BLOCKS_LAYER, MASKS_LAYER) else 0
    hooks = {"0": 0} if top is MOE_LAYER else {"0": 0, "1": gated, "2": gated}
    assert found[case]["fc2_hooks"] == hooks


@pytest.mark.parametrize("case", CASES)
def test_the_local_spec_has_none_of_them(found: dict[str, Any], case: str) -> None:
    classes = set(found[case]["local_slots"].values())
    assert not [name for name in classes if name.startswith("TE")], classes


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_keys_are_those_of_the_local_spec(found: dict[str, Any], case: str) -> None:
    assert found[case]["tensors"] > 20
    assert found[case]["other_tensors"] == []
    assert found[case]["other_objects"] == []


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_the_local_spec_gives_the_same_step(found: dict[str, Any], case: str) -> None:
    """Loss, every gradient and the gates' mean input in every phase; the control is the model before loading."""
    for phase, (difference, name) in found[case]["differences"].items():
        assert difference <= FP32_ATOL, f"{phase}: {name}"
    assert found[case]["before_loading"] > 1e3 * FP32_ATOL
