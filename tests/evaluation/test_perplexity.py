"""Perplexity against a naive float64 loop and by hand; router load against a recount from router logits."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.loads import RouterLoad, moe_routers
from megatron_l0moe.evaluation.models import load_model
from megatron_l0moe.evaluation.perplexity import measure, perplexity
from megatron_l0moe.index.heldout_file import HeldoutSequence, read_heldout

FP32_RTOL = 1e-5  # fp32 model against a float64 one: rounding of a 3-layer forward pass


def naive(folder, sequences):
    """exp(total NLL / tokens) with a float64 model, one sequence and one position at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")  # grouped_mm has no float64
    total = count = 0
    for sequence in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([sequence.tokens])).logits[0].double()
        for position in range(len(sequence.tokens) - 1):
            scores = logits[position].tolist()
            norm = math.log(math.fsum(math.exp(score) for score in scores))
            total += norm - scores[sequence.tokens[position + 1]]
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("which", [0, 1], ids=["dense", "moe"])
def test_against_naive_loop(models, heldout, which):
    sequences = read_heldout(heldout)
    table = perplexity(models[which], heldout, batch=4)
    assert table.overall == pytest.approx(naive(models[which], sequences), rel=FP32_RTOL)
    for domain in ("code", "novel"):
        own = [sequence for sequence in sequences if sequence.domain == domain]
        assert table.per_domain[domain] == pytest.approx(naive(models[which], own), rel=FP32_RTOL)
        assert table.domain_tokens[domain] == sum(len(sequence.tokens) - 1 for sequence in own)
    for cluster in ("0", "1", "2"):
        own = [sequence for sequence in sequences if sequence.cluster == int(cluster)]
        assert table.per_cluster[cluster] == pytest.approx(naive(models[which], own), rel=FP32_RTOL)
    assert table.tokens == 9 * 16 + 8
    # Control: the labels are shifted by one; without the shift the number is another one.
    unshifted = [HeldoutSequence(s.tokens[:-1] + s.tokens[-2:-1], s.domain, s.cluster) for s in sequences]
    assert naive(models[which], unshifted) != pytest.approx(table.overall, rel=10 * FP32_RTOL)


def test_batch_size_does_not_matter(models, heldout):
    one, many = (perplexity(models[0], heldout, batch=batch) for batch in (1, 16))
    assert one.overall == pytest.approx(many.overall, rel=FP32_RTOL)
    assert one.domain_tokens == many.domain_tokens


class Fixed:
    """A model that gives token v the probability p[v], whatever came before."""

    device = torch.device("cpu")
    config = SimpleNamespace(vocab_size=4)

    def __init__(self, probabilities):
        self.logits = torch.log(torch.tensor(probabilities))

    def __call__(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 4))


def test_by_hand():
    sequences = [HeldoutSequence((0, 0, 0), "a", 0), HeldoutSequence((0, 1, 1, 2, 2), "b", 10)]
    table = measure(Fixed([0.5, 0.25, 0.125, 0.125]), sequences)
    # a: 2 tokens of 1/2; b: 2 of 1/4 and 2 of 1/8. NLL in bits: 2 and 4 + 6.
    assert table.per_domain == pytest.approx({"a": 2.0, "b": 2 ** (10 / 4)})
    assert table.overall == pytest.approx(2 ** (12 / 6))  # 4: by tokens; the mean of the two would be 3.83
    assert list(table.per_cluster) == ["0", "10"]
    assert table.to_json()["tokens"] == 6


def test_broken_weights_stop():
    with pytest.raises(L0MoEError, match="likelihood of nan on a sequence of domain 'a'"):
        measure(Fixed([math.nan] * 4), [HeldoutSequence((0, 1), "a", 0)])


def test_foreign_token_stops(models):
    with pytest.raises(L0MoEError, match="token id 64, the model's vocabulary ends at 63"):
        measure(load_model(models[0]), [HeldoutSequence((0, 64), "a", 0)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{}\n", r":1 is not a held-out sequence"),
        ('{"tokens": [1, 2], "domain": "a", "cluster": 0}\n{"tok', r":2 is not valid JSON"),
        ('{"tokens": [1], "domain": "a", "cluster": 0}\n', r":1 holds 1 tokens"),
        ('{"tokens": [1, -1], "domain": "a", "cluster": 0}\n', r":1 holds .* whole numbers from 0 on"),
        ('{"tokens": [1, true], "domain": "a", "cluster": 0}\n', r":1 holds .* whole numbers from 0 on"),
        ('{"tokens": [1, 2], "domain": 5, "cluster": 0}\n', r":1 has a domain that is no text"),
        ('{"tokens": [1, 2], "domain": "a", "cluster": "0"}\n', r":1 has .* a cluster that is no number"),
        ("[1]\n", r":1 must hold a JSON object"),
    ],
)
def test_bad_heldout_files(tmp_path, text, message):
    file = tmp_path / "heldout.jsonl"
    file.write_text(text)
    with pytest.raises(L0MoEError, match=message):
        read_heldout(file)
    with pytest.raises(L0MoEError, match="run the curate stage first"):
        read_heldout(tmp_path / "none.jsonl")


def test_router_load_against_router_logits(models, heldout):
    sequences, model = read_heldout(heldout), load_model(models[1])
    with RouterLoad(model) as load:
        measure(model, sequences, batch=3, counts=load)
    fractions = load.fractions()
    assert list(fractions) == [1, 2]
    logits = {1: [], 2: []}
    own = [sequence for sequence in sequences if sequence.domain == "code"]
    for sequence in own:
        with torch.no_grad():
            output = model(torch.tensor([sequence.tokens[:-1]]), output_router_logits=True)
        for layer, scores in zip((1, 2), output.router_logits, strict=True):
            logits[layer].append(scores)
    for layer in (1, 2):
        chosen = torch.cat(logits[layer]).topk(2, dim=-1).indices.flatten().tolist()
        expected = [chosen.count(expert) / len(chosen) for expert in range(4)]
        assert fractions[layer]["code"] == pytest.approx(expected)
        assert sum(fractions[layer]["novel"]) == pytest.approx(1)
        assert fractions[layer]["code"] != pytest.approx(fractions[layer]["novel"])  # control


def test_hooks_are_removed(models):
    model = load_model(models[1])
    with RouterLoad(model):
        assert all(router._forward_hooks for router in moe_routers(model).values())
    assert not any(router._forward_hooks for router in moe_routers(model).values())


def test_dense_model_has_no_routers(models):
    with pytest.raises(L0MoEError, match="LlamaForCausalLM has no MoE layer"):
        RouterLoad(load_model(models[0]))


def test_incomplete_checkpoint_is_refused(models, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(models[0] / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((models[0] / "config.json").read_text())
    with pytest.raises(L0MoEError, match=r"1 missing keys, the first is model.layers.1.mlp.up_proj.weight"):
        load_model(tmp_path)
    with pytest.raises(
        L0MoEError, match=r"none does not exist; give the folder of a Hugging Face checkpoint"
    ):
        load_model(tmp_path / "none")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.5])
def test_files_that_are_cut_short_are_named(models, tmp_path, name, part):
    for file in ("config.json", "model.safetensors"):
        whole = (models[0] / file).read_bytes()
        (tmp_path / file).write_bytes(whole[: int(len(whole) * part)] if file == name else whole)
    with pytest.raises(L0MoEError, match=name) as refused:
        load_model(tmp_path)
    assert "\n" not in str(refused.value)


def test_experts_implementations_agree(models, heldout):
    tables = [
        measure(load_model(models[1], experts_implementation=name), read_heldout(heldout)).overall
        for name in ("eager", "grouped_mm", "batched_mm")
    ]
    assert tables == pytest.approx([tables[0]] * 3, rel=FP32_RTOL)


def test_table_is_json(models, heldout):
    assert json.loads(json.dumps(perplexity(models[0], heldout).to_json()))["per_domain"].keys() == {
        "code",
        "novel",
    }
