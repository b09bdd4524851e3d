"""Every rule of a recipe, and what it says when it is broken.

`method:` of a recipe: what each method takes and what it refuses.
"""

from pathlib import Path

import pytest
from toy_recipe import make_run, of_method, write_recipe

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import load_recipe, section_hash

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.expert_steps > 0
    assert recipe.moe_steps > 0


def test_examples_exist() -> None:
    assert [path.stem for path in EXAMPLES] == ["llama3_8b", "mistral_7b", "quickstart", "qwen2_7b"]


@pytest.mark.parametrize(
    ("name", "dense_layers", "expert_ffn"),
    [("llama3_8b", 8, 1024), ("mistral_7b", 8, 1024), ("qwen2_7b", 4, 1280)],
)
def test_paper_sizes(name: str, dense_layers: int, expert_ffn: int) -> None:
    recipe = load_recipe(EXAMPLES[0].parent / f"{name}.yaml")
    assert (recipe.model.dense_layers, recipe.model.expert_ffn) == (dense_layers, expert_ffn)
    assert recipe.model.num_experts == 64
    assert recipe.data.tokens_per_expert * 64 == 12_000_000_000
    assert (recipe.data.iterations, recipe.data.tokens_per_set) == (21, 900_000_000)
    assert recipe.moe_global_batch_size == 2 * 64
    assert (recipe.data.delta, recipe.data.beta, recipe.model.top_k) == (0.1, 0.5, 2)
    assert (recipe.data.order, recipe.data.batches, recipe.data.clustering) == (
        "ascending",
        "balanced",
        "kmeans",
    )


def test_steps_by_hand(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    assert recipe.expert_steps == 640 // (32 * 2)  # 10
    assert recipe.moe_steps == 2 * (1280 // (32 * 4))  # two sets of 10


def test_passes_multiply_the_sets_but_not_the_replay(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, data__set_passes=3, data__include_initial_tokens=256))
    assert recipe.moe_steps == 3 * 2 * 10 + 2


def test_initial_tokens_add_steps(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, data__include_initial_tokens=256))
    assert recipe.moe_steps == 2 * 10 + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__seq_lenght": 32}, r"unknown key 'data\.seq_lenght' \(did you mean 'seq_length'\?\)"),
        ({"modle": {}}, r"unknown key 'modle' \(did you mean 'model'\?\)"),
        (
            {"moe_training__parallel__tensr": 2},
            r"unknown key 'moe_training\.parallel\.tensr' \(did you mean 'tensor'\?\)",
        ),
        (
            {"data__filters": {"quality_signals": {"rps_doc_word_count": {"minn": 50}}}},
            r"unknown key 'data\.filters\.quality_signals\.rps_doc_word_count\.minn' \(did you mean 'min'\?\)",
        ),
        (
            {"data__filters": {"min_char": 50}},
            r"unknown key 'data\.filters\.min_char' \(did you mean 'min_chars'\?\)",
        ),
        (
            {"data__filters": {"languages": "en"}},
            r"data\.filters\.languages: Input should be a valid list, got 'en'",
        ),
        ({"model__path": None}, r"the key 'model\.path' is required"),
        ({"model__num_experts": "4"}, r"model\.num_experts: Input should be a valid integer, got '4'"),
        ({"model__num_experts": 1}, r"model\.num_experts: Input should be greater than or equal to 2, got 1"),
        ({"name": "a/b"}, r"name may hold letters, digits, '\.', '_' and '-' only, got 'a/b'"),
        ({"model__top_k": 5}, r"model\.top_k \(5\) must be at most model\.num_experts \(4\)"),
        (
            {"model__expert_ffn": 15, "moe_training__parallel": {"tensor": 2, "processes": 2}},
            r"model\.expert_ffn \(15\) must be divisible by moe_training\.parallel\.tensor \(2\); "
            r"the nearest layout that works is dp2 \(2 processes\)\.$",
        ),
        (
            {"moe_training__parallel": {"expert": 3, "processes": 3}},
            r"num_experts \(4\) must be divisible by moe_training\.parallel\.expert \(3\); "
            r"the nearest layout that works is ep4 \(4 processes\)\.$",
        ),
        (
            {"expert_training__parallel": {"expert": 2, "processes": 2}},
            r"expert_training\.parallel\.expert \(2\) must be 1, .*; the nearest layout that works is dp2 \(2 proc",
        ),
        (
            {"moe_training__parallel": {"tensor": 2, "processes": 3}},
            r"moe_training\.parallel\.processes \(3\) must be divisible by tensor \* pipeline \* context "
            r"\(2 \* 1 \* 1 = 2\) and .*; the nearest layout that works is tp2,sp,dp2 \(4 processes\)",
        ),
        (
            {"moe_training__parallel": {"processes": 4, "nodes": 3}},
            r"processes \(4\) must be divisible by moe_training\.parallel\.nodes \(3\)",
        ),
        (
            {"expert_training": {"global_batch_size": 3, "micro_batch_size": 2}},
            r"expert_training\.global_batch_size \(3\) must be divisible by micro_batch_size \* data-parallel "
            r"size \(2 \* 1 = 2\); no layout works with this batch, the nearest one that does is 4\.$",
        ),
        (
            {"moe_training__parallel__processes": 3},
            r"sequences_per_domain \* num_experts \(4\) must be divisible by .* \(1 \* 3 = 3\); .* is dp4 \(4 proc",
        ),
        (
            {"data__tokens_per_expert": 63},
            r"data\.tokens_per_expert \(63\) must be at least one training step, .* 64",
        ),
        ({"data__tokens_per_set": 127}, r"data\.tokens_per_set \(127\) must be at least one .* 128"),
        ({"data__include_initial_tokens": 1}, r"data\.include_initial_tokens \(1\) must be at least one"),
        (
            {"moe_training__flags": {"--lr-warmup": 1}},
            r"flag '--lr-warmup' must be written .* write 'lr-warmup'",
        ),
        ({"moe_training__flags": {"clip_grad": 1}}, r"write 'clip-grad'"),
        ({"moe_training__flags": {"bf16": False}}, r"flag 'bf16' is false, which means nothing"),
        (
            {"moe_training__flags": {"x": [1]}},
            r"moe_training\.flags\.x must be true, a number or text, got \[1\]",
        ),
    ],
)
def test_broken_rule(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(L0MoEError, match=message) as caught:
        load_recipe(write_recipe(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "recipe.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("- 1\n- 2\n", "must be a mapping with the keys name, method, seed, dtype, model"),
        ("name: a\nname: b\n", r"the key 'name' is there twice \(line 2\)"),
        ("", "must be a mapping"),
    ],
)
def test_broken_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(L0MoEError, match=message):
        load_recipe(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(L0MoEError, match=r"none\.yaml does not exist; see examples/"):
        load_recipe(tmp_path / "none.yaml")


def test_numbers_in_scientific_form(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    file.write_text(
        file.read_text() + "moe_training: {learning_rate: 3e-4, flags: {init-method-std: 1E+2}}\n"
    )
    recipe = load_recipe(file)
    assert recipe.moe_training.learning_rate == 3e-4
    assert recipe.moe_training.flags == {"init-method-std": 100.0}


def test_section_hash_is_stable_and_sees_changes() -> None:
    assert section_hash({"a": 1, "b": 2}) == section_hash({"b": 2, "a": 1})
    assert section_hash({"a": 1}) != section_hash({"a": 2})
    assert section_hash("x", {}) != section_hash("y", {})


def test_random_batches_cannot_rotate(tmp_path: Path) -> None:
    """Left out, rotation goes with the batches; asked for, it contradicts random ones."""
    for batches, rotate, rotates in (
        ("balanced", None, True), ("balanced", True, True), ("balanced", False, False),
        ("random", None, False), ("random", False, False),
    ):  # fmt: skip
        data = {"data__batches": batches} | ({} if rotate is None else {"data__rotate": rotate})
        assert load_recipe(write_recipe(tmp_path, **data)).data.rotates is rotates
    with pytest.raises(
        L0MoEError, match=r"data\.rotate is true, but data\.batches random has no rounds to rotate"
    ):
        load_recipe(write_recipe(tmp_path, data__batches="random", data__rotate=True))
    with pytest.raises(L0MoEError, match=r"data\.order"):
        load_recipe(write_recipe(tmp_path, data__order="shuffled"))


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
