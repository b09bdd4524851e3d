"""The masked model equals the extracted expert; the file holds exactly what was asked for.

Selection, gates and overlap by hand and against naive loops.
"""

import math
import shutil

import pytest
import torch
from conversion.reference import swiglu
from conversion.toy_checkpoints import EXPERT_RUN, FFN, HIDDEN, LAYERS, save_model, write_expert_run
from safetensors.torch import load_file, save_file

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.expert_file import ExpertFile, write_expert
from megatron_l0moe.experts.extraction import (
    chance_iou,
    extract_expert,
    overlap,
    select_units,
    units_of_mask,
)
from megatron_l0moe.modules.hard_concrete import HardConcreteConfig, deterministic_gate

WIDTH = 20
# z is multiplied into `up` in float32 and rounded once; outputs are of size 10
FLOAT32_ROUNDING_ATOL = 1e-5
DENSE_LAYERS = 1
GATES = {"l0_temperature": 0.7, "l0_stretch_low": -0.2, "l0_stretch_high": 1.3}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    convert_dense(save_model(folder / "hf"), folder)
    return folder / "megatron"


def masked_mlp(reader, layer, x, mask):
    """SwiGLU of the full width whose activation is multiplied by the mask: what the expert run computes; float64."""
    fc1 = reader.read(f"decoder.layers.{layer}.mlp.linear_fc1.weight").double()
    down = reader.read(f"decoder.layers.{layer}.mlp.linear_fc2.weight").double()
    out = torch.zeros_like(x)
    for unit in range(FFN):
        gate, up = x @ fc1[unit], x @ fc1[FFN + unit]
        out += (gate * gate.sigmoid() * up * mask[unit])[:, None] * down[:, unit]
    return out


def expert_mlp(expert, layer, x):
    return swiglu(x, *(expert.read(layer, part).double() for part in ("gate", "up", "down")))


@pytest.mark.parametrize("keep", [None, WIDTH], ids=["learning", "frozen"])
def test_masked_model_equals_extracted_expert(tmp_path, dense, keep):
    run = write_expert_run(tmp_path / "run", dense, keep=keep, settings=GATES, seed=3)
    result = extract_expert(run, tmp_path / "expert.safetensors", width=WIDTH)
    assert result["frozen"] is (keep is not None)
    reader, expert = CheckpointReader(run), ExpertFile(tmp_path / "expert.safetensors")
    x = torch.randn(7, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer in range(DENSE_LAYERS, LAYERS):
        log_alpha = reader.read(f"decoder.layers.{layer}.mlp.gate.log_alpha")
        if keep is None:
            z = deterministic_gate(
                log_alpha, HardConcreteConfig(l0_temperature=0.7, l0_stretch_low=-0.2, l0_stretch_high=1.3)
            )
            mask = torch.zeros(FFN)
            units = select_units(log_alpha, WIDTH)
            mask[units] = z[units]
            assert 0 < float(mask[units].min()) < 1  # else folding is not tested
        else:
            mask = reader.read(f"decoder.layers.{layer}.mlp.gate.hard_mask")
        expected = masked_mlp(reader, layer, x, mask.double())
        got = expert_mlp(expert, layer, x)
        torch.testing.assert_close(got, expected, atol=FLOAT32_ROUNDING_ATOL, rtol=0)
        control = masked_mlp(reader, layer, x, mask.roll(1).double())
        assert (got - control).abs().max() > 100 * FLOAT32_ROUNDING_ATOL


def test_frozen_weights_are_copied_bit_by_bit(tmp_path, dense):
    run = write_expert_run(tmp_path / "run", dense, keep=WIDTH)
    extract_expert(run, tmp_path / "expert.safetensors", width=WIDTH)
    reader, tensors = CheckpointReader(run), load_file(tmp_path / "expert.safetensors")
    units = tensors["layers.2.units"]
    fc1 = reader.read("decoder.layers.2.mlp.linear_fc1.weight")
    assert torch.equal(tensors["layers.2.gate"], fc1[units])
    assert torch.equal(tensors["layers.2.up"], fc1[FFN + units])
    assert torch.equal(
        tensors["layers.2.down"], reader.read("decoder.layers.2.mlp.linear_fc2.weight")[:, units]
    )
    assert torch.equal(tensors["layers.2.input_mean"], reader.read("decoder.layers.2.mlp.gate.input_mean"))


def test_shapes_and_metadata(tmp_path, dense):
    run = write_expert_run(
        tmp_path / "run", dense, change=lambda n, t: t.bfloat16() if "linear_fc" in n else t
    )
    result = extract_expert(run, tmp_path / "expert.safetensors", width=WIDTH)
    expert = ExpertFile(tmp_path / "expert.safetensors")
    assert (expert.width, expert.layers, expert.hidden) == (WIDTH, [1, 2], HIDDEN)
    assert result["moe_layers"] == [1, 2]
    assert result["parameters"] == 2 * 3 * WIDTH * HIDDEN
    tensors = load_file(tmp_path / "expert.safetensors")
    assert set(tensors) == {
        f"layers.{i}.{p}" for i in (1, 2) for p in ("gate", "up", "down", "units", "input_mean")
    }
    assert tensors["layers.1.up"].dtype is torch.bfloat16
    assert tensors["layers.1.input_mean"].dtype is torch.float32
    units = tensors["layers.1.units"]
    assert units.tolist() == sorted(set(units.tolist()))
    assert not list(tmp_path.glob(".*"))


def test_an_iteration_of_a_run_is_found(tmp_path, dense):
    run = write_expert_run(tmp_path / "run", dense)
    (run / "release").rename(run / "iter_0000060")
    (run / "latest_checkpointed_iteration.txt").write_text("60")
    extract_expert(run, tmp_path / "expert.safetensors", width=WIDTH)


def nan_mlp(name, tensor):
    if name == "decoder.layers.2.mlp.linear_fc2.weight":
        tensor[:] = torch.nan
    return tensor


def unfreeze_one(name, tensor):
    return torch.zeros_like(tensor) if name == "decoder.layers.2.mlp.gate.frozen" else tensor


def test_bad_runs_are_refused(tmp_path, dense):
    out = tmp_path / "expert.safetensors"
    with pytest.raises(L0MoEError, match="has no masks"):
        extract_expert(dense, out, width=WIDTH)
    with pytest.raises(L0MoEError, match="holds no Megatron checkpoint"):
        extract_expert(tmp_path / "gone", out, width=WIDTH)
    run = write_expert_run(tmp_path / "frozen", dense, keep=WIDTH)
    with pytest.raises(L0MoEError, match=f"keeps {WIDTH} units, but the expert width is 8"):
        extract_expert(run, out, width=8)
    run = write_expert_run(tmp_path / "open", dense)
    with pytest.raises(L0MoEError, match=r"width \(49\) must be between 1 and the layer's 48"):
        extract_expert(run, out, width=FFN + 1)
    run = write_expert_run(tmp_path / "nan", dense, change=nan_mlp)
    with pytest.raises(L0MoEError, match="down of layer 2 holds"):
        extract_expert(run, out, width=WIDTH)
    run = write_expert_run(tmp_path / "half", dense, keep=WIDTH, change=unfreeze_one)
    with pytest.raises(L0MoEError, match="1 of 2 masks are frozen"):
        extract_expert(run, out, width=WIDTH)
    assert not out.exists()


@pytest.mark.parametrize("name", EXPERT_RUN)
def test_runs_without_l0_settings_are_refused(tmp_path, dense, name):
    out = tmp_path / "expert.safetensors"
    run = write_expert_run(tmp_path / "run", dense, keep=WIDTH, without=[name])
    with pytest.raises(L0MoEError, match=rf"holds no L0 settings \({name} is missing\), so nothing says how"):
        extract_expert(run, out, width=WIDTH)
    assert not out.exists()


def test_gates_of_the_exact_budget_must_be_frozen(tmp_path, dense):
    out = tmp_path / "expert.safetensors"
    for control, keep in (("budget", WIDTH), ("lagrangian", None)):
        settings = {"l0_retention_control": control}
        run = write_expert_run(tmp_path / control, dense, keep=keep, settings=settings)
        extract_expert(run, out, width=WIDTH)
        out.unlink()
    run = write_expert_run(tmp_path / "open", dense, settings={"l0_retention_control": "budget"})
    with pytest.raises(
        L0MoEError, match=r"the masks are not frozen; train with --l0-freeze-fraction above 0"
    ):
        extract_expert(run, out, width=WIDTH)
    assert not out.exists()


MASKS_ONLY = {"l0_train_weights": "off"}


def test_of_a_run_that_trained_masks_only_the_units_are_kept(tmp_path, dense):
    full, units = tmp_path / "full.safetensors", tmp_path / "units.safetensors"
    for out, settings in ((full, {"l0_train_weights": "on"}), (units, MASKS_ONLY)):
        run = write_expert_run(tmp_path / out.stem, dense, keep=WIDTH, settings=settings)
        result = extract_expert(run, out, width=WIDTH)
        assert result["weights"] is (out == full)
        assert result["bytes"] == out.stat().st_size
        assert result["parameters"] == 2 * 3 * WIDTH * HIDDEN
    whole, small = load_file(full), load_file(units)
    assert set(small) == {f"layers.{i}.{part}" for i in (1, 2) for part in ("units", "input_mean")}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in small.items())
    expert = ExpertFile(units)
    assert (expert.has_weights, expert.width, expert.hidden) == (False, WIDTH, HIDDEN)
    assert expert.read(1, "units").dtype is torch.int64
    assert ExpertFile(full).has_weights


def test_masks_only_needs_frozen_masks(tmp_path, dense):
    run = write_expert_run(tmp_path / "open", dense, settings=MASKS_ONLY)
    with pytest.raises(L0MoEError, match=r"not frozen; .* an expert is a list of units, which has no place"):
        extract_expert(run, tmp_path / "expert.safetensors", width=WIDTH)
    assert not (tmp_path / "expert.safetensors").exists()


def unit_list(layers, width, hidden):
    tensors = {}
    for layer in layers:
        tensors[f"layers.{layer}.units"] = torch.arange(width, dtype=torch.int32)
        tensors[f"layers.{layer}.input_mean"] = torch.zeros(hidden)
    return tensors


def test_four_experts_of_smollm2_take_kilobytes(tmp_path):
    layers, file = list(range(6, 30)), tmp_path / "expert.safetensors"
    prints = dict.fromkeys(layers, "0123456789abcdef")
    write_expert(file, unit_list(layers, 384, 576), width=384, layers=layers, fingerprints=prints)
    assert 4 * file.stat().st_size < 450_000
    assert 4 * 24 * 3 * 384 * 576 * 2 > 120_000_000  # what their weights would take in bfloat16


def test_files_of_version_1_are_read(tmp_path):
    tensors = {f"layers.1.{part}": torch.zeros(4, HIDDEN) for part in ("gate", "up")}
    tensors |= {"layers.1.down": torch.zeros(HIDDEN, 4), "layers.1.input_mean": torch.zeros(HIDDEN)}
    metadata = {"format": "l0moe-expert", "version": "1", "expert_ffn": "4", "moe_layers": "1"}
    units = torch.arange(4)
    save_file({**tensors, "layers.1.units": units}, tmp_path / "old.safetensors", metadata)
    expert = ExpertFile(tmp_path / "old.safetensors")
    assert (expert.has_weights, expert.hidden) == (True, HIDDEN)
    assert torch.equal(expert.read(1, "units"), units)
    save_file(tensors, tmp_path / "lost.safetensors", metadata)
    with pytest.raises(L0MoEError, match=r"lacks the tensor layers\.1\.units"):
        ExpertFile(tmp_path / "lost.safetensors")
    save_file({**tensors, "layers.1.units": units}, tmp_path / "new.safetensors", metadata | {"version": "3"})
    with pytest.raises(L0MoEError, match="is not an expert file of version 1 or 2"):
        ExpertFile(tmp_path / "new.safetensors")


def test_unit_lists_that_contradict_themselves_are_refused(tmp_path):
    file, tensors = tmp_path / "expert.safetensors", unit_list([1, 2], 4, HIDDEN)
    write_expert(file, tensors, width=5, layers=[1, 2], fingerprints={1: "a", 2: "b"})
    with pytest.raises(L0MoEError, match=r"does not describe 5 units of layer 1 \(their shape is \[4\]\)"):
        ExpertFile(file)
    write_expert(file, tensors, width=4, layers=[1, 2], fingerprints={1: "a"})
    with pytest.raises(L0MoEError, match="does not describe 4 units of layer 2"):
        ExpertFile(file)
    extra = tensors | {"layers.1.gate": torch.zeros(4, HIDDEN)}
    write_expert(file, extra, width=4, layers=[1, 2], fingerprints={1: "a", 2: "b"})
    with pytest.raises(L0MoEError, match=r"should not hold the tensor layers\.1\.gate"):
        ExpertFile(file)


def test_bad_expert_files_are_refused(tmp_path):
    with pytest.raises(L0MoEError, match="does not exist"):
        ExpertFile(tmp_path / "gone.safetensors")
    save_file({"a": torch.zeros(1000)}, tmp_path / "other.safetensors")
    with pytest.raises(L0MoEError, match="is not an expert file of version 1"):
        ExpertFile(tmp_path / "other.safetensors")
    shutil.copy(tmp_path / "other.safetensors", tmp_path / "short.safetensors")
    with (tmp_path / "short.safetensors").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(L0MoEError, match="is truncated"):
        ExpertFile(tmp_path / "short.safetensors")


def naive_units(values, width):
    """Take the largest value again and again; the first of equals wins."""
    left = list(enumerate(values))
    chosen = []
    for _ in range(width):
        best = left[0]
        for candidate in left[1:]:
            if candidate[1] > best[1]:
                best = candidate
        left.remove(best)
        chosen.append(best[0])
    return sorted(chosen)


@pytest.mark.parametrize("width", [1, 7, 30])
def test_units_equal_the_naive_loop_with_many_ties(width):
    generator = torch.Generator().manual_seed(width)
    log_alpha = torch.randint(-3, 3, (30,), generator=generator).float()
    units = select_units(log_alpha, width)
    assert units.tolist() == naive_units(log_alpha.tolist(), width)
    assert units.dtype is torch.int64


def test_units_by_hand():
    assert select_units(torch.tensor([0.5, 2.0, 2.0, -1.0, 2.0]), 2).tolist() == [1, 2]
    assert select_units(torch.zeros(5), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("width", [0, 6])
def test_width_must_fit(width):
    with pytest.raises(L0MoEError, match=rf"width \({width}\) must be between 1 and the layer's 5 FFN units"):
        select_units(torch.zeros(5), width)


def test_nan_is_refused():
    with pytest.raises(L0MoEError, match="log_alpha holds NaN"):
        select_units(torch.tensor([0.0, math.nan]), 1)


def test_a_frozen_mask_must_have_exactly_the_width():
    mask = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert units_of_mask(mask, 2).tolist() == [1, 3]
    with pytest.raises(L0MoEError, match="keeps 2 units, but the expert width is 3"):
        units_of_mask(mask, 3)


def test_gate_by_hand():
    """log_alpha 0: s = 1/2, z = 0.5 * 1.2 - 0.1 = 0.5; far ends are clipped to exactly 0 and 1."""
    z = deterministic_gate(torch.tensor([0.0, -10.0, 10.0, 0.83 * math.log(3.0)]), HardConcreteConfig())
    assert z.tolist() == pytest.approx([0.5, 0.0, 1.0, 0.75 * 1.2 - 0.1], abs=1e-7)
    assert z[1] == 0
    assert z[2] == 1
    other = deterministic_gate(
        torch.tensor([1.0]), HardConcreteConfig(l0_temperature=2.0, l0_stretch_low=-0.5, l0_stretch_high=1.5)
    )
    assert float(other) == pytest.approx(2 / (1 + math.exp(-0.5)) - 0.5, abs=1e-6)


def test_overlap_by_hand():
    """{0,1}, {1,2}, {4,5} of 8: one shared unit of three in the first pair, none in the others; 5 of 8 covered."""
    result = overlap([torch.tensor(u) for u in ([0, 1], [1, 2], [4, 5])], 8)
    flat = [x for row in result.iou_matrix for x in row]
    assert flat == pytest.approx([1, 1 / 3, 0, 1 / 3, 1, 0, 0, 0, 1])
    assert result.mean_iou == pytest.approx(1 / 9)
    assert result.coverage == pytest.approx(5 / 8)


def test_overlap_equals_sets():
    generator = torch.Generator().manual_seed(0)
    units = [torch.randperm(40, generator=generator)[:13] for _ in range(4)]
    result = overlap(units, 40)
    sets = [set(u.tolist()) for u in units]
    expected = [[len(a & b) / len(a | b) for b in sets] for a in sets]
    assert [x for row in result.iou_matrix for x in row] == pytest.approx(
        [x for row in expected for x in row]
    )
    assert result.coverage == pytest.approx(len(set.union(*sets)) / 40)


def test_chance_iou_is_that_of_random_choices():
    generator = torch.Generator().manual_seed(0)
    units = [torch.randperm(400, generator=generator)[:100] for _ in range(40)]
    assert chance_iou(100, 400) == pytest.approx(1 / 7)
    assert overlap(units, 400).mean_iou == pytest.approx(chance_iou(100, 400), abs=0.005)
    assert chance_iou(400, 400) == 1.0
