"""`method:` of a recipe: what each method takes and what it refuses."""

import pytest
from toy_recipe import make_run, of_method, write_recipe

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import load_recipe

LAYOUTS = {1: {name: {"parallel": {}} for name in ("expert_training", "moe_training")}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dsmeo"}, r"method: Input should be 'l0moe'.*got 'dsmeo'"),
        ({"model__expert_ffn": None}, r"model\.expert_ffn \(0\) must be at least 1 for method l0moe"),
        ({"dsmoe__blocks": 4}, r"the section dsmoe is of method dsmoe, but method is l0moe; remove it, or set"),
        (of_method("dsmoe", model__expert_ffn=8), r"model\.expert_ffn is of method l0moe, but method is dsmoe"),
        (of_method("dsmoe", model__top_k=1), r"model\.top_k is of method l0moe"),
        (of_method("dsmoe", expert_training__method="obs"), r"expert_training\.method is of method l0moe"),
        (of_method("dsmoe", expert_training__learning_rate=1e-3), r"expert_training\.learning_rate is of method"),
        (of_method("dsmoe", expert_training__parallel={"threads": 2}), r"expert_training\.parallel is of method"),
        (of_method("dsmoe", export={"target": "vllm"}), r"export\.target is of method l0moe"),
        (of_method("dsmoe", evaluation__benchmarks={"tasks": ["gsm8k"]}), r"evaluation\.benchmarks is of method"),
        (of_method("mom", dsmoe__blocks=4), r"the section dsmoe is of method dsmoe, but method is mom"),
        (of_method("mom", mom__masks=2), r"mom\.masks: Input should be greater than or equal to 3"),
        (of_method("mom", mom={"masks": 3, "top_k": 3}), r"mom: top_k \(3\) must be below masks \(3\)"),
        (of_method("mom", mom={"masks": 33}), r"mom: masks \(33\) by top_k \(2\) make 528 sets .* at most 512"),
        (of_method("mom", mom__target=1.0), r"mom\.target: Input should be less than 1"),
        (of_method("mom", expert_training__mask_learning_rate=0.1), r"expert_training\.mask_learning_rate is of"),
        (of_method("mom", moe_training__router_init="normal"), r"moe_training\.router_init is of method l0moe"),
        (of_method("dsmoe", dsmoe__blocks=1), r"dsmoe\.blocks: Input should be greater than or equal to 2"),
        (of_method("dsmoe", dsmoe__threshold=1.0), r"dsmoe\.threshold: Input should be less than 1"),
        (of_method("dsmoe", dsmoe__treshold=0.1), r"unknown key 'dsmoe\.treshold' \(did you mean 'threshold'"),
        (
            of_method("dsmoe", moe_training__parallel={"expert": 2, "processes": 2}),
            r"moe_training\.parallel\.expert \(2\) must be 1",
        ),
        (
            of_method("dsmoe", moe_training__parallel={"context": 2, "processes": 2}),
            r"moe_training\.parallel\.context \(2\) must be 1 for method dsmoe",
        ),
        (
            of_method("dsmoe", gpus=1, layouts=LAYOUTS),
            r"layouts hold the expert runs' layouts too, and method is dsmoe",
        ),
    ],
)  # fmt: skip
def test_keys_of_another_method_are_refused(tmp_path, changes, message):
    with pytest.raises(L0MoEError, match=message) as caught:
        load_recipe(write_recipe(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["dsmoe", "mom"])
def test_keys_at_their_defaults_are_no_mistake(tmp_path, method):
    """A run folder's recipe.json holds all keys; `status` reads it."""
    recipe = make_run(tmp_path, **of_method(method)).recipe
    assert type(recipe).model_validate(recipe.model_dump()) == recipe
