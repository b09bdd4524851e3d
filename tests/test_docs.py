"""The documents against the code, read from source without Megatron: links, commands, flags and defaults, metrics."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_l0moe
from megatron_l0moe import cli

PACKAGE = Path(megatron_l0moe.__file__).parent
ROOT = PACKAGE.parent
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "checkpoints_conversion" / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```[^\n]*\n(.*?)^```|`([^`\n]+)`", re.M | re.S)
ABSOLUTE_PATH = re.compile(r"(?:^|[\s\"'(`=])/[A-Za-z][\w.-]*/", re.M)
REGISTRY_HOST = re.compile(
    r"pypi\.|pythonhosted|huggingface\.co|hf\.co/|npmjs|conda\.|nvcr\.io|docker\.io|ghcr\.io|index-url"
)


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_of(text: str) -> str:
    """Return what stands in fenced blocks and between backticks."""
    return "\n".join(block or inline for block, inline in CODE.findall(text))


def table(text: str, header: str) -> list[list[str]]:
    """Return the cells of the rows below the table header that starts with `header`."""
    rows = text.split(f"\n{header}", 1)[1].split("\n")[2:]
    body = rows[: next((i for i, row in enumerate(rows) if not row.startswith("|")), len(rows))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in body]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def flags_of(tree: ast.Module, name: str) -> Iterator[tuple[str, str, str]]:
    """Yield (flag, default as it is written, docstring) of a dataclass of settings."""
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    for field, doc in zip(found.body, found.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert field.value is not None
            assert isinstance(doc, ast.Expr), f"{name}.{field.target.id} has no docstring"
            help_text = " ".join(str(ast.literal_eval(doc.value)).split())
            yield f"--{field.target.id.replace('_', '-')}", str(ast.literal_eval(field.value)), help_text


def all_flags() -> list[tuple[str, str, str]]:
    """Return the flags of every class in ARGUMENT_GROUPS, in their order."""
    arguments = PACKAGE / "training" / "arguments.py"
    tree = parse(arguments)
    homes = {
        alias.name: ROOT / f"{node.module.replace('.', '/')}.py"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("megatron_l0moe")
        for alias in node.names
    }
    (groups,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id == "ARGUMENT_GROUPS"
    )
    assert isinstance(groups, ast.Tuple)
    names = [pair.elts[1].id for pair in groups.elts if isinstance(pair, ast.Tuple)]  # type: ignore[attr-defined]
    return [flag for name in names for flag in flags_of(parse(homes.get(name, arguments)), name)]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.isascii()
    for target in LINK.findall(text):
        if not target.startswith(("http:", "https:", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target
    assert not ABSOLUTE_PATH.findall(text)
    assert not REGISTRY_HOST.findall(text)


def test_index_lists_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in LINK.findall(index.read_text(encoding="utf-8"))}
    assert {page.resolve() for page in PAGES} - {index.resolve()} <= linked


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_exist(page: Path) -> None:
    code = code_of(page.read_text(encoding="utf-8"))
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}  # type: ignore[union-attr]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"\bl0moe ([a-z][\w-]*)", code)) <= commands
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", code)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_named_in_code_exist(page: Path) -> None:
    """Files of the repository that a page names with their folder are there."""
    code = code_of(page.read_text(encoding="utf-8"))
    folders = "runtime|training|modules|data|launch|conversion|experts|planning|evaluation|reports"
    for name in re.findall(rf"(?<![\w/.])((?:{folders})/\w+\.py)", code):
        assert (PACKAGE / name).is_file(), name
    for name in re.findall(
        r"(?<![\w/.])((?:examples|scripts|tools|checkpoints_conversion)/[\w]+\.\w+)", code
    ):
        assert (ROOT / name).is_file(), name


def test_table_of_flags() -> None:
    """docs/training.md holds every flag with its default and help, word by word, and no other."""
    rows = table((ROOT / "docs" / "training.md").read_text(encoding="utf-8"), "| flag | default |")
    expected = [[f"`{flag}`", f"`{default}`" if default else "", text] for flag, default, text in all_flags()]
    assert rows == expected


def test_table_of_metrics() -> None:
    """docs/training.md holds the table of training/metrics.py."""
    source = ast.get_docstring(parse(PACKAGE / "training" / "metrics.py")) or ""
    header = "| name | meaning |"
    assert table((ROOT / "docs" / "training.md").read_text(encoding="utf-8"), header) == table(source, header)


def test_flags_named_in_the_pages() -> None:
    """Every `--l0-` flag in a page exists, and a value beside a default in docs/decisions.md is the default."""
    defaults = {flag: default for flag, default, _ in all_flags()}
    commands = (("logits.py", "LogitsConfig"), ("construct.py", "ConstructConfig"))
    extra = {
        flag for file, name in commands for flag, _, _ in flags_of(parse(PACKAGE / "training" / file), name)
    }
    for page in PAGES:
        named = set(re.findall(r"--l0-[a-z0-9-]*[a-z0-9]", page.read_text(encoding="utf-8")))
        assert named <= defaults.keys() | extra, page_name(page)
    decisions = table(
        (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8"), "| topic | default | also"
    )
    shown = [pair for row in decisions for pair in re.findall(r"`(--l0-[a-z0-9-]+) ([^`]+)`", row[1])]
    assert len(shown) > 10
    assert [(flag, value) for flag, value in shown if defaults[flag] != value] == []


def test_rules_can_fail() -> None:
    assert ABSOLUTE_PATH.search("see `/data/models/x`")
    assert not ABSOLUTE_PATH.search("see runs/NAME/moe, dense / L0-MoE, and/or/not")
    assert REGISTRY_HOST.search("pip install --index-url x")
    assert code_of("l0moe is `l0moe run`\n```\nmake test\n```\n") == "l0moe run\nmake test\n"
    assert table("x\n| a | b |\n|---|---|\n| 1 | 2 |\n\n| 3 | 4 |", "| a |") == [["1", "2"]]
    tree = ast.parse("class C:\n    l0_x: float = 0.5\n    '''Half.'''")
    assert list(flags_of(tree, "C")) == [("--l0-x", "0.5", "Half.")]
