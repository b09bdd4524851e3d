"""Try a tokenizer as the users of an export will: `AutoTokenizer`, and a text there and back.

It runs in a process of its own (`python -m megatron_l0moe.conversion.tokenizer_check FOLDER`): offline, without the
folder's own code, and without transformers in the memory of the export.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError

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


if __name__ == "__main__":
    sys.stdout.write(f"\n{_MARK}{problem_of(Path(sys.argv[1]))}\n")
