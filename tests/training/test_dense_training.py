"""Training a dense model: against transformers, in another layout, after a stop, from random weights, and out again.

Equality ladder: loss and gradient norm of the first step against transformers' own model and autograd; the loss of a
later step against the exported model; TP2 and a resumed run against the straight run.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conversion.toy_checkpoints import save_model
from distributed import resume_world as toy
from transformers import AutoModelForCausalLM

from megatron_l0moe.chain.training_commands import DenseTraining, dense_job
from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.conversion.export import export_dense
from megatron_l0moe.index.dataset import CurriculumDataset
from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.sizes.architecture import Architecture

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS, STOP, BATCH = 4, 2, 4
ATOL = 1e-5  # fp32 sums in other orders; losses and norms are of size 4
FAMILY = "llama"


def words(training: DenseTraining, architecture: Architecture, *more: str) -> dict[str, object]:
    """A run for `toy.launch`: the job's own command line without the launcher."""
    training.folder.mkdir(parents=True, exist_ok=True)
    command = dense_job(training, architecture).command
    return {
        "argv": [*command[command.index("-m", 3) + 2 :], *more],
        "broken": "",
        "label": training.folder.name,
    }


def checkpoint_of(source: Path, iteration: int, target: Path) -> Path:
    """A folder that holds one earlier checkpoint."""
    name = f"iter_{iteration:07d}"
    shutil.copytree(source / name, target / name)
    (target / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return target


@dataclass(frozen=True)
class World:
    root: Path
    index: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("dense")
    index = toy.write_indexes(root / "index") / "expert"
    hf = save_model(root / "hf", FAMILY)
    architecture = Architecture.from_hf(hf)
    convert_dense(hf, root / "converted")
    straight = DenseTraining(
        folder=root / "straight",
        index=index,
        start=root / "converted" / "megatron",
        steps=STEPS,
        seq_length=toy.SEQUENCE,
        micro_batch_size=2,
        global_batch_size=BATCH,
        learning_rate=1e-2,
        warmup_share=0.25,
        seed=3,
        save_interval=STOP,
    )
    stopped = replace(straight, folder=root / "stopped")
    alone = [
        words(straight, architecture),
        words(stopped, architecture, "--exit-interval", str(STOP)),
        words(stopped, architecture),
        words(replace(straight, folder=root / "random", start=None), architecture),
    ]
    toy.launch(1, alone, root / "one.log")
    halfway = checkpoint_of(root / "straight" / "checkpoints", STOP, root / "iteration_2")
    export_dense(halfway, hf, root / "halfway")
    two = replace(straight, folder=root / "tp2", layout=Layout(processes=2, tensor=2, sequence=True))
    toy.launch(2, [words(two, architecture)], root / "two.log")
    return World(root, index)


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reference(hf: Path, index: Path, samples: Sequence[int]) -> tuple[float, float]:
    """Loss of the samples and norm of its gradient, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(hf)
    data = CurriculumDataset(index)
    tokens, labels = (torch.stack([data[i][key] for i in samples]) for key in ("tokens", "labels"))
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    norms = [float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None]
    assert len(norms) == len(list(model.parameters()))
    return float(loss.detach()), math.sqrt(sum(norms))


def test_the_first_step_has_the_loss_and_gradient_of_transformers(world: World) -> None:
    first = records(world.root / "straight")[0]
    loss, norm = reference(world.root / "hf", world.index, range(BATCH))
    assert first["lm_loss"] == pytest.approx(loss, abs=ATOL)
    assert first["grad_norm"] == pytest.approx(norm, abs=ATOL)
    other_loss, other_norm = reference(world.root / "hf", world.index, range(1, BATCH + 1))  # control
    assert abs(other_loss - loss) > 100 * ATOL
    assert abs(other_norm - norm) > 100 * ATOL


def test_every_weight_trains_and_the_export_is_what_was_trained(world: World) -> None:
    third = records(world.root / "straight")[STOP]
    batch = range(STOP * BATCH, (STOP + 1) * BATCH)
    loss, _ = reference(world.root / "halfway", world.index, batch)
    assert third["lm_loss"] == pytest.approx(loss, abs=ATOL)
    assert abs(reference(world.root / "hf", world.index, batch)[0] - loss) > 100 * ATOL  # control
    before, after = (
        AutoModelForCausalLM.from_pretrained(world.root / name).state_dict() for name in ("hf", "halfway")
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_tensor_parallelism_does_not_change_it(world: World) -> None:
    one, two = records(world.root / "straight"), records(world.root / "tp2")
    for key in ("lm_loss", "grad_norm"):
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], abs=ATOL)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(world: World) -> None:
    straight, resumed = (toy.opened(world.root / n / "checkpoints", STEPS) for n in ("straight", "stopped"))
    assert set(toy.differences(straight, resumed).values()) == {0.0}
    assert [r["lm_loss"] for r in records(world.root / "stopped")] == [
        r["lm_loss"] for r in records(world.root / "straight")
    ]
    halfway = toy.opened(world.root / "straight" / "checkpoints", STOP)
    assert max(toy.differences(halfway, straight).values()) > 0  # control


def test_without_a_start_the_weights_are_random(world: World) -> None:
    losses = [r["lm_loss"] for r in records(world.root / "random")]
    assert losses[0] == pytest.approx(math.log(toy.VOCAB), abs=0.2)  # small weights: nearly uniform
    assert losses[-1] < losses[0]
    assert abs(records(world.root / "straight")[0]["lm_loss"] - losses[0]) > 0.2  # control: from a checkpoint
