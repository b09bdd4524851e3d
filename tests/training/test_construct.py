"""The construction job's own rules: whose text is read, and problems of one rank that stop all."""

import argparse
from pathlib import Path

import pytest
import torch

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.construction import ConstructionSettings
from megatron_l0moe.experts.unit_choice import Calibration
from megatron_l0moe.runtime import cpu
from megatron_l0moe.training import calibration_pass, construct

SAMPLES = 5


class FakeDataset:
    """An index of five samples that remembers whether it was verified."""

    def __init__(self, path, *, vocab_size, seq_length, verify):
        assert (vocab_size, seq_length) == (64, 16)
        self.name, self.verified = path.name, verify

    def __len__(self):
        return SAMPLES


def settings(method, width=2):
    return ConstructionSettings(
        method=method, width=width, expert=1, num_experts=3, top_k=2, damping=0.01, shared=0.5, seed=1
    )


@pytest.fixture
def one_process():
    with cpu.one_process_group():
        yield


@pytest.fixture
def args(monkeypatch):
    monkeypatch.setattr(calibration_pass, "CurriculumDataset", FakeDataset)
    return argparse.Namespace(
        l0_data_index=str(Path("curate") / "expert_001"), padded_vocab_size=64, seq_length=16
    )


def test_a_method_reads_its_domain_and_clusters_read_all(one_process, args):
    def found(method, count):
        return [
            (data.name, index, data.verified)
            for data, index in calibration_pass.sequences(args, settings(method), count)
        ]

    assert found("obs", 2) == [("expert_001", 0, True), ("expert_001", 1, True)]
    assert found("coactivation", 4) == [
        ("expert_000", 0, False),
        ("expert_000", 1, False),
        ("expert_001", 0, True),
        ("expert_002", 0, False),
    ]


def test_more_text_than_there_is_is_refused(one_process, args):
    assert len(calibration_pass.sequences(args, settings("random"), SAMPLES)) == SAMPLES
    with pytest.raises(L0MoEError, match=r"holds 5 samples but calibration asks for 6; lower"):
        calibration_pass.sequences(args, settings("random"), SAMPLES + 1)


def test_problems_of_a_layer_end_the_job_with_its_sentence(one_process):
    numbers = Calibration(tokens=3, input_mean=torch.ones(4), activation_squares=torch.ones(6).double())
    fc2 = torch.ones(4, 6)

    def made(width):
        layers = iter([(1, numbers), (2, numbers)])
        return construct._construct(layers, settings("magnitude", width), lambda layer: fc2, solves=True)

    found = construct._gather(made(2))
    assert list(found) == [1, 2]
    assert found[2].units.tolist() == [0, 1]
    with pytest.raises(L0MoEError, match=r"model\.expert_ffn \(7\) must be between 1 and the 6 FFN channels"):
        made(7)


def test_jobs_that_cannot_work_are_refused():
    good = {
        "virtual_pipeline_model_parallel_size": None,
        "l0_stage": "expert",
        "pretrained_checkpoint": "convert/megatron",
        "l0_expert_file": "expert.safetensors",
    }
    construct._check(argparse.Namespace(**good))
    with pytest.raises(L0MoEError, match="remove virtual_pipeline"):
        construct._check(argparse.Namespace(**good | {"virtual_pipeline_model_parallel_size": 2}))
    for name, value in (("l0_stage", "dense"), ("pretrained_checkpoint", None), ("l0_expert_file", "")):
        with pytest.raises(L0MoEError, match="needs --l0-stage expert, --pretrained-checkpoint and"):
            construct._check(argparse.Namespace(**good | {name: value}))
