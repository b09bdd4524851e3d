"""The files beside weights and config of an export: tokenizer, generation config, licence. All come from the base.

The tokenizer is tried as the users of an export will use it: `AutoTokenizer`, and a text there and back. That runs in a
process of its own (`python -m megatron_l0moe.conversion.companions FOLDER`): offline, without the folder's own code,
and without transformers in the memory of the export.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.sizes.architecture import read_config

logger = logging.getLogger(__name__)

TEXT = "The quick brown fox jumps over 13 lazy dogs."
SECONDS = 600
_MARK = "tokenizer: "
_OFFLINE = {
    **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


def check_tokenizer(base: Path, files: list[Path], config: dict[str, Any]) -> None:
    """Refuse tokenizer files with which an export could not be used.

    Args:
        base: the folder that they lie in, for the message and the files' places.
        files: the tokenizer's files, as they will be copied.
        config: the export's config.json, by which transformers chooses the tokenizer's class.

    Raises:
        L0MoEError: transformers cannot load them, or a plain text does not come back.
    """
    with tempfile.TemporaryDirectory(prefix="l0moe_tokenizer_") as name:
        for file in files:
            target = Path(name) / file.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        (Path(name) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, name],
                env={**os.environ, **_OFFLINE},
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=SECONDS,
            )
            answers = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
            problem = answers[-1].removeprefix(_MARK) if answers else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"no answer in {SECONDS} s"
    if problem != "ok":
        raise L0MoEError(
            f"The tokenizer in {base} cannot be used ({problem}), so the export could not be either; copy the "
            "base model's tokenizer files again."
        )


def problem_of(folder: Path) -> str:
    """Return what is wrong with the tokenizer in a folder, `ok` where nothing is; for a process of its own."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        ids = tokenizer(TEXT).input_ids
        got = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    except Exception as error:  # of many libraries, some of which raise a bare Exception
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return "ok" if got.strip() == TEXT else f"it makes {got[:60]!r} of {TEXT!r}"


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


if __name__ == "__main__":
    sys.stdout.write(f"\n{_MARK}{problem_of(Path(sys.argv[1]))}\n")
