"""Random dense models and L0-MoEs with a published model's proportions, scaled to fit a machine, for timing.

Scaled by s with L' of L layers: hidden size, FFN and expert channels, query and KV heads by s, the vocabulary by
s L' / L, so that attention, FFN, experts and LM head keep their shares of the work and the bounds stay the same.

Sources: sizes/architecture.py; experts: the paper's 64 of 7 % width, top 2, above the bottom
dense layers that the recipes in examples/ have.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_l0moe.checkpoints.families import MoEShape, dense_rules
from megatron_l0moe.checkpoints.rules import Rule, Zeros, hf_shapes
from megatron_l0moe.checkpoints.safetensors_files import SafetensorsWriter
from megatron_l0moe.conversion import targets
from megatron_l0moe.conversion.moe_layouts import LAYOUTS, MoELayout
from megatron_l0moe.errors import L0MoEError, nearest
from megatron_l0moe.evaluation.models import DTYPES
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.sizes.architecture import LLAMA_3_8B, MISTRAL_7B_V01, QWEN2_7B, Architecture
from megatron_l0moe.sizes.parameters import count_parameters, l0moe_counts

logger = logging.getLogger(__name__)

INIT_STD = 0.02
MEMORY_SHARE = 0.6
"""The share of the free memory that the weights of both models take; the rest is for activations and loading."""
_EXPERT_MULTIPLE = 32
_FFN_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a dense model and of the L0-MoE made of it."""

    dense: Architecture
    moe: MoEShape

    def configs(self, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return config.json of the dense model and of the L0-MoE, in a layout that vLLM computes rightly."""
        moe = self._layout().hf_config(self.dense, self.moe, dtype, ("transformers", "vllm"))
        return self.dense.hf_config(dtype), moe

    def weights(self) -> int:
        """Return the number of weights of both models together."""
        dense = self.dense.hf_config("float32")
        moe = l0moe_counts(
            dense,
            dense_layers=self.moe.dense_layers,
            num_experts=self.moe.num_experts,
            expert_ffn=self.moe.expert_ffn,
            top_k=self.moe.top_k,
        )
        return count_parameters(dense).total + moe.total

    def rules(self) -> tuple[list[Rule], list[Rule]]:
        """Return the tables of tensors that belong to `configs`."""
        return dense_rules(self.dense), self._layout().rules(self.dense, self.moe)

    def _layout(self) -> MoELayout:
        model = targets.Model.of(self.dense, renormalised=self.moe.renormalised)
        return LAYOUTS[targets.plan("vllm", model)[0].form]


def _published(config: dict[str, Any], *, expert_ffn: int, dense_layers: int) -> Shape:
    # Without Mistral's sliding window: prompts are shorter, and not every engine's layout has one.
    dense = replace(Architecture.from_config(config, Path("config.json")), sliding_window=None)
    moe = MoEShape(dense_layers=dense_layers, num_experts=64, expert_ffn=expert_ffn, top_k=2)
    return Shape(dense=dense, moe=moe)


SHAPES = {
    "llama-3-8b": _published(LLAMA_3_8B, expert_ffn=1024, dense_layers=8),
    "mistral-7b": _published(MISTRAL_7B_V01, expert_ffn=1024, dense_layers=8),
    "qwen2-7b": _published(QWEN2_7B, expert_ffn=1280, dense_layers=4),
}


def find_shape(name: str) -> Shape:
    """Return a published shape by its name."""
    if name not in SHAPES:
        raise L0MoEError(f"There is no shape {name!r}{nearest(name, SHAPES)}; known are {', '.join(SHAPES)}.")
    return SHAPES[name]


def scaled(shape: Shape, scale: float, layers: int | None = None) -> Shape:
    """Return a smaller shape of the same proportions, as nearly as whole heads and round sizes allow.

    Args:
        scale: of all widths, above 0 and at most 1.
        layers: fewer layers, of which the same share stays dense (at least one); None: all.
    """
    a, moe = shape.dense, shape.moe
    layers = a.num_layers if layers is None else layers
    if not 0 < scale <= 1:
        raise L0MoEError(f"--scale ({scale}) must be above 0 and at most 1.")
    if not 2 <= layers <= a.num_layers:
        raise L0MoEError(f"--layers ({layers}) must be between 2 and the model's {a.num_layers}.")
    groups = max(1, round(a.num_query_groups * scale))
    heads = groups * (a.num_attention_heads // a.num_query_groups)
    head_dim = _multiple(a.hidden_size * scale / heads, 16)
    width = heads * head_dim / a.hidden_size  # what rounding the heads made of the scale
    dense = replace(
        a,
        hidden_size=heads * head_dim,
        ffn_hidden_size=_multiple(a.ffn_hidden_size * width, _FFN_MULTIPLE),
        num_layers=layers,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=_multiple(a.vocab_size * width * layers / a.num_layers, 64),
    )
    experts = replace(
        moe,
        expert_ffn=_multiple(moe.expert_ffn * width, _EXPERT_MULTIPLE),
        dense_layers=max(1, round(moe.dense_layers * layers / a.num_layers)),
    )
    return Shape(dense=dense, moe=experts)


def largest_scale(shape: Shape, layers: int | None, dtype: str, free_bytes: int) -> float:
    """Return the largest of 1, 1/2, 1/4, ... whose two models fit into a share of the free memory."""
    room = free_bytes * MEMORY_SHARE
    for scale in (1.0, 0.5, 0.25, 0.125, 0.0625):
        if scaled(shape, scale, layers).weights() * DTYPES[dtype].itemsize <= room:
            return scale
    raise L0MoEError(f"No scaled shape fits into {room / 2**30:.1f} GiB; give fewer --layers.")


def write_pair(shape: Shape, folder: Path, *, dtype: str, seed: int = 0) -> tuple[Path, Path]:
    """Write folder/dense and folder/moe as ordinary Hugging Face checkpoints; returns the two folders."""
    generator = torch.Generator().manual_seed(seed)
    folders = folder / "dense", folder / "moe"
    for out, config, rules in zip(folders, shape.configs(dtype), shape.rules(), strict=True):
        logger.info("writing random weights to %s", out)
        with SafetensorsWriter(out, hf_shapes(rules)) as writer:
            for name, tensor in random_tensors(rules, DTYPES[dtype], generator):
                writer.write(name, tensor)
        write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    return folders


def random_tensors(
    rules: Sequence[Rule], dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a table: norms are 1, what must be zero is, routers give logits of variance 1."""
    for rule in rules:
        for name, size in rule.hf_shapes().items():
            if isinstance(rule, Zeros):
                yield name, torch.zeros(size)
            elif name.endswith("norm.weight"):
                yield name, torch.ones(size, dtype=dtype)
            elif name.endswith(".mlp.gate.weight"):
                yield name, torch.randn(size, generator=generator) * size[1] ** -0.5
            else:
                yield name, (torch.randn(size, generator=generator) * INIT_STD).to(dtype)


def _multiple(value: float, of: int) -> int:
    return max(of, round(value / of) * of)
