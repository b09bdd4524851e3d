"""Ours stands around Megatron's functions, and another Megatron is told by name."""

import types

import pytest

from megatron_l0moe.training import megatron_hooks as hooks


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A module with Megatron's names, whose calls are written down."""
    calls: list[str] = []

    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, skipped_iter, grad_norm):
        calls.append(f"log {iteration}")
        return "flag"

    def checkpoint_and_decide_exit(model, iteration):
        calls.append(f"exit {iteration}")
        return False

    module = types.SimpleNamespace(
        __name__="loop",
        training_log=training_log,
        checkpoint_and_decide_exit=checkpoint_and_decide_exit,
        get_megatron_optimizer_config=lambda args: ("config", {"upstream": 1}),
        generate_state_dict=lambda args, model: {"args": args, "model": model},
        calls=calls,
    )
    monkeypatch.setattr(hooks, "megatron_training", module)
    monkeypatch.setattr(hooks, "checkpointing", module)
    return module


def test_results_are_seen_before_the_log_the_last_hook_first(loop):
    hooks.before_log(lambda given: loop.calls.append(f"first {given['grad_norm']}"))
    hooks.before_log(lambda given: loop.calls.append(f"second {given['loss_dict']}"))
    assert loop.training_log({"lm": 2.0}, {}, 0.1, 7, skipped_iter=0, grad_norm=3.0) == "flag"
    assert loop.calls == ["second {'lm': 2.0}", "first 3.0", "log 7"]


def test_megatrons_answer_can_be_overruled(loop):
    hooks.around_exit(lambda megatrons, iteration: megatrons() or iteration == 9)
    assert not loop.checkpoint_and_decide_exit("model", iteration=8)
    assert loop.checkpoint_and_decide_exit("model", 9)
    assert loop.calls == ["exit 8", "exit 9"]


def test_what_is_added_stands_beside_megatrons(loop):
    hooks.add_to_optimizer({"ours": 2})
    assert loop.get_megatron_optimizer_config("args") == ("config", {"upstream": 1, "ours": 2})
    hooks.add_to_checkpoints(lambda: {"l0moe": {"version": 1}})
    assert loop.generate_state_dict("a", model="m") == {"args": "a", "model": "m", "l0moe": {"version": 1}}


def test_another_megatron_is_told_by_name(loop):
    del loop.training_log
    with pytest.raises(
        AssertionError, match=r"loop\.training_log is not there; written for megatron-core 0\.19\.2"
    ):
        hooks.before_log(print)
    loop.checkpoint_and_decide_exit = lambda model, step: False
    with pytest.raises(AssertionError, match=r"loop\.checkpoint_and_decide_exit has no \{'iteration'\}"):
        hooks.around_exit(lambda megatrons, iteration: False)
