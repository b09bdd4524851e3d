"""A DSMoE in `evaluate`: its own code and no other, which blocks are open, parameter counts."""

from pathlib import Path

import pytest
import torch

from megatron_l0moe.conversion.dsmoe_layout import MODELLING_FILE, modelling_text
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.loads import OpenBlocks
from megatron_l0moe.evaluation.models import exported_code, is_dsmoe, load_model
from megatron_l0moe.evaluation.perplexity import measure
from megatron_l0moe.index.heldout_file import read_heldout
from megatron_l0moe.methods.method import method_of

BLOCKS, DENSE_LAYERS = 4, 1
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
SHAPE = {"num_blocks": BLOCKS, "block_threshold": 0.5, "num_dense_layers": DENSE_LAYERS}


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dsmoe")
    (folder / MODELLING_FILE).write_text(modelling_text("llama"), encoding="utf-8")
    code = exported_code(folder, "dsmoe_llama")
    torch.manual_seed(0)
    model = code.DSMoEForCausalLM(code.DSMoEConfig(**SIZES, **SHAPE))
    for layer in model.model.layers[DENSE_LAYERS:]:
        torch.nn.init.normal_(layer.mlp.block_gate.weight)
    model.save_pretrained(folder)
    return folder


def test_model_types():
    assert is_dsmoe("dsmoe_llama")
    assert not any(map(is_dsmoe, ("llama", "dsmoe_gpt2", None, "ernie4_5_moe")))


def test_no_other_code_is_run(export, tmp_path):
    for file in export.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    load_model(tmp_path)  # control
    ran = tmp_path / "ran"
    text = (tmp_path / MODELLING_FILE).read_text(encoding="utf-8")
    (tmp_path / MODELLING_FILE).write_text(f"open({str(ran)!r}, 'w')\n{text}", encoding="utf-8")
    with pytest.raises(
        L0MoEError, match=r"modeling_dsmoe\.py is not the modelling file that this version exports"
    ):
        load_model(tmp_path)
    assert not ran.exists()


def test_open_blocks_by_hand(export, heldout):
    model, sequences = load_model(export), read_heldout(heldout)
    with OpenBlocks(model) as load:
        table = measure(model, sequences, counts=load)
    assert measure(model, sequences).overall == table.overall  # counting changes nothing
    counts: dict[int, dict[str, torch.Tensor]] = {}
    tokens = dict.fromkeys(("code", "novel"), 0)
    for sequence in sequences:
        states = model(torch.tensor(sequence.tokens[:-1])[None], output_hidden_states=True).hidden_states
        tokens[sequence.domain] += len(sequence.tokens) - 1
        for layer in range(DENSE_LAYERS, SIZES["num_hidden_layers"]):
            block = model.model.layers[layer]
            entered = states[layer]
            cosine, sine = model.model.rotary_emb(entered, torch.arange(entered.shape[1])[None])
            mixed = entered + block.self_attn(block.input_layernorm(entered), (cosine, sine), None)[0]
            gates = block.mlp.block_gate.weight
            scores = torch.sigmoid(block.post_attention_layernorm(mixed)[0] @ gates.T)
            is_open = scores > 0.5
            is_open[~is_open.any(dim=1)] = torch.nn.functional.one_hot(
                scores.argmax(dim=1)[~is_open.any(dim=1)], BLOCKS
            ).bool()
            of_layer = counts.setdefault(layer, {})
            of_layer[sequence.domain] = of_layer.get(sequence.domain, 0) + is_open.sum(dim=0)
    assert sum(tokens.values()) == 9 * 16 + 8
    for layer, domains in load.fractions().items():
        for domain, shares in domains.items():
            assert shares == pytest.approx((counts[layer][domain] / tokens[domain]).tolist())
    total = sum(float(n.sum()) for domains in counts.values() for n in domains.values())
    assert load.mean_open() == pytest.approx(total / (sum(tokens.values()) * len(counts)))
    assert 1 < load.mean_open() < BLOCKS


def test_a_model_without_blocks_is_refused(models):
    with pytest.raises(L0MoEError, match="no layer with block gates"):
        OpenBlocks(load_model(models[0]))


def test_parameters(export):
    model = load_model(export)
    counts = method_of("dsmoe").exported_counts(model.config.to_dict(), open_blocks=BLOCKS)
    assert counts.total == sum(weight.numel() for weight in model.parameters())
    one_block = 2 * 3 * SIZES["hidden_size"] * SIZES["intermediate_size"] // BLOCKS  # of two layers
    half = method_of("dsmoe").exported_counts(model.config.to_dict(), open_blocks=2.5)
    assert (half.total, half.active) == (counts.total, counts.active - round(1.5 * one_block))
    assert half.distinct_experts(8) == pytest.approx(BLOCKS * (1 - (1 - 2.5 / BLOCKS) ** 8))
