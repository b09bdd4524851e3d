"""Every flag of a rendered job is one that Megatron's parser, with ours added, knows."""

import argparse
from pathlib import Path

import pytest
from toy_recipe import make_run, toy_architecture

from megatron_l0moe.chain import training_commands


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Return all option strings of the training job's parser."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_l0moe.training.arguments import add_l0_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_l0_arguments(add_megatron_arguments(parser))
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("stage", ["expert", "moe"])
def test_flags_are_known(tmp_path: Path, known: set[str], stage: str) -> None:
    run = make_run(tmp_path, moe_training__parallel={"processes": 4, "tensor": 2, "expert": 2})
    job = (
        training_commands.expert_job(run, toy_architecture(), 0)
        if stage == "expert"
        else training_commands.moe_job(run, toy_architecture())
    )
    words = job.command[job.command.index(training_commands.PRETRAIN) + 1 :]
    assert {word for word in words if word.startswith("--")} - known == set()


def test_wrong_flags_would_be_seen(known: set[str]) -> None:
    assert "--no-such-flag" not in known
    assert "--l0-stage" in known
