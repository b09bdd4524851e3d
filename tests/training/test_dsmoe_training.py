"""The dsmoe stage as a job: from the converted dense model, in another layout, after a stop, and exported."""

import json
from pathlib import Path

import pytest
import torch
from conversion.toy_checkpoints import save_model
from distributed import resume_world as toy
from transformers import AutoModelForCausalLM, dynamic_module_utils

from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.conversion.export import export_dsmoe
from megatron_l0moe.index.dataset import CurriculumDataset
from megatron_l0moe.sizes.architecture import Architecture

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS, STOP, BATCH, DENSE_LAYERS = 4, 2, 4, 1
ATOL = 1e-5  # fp32 sums in other orders; losses and norms are of size 1 to 4
FLAGS = [
    "--l0-stage", "dsmoe", "--l0-dense-layers", str(DENSE_LAYERS), "--l0-block-init-std", "0.3",
    "--l0-router-lr", "3e-2", "--train-iters", str(STEPS), "--lr-wsd-decay-iters", "1", "--min-lr", "0", "--lr", "1e-2",
    "--lr-decay-style", "WSD", "--lr-wsd-decay-style", "cosine", "--lr-warmup-iters", "1", "--clip-grad", "1.0",
    "--micro-batch-size", "1", "--global-batch-size", str(BATCH), "--eval-iters", "0", "--eval-interval", "9",
    "--num-workers", "0",
    "--log-interval", "1", "--ckpt-format", "torch_dist", "--save-interval", str(STOP), "--seq-length",
    str(toy.SEQUENCE), "--tokenizer-type", "NullTokenizer", "--vocab-size", str(toy.VOCAB),
    "--make-vocab-size-divisible-by", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dsmoe")
    toy.write_indexes(root / "index")
    convert_dense(save_model(root / "hf"), root / "converted")
    model = Architecture.from_hf(root / "hf").megatron_flags()

    def run(name: str, *more: str) -> dict[str, object]:
        folder = root / name
        folder.mkdir(exist_ok=True)
        files = ["--load", folder, "--save", folder, "--pretrained-checkpoint", root / "converted/megatron"]
        files += ["--l0-metrics-file", folder / "metrics.jsonl", "--l0-data-index", root / "index/expert"]
        argv = [*model, *FLAGS, *(str(word) for word in files), *more]
        return {"argv": argv, "broken": "", "label": name}

    alone = [run("straight"), run("stopped", "--exit-interval", str(STOP))]
    toy.launch(1, alone, root / "one.log")
    toy.launch(2, [run("tp2", *toy.layout(tp=2)), run("stopped")], root / "two.log")
    export_dsmoe(root / "straight" / f"iter_{STOP:07d}", root / "hf", root / "halfway_export")
    return root


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_hold_active_fraction_and_loss_of_every_gated_layer(world):
    first = records(world / "straight")[0]
    for name, low, high in (("active_fraction", 0.2, 0.8), ("sparsity_loss", 0.1, 0.7)):
        assert first[name].keys() == {"1", "2"}
        assert all(low < value < high for value in first[name].values())


def test_tensor_parallelism_does_not_change_it(world):
    for one, two in zip(records(world / "straight"), records(world / "tp2"), strict=True):
        for key in ("lm_loss", "grad_norm", "active_fraction", "sparsity_loss"):
            assert two[key] == pytest.approx(one[key], abs=ATOL), key


def test_a_stopped_run_goes_on_in_another_layout(world):
    straight, resumed = records(world / "straight"), records(world / "stopped")
    assert [r["lm_loss"] for r in resumed] == pytest.approx([r["lm_loss"] for r in straight], abs=ATOL)
    assert straight[STOP]["lm_loss"] != pytest.approx(straight[0]["lm_loss"], abs=ATOL)  # control


@torch.no_grad()
def test_the_export_is_what_was_trained(world, monkeypatch, tmp_path):
    """Loss of the third batch by transformers, from the checkpoint after two steps."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    data = CurriculumDataset(world / "index/expert")
    batch = range(STOP * BATCH, (STOP + 1) * BATCH)
    tokens, labels = (torch.stack([data[i][key] for i in batch]) for key in ("tokens", "labels"))
    losses = [
        torch.nn.functional.cross_entropy(model.eval()(tokens).logits.flatten(0, 1), labels.flatten()).item()
        for model in (
            AutoModelForCausalLM.from_pretrained(world / "halfway_export", trust_remote_code=True),
            AutoModelForCausalLM.from_pretrained(world / "hf"),
        )
    ]
    expected = records(world / "straight")[STOP]["lm_loss"]
    assert losses[0] == pytest.approx(expected, abs=ATOL)
    assert losses[1] != pytest.approx(expected, abs=100 * ATOL)  # control: the dense model
