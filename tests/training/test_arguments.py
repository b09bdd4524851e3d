"""Our flags beside Megatron's: names, no clashes, round trip, and the rules that need both."""

import argparse
from dataclasses import fields
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.training import arguments


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return arguments.add_l0_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def ours() -> set[str]:
    return {field.name for _, config in arguments.ARGUMENT_GROUPS for field in fields(config)}


def test_every_flag_of_ours_starts_with_l0_and_clashes_with_none(parser):
    names = ours()
    assert all(name.startswith("l0_") for name in names)
    actions = [action for action in parser._actions if action.dest in names]
    assert {action.dest for action in actions} == names
    assert len(actions) == len(names), "a dest is shared with a flag of Megatron"
    for action in actions:
        assert all(option.startswith("--l0-") for option in action.option_strings)


def test_help_renders():
    own = arguments.add_l0_arguments(
        argparse.ArgumentParser()
    )  # Megatron's own help does not render in 0.19.2
    assert "--l0-retention-ramp" in own.format_help()


def parse(parser: argparse.ArgumentParser, *words: str) -> Any:
    args = parser.parse_args(list(words))
    args.num_layers, args.ffn_hidden_size, args.num_experts = 4, 64, None
    return args


def test_flags_reach_the_configs(parser):
    words = (
        "--l0-stage",
        "expert",
        "--l0-expert-ffn",
        "16",
        "--l0-temperature",
        "0.5",
        "--l0-dense-layers",
        "2",
    )
    settings = arguments.settings_from_args(parse(parser, *words))
    assert settings.plan.stage == "expert"
    assert settings.plan.dense_layers == 2
    assert settings.plan.retention.l0_expert_ffn == 16
    assert settings.plan.gate.l0_temperature == 0.5
    stored = arguments.settings_as_dict(settings)
    assert stored["stage"] == "expert"
    assert stored["l0_temperature"] == 0.5


MOM = ("--l0-stage", "mom", "--l0-retention-control", "lagrangian")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--l0-stage", "expert"), r"--l0-expert-ffn \(0\) must lie between 1 and --ffn-hidden-size \(64\)"),
        (("--l0-stage", "expert", "--l0-expert-ffn", "65"), r"--l0-expert-ffn \(65\) must lie between 1"),
        (("--l0-dense-layers", "5"), r"--l0-dense-layers \(5\) must be at most --num-layers \(4\)"),
        (("--l0-stage", "moe"), "--l0-stage moe needs --num-experts"),
        (("--l0-domain-load-interval", "-1"), "l0_domain_load_interval must be at least 0, got -1"),
        (("--l0-stretch-low", "0.1"), "l0_stretch_low must be below 0"),
        (("--l0-stage", "expert", "--l0-expert-ffn", "8", "--fp16"), "neither --fp16 nor"),
        (
            ("--l0-stage", "dsmoe", "--l0-blocks", "7"),
            r"--l0-blocks \(7\) must divide .* \(64\), .* nearest .* is 8",
        ),
        (("--l0-stage", "dsmoe", "--l0-blocks", "1"), "l0_blocks must be at least 2, got 1"),
        (("--l0-stage", "dsmoe", "--l0-dense-layers", "4"), r"\(4\) must be below --num-layers \(4\)"),
        (("--l0-stage", "dsmoe", "--calculate-per-token-loss"), "does not take --calculate-per-token-loss"),
        (
            ("--l0-stage", "expert", "--l0-expert-ffn", "8", "--l0-freeze-fraction", "0"),
            "--l0-freeze-fraction 0 needs --l0-retention-control lagrangian",
        ),
        ((*MOM, "--l0-dense-layers", "4"), r"\(4\) must be below --num-layers \(4\)"),
        ((*MOM, "--l0-masks-top-k", "1"), "l0_masks_top_k must be at least 2 and below"),
        ((*MOM, "--fp16"), "neither --fp16 nor"),
        ((*MOM, "--overlap-grad-reduce"), "--overlap-grad-reduce needs a gradient"),
        (("--l0-stage", "mom"), "--l0-stage mom takes --l0-retention-control lagrangian"),
        (
            (*MOM, "--l0-train-weights", "off"),
            "--l0-train-weights off is for the expert stage",
        ),
        ((*MOM, "--l0-freeze-fraction", "0"), "needs --l0-freeze-fraction above 0"),
        ((*MOM, "--l0-masks-target", "0.01"), "at least one channel of .*, that is 1 / 64"),
        ((*MOM, "--train-iters", "4"), "leaves no step between open gates and the freeze"),
    ],
)
def test_bad_flags_end_with_one_sentence(parser, words, message):
    with pytest.raises(L0MoEError, match=message) as caught:
        arguments.settings_from_args(parse(parser, *words))
    assert str(caught.value).count("\n") == 0


def test_blocks_are_cut_out_of_dense_layers_only(parser):
    args = parse(parser, "--l0-stage", "dsmoe")
    stored = arguments.settings_as_dict(arguments.settings_from_args(args))
    assert (stored["stage"], stored["l0_blocks"], stored["l0_block_threshold"]) == ("dsmoe", 8, 0.5)
    args.num_experts = 4
    with pytest.raises(L0MoEError, match=r"takes no --num-experts \(4\)"):
        arguments.settings_from_args(args)


def test_masks_are_laid_over_dense_layers_only(parser):
    args = parse(parser, *MOM, "--l0-masks", "6")
    stored = arguments.settings_as_dict(arguments.settings_from_args(args))
    names = ("stage", "l0_masks", "l0_masks_top_k", "l0_masks_target")
    assert [stored[name] for name in names] == ["mom", 6, 2, 0.5]
    args.num_experts = 4
    with pytest.raises(L0MoEError, match=r"takes no --num-experts \(4\)"):
        arguments.settings_from_args(args)


def test_masks_only_needs_a_freeze(parser):
    words = ("--l0-stage", "expert", "--l0-expert-ffn", "8", "--l0-train-weights", "off")
    assert arguments.settings_from_args(parse(parser, *words)).stage.l0_train_weights == "off"
    with pytest.raises(L0MoEError, match="--l0-train-weights off needs --l0-freeze-fraction above 0"):
        arguments.settings_from_args(parse(parser, *words, "--l0-freeze-fraction", "0"))
