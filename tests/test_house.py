"""The package's shape is as good as the list says, no better and no worse; the list may only shrink."""

import ast
import json
import re

import house
import pytest


def files(**sources: str) -> list[house.File]:
    """A package of files, `folder__file=source`; each is long enough to be no finding of its own."""
    return [
        house.File(name.replace("__", "/") + ".py", house.LEAST_MEDIAN, ast.parse(source))
        for name, source in sources.items()
    ]


def test_nothing_is_bent_but_what_is_listed() -> None:
    """Where this fails: mend what is new; where something got better, `python tests/house.py --write`."""
    listed = json.loads(house.FINDINGS.read_text(encoding="utf-8"))
    found = house.findings(house.read(house.PACKAGE))
    worse = {bent: count for bent, count in found.items() if count > listed.get(bent, 0)}
    better = {bent: count for bent, count in listed.items() if count > found.get(bent, 0)}
    assert (worse, better) == ({}, {})


@pytest.mark.parametrize(
    ("sources", "bent"),
    [
        ({"index__a": "from megatron_l0moe.training.b import c"}, "index/a.py imports training: up, from floor 6 to 8"),
        ({"modules__a": "import megatron_l0moe.index.b"}, "modules/a.py imports index: up, from floor 6 to 6"),
        ({"launch__a": "from megatron_l0moe import recipe"}, "launch imports recipe: not both are on a floor"),
        ({"recipe__a": "def f():\n    import torch.nn"}, "recipe/a.py imports torch"),
        ({"runs__a": "class Plan: ...", "plan__b": "class Plan: ..."}, "classes called Plan"),
        ({"runs__a": "", "plan__a": ""}, "files called a.py"),
        ({"runs__a": "x = ['moe', 'export', 'report']"}, "files that list stages beside the table"),
        ({"runs__a": "x = {'moe': 1, 'export': 2, 'report': 3}"}, "files that list stages beside the table"),
        ({"runs__a": "def _moe(): 1\ndef export(): 1\ndef _report(): 1"}, "files that list stages beside the table"),
        ({"runs__a": "if x.method == 'dsmoe': ..."}, "files that name dsmoe outside its own"),
        ({"runs__a": "from megatron_l0moe.runtime import mom_layout"}, "files that name mom outside its own"),
        (
            {"runs__a": "from megatron_l0moe.runs.b import c", "runs__b": "import megatron_l0moe.runs.a"},
            "files in a circle of imports: runs/a.py, runs/b.py",
        ),
        ({f"runs__a{i}": "" for i in range(13)}, "runs: files, at most 12"),
    ],
)  # fmt: skip
def test_each_rule_can_fail(sources: dict[str, str], bent: str) -> None:
    assert list(house.findings(files(**sources))) == [bent]


@pytest.mark.parametrize(
    "sources",
    [
        {"training__a": "from megatron_l0moe.modules.b import c\nimport torch"},
        {"training__a": "from megatron_l0moe.training.b import c"},
        {"launch__a": "from megatron_l0moe.errors import L0MoEError"},
        {"modules__dsmoe": "def dsmoe(): ..."},
        {"runs__a": "import megatron_l0moe.runs.b", "runs__b": "def f():\n    import megatron_l0moe.runs.a"},
        {"runs__a": "moment = 'a sentence about mom, whose words are no code'"},
        {"runs__a": "x = ['moe', 'export']", "runs__stages": "x = ['moe', 'export', 'report']"},
    ],
)
def test_what_is_straight_is_no_finding(sources: dict[str, str]) -> None:
    assert house.findings(files(**sources)) == {}


def test_sizes() -> None:
    small = house.File("runs/a.py", 59, ast.parse(""))
    large = house.File("runs/b.py", 501, ast.parse(""))
    assert house.findings([large]) == {"runs/b.py: lines, at most 500": 501}
    assert house.findings([small]) == {
        "files under 60 lines, at most 10%": 1,
        "lines that the median file lacks to 180": 121,
    }


PAGE = house.PACKAGE.parent / "docs" / "architecture.md"


def test_the_picture_is_the_house() -> None:
    picture = PAGE.read_text(encoding="utf-8").split("```")[1].strip().splitlines()
    names = [re.split(r"  +(?=\S+ \S)", re.sub(r"\([^)]*\)", "", line))[0] for line in picture]
    drawn = [set(re.findall(r"\w+", name)) for name in names]
    floors = [set(rooms) for rooms in reversed(house.FLOORS)]
    assert drawn == [floors[1] | floors[2], *floors[3:-2], floors[-2] | floors[-1]]  # __main__ is not drawn


def test_files_that_the_page_names_are_there() -> None:
    text = PAGE.read_text(encoding="utf-8").replace("NAME", "dsmoe")
    named = re.findall(
        r"`((?:megatron_l0moe|tests)/[\w/.]*)`",
        text.replace("ROOM/FILE", "runs/lock").replace("ROOM/test_FILE", "runs/test_lock"),
    )
    assert len(named) > 30
    assert [name for name in named if not (house.PACKAGE.parent / name).exists()] == []
