"""Read JSON that may be damaged or anybody's: whatever is wrong with it is one sentence with the file's name."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from megatron_l0moe.errors import L0MoEError


def read_json(file: Path, mend: str, *, finite: bool = True) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        file: in UTF-8.
        mend: what helps when the file is damaged, as the end of a sentence: "run the curate stage again".
        finite: whether NaN and infinite numbers are refused; what other programs write may hold them.
    """
    if not file.is_file():
        raise L0MoEError(f"{file} is missing; {mend}.")
    return parse_json(file.read_bytes(), str(file), mend, finite=finite)


def parse_json(data: bytes, where: str, mend: str, *, finite: bool = True) -> dict[str, Any]:
    """Parse a JSON object; `where` names it in the message. See `read_json`."""
    constant, number = (_refuse_constant, _finite) if finite else (None, None)
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=constant, parse_float=number)
    except RecursionError as error:
        raise L0MoEError(f"{where} is not valid JSON (nested too deeply); {mend}.") from error
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise L0MoEError(f"{where} is not valid JSON ({reason}); {mend}.") from error
    if not isinstance(value, dict):
        raise L0MoEError(f"{where} must hold a JSON object, not a {type(value).__name__}; {mend}.")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value
