"""The model card of an export other than a dense one, README.md: origin, sizes, what was measured, licence."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from megatron_l0moe.conversion.companions import licence_files
from megatron_l0moe.conversion.moe_layouts import ENGINES_KEY, layout_of
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import TITLES, Recipe
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.sizes.architecture import read_config
from megatron_l0moe.sizes.parameters import count_parameters, moe_layers


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card says beside the sizes of the model."""

    base_name: str | None = None
    """The dense model's name; None: as its config.json or its folder is called."""
    recipe: str | None = None
    """The recipe's text."""
    method: str = "l0"
    """How the experts' units were chosen."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Training tokens by stage."""
    numbers: Mapping[str, str] = field(default_factory=dict)
    """What was measured -> value with its unit."""


_CREDENTIALS = re.compile(r"://[^/\s]*@")
_LOCAL = re.compile(r"file://|[/~]|(?:\.\./)")
_LOCAL_INSIDE = re.compile(
    r"(?:(?<![\w/:.~-])|(?<=:)(?!//))(?:file://)?(?:/|~\w*/|\.\./)(?:[^/\s,;:'\"=]+/)*"
)
"""The folders of a path within a text, such as `/home/me/` in `a:/home/me/b`."""
_CHOICES = {True: "for one domain by L0 regularization", False: "without training (expert_training.method)"}


def recipe_facts(recipe: Recipe) -> CardFacts:
    """Return what a recipe says: its text with all defaults, and the training tokens of the stages."""
    length = recipe.data.seq_length
    text = yaml.safe_dump(publishable(recipe), sort_keys=False)
    moe = recipe.moe_steps * recipe.moe_global_batch_size * length
    if recipe.method != "l0moe":
        return CardFacts(recipe=text, tokens={TITLES[recipe.method]: moe})
    expert, what = recipe.expert_steps * recipe.expert_training.global_batch_size * length, "runs"
    if recipe.construction is not None:
        expert, what = recipe.calibration_sequences * length, "calibration passes"
    return CardFacts(
        recipe=text,
        method=recipe.expert_training.method,
        tokens={
            f"experts, {recipe.model.num_experts} {what} together": expert * recipe.model.num_experts,
            "MoE": moe,
        },
    )


def publishable(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe with all defaults, without what tells of the machines that it ran on.

    Folders are called by their own names alone; the executor of curate, which changes no result, is left out.
    """
    raw = recipe.model_dump(mode="json")
    del raw["data"]["executor"]
    named: dict[str, Any] = _without_places(raw)
    return named


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if not isinstance(value, str):
        return value
    text = _CREDENTIALS.sub("://", value)
    if _LOCAL.match(text):
        return PurePosixPath(text.removeprefix("file://")).name or "."
    return _LOCAL_INSIDE.sub("", text)


def summary_facts(file: Path) -> CardFacts:
    """Return what a finished run's summary.json says, with what was measured."""
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        recipe = Recipe.model_validate(summary["recipe"])
        facts, method = recipe_facts(recipe), recipe.method
        perplexity, speed = summary["perplexity"], summary["speed"]
        numbers = {
            "perplexity on held-out text, dense": f"{perplexity['dense']['overall']:.3f}",
            f"perplexity on held-out text, {TITLES[method]}": f"{perplexity[method]['overall']:.3f}",
            "speed against dense, prefill": f"{speed['prefill_ratio']:.2f} times",
            "speed against dense, decode, batch 1": f"{speed['decode_b1_ratio']:.2f} times",
            "speed against dense, decode, batch 8": f"{speed['decode_b8_ratio']:.2f} times",
            "largest difference of logits, Megatron against this checkpoint": (
                f"{summary['parity']['megatron_vs_hf_max_abs']:.1e}"
            ),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise L0MoEError(f"{file} is not the summary.json of a finished run ({error}).") from error
    return dataclasses.replace(facts, numbers=numbers)


def rewrite_card(export: Path, hf_base: Path, facts: CardFacts) -> None:
    """Write README.md of an export anew, for example when its numbers are measured."""
    config = read_config(export)
    layout_of(config, export / "config.json")
    write_text(export / "README.md", model_card(config, hf_base, facts))


def model_card(config: Mapping[str, Any], hf_base: Path, facts: CardFacts) -> str:
    """Return the text of README.md.

    Args:
        config: config.json of the export.
        hf_base: the dense model; its own card names the licence.
        facts: the rest.
    """
    base = facts.base_name or hf_base.resolve().name
    parts = [
        _front_matter(_base_licence(hf_base), base),
        f"# {base} as L0-MoE\n",
        f"A mixture of experts made from `{base}`: each expert holds {config['moe_intermediate_size']} of the "
        f"{config['intermediate_size']} units of a dense layer, chosen {_CHOICES[facts.method == 'l0']}, and was "
        "then trained together with the others and the routers.\n",
        _table(("what", "value"), _sizes(config)),
        _engines(config),
        *_facts(facts),
        "## Licence\n",
        _licence_text(hf_base, base),
    ]
    return "\n".join(part for part in parts if part)


def dsmoe_card(config: Mapping[str, Any], hf_base: Path, facts: CardFacts) -> str:
    """Return the text of README.md of an exported DSMoE; arguments as for `model_card`."""
    base = facts.base_name or hf_base.resolve().name
    blocks, dense = config["num_blocks"], config["num_dense_layers"]
    width = config["intermediate_size"] // blocks
    sizes = [
        ("layers", f"{config['num_hidden_layers']}, the bottom {dense} of them dense"),
        (
            "blocks of a layer",
            f"{blocks} of {width} units; a token uses those with a gate above the threshold",
        ),
        ("threshold", str(config["block_threshold"])),
        ("longest sequence", f"{config['max_position_embeddings']:,} tokens"),
        ("dtype", str(config["torch_dtype"])),
    ]
    parts = [
        _front_matter(_base_licence(hf_base), base),
        f"# {base} as DSMoE\n",
        f"`{base}` with its feed-forward layers cut into blocks (DSMoE, arXiv 2502.12455): each token opens as many of "
        "them as its gates say. Weights and number of parameters are those of the dense model, and the gates'.\n",
        _table(("what", "value"), sizes),
        "## Loading\n",
        "No architecture of transformers has a number of active experts that differs from token to token, so this "
        "checkpoint brings its own code, `modeling_dsmoe.py`. Read it, then load with\n",
        "```python\nAutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)\n```\n",
        "It is for inference, skips blocks that no token at hand uses, and is not for tensor parallelism. vLLM and "
        "SGLang do not know it.\n",
        *_facts(facts),
        "## Licence\n",
        _licence_text(hf_base, base),
    ]
    return "\n".join(part for part in parts if part)


def mom_card(
    config: Mapping[str, Any], counts: Mapping[int, Mapping[str, Any]], hf_base: Path, facts: CardFacts
) -> str:
    """Return the text of README.md of an exported Mixture-of-Masks.

    Args:
        config: config.json of the export.
        counts: by layer, numbers of `shared` and `inactive` units, and of `routed` ones by mask.
        hf_base: the dense model.
        facts: the rest.
    """
    base = facts.base_name or hf_base.resolve().name
    width, shared = config["moe_intermediate_size"], config["moe_num_shared_experts"]
    rows = [
        (
            str(layer),
            f"{units['shared']} in all masks, {min(units['routed'])} to {max(units['routed'])} more in each mask, "
            f"{units['inactive']} in none",
        )
        for layer, units in counts.items()
    ]
    parts = [
        _front_matter(_base_licence(hf_base), base),
        f"# {base} as Mixture-of-Masks\n",
        f"A mixture of experts made from `{base}`: {config['num_experts']} masks over each dense layer's "
        f"{config['intermediate_size']} units were trained with it (our reading of the abstract of ACL 2025 long 768), "
        f"and a token uses {config['num_experts_per_tok']} of them. Units that all masks keep are a shared expert, the "
        "others routed ones.\n",
        _table(("layer", "units"), rows),
        f"The layout has one width for all experts: {width} channels, and a shared expert of {shared} times that; "
        "narrower ones are filled with zeros, which change nothing but cost time.\n",
        _engines(config),
        *_facts(facts),
        "## Licence\n",
        _licence_text(hf_base, base),
    ]
    return "\n".join(part for part in parts if part)


def _facts(facts: CardFacts) -> list[str]:
    return [
        "## Training\n",
        _table(("stage", "tokens"), [(name, f"{count:,}") for name, count in facts.tokens.items()])
        or "The numbers of tokens were not given to the export.\n",
        f"The recipe:\n\n```yaml\n{facts.recipe.strip()}\n```\n" if facts.recipe else "",
        "## Measured\n",
        _table(("what", "value"), list(facts.numbers.items())) or "Nothing was given to the export.\n",
    ]


def _front_matter(licence: Mapping[str, Any], base: str) -> str:
    values = {
        **licence,
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _sizes(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = count_parameters(config)
    dense = config["num_hidden_layers"] - moe_layers(config)
    return [
        ("parameters", f"{counts.total:,}"),
        ("parameters that one token uses", f"{counts.active:,}"),
        ("layers", f"{config['num_hidden_layers']}, the bottom {dense} of them dense"),
        ("experts of a layer", f"{config['num_experts']}, {config['num_experts_per_tok']} for each token"),
        ("longest sequence", f"{config['max_position_embeddings']:,} tokens"),
        ("dtype", str(config["torch_dtype"])),
    ]


def _engines(config: Mapping[str, Any]) -> str:
    return (
        f"The layout is `{config['architectures'][0]}`, without code of its own, for "
        f"{', '.join(config[ENGINES_KEY])}. Other engines may load it and answer wrongly.\n"
    )


def _base_licence(hf_base: Path) -> dict[str, Any]:
    """Return `license`, `license_name` and `license_link` of the base model's card, as far as they are there."""
    file = hf_base / "README.md"
    if not file.is_file():
        return {}
    parts = file.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        values = yaml.safe_load(parts[1])
    except (
        yaml.YAMLError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        RecursionError,
    ):  # a 13th month ...
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: values[key] for key in keys if key in values} if isinstance(values, dict) else {}


def _licence_text(hf_base: Path, base: str) -> str:
    licence, files = _base_licence(hf_base), licence_files(hf_base)
    named = licence.get("license_name") or licence.get("license")
    text = (
        f"The weights derive from `{base}`, whose licence applies: {named}."
        if named
        else f"The weights derive from `{base}`, whose licence applies; its checkpoint does not name it."
    )
    return f"{text} {'See ' + ', '.join(files) + '.' if files else ''}".rstrip() + "\n"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    return "\n".join(lines) + "\n"
