"""Read JSON that others wrote, as of a downloaded model: every way in which it can be damaged is one sentence."""

import json
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError


def read_object(file: Path, advice: str = "copy it again") -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        file: in UTF-8.
        advice: what to do with a damaged file, for the message.

    Raises:
        L0MoEError: it is missing, no JSON, nested too deeply, or holds something else than an object.
    """
    if not file.is_file():
        raise L0MoEError(f"{file} is missing; {advice}.")
    try:
        return parse_object(file.read_bytes())
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise L0MoEError(f"{file} is not valid JSON, or no JSON object ({reason}); {advice}.") from error


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: it is none, or is nested too deeply.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value
