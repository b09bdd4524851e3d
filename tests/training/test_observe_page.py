"""docs/observe.md against the code: the flags it shows, the names of scalars, the files of the records."""

import argparse
import ast
import re
from pathlib import Path

import yaml
from megatron.training.arguments import add_megatron_arguments
from toy_recipe import make_run, toy_architecture
from training.test_metrics import EXPERT, MOE

import megatron_l0moe
from megatron_l0moe.chain import records, training_commands
from megatron_l0moe.training import arguments, metrics

ROOT = Path(megatron_l0moe.__file__).parent.parent
PAGE = (ROOT / "docs" / "observe.md").read_text(encoding="utf-8")


def column(header: str, text: str = PAGE) -> list[str]:
    """Return the first column of the table below a header."""
    rows = text.split(f"\n{header}\n", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    return [row.split("|")[1].strip() for row in rows]


def test_flags_of_the_page_reach_megatron(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```\n(moe_training:\n.*?)^```", PAGE, re.M | re.S)
    flags = yaml.safe_load(block)["moe_training"]["flags"]
    assert len(flags) == 4
    job = training_commands.moe_job(make_run(tmp_path, moe_training__flags=flags), toy_architecture())
    parser = arguments.add_l0_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    args = parser.parse_args(job.command[job.command.index(training_commands.PRETRAIN) + 1 :])
    for name, value in flags.items():
        assert getattr(args, name.replace("-", "_")) == value


def test_names_of_scalars() -> None:
    shown = [name for cell in column("| name | meaning |") for name in cell.split(", ")]
    values = metrics.scalars(MOE) | metrics.scalars(EXPERT | {"mfu": 0.4})
    written = {name.removeprefix(f"{metrics.PREFIX}/").split("/")[0] for name in values}
    assert set(shown) == written
    assert len(shown) == len(written)


def test_files_of_the_records() -> None:
    source = ast.get_docstring(ast.parse(Path(records.__file__).read_text(encoding="utf-8"))) or ""
    header = "| file | what |"
    rows = [text.split(f"\n{header}\n", 1)[1].split("\n\n", 1)[0] for text in (PAGE, source)]
    assert rows[0] == rows[1]
    names = re.findall(r"`((?:SLURM|NCCL|CUDA)_[A-Z_]+)`", PAGE)
    assert len(names) == 3
    assert set(names) <= records.RECORDED
