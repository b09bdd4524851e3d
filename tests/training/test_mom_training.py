"""The mom stage as a job: from the converted dense model, in another layout, after a stop, and exported."""

import json
from pathlib import Path

import pytest
import torch
from conversion.toy_checkpoints import save_model
from distributed import resume_world as toy
from transformers import AutoModelForCausalLM

from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.conversion.export import export_mom
from megatron_l0moe.index.dataset import CurriculumDataset
from megatron_l0moe.sizes.architecture import Architecture

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

# one step with open masks, three that learn them, three with hard ones; saved after the third (where one run stops) and
# the sixth (which is exported)
STEPS, STOP, HARD, BATCH, DENSE_LAYERS, MASKS = 7, 3, 6, 4, 1, 4
ATOL = 1e-5  # fp32 sums in other orders; losses and norms are of size 1 to 4
FLAGS = [
    "--l0-stage", "mom", "--l0-dense-layers", str(DENSE_LAYERS), "--l0-masks", str(MASKS), "--l0-masks-init-std", "0.3",
    "--l0-retention-control", "lagrangian",
    "--l0-open-steps", "1", "--l0-retention-ramp", "0.5", "--l0-freeze-fraction", "0.4", "--l0-mask-lr", "1.0",
    "--l0-router-lr", "3e-2", "--train-iters", str(STEPS), "--lr-wsd-decay-iters", "1", "--min-lr", "0", "--lr", "1e-2",
    "--lr-decay-style", "WSD", "--lr-wsd-decay-style", "cosine", "--lr-warmup-iters", "1", "--clip-grad", "1.0",
    "--micro-batch-size", "1", "--global-batch-size", str(BATCH), "--eval-iters", "0", "--eval-interval", "99",
    "--num-workers", "0",
    "--log-interval", "1", "--ckpt-format", "torch_dist", "--save-interval", str(HARD), "--seq-length",
    str(toy.SEQUENCE), "--tokenizer-type", "NullTokenizer", "--vocab-size", str(toy.VOCAB),
    "--make-vocab-size-divisible-by", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mom")
    toy.write_indexes(root / "index")
    convert_dense(save_model(root / "hf"), root / "converted")
    model = Architecture.from_hf(root / "hf").megatron_flags()

    def run(name: str, *more: str) -> dict[str, object]:
        folder = root / name
        folder.mkdir(exist_ok=True)
        files = ["--load", folder, "--pretrained-checkpoint", root / "converted/megatron"]
        files += ["--l0-metrics-file", folder / "metrics.jsonl", "--l0-data-index", root / "index/expert"]
        argv = [*model, *FLAGS, *(str(word) for word in files), *more]
        return {"argv": argv, "broken": "", "label": name}

    alone = [
        run("straight", "--save", str(root / "straight")),
        run("stopped", "--save", str(root / "stopped"), "--exit-interval", str(STOP)),
    ]
    toy.launch(1, alone, root / "one.log")
    toy.launch(2, [run("tp2", *toy.layout(tp=2)), run("stopped")], root / "two.log")
    hard = root / "straight" / f"iter_{HARD:07d}"
    # rows of 16 bytes at least, which torch's grouped_mm asks for
    export_mom(hard, root / "hf", root / "hard_export", width_multiple=4)
    return root


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_hold_activated_fraction_lambdas_and_load_of_every_masked_layer(world):
    found = records(world / "straight")
    assert [record["frozen"] for record in found] == [False] * 4 + [True] * 3
    targets = [record["retention_target"] for record in found]
    assert targets[0] == 1.0
    assert targets[-1] == 0.5
    for record in found:
        for name in ("retention", "lambda1", "lambda2", "load"):
            assert record[name].keys() == {"1", "2"}
        assert all(sum(load) == pytest.approx(1) for load in record["load"].values())
        assert record["balance_loss"] >= 0
    assert all(value > 0.99 for value in found[0]["retention"].values())
    for record in found[4:]:  # the masks were frozen for the load of the batch before
        assert all(0.3 < value < 0.7 for value in record["retention"].values())
    assert found[3]["lambda1"]["1"] != 0.0


def test_tensor_parallelism_does_not_change_it(world):
    for one, two in zip(records(world / "straight"), records(world / "tp2"), strict=True):
        for key in ("lm_loss", "grad_norm", "retention", "lambda1", "balance_loss"):
            assert two[key] == pytest.approx(one[key], abs=ATOL), key
        assert two["load"].keys() == one["load"].keys()
        for layer, load in one["load"].items():
            assert two["load"][layer] == pytest.approx(load, abs=ATOL)


def test_a_stopped_run_goes_on_in_another_layout(world):
    straight, resumed = records(world / "straight"), records(world / "stopped")
    assert [r["lm_loss"] for r in resumed] == pytest.approx([r["lm_loss"] for r in straight], abs=ATOL)
    assert straight[STOP]["lm_loss"] != pytest.approx(straight[0]["lm_loss"], abs=ATOL)  # control


@torch.no_grad()
def test_the_export_is_what_was_trained(world):
    """Loss of the last batch by stock transformers, from the checkpoint before it."""
    data = CurriculumDataset(world / "index/expert")
    batch = range(HARD * BATCH, (HARD + 1) * BATCH)
    tokens, labels = (torch.stack([data[i][key] for i in batch]) for key in ("tokens", "labels"))
    losses = [
        torch.nn.functional.cross_entropy(model.eval()(tokens).logits.flatten(0, 1), labels.flatten()).item()
        for model in (
            AutoModelForCausalLM.from_pretrained(world / "hard_export"),
            AutoModelForCausalLM.from_pretrained(world / "hf"),
        )
    ]
    expected = records(world / "straight")[HARD]["lm_loss"]
    assert losses[0] == pytest.approx(expected, abs=ATOL)
    assert losses[1] != pytest.approx(expected, abs=100 * ATOL)  # control: the dense model
