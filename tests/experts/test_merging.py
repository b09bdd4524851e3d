"""K experts become one MoE: identical full-width experts are the dense model, and misfits are named."""

import json

import pytest
import torch
from conversion.toy_checkpoints import FFN, HIDDEN, LAYERS, VOCAB, save_model, write_expert_run
from transformers import AutoModelForCausalLM

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.conversion.export import export_moe
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.expert_file import ExpertFile, fingerprint, write_expert
from megatron_l0moe.experts.extraction import extract_expert
from megatron_l0moe.experts.merging import assemble, domain_mean_router

WIDTH, EXPERTS, TOP_K = 20, 3, 2
# two equal experts weighted w and 1 - w against one, float32; logits are of size 10
FP32_LOGITS_ATOL = 2e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with hf/, megatron/ and expert files 0.. of width 20."""
    folder = tmp_path_factory.mktemp("merge")
    convert_dense(save_model(folder / "hf"), folder)
    for k in range(EXPERTS):
        run = write_expert_run(folder / f"run{k}", folder / "megatron", seed=k, keep=WIDTH)
        extract_expert(run, folder / f"{k}.safetensors", width=WIDTH)
    return folder


def expert_paths(folder):
    return [folder / f"{k}.safetensors" for k in range(EXPERTS)]


def test_identical_full_width_experts_are_the_dense_model(made, tmp_path):
    def random_means(name, tensor, k=0):
        return torch.randn(HIDDEN) if name.endswith("input_mean") else tensor

    files = []
    for k in range(EXPERTS):
        run = write_expert_run(tmp_path / f"run{k}", made / "megatron", keep=FFN, seed=k, change=random_means)
        files.append(tmp_path / f"{k}.safetensors")
        extract_expert(run, files[-1], width=FFN)
    assemble(made / "megatron", files, tmp_path / "out", top_k=TOP_K)
    export_moe(tmp_path / "out/megatron", made / "hf", tmp_path / "export", dense_layers=1, top_k=TOP_K)
    ids = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense, moe = (
            AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (made / "hf", tmp_path / "export")
        )
    torch.testing.assert_close(moe, dense, atol=FP32_LOGITS_ATOL, rtol=0)


def test_control_narrow_experts_are_not_the_dense_model(made, tmp_path):
    assemble(made / "megatron", expert_paths(made), tmp_path / "out", top_k=TOP_K)
    export_moe(tmp_path / "out/megatron", made / "hf", tmp_path / "export", dense_layers=1, top_k=TOP_K)
    ids = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense, moe = (
            AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (made / "hf", tmp_path / "export")
        )
    assert (moe - dense).abs().max() > 1000 * FP32_LOGITS_ATOL


def test_every_tensor_comes_from_where_it_should(made, tmp_path):
    assemble(made / "megatron", expert_paths(made), tmp_path, top_k=TOP_K)
    dense, moe = CheckpointReader(made / "megatron"), CheckpointReader(tmp_path / "megatron")
    assert not any(f"layers.{i}.mlp.linear" in name for name in moe.shapes for i in (1, 2))
    for name in dense.shapes:
        if name in moe.shapes:
            assert torch.equal(moe.read(name), dense.read(name)), name
    for layer in (1, 2):
        prefix = f"decoder.layers.{layer}."
        norm = dense.read(f"{prefix}mlp.linear_fc1.layer_norm_weight")
        assert torch.equal(moe.read(f"{prefix}pre_mlp_layernorm.weight"), norm)
        for k, file in enumerate(map(ExpertFile, expert_paths(made))):
            fc1 = moe.read(f"{prefix}mlp.experts.experts.linear_fc1.weight", k, k + 1)[0]
            assert torch.equal(fc1[:WIDTH], file.read(layer, "gate"))
            assert torch.equal(fc1[WIDTH:], file.read(layer, "up"))
            fc2 = moe.read(f"{prefix}mlp.experts.experts.linear_fc2.weight", k, k + 1)[0]
            assert torch.equal(fc2, file.read(layer, "down"))
    assert moe.settings["stage"] == "moe"
    arguments = moe.common["args"]
    assert arguments.moe_layer_freq == [0, 1, 1]
    assert (arguments.num_experts, arguments.moe_ffn_hidden_size, arguments.moe_router_topk) == (
        3,
        WIDTH,
        TOP_K,
    )


def test_numbers_of_the_report(made, tmp_path):
    result = assemble(made / "megatron", expert_paths(made), tmp_path, top_k=TOP_K)
    assert json.loads((tmp_path / "summary.json").read_text()) == result
    assert result["width_per_layer"] == {"1": [WIDTH] * EXPERTS, "2": [WIDTH] * EXPERTS}
    assert result["chance_iou"] == pytest.approx((WIDTH / FFN) / (2 - WIDTH / FFN))
    sets = [set(ExpertFile(file).read(2, "units").tolist()) for file in expert_paths(made)]
    pairs = [len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
    assert result["iou"]["2"] == pytest.approx(sum(pairs) / len(pairs))
    assert result["iou_matrix"]["2"][0][1] == pytest.approx(pairs[0])
    assert result["coverage"]["2"] == pytest.approx(len(set.union(*sets)) / FFN)


def test_domain_mean_router_by_hand():
    """Means (4, 0), (0, 0), (2, 3): common mean (2, 1); less it (2, -1), (-2, -1), (0, 2), made of length 1."""
    rows = domain_mean_router(torch.tensor([[4.0, 0.0], [0.0, 0.0], [2.0, 3.0]], dtype=torch.bfloat16))
    root5 = 5**0.5
    expected = torch.tensor([[2 / root5, -1 / root5], [-2 / root5, -1 / root5], [0.0, 1.0]])
    assert rows.dtype is torch.float32
    torch.testing.assert_close(rows, expected)


def test_router_of_the_checkpoint(made, tmp_path):
    assemble(made / "megatron", expert_paths(made), tmp_path / "mean", top_k=TOP_K)
    name = "decoder.layers.2.mlp.router.weight"
    means = torch.stack([ExpertFile(file).read(2, "input_mean") for file in expert_paths(made)])
    assert torch.equal(CheckpointReader(tmp_path / "mean/megatron").read(name), domain_mean_router(means))
    routers = []
    for seed in (1, 1, 2):
        out = tmp_path / f"normal{len(routers)}"
        assemble(made / "megatron", expert_paths(made), out, top_k=TOP_K, router_init="normal", seed=seed)
        routers.append(CheckpointReader(out / "megatron").read(name))
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
    assert routers[0].dtype is torch.float32
    assert 0.015 < float(routers[0].std()) < 0.025


def test_equal_domain_means_are_refused():
    with pytest.raises(L0MoEError, match="domain mean of expert 0 equals the mean of all"):
        domain_mean_router(torch.ones(3, 4))


def make_expert(file, *, width=WIDTH, layers=(1, 2), hidden=HIDDEN):
    tensors = {}
    for layer in layers:
        for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            tensors[f"layers.{layer}.{part}"] = torch.randn(shape)
        tensors[f"layers.{layer}.units"] = torch.arange(width)
        tensors[f"layers.{layer}.input_mean"] = torch.randn(hidden)
    write_expert(file, tensors, width=width, layers=list(layers))
    return file


def checkpoints_from(tmp_path, dense, dtype=None, change=lambda name, tensor: tensor):
    """Extract every run with and without weights, merge both ways; returns the two checkpoints' readers and units."""

    def as_trained(name, tensor):
        return change(name, tensor.to(dtype) if dtype and "linear_fc" in name else tensor)

    readers = {}
    for mode in ("on", "off"):
        files = [tmp_path / f"{mode}{k}.safetensors" for k in range(EXPERTS)]
        for k, file in enumerate(files):
            settings = {"l0_train_weights": mode}
            folder = tmp_path / f"run-{mode}{k}"
            run = write_expert_run(folder, dense, seed=k, keep=WIDTH, settings=settings, change=as_trained)
            assert extract_expert(run, file, width=WIDTH)["weights"] is (mode == "on")
        assemble(dense, files, tmp_path / mode, top_k=TOP_K)
        readers[mode] = CheckpointReader(tmp_path / mode / "megatron")
    return readers["on"], readers["off"]


@pytest.fixture(scope="module")
def dense_bf16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16")
    convert_dense(save_model(folder / "hf", dtype=torch.bfloat16), folder)
    return folder / "megatron"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_unit_lists_equals_merging_untrained_weights_bit_for_bit(made, dense_bf16, tmp_path, dtype):
    dense = made / "megatron" if dtype is torch.float32 else dense_bf16
    whole, lists = checkpoints_from(tmp_path, dense)
    assert whole.shapes == lists.shapes
    for name in whole.shapes:
        one, other = whole.read(name), lists.read(name)
        assert one.dtype is other.dtype
        assert torch.equal(one, other), name
    units = ExpertFile(tmp_path / "off1.safetensors").read(2, "units")
    fc1 = CheckpointReader(dense).read("decoder.layers.2.mlp.linear_fc1.weight")
    got = lists.read("decoder.layers.2.mlp.experts.experts.linear_fc1.weight", 1, 2)[0]
    assert torch.equal(got, torch.cat([fc1[units], fc1[FFN + units]]))


def test_control_another_unit_list_gives_another_checkpoint(made, tmp_path):
    def other_mask(name, tensor):
        return tensor.roll(1) if name == "decoder.layers.2.mlp.gate.hard_mask" else tensor

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, lists = checkpoints_from(tmp_path / "a", made / "megatron")
    _, others = checkpoints_from(tmp_path / "b", made / "megatron", change=other_mask)
    for layer, equal in ((1, True), (2, False)):
        name = f"decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight"
        assert torch.equal(lists.read(name), others.read(name)) is equal


def test_runs_in_bfloat16_know_their_float32_dense_model_again(made, tmp_path):
    whole, lists = checkpoints_from(tmp_path, made / "megatron", dtype=torch.bfloat16)
    name = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
    assert lists.read(name).dtype is torch.float32  # cut out of the dense checkpoint, not rounded
    assert torch.equal(lists.read(name).bfloat16(), whole.read(name))


def test_units_of_another_dense_model_are_refused(made, tmp_path):
    def trained(name, tensor):
        """One weight moved by one step of bfloat16."""
        if name == "decoder.layers.2.mlp.linear_fc1.weight":
            tensor[3, 5] *= 1.01
        return tensor

    with pytest.raises(L0MoEError, match="lists units of layer 2 of another dense model"):
        checkpoints_from(tmp_path, made / "megatron", change=trained)
    assert (tmp_path / "on" / "megatron").exists()  # weights need no dense MLP
    assert not (tmp_path / "off" / "megatron" / "release").exists()


def make_list(file, dense, units, *, layers=(1, 2)):
    reader, tensors, prints = CheckpointReader(dense), {}, {}
    for layer in layers:
        prefix = f"decoder.layers.{layer}.mlp.linear_"
        prints[layer] = fingerprint(reader.read(f"{prefix}fc1.weight"), reader.read(f"{prefix}fc2.weight"))
        tensors[f"layers.{layer}.units"] = torch.tensor(units, dtype=torch.int32)
        tensors[f"layers.{layer}.input_mean"] = torch.randn(HIDDEN)
    write_expert(file, tensors, width=len(units), layers=list(layers), fingerprints=prints)
    return file


@pytest.mark.parametrize("units", [[0, 2, 1], [0, 1, 1], [-1, 0, 1], [0, 1, FFN]], ids=str)
def test_impossible_units_are_refused(made, tmp_path, units):
    good = make_list(tmp_path / "good.safetensors", made / "megatron", [0, 1, FFN - 1])
    bad = make_list(tmp_path / "bad.safetensors", made / "megatron", units)
    assemble(made / "megatron", [good, good], tmp_path / "fine", top_k=1, router_init="normal")
    with pytest.raises(L0MoEError, match="not ascending numbers from 0 to 47"):
        assemble(made / "megatron", [good, bad], tmp_path / "out", top_k=1, router_init="normal")


def test_experts_with_and_without_weights_do_not_mix(made, tmp_path):
    units = list(range(WIDTH))
    files = [make_list(tmp_path / "list.safetensors", made / "megatron", units), expert_paths(made)[0]]
    for order in (files, files[::-1]):
        with pytest.raises(
            L0MoEError, match=r"0\.safetensors holds weights and .*list\.safetensors only units"
        ):
            assemble(made / "megatron", order, tmp_path / "out", top_k=2)


MISFITS = {
    "width": ({"width": 19}, "has 19 units a layer, but .* has 20"),
    "layers": ({"layers": (2,)}, "has other MoE layers"),
    "hidden": ({"hidden": 16}, "hidden size 16, but the dense model has 32"),
}


@pytest.mark.parametrize(("changes", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_experts_that_do_not_fit_are_refused(made, tmp_path, changes, message):
    files = [make_expert(tmp_path / "a.safetensors"), make_expert(tmp_path / "b.safetensors", **changes)]
    with pytest.raises(L0MoEError, match=message):
        assemble(made / "megatron", files, tmp_path / "out", top_k=2)
    assert not (tmp_path / "out").exists()


def test_numbers_that_do_not_fit_are_refused(made, tmp_path):
    files = expert_paths(made)
    with pytest.raises(L0MoEError, match="3 expert files were given, but 4 experts are asked for"):
        assemble(made / "megatron", files, tmp_path / "out", top_k=2, num_experts=4)
    with pytest.raises(L0MoEError, match="1 expert files were given, but at least 2"):
        assemble(made / "megatron", files[:1], tmp_path / "out", top_k=1)
    with pytest.raises(L0MoEError, match=r"top_k \(4\) must be between 1 and the number of experts \(3\)"):
        assemble(made / "megatron", files, tmp_path / "out", top_k=4)
    with pytest.raises(L0MoEError, match=r"gone\.safetensors does not exist"):
        assemble(made / "megatron", [*files, tmp_path / "gone.safetensors"], tmp_path / "out", top_k=2)
    with pytest.raises(L0MoEError, match="is not a dense checkpoint"):
        assemble(made / "run0", files, tmp_path / "out", top_k=2)
    middle = [make_expert(tmp_path / f"{k}.safetensors", layers=(1,)) for k in range(2)]
    with pytest.raises(L0MoEError, match=r"MoE layers \[1\], but they must be the top layers .* up to 2"):
        assemble(made / "megatron", middle, tmp_path / "out", top_k=2)
    assert not (tmp_path / "out").exists()


def test_the_toy_model_has_dense_and_moe_layers():
    assert LAYERS == 3
