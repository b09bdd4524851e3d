"""Which checkpoint layout an inference engine computes an L0-MoE rightly from. A table; no torch.

`WRONG` was found by running transformers 4.57 and 5.23 and vLLM 0.32 on the CPU, and by reading the released sources of
SGLang 0.4.1 to 0.5.23, which needs a GPU to run. Most of these faults are silent: the engine loads and answers.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.sizes.architecture import Architecture

Engine = Literal["transformers", "vllm", "sglang"]
Target = Literal["transformers", "vllm", "sglang", "all"]
Form = Literal["ernie4_5_moe", "qwen2_moe", "ernie4_5_moe_bias"]

ENGINES: tuple[Engine, ...] = get_args(Engine)


@dataclass(frozen=True, kw_only=True)
class FormSpec:
    """What a layout can express."""

    name: Form
    qkv_bias: frozenset[bool]
    """The models it holds for, by whether they have biases on q, k and v."""
    renormalised: frozenset[bool]
    """The models it holds for, by whether their top-k gate weights sum to 1 (else they are softmax's own)."""
    cannot: str
    """Why it expresses nothing else."""


FORMS: tuple[FormSpec, ...] = (
    FormSpec(
        name="ernie4_5_moe",
        qkv_bias=frozenset({False}),
        renormalised=frozenset({True}),
        cannot="Ernie4.5-MoE has no biases on q, k and v alone and always makes the top-k weights sum to 1",
    ),
    FormSpec(
        name="qwen2_moe",
        qkv_bias=frozenset({False, True}),
        renormalised=frozenset({False, True}),
        cannot="",
    ),
    FormSpec(
        name="ernie4_5_moe_bias",
        qkv_bias=frozenset({True}),
        renormalised=frozenset({True}),
        cannot="Ernie4.5-MoE always makes the top-k weights sum to 1",
    ),
)
"""The layouts, the preferred one first."""

WRONG: dict[tuple[Engine, Form], str] = {
    ("transformers", "ernie4_5_moe_bias"): (
        "with use_bias transformers also makes biases of the MLPs, which the checkpoint lacks"
    ),
    ("vllm", "ernie4_5_moe_bias"): (
        "with use_bias vLLM drops o_proj's bias and makes biases of the dense MLPs that stay unset, without an error"
    ),
    ("sglang", "qwen2_moe"): (
        "from 0.4.7 on SGLang's Qwen2-MoE ignores mlp_only_layers and takes dense layers for experts"
    ),
}
"""Layouts that an engine loads and gets wrong, or cannot load."""

HIDDEN_FROM_HEADS: frozenset[tuple[Engine, Form]] = frozenset({("vllm", "qwen2_moe")})
"""Where head_dim of config.json is not read by an engine, so that it must be hidden_size / num_attention_heads."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What decides which layouts can hold a model."""

    qkv_bias: bool
    renormalised: bool = True
    usual_head_dim: bool = True
    """Whether head_dim is hidden_size / num_attention_heads."""

    @classmethod
    def of(cls, architecture: Architecture, *, renormalised: bool = True) -> "Model":
        """Return the facts of an L0-MoE made from a dense model."""
        a = architecture
        usual = a.head_dim * a.num_attention_heads == a.hidden_size
        return cls(qkv_bias=a.qkv_bias, renormalised=renormalised, usual_head_dim=usual)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One checkpoint to write."""

    form: Form
    engines: tuple[Engine, ...]
    folder: str
    """Below the export's folder; empty: that folder itself."""


def plan(target: Target, model: Model) -> tuple[Planned, ...]:
    """Return the checkpoints that serve a target; for `all`, one if one form serves every engine, else one per form.

    The first lies in the export's folder itself, others in a folder below it that is named after their engines.

    Raises:
        L0MoEError: no layout is computed rightly by an engine of the target; names each layout's reason.
    """
    engines = ENGINES if target == "all" else (target,)
    forms: dict[Form, list[Engine]] = {}
    for engine in engines:
        forms.setdefault(_form(engine, model), []).append(engine)
    return tuple(
        Planned(form=form, engines=tuple(served), folder="" if i == 0 else "-".join(served))
        for i, (form, served) in enumerate(forms.items())
    )


def refusal(engine: Engine, spec: FormSpec, model: Model) -> str | None:
    """Return why an engine cannot be given the model in this layout; None: it can."""
    if model.qkv_bias not in spec.qkv_bias or model.renormalised not in spec.renormalised:
        return spec.cannot or f"{spec.name} cannot hold this model"
    if (engine, spec.name) in HIDDEN_FROM_HEADS and not model.usual_head_dim:
        return "vLLM's Qwen2-MoE takes hidden_size / num_attention_heads for head_dim, which is another here"
    return WRONG.get((engine, spec.name))


def _form(engine: Engine, model: Model) -> Form:
    reasons: dict[str, None] = {}
    for spec in FORMS:
        reason = refusal(engine, spec, model)
        if reason is None:
            return spec.name
        reasons[reason] = None
    possible = [other for other in ENGINES if any(refusal(other, spec, model) is None for spec in FORMS)]
    raise L0MoEError(
        f"This L0-MoE (biases on q, k, v: {_yes(model.qkv_bias)}; top-k weights renormalised: "
        f"{_yes(model.renormalised)}) cannot be exported for {engine}: {'; '.join(reasons)}; export for "
        f"{' or '.join(possible)}."
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"
