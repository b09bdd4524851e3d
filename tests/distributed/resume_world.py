"""A toy model's flags, data, launches and checkpoints for the tests of resuming."""

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import torchrun

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader

LAYERS, DENSE, HIDDEN, FFN, EXPERTS, EXPERT_FFN, VOCAB, SEQUENCE, BATCH = 4, 2, 16, 32, 4, 16, 64, 8, 4
STEPS, SAVE_EVERY = 10, 2
PROGRAM = Path(__file__).with_name("resume_runs.py")

MODEL = [
    "--num-layers", str(LAYERS), "--hidden-size", str(HIDDEN), "--ffn-hidden-size", str(FFN),
    "--num-attention-heads", "4", "--group-query-attention", "--num-query-groups", "2", "--kv-channels", "4",
    "--max-position-embeddings", str(SEQUENCE), "--position-embedding-type", "rope", "--normalization", "RMSNorm",
    "--swiglu", "--disable-bias-linear", "--attention-dropout", "0", "--hidden-dropout", "0",
    "--init-method-std", "0.1", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB - 1),
    "--make-vocab-size-divisible-by", "32", "--seq-length", str(SEQUENCE),
]  # fmt: skip
TRAINING = [
    "--micro-batch-size", "1", "--global-batch-size", str(BATCH), "--train-iters", str(STEPS),
    "--eval-iters", "0", "--eval-interval", str(STEPS), "--num-workers", "0", "--log-interval", "1",
    "--lr", "1e-2", "--min-lr", "0", "--lr-decay-style", "WSD", "--lr-wsd-decay-style", "cosine",
    "--lr-wsd-decay-iters", "2", "--lr-warmup-iters", "1", "--weight-decay", "0.1", "--clip-grad", "1.0",
    "--ckpt-format", "torch_dist", "--save-interval", str(SAVE_EVERY),
]  # fmt: skip
STAGES = {
    "expert": [
        "--l0-stage", "expert", "--l0-dense-layers", str(DENSE), "--l0-expert-ffn", str(EXPERT_FFN),
        "--l0-retention-control", "lagrangian",  # its lambdas are more to restore
        "--l0-open-steps", "1", "--l0-freeze-fraction", "0.25", "--l0-log-alpha-init", "0.5",
    ],
    "moe": [
        "--l0-stage", "moe", "--l0-dense-layers", str(DENSE), "--l0-expert-ffn", str(EXPERT_FFN),
        "--num-experts", str(EXPERTS), "--moe-ffn-hidden-size", str(EXPERT_FFN), "--moe-router-topk", "2",
        "--moe-layer-freq", f"([0]*{DENSE}+[1]*{LAYERS - DENSE})", "--moe-router-dtype", "fp32",
        "--moe-router-load-balancing-type", "none", "--moe-aux-loss-coeff", "0.01", "--moe-z-loss-coeff", "0.003",
        "--l0-router-lr", "3e-2",
    ],
}  # fmt: skip
PRECISIONS = {"fp32": [], "bf16": ["--bf16"]}
OPTIMIZERS = {
    "plain": [],
    "distributed": ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"],
}


@dataclass(frozen=True)
class Case:
    """What of a run does not change over its life."""

    stage: str
    precision: str
    optimizer: str

    @property
    def name(self) -> str:
        return f"{self.stage}_{self.precision}_{self.optimizer}"

    @property
    def flags(self) -> list[str]:
        return [*STAGES[self.stage], *PRECISIONS[self.precision], *OPTIMIZERS[self.optimizer]]


def layout(tp: int = 1, pp: int = 1, ep: int = 1, etp: int | None = None) -> list[str]:
    """Return the flags of a parallel layout."""
    flags = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    flags += ["--sequence-parallel"] if tp > 1 else []
    flags += ["--expert-model-parallel-size", str(ep)] if ep > 1 else []
    return flags + (["--expert-tensor-parallel-size", str(etp)] if etp else [])


def run(
    case: Case, folder: Path, index: Path, parallel: list[str], *more: str, stop: int = 0, broken: str = ""
) -> dict[str, Any]:
    """Return one run of a plan: it goes on from the checkpoints in `folder`, if there are any."""
    ends = ["--exit-interval", str(stop)] if stop else []
    files = ["--load", str(folder), "--save", str(folder), "--l0-metrics-file", str(folder / "metrics.jsonl")]
    argv = [
        *MODEL,
        *TRAINING,
        *case.flags,
        *parallel,
        *files,
        *ends,
        "--l0-data-index",
        str(index / case.stage),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    return {"argv": [*argv, *more], "broken": broken, "label": f"{folder.name} {' '.join(parallel)}"}


def launch(processes: int, plan: list[dict[str, Any]], log: Path, program: Path = PROGRAM) -> None:
    """Do the runs of a plan in one set of processes; output to a file, which a killed rank's child may hold open."""
    file = log.with_suffix(".json")
    file.write_text(json.dumps(plan), encoding="utf-8")
    torchrun(processes, program, file, log=log)


def write_indexes(folder: Path) -> Path:
    """Write the sample indexes `expert` (one domain) and `moe` (K domains) with samples for all steps."""
    from curated import describe_shard
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_l0moe.index.index import DOC, ClusterBlock, IterationBlock, write_index

    rng = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, domains in (("expert", 1), ("moe", EXPERTS)):
        rounds = STEPS * BATCH // domains
        prefix = folder / f"{kind}_shard"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        clusters, written = [], 0
        for domain in range(domains):
            lengths = [int(n) for n in rng.integers(5, 3 * SEQUENCE, 2 * rounds)]
            assert sum(lengths) > rounds * SEQUENCE
            for length in lengths:
                words = np.cumsum(rng.integers(1, 4, length)) + 16 * domain
                builder.add_document(torch.tensor(words % (VOCAB - 1)), [length])
            places = np.array([(0, written + i) for i in range(len(lengths))], dtype=DOC)
            clusters.append(ClusterBlock(domain, places, np.array(lengths)))
            written += len(lengths)
        builder.finalize(f"{prefix}.idx")
        block = IterationBlock(1, [describe_shard(prefix, folder)], clusters, rounds)
        write_index(
            folder / kind, [block], kind=kind, num_domains=domains, iterations=2, seq_length=SEQUENCE, d_ds=[0.1],
            sequences_per_domain=BATCH // domains, rotate=True, tokenizer_sha256="t", vocab_size=VOCAB - 1, eod=0,
        )  # fmt: skip
    return folder


def stopped(source: Path, iteration: int, target: Path) -> Path:
    """Make a folder that looks as `source` did right after the save at `iteration`."""
    name = f"iter_{iteration:07d}"
    shutil.copytree(source / name, target / name)
    (target / "latest_checkpointed_iteration.txt").write_text(str(iteration), encoding="utf-8")
    lines = (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[:iteration]), encoding="utf-8")
    return target


def losses(folder: Path) -> list[float]:
    """Return the logged loss of every step so far, in order."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    records = [json.loads(line) for line in lines]
    assert [record["iteration"] for record in records] == list(range(1, len(records) + 1))
    return [record["lm_loss"] for record in records]


def opened(folder: Path, iteration: int = STEPS) -> CheckpointReader:
    return CheckpointReader(folder / f"iter_{iteration:07d}")


def differences(one: CheckpointReader, two: CheckpointReader) -> dict[str, float]:
    """Return the largest absolute difference of every tensor, those of the optimizer too."""
    assert one.shapes == two.shapes
    return {
        name: float((one.read(name).double() - two.read(name).double()).abs().max()) for name in one.shapes
    }


def position(reader: CheckpointReader) -> dict[str, Any]:
    """Return what is no tensor and must be the same in every layout: steps, samples, schedule, our settings."""
    common = reader.common
    return {
        "iteration": common["iteration"],
        "samples": common["args"].consumed_train_samples,
        "schedule": common["opt_param_scheduler"],
        "settings": common["l0moe"],
        "steps": _steps(common["optimizer"]),
    }


STARTS_COUNT_IN = ("torch_rng_state", "cuda_rng_state")
"""Torch's default generator: each start of a job makes a DataLoader, which draws its workers' base seed from it.

Without CUDA both names stand for it. Nothing else in a stage draws from it: no dropout, and gates key their own noise.
"""


def random_states(reader: CheckpointReader) -> Any:
    """Return the states of the random number generators that a stage may draw from, as plain values."""
    states = {}
    for index, info in reader._metadata.storage_data.items():
        if index.fqn.startswith("rng_state"):
            with (reader.path / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                content = torch.load(io.BytesIO(file.read(info.length)), weights_only=False)
            states[index.fqn] = [
                [{name: state for name, state in one.items() if name not in STARTS_COUNT_IN} for one in row]
                for row in _plain(content)
            ]
    assert states
    return states


def _steps(optimizer: Any) -> set[float]:
    """Return Adam's steps wherever they stand: `common_step` of plain optimizers, `step` of parameter groups."""
    if isinstance(optimizer, dict):
        here = [float(optimizer[key]) for key in ("common_step", "step") if optimizer.get(key) is not None]
        return set(here).union(*(_steps(value) for value in optimizer.values()))
    return set().union(*(_steps(value) for value in optimizer)) if isinstance(optimizer, list) else set()


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
