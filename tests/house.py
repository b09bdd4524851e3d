"""The shape of the package, read from its source: which rooms import which, how many files and lines there are.

A room is a folder of the package, or a file beside them. `python tests/house.py` prints what is bent; with `--write` it
becomes the list that tests/test_house.py compares with.
"""

import ast
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import megatron_l0moe

PACKAGE = Path(megatron_l0moe.__file__).parent
FINDINGS = Path(__file__).with_name("house_findings.json")
# An import goes to a lower floor, or stays in its room. Rooms that are on no floor are to go.
FLOORS = (
    ("errors",),
    ("runtime",),
    ("recipe",),
    ("runs", "sizes"),
    ("methods",),
    ("modules", "index", "checkpoints"),
    ("curate", "conversion", "experts", "reports", "plan"),
    ("evaluation", "training"),
    ("chain",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
WITHOUT_TORCH = (
    *("errors", "runtime/json_files", "runtime/hardware", "recipe/", "runs/", "sizes/", "methods/"),
    *("plan/", "reports/", "chain/", "commands", "cli", "__main__"),
)
"""How the names of files begin that must not load torch."""
TORCH_USERS = ("torch", "megatron", "transformers", "FlagEmbedding", "safetensors.torch")
MOST_FILES, MOST_LINES, LEAST_MEDIAN, FEWEST_LINES, MOST_SMALL = 12, 500, 180, 60, 0.10
ONE_MEANING = {"Plan", "Job", "Stage", "Record", "Part", "Progress", "Settings", "Cluster", "TrainingStage"}
STAGES = {"convert", "curate", "experts", "assemble", "moe", "export", "evaluate", "report"}
STAGE_FILES = ("runs/stages.py", "chain/stage_work.py", "chain/dry_run.py", "chain/forecast.py")
"""The table, and the files whose functions it names."""
FEW_STAGES = 3
METHODS = ("dsmoe", "mom")
PLUGS = (
    "recipe/recipe.py",  # the methods' sections
    "modules/layer_specs.py",  # their layers
    "training/arguments.py",  # their stages, flags and rules
    "training/checkpoints.py",  # which checkpoint each starts from
    "conversion/export.py",  # their layouts
    "evaluation/models.py",  # the code that an export brings
)
"""The places where a method plugs in, beside the files that have its name."""


@dataclass(frozen=True)
class File:
    """One file of the package."""

    name: str
    """With its folders."""
    lines: int
    tree: ast.Module

    @property
    def room(self) -> str:
        """The first folder, or the file itself."""
        return self.name.split("/")[0].removesuffix(".py")

    @property
    def folder(self) -> str:
        """All folders."""
        return self.name.rpartition("/")[0] or "."


def read(package: Path) -> list[File]:
    """Return the files of a package."""
    files = []
    for path in sorted(package.rglob("*.py")):
        if path.name != "__init__.py":
            text = path.read_text(encoding="utf-8")
            files.append(File(path.relative_to(package).as_posix(), text.count("\n"), ast.parse(text)))
    return files


def findings(files: list[File], package: str = PACKAGE.name) -> dict[str, int]:
    """Return what is bent and how much, in words."""
    found: Counter[str] = Counter({bent: 1 for file in files for bent in _of_imports(file, package)})
    for file in files:
        if file.lines > MOST_LINES:
            found[f"{file.name}: lines, at most {MOST_LINES}"] = file.lines
        if file.name not in STAGE_FILES and any(
            len(STAGES & names) >= FEW_STAGES for names in _lists(file.tree)
        ):
            found["files that list stages beside the table"] += 1
        for method in METHODS:
            if file.name not in PLUGS:
                found[f"files that name {method} outside its own"] += _names(file, method)
    found.update(_of_sizes(files))
    found.update(
        {
            f"files in a circle of imports: {', '.join(circle)}": len(circle)
            for circle in _circles(files, package)
        }
    )
    owners = defaultdict(set)
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ClassDef) and node.name in ONE_MEANING:
                owners[node.name].add(file.name)
    found.update({f"classes called {name}": len(where) for name, where in owners.items() if len(where) > 1})
    return {finding: count for finding, count in sorted(found.items()) if count}


def _of_imports(file: File, package: str) -> Iterator[str]:
    for name in imports(file.tree):
        first, *rest = name.split(".")
        if file.name.startswith(WITHOUT_TORCH) and any(within(name, user) for user in TORCH_USERS):
            yield f"{file.name} imports {first}"
        if first == package and rest and rest[0] != file.room:
            here, there = _floor(file.room), _floor(rest[0])
            if there == 1:
                continue
            if here is None or there is None:
                yield f"{file.room} imports {rest[0]}: not both are on a floor"
            elif here <= there:
                yield f"{file.name} imports {rest[0]}: up, from floor {here} to {there}"


def _circles(files: list[File], package: str) -> Iterator[list[str]]:
    """Yield the groups of files that import each other when they are loaded."""
    modules = {f"{package}.{file.name.removesuffix('.py').replace('/', '.')}": file for file in files}
    loads: dict[str, set[str]] = {}
    for name, file in modules.items():
        top = [node for node in file.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        loads[name] = set(imports(ast.Module(list(top), []))) & set(modules)
    reached = {name: _reached(name, loads) for name in loads}
    seen: set[str] = set()
    for name in sorted(loads):
        circle = sorted(other for other in reached[name] if name in reached[other])
        if circle and name not in seen:
            seen.update(circle)
            yield [modules[other].name for other in circle]


def _reached(name: str, loads: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(loads[name])
    while waiting:
        if (other := waiting.pop()) not in found:
            found.add(other)
            waiting += loads[other]
    return found


def _of_sizes(files: list[File]) -> dict[str, int]:
    found = {
        f"{folder}: files, at most {MOST_FILES}": count
        for folder, count in Counter(file.folder for file in files).items()
        if count > MOST_FILES
    }
    small = sum(file.lines < FEWEST_LINES for file in files)
    if small > MOST_SMALL * len(files):
        found[f"files under {FEWEST_LINES} lines, at most {MOST_SMALL:.0%}"] = small
    missing = LEAST_MEDIAN - int(median(file.lines for file in files))
    found[f"lines that the median file lacks to {LEAST_MEDIAN}"] = max(missing, 0)
    names = Counter(file.name.rpartition("/")[2] for file in files)
    return found | {f"files called {name}": count for name, count in names.items() if count > 1}


def _floor(room: str) -> int | None:
    return next((number for number, rooms in enumerate(FLOORS, 1) if room in rooms), None)


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the full names of imported modules, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _texts(tree: ast.Module) -> set[str]:
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def _lists(tree: ast.Module) -> Iterator[set[str]]:
    """Yield the texts of each list: a display, the keys of a dictionary, the functions of a file."""
    yield {node.name.lstrip("_") for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", ())
        yield {item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)}


def _names(file: File, method: str) -> bool:
    """Say whether a file that is not a method's own has the method's name in its code."""
    if method in file.name:
        return False
    words = {node.id for node in ast.walk(file.tree) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(file.tree) if isinstance(node, ast.Attribute)}
    words |= set(imports(file.tree)) | {text for text in _texts(file.tree) if " " not in text}
    return any(method in part.split("_") for word in words for part in word.lower().split("."))


if __name__ == "__main__":
    now = findings(read(PACKAGE))
    print(*(f"{count:5} {finding}" for finding, count in now.items()), sep="\n")
    if "--write" in sys.argv:
        FINDINGS.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
