"""One call of the LM evaluation harness: backend, model arguments, tasks. The same for both models but for the folder.

The call is written to a file and carried out by `harness_process.py` in a process of its own, so that an engine's
memory is free again when the next model's turn comes, and so that the switches which the libraries read on import
can be set.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.sections import BenchmarkSection
from megatron_l0moe.runtime.json_files import read_json
from megatron_l0moe.sizes.architecture import read_config

RESERVED = ("pretrained", "trust_remote_code", "dtype", "batch_size", "device")
LENGTH_ARGUMENT = {"hf": "max_length", "vllm": "max_model_len", "sglang": "context_length"}
PACKAGE = {"hf": "transformers", "vllm": "vllm", "sglang": "sglang"}


@dataclass(frozen=True, kw_only=True)
class HarnessCall:
    """What `harness_process.py` is to do with one model."""

    backend: str
    model_arguments: dict[str, Any]
    """Keyword arguments of the harness' model class."""
    tasks: list[str]
    indexed: list[str]
    """Folders of task files; a later one replaces tasks of an earlier one."""
    num_fewshot: int | None
    limit: int | None
    allow_code_execution: bool
    keys: dict[str, str]
    """By task: hash of everything that can change its scores; results with another one are not reused."""
    results: str
    """Folder that gets TASK.json, and TASK.samples.jsonl with what the model answered."""

    @classmethod
    def read(cls, file: Path) -> "HarnessCall":
        """Read a call that `write` wrote."""
        return cls(**read_json(file, "run the evaluate stage again"))

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return asdict(self)


def model_arguments(
    section: BenchmarkSection, folder: Path, *, dtype: str, device: str, max_length: int
) -> dict[str, Any]:
    """Return the keyword arguments of the harness' model class for a checkpoint folder.

    Args:
        section: backend, batch size and further arguments.
        folder: the checkpoint; the only argument that is not the same for both models.
        device: such as `cpu` or `cuda`; vLLM and SGLang choose by themselves.
        max_length: tokens of prompt and answer together.

    Raises:
        L0MoEError: the recipe sets an argument that is set here.
    """
    for name in section.backend_arguments:
        if name in RESERVED or name in LENGTH_ARGUMENT.values():
            raise L0MoEError(
                f"evaluation.benchmarks.backend_arguments.{name} is set by this command; use evaluation.dtype, "
                "evaluation.benchmarks.batch_size or max_length, or leave it out."
            )
    arguments: dict[str, Any] = {
        "pretrained": str(folder),
        "dtype": dtype,
        "trust_remote_code": False,
        LENGTH_ARGUMENT[section.backend]: max_length,
        "batch_size": section.batch_size,
    }
    if section.backend == "hf":
        arguments["device"] = device
    return arguments | section.backend_arguments


def common_length(folders: Sequence[Path], wanted: int | None) -> int:
    """Return the tokens that every model can take, or `wanted` if it is not more.

    Raises:
        L0MoEError: a checkpoint does not say, or takes less than `wanted`.
    """
    lengths = {}
    for folder in folders:
        config = read_config(folder)
        length = config.get("max_position_embeddings")
        if not isinstance(length, int):
            raise L0MoEError(
                f"{folder / 'config.json'} has no max_position_embeddings; export the model again."
            )
        lengths[folder] = length
    shortest = min(lengths, key=lambda folder: lengths[folder])
    if wanted is not None and wanted > lengths[shortest]:
        raise L0MoEError(
            f"evaluation.benchmarks.max_length ({wanted}) must be at most the {lengths[shortest]} positions of "
            f"{shortest}."
        )
    return wanted or lengths[shortest]


def environment(*, offline: bool, cache: Path, code: bool) -> Mapping[str, str]:
    """Return the variables of the harness' process.

    Args:
        offline: nothing may be fetched.
        cache: where `datasets` puts what it makes from local copies.
        code: whether programs are executed, which the harness wants to be told twice.
    """
    variables = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if offline:
        variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
        variables |= {"HF_DATASETS_CACHE": str(cache.resolve())}
    return variables | ({"HF_ALLOW_CODE_EVAL": "1"} if code else {})


def check_installed(section: BenchmarkSection) -> None:
    """Refuse a backend whose packages are not there, before any work is done."""
    if importlib.util.find_spec("lm_eval") is None:
        raise L0MoEError(
            "evaluation.benchmarks needs the LM evaluation harness, which is not installed; install the extra "
            "with pip install 'megatron-l0moe[evaluation]', or remove the section."
        )
    if importlib.util.find_spec(PACKAGE[section.backend]) is None:
        raise L0MoEError(
            f"evaluation.benchmarks.backend {section.backend!r} needs the package {PACKAGE[section.backend]}, which is "
            "not installed in this environment; use 'hf', or install it beside the harness."
        )
    if section.local_data is not None and not Path(section.local_data).is_dir():
        raise L0MoEError(
            f"evaluation.benchmarks.local_data: the folder {section.local_data} does not exist; give the folder of "
            "local copies, see docs/evaluate.md for its layout."
        )
