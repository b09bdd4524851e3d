"""Random models with a published model's proportions: they load, keep the bounds, and fit."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.bench.shapes import SHAPES, find_shape, largest_scale, scaled, write_pair
from megatron_l0moe.evaluation.models import load_model
from megatron_l0moe.sizes.parameters import count_parameters, pass_bounds

ROUNDED = 0.04
"""Relative: heads and widths are whole multiples, so the smallest shapes are a little off the proportions."""


def bounds(shape):
    dense, moe = (count_parameters(config) for config in shape.configs("float32"))
    return [pass_bounds(dense, moe, tokens=n, logits=1 if n > 64 else n) for n in (1, 8, 64, 2048)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("scale", "share"), [(0.5, 1), (0.25, 1), (0.25, 2), (0.125, 2)])
def test_a_scaled_shape_has_the_bounds_of_the_published_one(name, scale, share):
    full = SHAPES[name]
    small = scaled(full, scale, full.dense.num_layers // share)
    assert small.weights() < full.weights() * scale**2 / share * 1.1
    for a, b in zip(bounds(full), bounds(small), strict=True):
        assert b.active == pytest.approx(a.active, rel=ROUNDED)
        assert b.bytes_read == pytest.approx(a.bytes_read, rel=ROUNDED)


def test_control_another_width_of_experts_has_other_bounds():
    full = SHAPES["llama-3-8b"]
    other = scaled(full, 0.25)
    wide = type(other)(dense=other.dense, moe=type(other.moe)(**{**vars(other.moe), "expert_ffn": 512}))
    assert bounds(wide)[0].active != pytest.approx(bounds(full)[0].active, rel=ROUNDED)


def test_published_sizes():
    totals = {
        name: count_parameters(shape.configs("bfloat16")[0]).total / 1e9 for name, shape in SHAPES.items()
    }
    assert totals == pytest.approx({"llama-3-8b": 8.03, "mistral-7b": 7.24, "qwen2-7b": 7.62}, abs=0.005)


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2-7b"])
def test_the_folders_load_and_are_what_was_planned(tmp_path, name):
    shape = scaled(SHAPES[name], 0.03, 3)
    folders = write_pair(shape, tmp_path, dtype="float32")
    models = [load_model(folder) for folder in folders]  # refuses missing and unknown weights
    for model, config in zip(models, shape.configs("float32"), strict=True):
        ids = torch.arange(8)[None]
        with torch.no_grad():
            assert bool(torch.isfinite(model(ids).logits).all())
        assert count_parameters(config).lm_head == model.lm_head.weight.numel()
    again = write_pair(shape, tmp_path / "again", dtype="float32")
    for one, two in zip(folders, again, strict=True):
        a, b = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (one, two))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_largest_scale_that_fits():
    shape = SHAPES["llama-3-8b"]
    assert largest_scale(shape, None, "bfloat16", 150 * 2**30) == 1.0
    assert largest_scale(shape, None, "float32", 150 * 2**30) == 0.5
    assert largest_scale(shape, 16, "float32", 150 * 2**30) == 1.0
    with pytest.raises(L0MoEError, match=r"fits into 0\.1 GiB; give fewer --layers"):
        largest_scale(shape, None, "float32", 2**27)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: find_shape("llama-3-8"), r"no shape 'llama-3-8' \(did you mean 'llama-3-8b'\?\); known are"),
        (lambda: scaled(SHAPES["qwen2-7b"], 0), r"--scale \(0\) must be above 0 and at most 1"),
        (
            lambda: scaled(SHAPES["qwen2-7b"], 0.5, 29),
            r"--layers \(29\) must be between 2 and the model's 28",
        ),
    ],
    ids=["name", "scale", "layers"],
)
def test_refusals(make, message):
    with pytest.raises(L0MoEError, match=message):
        make()
