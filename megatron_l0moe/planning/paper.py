"""Table 5 of the paper beside counts from the sizes it states, and where the two do not agree."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_l0moe.sizes.architecture import LLAMA_3_8B, MISTRAL_7B_V01, QWEN2_7B, Architecture
from megatron_l0moe.sizes.flops import StageModel, stage_model
from megatron_l0moe.sizes.parameters import ParameterCounts

FITTING_DENSE_LAYERS = 4
"""With so many dense layers Table 5's columns of parameters come out for all three models."""


@dataclass(frozen=True, kw_only=True)
class Table5Row:
    """One base model and its L0-MoE, as the paper has them."""

    name: str
    config: dict[str, Any]
    dense_layers: int
    """Section A.1: 4 for Qwen2, 8 for Mistral and Llama3."""
    expert_ffn: int
    dense_billions: float
    total_billions: float
    active_billions: float
    speedup: float
    """Table 1."""

    def architecture(self) -> Architecture:
        """Return the base model's sizes."""
        return Architecture.from_config(self.config, Path("Table 5"))

    def moe(self, dense_layers: int | None = None) -> StageModel:
        """Return the L0-MoE with the stated number of dense layers, or another."""
        layers = self.dense_layers if dense_layers is None else dense_layers
        return stage_model(
            self.architecture(),
            "moe",
            dense_layers=layers,
            num_experts=64,
            expert_ffn=self.expert_ffn,
            top_k=2,
        )

    def dense(self) -> StageModel:
        """Return the base model."""
        return stage_model(
            self.architecture(),
            "expert",
            dense_layers=self.dense_layers,
            num_experts=64,
            expert_ffn=self.expert_ffn,
            top_k=2,
        )


TABLE5 = (
    Table5Row(
        name="Llama-3-8B",
        config=LLAMA_3_8B,
        dense_layers=8,
        expert_ffn=1024,
        dense_billions=7.5,
        total_billions=25.1,
        active_billions=3.2,
        speedup=2.0,
    ),
    Table5Row(
        name="Mistral-7B",
        config=MISTRAL_7B_V01,
        dense_layers=8,
        expert_ffn=1024,
        dense_billions=7.1,
        total_billions=24.7,
        active_billions=2.9,
        speedup=2.1,
    ),
    Table5Row(
        name="Qwen2-7B",
        config=QWEN2_7B,
        dense_layers=4,
        expert_ffn=1280,
        dense_billions=7.0,
        total_billions=23.3,
        active_billions=2.8,
        speedup=2.5,
    ),
)


def paper_total(counts: ParameterCounts) -> int:
    """Return all weights but one embedding table: the way of counting that gives the paper's dense models."""
    return counts.total - counts.embedding if not counts.tied else counts.total


def full_active(counts: ParameterCounts) -> int:
    """Return the active weights with the embedding table, of which a token looks up one row."""
    return counts.active + (0 if counts.tied else counts.embedding)


def agrees(count: float, printed: float) -> bool:
    """Whether a count, in billions, is the printed one after rounding or cutting off to one digit."""
    return round(count, 1) == printed or int(count * 10) / 10 == printed


def disagreement(row: Table5Row) -> str | None:
    """Say where Table 5's L0-MoE columns do not follow from the paper's text, or None."""
    stated, fitting = row.moe().counts, row.moe(FITTING_DENSE_LAYERS).counts
    if agrees(paper_total(stated) / 1e9, row.total_billions) and agrees(
        stated.active / 1e9, row.active_billions
    ):
        return None
    return (
        f"Table 5 prints {row.total_billions:g} / {row.active_billions:g} billion for {row.name}'s L0-MoE, the text "
        f"({row.dense_layers} dense layers) gives {_billions(paper_total(stated))} / {_billions(stated.active)}; "
        f"{FITTING_DENSE_LAYERS} dense layers would give {_billions(paper_total(fitting))} / "
        f"{_billions(fitting.active)}"
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}"
