"""The files beside weights and config of an export: tokenizer, generation config, licence. All come from the base."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.sizes.architecture import read_config

logger = logging.getLogger(__name__)

# Of byte-level BPE and of sentencepiece (tokenizer.model); Mistral names some of its own after their version.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
GENERATION_CONFIG = "generation_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_tokenizer(hf_base: Path, out: Path) -> None:
    """Copy the tokenizer's files, and warn when there are none: the export then needs token ids as input."""
    if not _copy(hf_base, out, TOKENIZER_FILES):
        logger.warning("%s holds no tokenizer, so the export has none either", hf_base)


def tokenizer_files(hf_base: Path) -> list[Path]:
    """Return the files that `copy_tokenizer` copies."""
    return _matching(hf_base, TOKENIZER_FILES)


def copy_licence(hf_base: Path, out: Path) -> None:
    """Copy the base model's licence, notice and use policy, which many licences ask to be passed on."""
    _copy(hf_base, out, LICENCE_FILES)


def licence_files(hf_base: Path) -> list[str]:
    """Return the names of the files that `copy_licence` copies."""
    return sorted(
        {file.name for pattern in LICENCE_FILES for file in hf_base.glob(pattern) if file.is_file()}
    )


def write_generation_config(hf_base: Path, out: Path, ids: dict[str, Any]) -> None:
    """Copy the base's generation config, or write one of its special tokens, which say where text ends."""
    if not _copy(hf_base, out, (GENERATION_CONFIG,)):
        known = {key: value for key, value in ids.items() if value is not None}
        write_text(out / GENERATION_CONFIG, json.dumps(known, indent=2) + "\n")


def token_ids(hf_base: Path) -> dict[str, Any]:
    """Return the ids of special tokens, also when null: a layout's own default would be another model's token."""
    base = read_config(hf_base)
    return {key: base.get(key) for key in _TOKEN_IDS}


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file()]


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> int:
    files = _matching(source, patterns)
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    return len(files)
