"""Reading a YAML file into a strict pydantic model; what is wrong becomes one sentence that names the key."""

import re
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_l0moe.errors import L0MoEError, nearest


class Settings(BaseModel):
    """Base of everything that is read from a file: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `1e-4` is a number, and a key that is written twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _unique_keys(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for position, key in enumerate(keys):
        if key in keys[:position]:
            line = node.value[position][0].start_mark.line + 1
            raise L0MoEError(f"the key {key!r} is there twice (line {line}); remove one of the two")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_keys)


def load_settings[Model: Settings](
    path: str | Path, model: type[Model], *, what: str, examples: str
) -> Model:
    """Read and validate a file.

    Args:
        what: how messages call the file: `Recipe`.
        examples: where files to start from lie.

    Raises:
        L0MoEError: the file is missing, is not YAML, or breaks a rule; the message names the key.
    """
    file = Path(path)
    if not file.is_file():
        raise L0MoEError(f"{what} {file} does not exist; see {examples} for {what.lower()}s to start from.")
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise L0MoEError(f"{what} {file} is not valid YAML: {' '.join(str(error).split())}.") from error
    except L0MoEError as error:
        raise L0MoEError(f"{what} {file}: {error}.") from error
    if not isinstance(raw, dict):
        raise L0MoEError(f"{what} {file} must be a mapping with the keys {', '.join(model.model_fields)}.")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise L0MoEError(f"{what} {file}: {first_problem(error, model)}.") from error


def first_problem(error: ValidationError, model: type[Settings]) -> str:
    """Word the first problem as one clause: unknown keys first, since they often explain a missing one."""
    problems = error.errors()
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    problem = (unknown or problems)[0]
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        key = location[-1]
        return f"unknown key {'.'.join(location)!r}{nearest(key, _keys_at(location[:-1], model))}"
    if "flags" in location[:-1]:
        name = ".".join(location[: location.index("flags") + 2])
        return f"{name} must be true, a number or text, got {problem['input']!r}"
    if problem["type"] == "missing":
        return f"the key {'.'.join(location)!r} is required"
    if problem["type"] == "string_pattern_mismatch":
        return (
            f"{'.'.join(location)} may hold letters, digits, '.', '_' and '-' only, got {problem['input']!r}"
        )
    message = problem["msg"].removeprefix("Value error, ")
    return f"{'.'.join(location)}: {message}, got {problem['input']!r}" if location else message


def _keys_at(location: list[str], model: type[Settings]) -> list[str]:
    section: Any = model
    for part in location:
        # the other kind is a mapping from names to sections
        is_section = hasattr(section, "model_fields")
        section = section.model_fields[part].annotation if is_section else get_args(section)[1]
        if isinstance(section, UnionType):  # a section that may be left out
            section = get_args(section)[0]
    return list(section.model_fields)
