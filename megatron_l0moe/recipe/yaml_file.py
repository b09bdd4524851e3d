"""Reading a YAML file into a strict pydantic model; what is wrong becomes one sentence that names the key.

Whatever parsing can raise is caught here, and a value that YAML reads as another one than is written, such as
`12:00:00` as 43200, is refused.
"""

import re
import unicodedata
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from megatron_l0moe.errors import L0MoEError, nearest, sentence_of, shortened

LARGEST = 2**63 - 1
"""Numbers beyond it do not fit into 64 bits."""
LONGEST_NAME = 128
"""Characters of a name that becomes a folder's."""
MOST_BYTES = 2**20
"""The size that a settings file may have."""
MOST_VALUES, DEEPEST = 100_000, 50
"""Values of a file, aliases written out, and how deep they may lie in each other."""
MOST_DIGITS = 40
FREE_VALUES = frozenset({"flags", "sbatch", "options", "environment", "backend_arguments"})
"""Keys whose values go to other programs; a test compares them with the settings' own types."""
NUMBERS_TOO = frozenset({"flags", "backend_arguments"})
"""The mappings among them that most often hold numbers."""
OPTION_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
"""The name of a long option, without dashes before it."""
Place = tuple[str, ...]
"""The keys that lead to a value; `KEY` at its end: the last key itself."""
Written = Mapping[Place, yaml.ScalarNode]
"""The values of a file as they are written."""
KEY = "[key]"
_TAG = "tag:yaml.org,2002:"
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_WHOLE = r"-?(?:0|[1-9][0-9]*)"
_IN_GROUPS = re.compile(r"-?[1-9][0-9]{0,2}(?:_[0-9]{3})+")
_SHORTEST_NUMBER = re.compile(
    rf"-?[0-9](?:\.[0-9]+)?[eE][-+]?[0-9]+|\.[0-9]*[1-9]|{_WHOLE}\.[0-9]*[1-9]|{_WHOLE}\.0?"
)


class Settings(BaseModel):
    """Base of everything that is read from a file: strict types, finite numbers, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    shell_lines: ClassVar[frozenset[str]] = frozenset()
    """Keys that hold lines of a shell, which may be several."""

    @field_validator("*", mode="after")
    @classmethod
    def _check_values(cls, value: Any, info: Any) -> Any:
        for part in _parts(value):
            if isinstance(part, str):
                check_text(part, several_lines=info.field_name in cls.shell_lines)
            elif isinstance(part, int) and abs(part) > LARGEST:
                raise ValueError("a number must fit into 64 bits")
        return value


def check_text(text: str, *, several_lines: bool = False) -> None:
    """Refuse control characters and halves of characters, which leave the line of a script or of a file.

    Raises:
        ValueError: names the character.
    """
    for character in text:
        if several_lines and character in "\n\t":
            continue
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise ValueError(f"a text may not hold the character {character!a}; remove it")


def check_option_name(name: str) -> None:
    """Refuse what is no name of a long option.

    Raises:
        ValueError: names the characters that are allowed.
    """
    if not OPTION_NAME.fullmatch(name):
        raise ValueError(
            f"the name {shortened(repr(name))} may hold small letters, digits and '-' only; write its value after a "
            "colon"
        )


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `1e-4` is a number, and a key that is written twice is an error."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a value, unless it lies too deep in others: the parser takes minutes for thousands of brackets."""
        self.depth += 1
        if self.depth > DEEPEST:
            line = self.peek_event().start_mark.line + 1
            raise L0MoEError(f"{_TOO_DEEP} (line {line})")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value; one that its own type refuses, such as a 13th month, is named with its line."""
        try:
            return super().construct_object(node, deep)
        except (L0MoEError, yaml.YAMLError):
            raise
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
            kind = node.tag.removeprefix(_TAG)
            raise L0MoEError(
                f"{shortened(str(node.value))} is no {kind} (line {_line(node)}); correct it, or put it in quotes if "
                "it is text"
            ) from error


_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _unique_keys(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            continue  # construct_mapping refuses it
        if key in seen:
            raise L0MoEError(
                f"the key {shortened(repr(key))} is there twice (line {_line(key_node)}); remove one of the two"
            )
        seen.add(key)
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
    name = f"{what} {shortened(str(file))}"
    try:
        if not file.is_file():
            raise L0MoEError(f"{name} does not exist; see {examples} for {what.lower()}s to start from.")
        raw, written = _parse(_text_of(file, name))
        if not isinstance(raw, dict):
            raise L0MoEError(f"{name} must be a mapping with the keys {', '.join(model.model_fields)}.")
        return model.model_validate(raw)
    except OSError as error:
        problem = f"{what} {sentence_of(error, file)}"
    except ValidationError as error:
        problem = f"{name}: {first_problem(error, model, written)}."
    except (yaml.YAMLError, UnicodeError) as error:
        problem = f"{name} is not valid YAML: {_yaml_words(error)}."
    except RecursionError:
        problem = f"{name} is not valid YAML: {_TOO_DEEP}."
    except L0MoEError as error:
        problem = str(error) if str(error).startswith(name) else f"{name}: {error}."
    raise L0MoEError(_printable(problem))


_TOO_DEEP = f"values lie in each other more than {DEEPEST} deep, and a settings file needs six at most"


def _text_of(file: Path, name: str) -> str:
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise L0MoEError(f"{name} has {size} bytes, and a settings file has {MOST_BYTES} at most.")
    return file.read_bytes().decode("utf-8")


def _yaml_words(error: Exception) -> str:
    """Return a problem of the parser with its line, without the excerpts of the file that it shows."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return shortened(" ".join(str(error).split()))
    words = f"{error.context} " if error.context else ""
    mark = error.problem_mark
    return f"{words}{shortened(error.problem or 'something is wrong')} (line {mark.line + 1}, column {mark.column + 1})"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _parse(text: str) -> tuple[Any, Written]:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, {}
        written = dict(_scalars(loader, root))
        for place, node in written.items():
            _check_written(place, node)
        return loader.construct_document(root), written
    finally:
        loader.dispose()


def _scalars(loader: _Loader, root: yaml.Node) -> Iterator[tuple[Place, yaml.ScalarNode]]:
    """Yield every single value with its place; of an alias for each place where it stands."""
    waiting: list[tuple[Place, yaml.Node]] = [((), root)]
    count = 0
    while waiting:
        place, node = waiting.pop()
        count += 1
        if len(place) > DEEPEST:
            raise L0MoEError(f"{_TOO_DEEP} (line {_line(node)})")
        if count > MOST_VALUES:
            raise L0MoEError(f"it holds more than {MOST_VALUES} values; write out aliases (*) less often")
        if isinstance(node, yaml.ScalarNode):
            _check_length(node)
            yield place, node
        elif isinstance(node, yaml.SequenceNode):
            waiting += [((*place, str(index)), item) for index, item in enumerate(node.value)][::-1]
        elif isinstance(node, yaml.MappingNode):
            for key, value in reversed(node.value):
                if isinstance(key, yaml.ScalarNode):
                    _check_length(key)
                    inside = (*place, str(loader.construct_object(key)))
                    yield (*inside, KEY), key
                    waiting.append((inside, value))


def _check_length(node: yaml.ScalarNode) -> None:
    if node.tag in (f"{_TAG}int", f"{_TAG}float") and len(node.value) > MOST_DIGITS:
        raise L0MoEError(
            f"the number {shortened(node.value)} has more than {MOST_DIGITS} digits (line {_line(node)}); put it in "
            "quotes if it is text"
        )


def _check_written(place: Place, node: yaml.ScalarNode) -> None:
    """Refuse a value that YAML reads as something else than people do."""
    kind, text = node.tag.removeprefix(_TAG), node.value
    where = f"{_words(place)}: "
    if kind in ("int", "float") and _BASE_60.fullmatch(text):
        raise L0MoEError(
            f'{where}a time must be text; put it in quotes, "{shortened(text)}" (line {_line(node)}: YAML counts it in '
            "base 60)"
        )
    if kind == "int" and _OCTAL.fullmatch(text):
        raise L0MoEError(
            f"{where}{shortened(text)} begins with 0, which makes it an octal number (line {_line(node)}); put it in "
            "quotes if it is text, else leave out the 0"
        )
    free = place[-2] if len(place) > 1 else ""
    if free in FREE_VALUES and _is_changed(kind, text, with_groups=free in NUMBERS_TOO):
        raise L0MoEError(
            f"{where}{shortened(text)} is not passed on as it is written, since YAML reads it as another value (line "
            f"{_line(node)}); {_mend(kind, text, with_numbers=free in NUMBERS_TOO)}"
        )


def _is_changed(kind: str, text: str, *, with_groups: bool) -> bool:
    """Say whether a value that is passed on as text would be another text, or another number, than is written.

    Args:
        with_groups: whether `10_000` may be meant as a number.
    """
    if kind == "bool":
        return text.lower() not in ("true", "false")
    if kind == "null":
        return text != ""
    if kind == "int":
        return not (re.fullmatch(_WHOLE, text) or (with_groups and _IN_GROUPS.fullmatch(text)))
    if kind == "float":
        return not _SHORTEST_NUMBER.fullmatch(text)
    return kind != "str"


def _mend(kind: str, text: str, *, with_numbers: bool) -> str:
    words = f"put it in quotes, '{shortened(text)}'"
    if with_numbers and kind == "bool":
        return f"{words}, or write true or false"
    return f"{words}, or write the number in its shortest form" if with_numbers and kind != "null" else words


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _words(place: Place) -> str:
    return shortened(".".join(part for part in place if part != KEY)) or "the file"


def first_problem(error: ValidationError, model: type[Settings], written: Written | None = None) -> str:
    """Word the first problem as one clause: unknown keys first, since they often explain a missing one.

    Args:
        written: the file's values as they are written.
    """
    problems = error.errors()
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    problem = (unknown or problems)[0]
    location = [str(part) for part in problem["loc"]]
    name = shortened(".".join(location))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {name!r}{nearest(location[-1], _keys_at(location[:-1], model))}"
    got = _got(
        problem["input"], (written or {}).get(tuple(location)), wants_text=problem["type"] == "string_type"
    )
    if location[-1:] == [KEY]:
        return f"{name.removesuffix('.' + KEY)}: this key is not allowed ({problem['msg']}), {got}"
    if "flags" in location[:-1]:
        name = shortened(".".join(location[: location.index("flags") + 2]))
        return f"{name} must be true, a number or text, {got}"
    if problem["type"] == "missing":
        return f"the key {name!r} is required"
    if problem["type"] == "string_pattern_mismatch":
        return f"{name} may hold letters, digits, '.', '_' and '-' only, {got}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message}, {got}" if location else message


def _got(value: Any, node: yaml.ScalarNode | None, *, wants_text: bool) -> str:
    """Say what was found, and how YAML reads what is written where that is something else."""
    found = shortened(repr(value))
    if node is None or isinstance(value, str | None):
        return f"got {found}"
    if node.value.lower() == str(value).lower():
        return f"got {shortened(node.value)}" + (
            f" (line {_line(node)}); put it in quotes" if wants_text else ""
        )
    words = f"got {shortened(node.value)}, which YAML reads as {found} (line {_line(node)})"
    return f"{words}; put it in quotes if it is text"


def _parts(value: Any) -> Iterator[Any]:
    """Yield the single values of a setting, without those of other sections, which check their own."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    elif not isinstance(value, BaseModel):
        yield value


def _keys_at(location: list[str], model: type[Settings]) -> list[str]:
    section: Any = model
    for part in location:
        # the other kind is a mapping from names to sections
        is_section = hasattr(section, "model_fields")
        section = section.model_fields[part].annotation if is_section else get_args(section)[1]
        if isinstance(section, UnionType):  # a section that may be left out
            section = get_args(section)[0]
    return list(section.model_fields)
