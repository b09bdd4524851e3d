"""A frozen Mixture-of-Masks as Ernie4.5-MoE in transformers, against Megatron: logits, files, refusals.

Units of a frozen Mixture-of-Masks: worked by hand, and the same function as the masked FFN.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from conversion.in_megatron import megatron_logits
from conversion.toy_checkpoints import FFN, HIDDEN, LAYERS, STD, VOCAB, save_model
from transformers import AutoModelForCausalLM

from megatron_l0moe.checkpoints.families import extra_states
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader, CheckpointWriter
from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.conversion.export import export_dense, export_mom
from megatron_l0moe.conversion.mom_layout import ExpertWidths, MaskUnits, common_widths, sort_units
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.modules.mixture_of_masks import channel_factors, choose_masks
from megatron_l0moe.sizes.architecture import Architecture

FAMILIES = {"llama": "llama3.1", "llama_tied": "llama-tied", "mistral": "mistral-v0.2"}
DENSE_LAYERS, MASKS, TOP_K = 1, 4, 2
SETTINGS = {"stage": "mom", "dense_layers": DENSE_LAYERS, "l0_masks": MASKS, "l0_masks_top_k": TOP_K}
# two float32 programs that sum in other orders, logits of size 1 (relative to the largest)
FP32_RELATIVE_TOLERANCE = 1e-5
IDS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def make_mom(folder: Path, name: str, *, keep: float = 0.7, frozen: int = 1) -> Path:
    """Write folder/hf, folder/convert and folder/mom: the dense weights with random masks and routers."""
    convert_dense(save_model(folder / "hf", name), folder / "convert")
    reader = CheckpointReader(folder / "convert/megatron")
    generator = torch.Generator().manual_seed(1)
    sets = math.comb(MASKS, TOP_K)
    with CheckpointWriter(folder / "mom", {**reader.common, "l0moe": SETTINGS}) as writer:
        for tensor in reader.model_names():
            writer.write(tensor, reader.read(tensor))
        for layer in range(DENSE_LAYERS, LAYERS):
            mlp = f"decoder.layers.{layer}.mlp"
            kept = torch.rand(MASKS, FFN, generator=generator) < keep
            writer.write(f"{mlp}.masks.hard_mask", kept.float())
            writer.write(f"{mlp}.masks.log_alpha", torch.randn(MASKS, FFN, generator=generator))
            writer.write(f"{mlp}.masks.frozen", torch.tensor([frozen]))
            writer.write(f"{mlp}.masks.controller.lambdas", torch.randn(2, generator=generator))
            writer.write(f"{mlp}.masks.set_load.counts", torch.zeros(sets))
            writer.write(f"{mlp}.masks.set_load.load", torch.full((sets,), 1 / sets))
            router = 2 * STD * torch.randn(MASKS, HIDDEN, generator=generator)
            writer.write(f"{mlp}.mask_router.weight", router)
        for state, shards in extra_states(Architecture.from_hf(folder / "hf"), None).items():
            writer.write_empty_state(state, shards)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for family, name in FAMILIES.items():
        place = folders[family] = make_mom(tmp_path_factory.mktemp(family), name)
        numbers = export_mom(place / "mom", place / "hf", place / "export", width_multiple=4)
        (place / "numbers.json").write_text(json.dumps(numbers))
    return folders


@pytest.fixture(scope="module")
def expected_logits(exported, tmp_path_factory) -> dict[str, torch.Tensor]:
    checkpoints = {family: place / "mom/release" for family, place in exported.items()}
    return megatron_logits(checkpoints, IDS, tmp_path_factory.mktemp("logits"))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stock_transformers_computes_megatrons_logits(exported, expected_logits, family):
    model, loading = AutoModelForCausalLM.from_pretrained(
        exported[family] / "export", output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "Ernie4_5_MoeForCausalLM"
    expected = expected_logits[family]
    tolerance = FP32_RELATIVE_TOLERANCE * expected.abs().max()
    assert (model(IDS).logits - expected).abs().max() < tolerance
    model.model.layers[-1].mlp.shared_experts.down_proj.weight.zero_()  # control
    assert (model(IDS).logits - expected).abs().max() > 100 * tolerance


def test_widths_and_files(exported):
    place = exported["llama"]
    config = json.loads((place / "export/config.json").read_text())
    numbers = json.loads((place / "numbers.json").read_text())
    width, shared = config["moe_intermediate_size"], config["moe_num_shared_experts"]
    assert (numbers["expert_ffn"], numbers["num_shared_experts"]) == (width, shared)
    assert width % 4 == 0
    assert shared >= 1
    assert numbers["units"].keys() == {"1", "2"}
    for units in numbers["units"].values():
        assert max(units["routed"]) <= width
        assert units["shared"] <= shared * width
        assert min(units["routed"]) < width  # control: some expert is filled with zeros
    card = (place / "export/README.md").read_text()
    assert "as Mixture-of-Masks" in card
    assert f"{numbers['units']['1']['shared']} in all masks" in card


def test_what_cannot_be_exported_is_refused(exported, tmp_path):
    place = exported["llama"]
    with pytest.raises(L0MoEError, match="is of the stage 'dense' and has no masks"):
        export_mom(place / "convert/megatron", place / "hf", tmp_path / "out")
    with pytest.raises(L0MoEError, match=r"holds the tensor decoder\.layers\.1\.mlp\.mask"):
        export_dense(place / "mom", place / "hf", tmp_path / "out")
    soft = make_mom(tmp_path / "soft", "llama-tied", frozen=0)
    with pytest.raises(L0MoEError, match="are not frozen"):
        export_mom(soft / "mom", soft / "hf", tmp_path / "out")
    empty = make_mom(tmp_path / "empty", "llama-tied", keep=0.0)
    with pytest.raises(L0MoEError, match="No mask keeps a unit in any layer"):
        export_mom(empty / "mom", empty / "hf", tmp_path / "out")
    biases = make_mom(tmp_path / "qwen", "qwen2")
    with pytest.raises(L0MoEError, match="has biases on q, k and v"):
        export_mom(biases / "mom", biases / "hf", tmp_path / "out")


FLOAT64_ATOL = 1e-12  # the same products, summed in another order


def units(shared: int, *routed: int) -> MaskUnits:
    return MaskUnits(torch.arange(shared), tuple(torch.arange(n) for n in routed), torch.arange(0))


def test_units_worked_by_hand():
    masks = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 1, 0, 0, 1]])
    found = sort_units(masks.float())
    assert found.shared.tolist() == [0, 4]
    assert [part.tolist() for part in found.routed] == [[1], [3], [1]]
    assert found.inactive.tolist() == [2]


def test_shared_and_routed_experts_are_the_masked_ffn():
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(4, 30, generator=generator) < 0.7).double()
    activation = torch.randn(9, 30, generator=generator, dtype=torch.float64)
    down = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    weights, _ = choose_masks(torch.randn(9, 4, generator=generator, dtype=torch.float64), 2)
    expected = (activation * channel_factors(weights, masks)) @ down.T
    found = sort_units(masks)
    assert len(found.shared) > 2
    assert len(found.inactive) > 0

    def ffn(kept: torch.Tensor) -> torch.Tensor:
        return activation[:, kept] @ down[:, kept].T

    routed = sum(weights[:, e, None] * ffn(kept) for e, kept in enumerate(found.routed))
    assert (ffn(found.shared) + routed - expected).abs().max() < FLOAT64_ATOL
    assert (routed - expected).abs().max() > 0.1  # control: without the shared expert


@pytest.mark.parametrize(
    ("layers", "multiple", "expected"),
    [
        # two shared of 5 and two routed: 20 channels; one of 10 and two of 10: 30
        ([units(10, 5, 4)], 1, ExpertWidths(expert=5, num_shared=2)),
        # one of 6 makes 18 channels, two of 5 make 20
        ([units(6, 5, 5)], 1, ExpertWidths(expert=6, num_shared=1)),
        ([units(3, 2, 5), units(1, 7, 0)], 1, ExpertWidths(expert=7, num_shared=1)),
        ([units(0, 3, 4)], 1, ExpertWidths(expert=4, num_shared=0)),
        ([units(0, 3, 4)], 16, ExpertWidths(expert=16, num_shared=0)),
        ([units(40, 3, 4)], 16, ExpertWidths(expert=16, num_shared=3)),
        # all masks alike: the narrowest experts, all zero, beside the shared one
        ([units(6, 0, 0)], 1, ExpertWidths(expert=1, num_shared=6)),
    ],
)
def test_widths_worked_by_hand(layers: list[MaskUnits], multiple: int, expected: ExpertWidths):
    assert common_widths(layers, top_k=2, multiple=multiple) == expected


def test_bad_masks_are_refused():
    with pytest.raises(L0MoEError, match="hold other values than 0 and 1"):
        sort_units(torch.tensor([[1.0, 0.5]]))
    with pytest.raises(L0MoEError, match="hold other values than 0 and 1"):
        sort_units(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(L0MoEError, match="No mask keeps a unit in any layer"):
        common_widths([sort_units(torch.zeros(3, 4))], top_k=2)
