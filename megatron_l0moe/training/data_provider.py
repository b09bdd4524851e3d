"""The training data of a stage: the sample index, served to Megatron's own sampler."""

import argparse
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.dataset import CurriculumDataset
from megatron_l0moe.index.index import check_batching


def datasets_provider(
    args: argparse.Namespace, num_samples: list[int], vp_stage: int | None = None
) -> tuple[Any, None, None]:
    """Return the train set; perplexity is measured on the exported model, so there are no others.

    Without a train set Megatron trains no step. That is the answer to a job that was killed after its last
    checkpoint and before its end was noted: the sampler refuses to begin behind the last sample.

    Args:
        args: Megatron's.
        num_samples: of train, validation and test set.
        vp_stage: model chunk, which Megatron demands to name; all chunks read the same samples.

    Raises:
        L0MoEError: the index is too short for the steps, or its batches do not fit the job.
    """
    prefix = args.l0_data_index
    if not prefix:
        raise L0MoEError(
            "--l0-data-index is required: the prefix of the sample index made by `l0moe curate`."
        )
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return None, None, None
    if args.consumed_train_samples >= num_samples[0]:
        return None, None, None
    dataset = CurriculumDataset(
        Path(prefix),
        vocab_size=args.padded_vocab_size,
        seq_length=args.seq_length,
        verify=torch.distributed.get_rank() == 0,  # one rank reads the shards for their checksums
    )
    check_batching(
        dataset.header,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
    )
    if len(dataset) < num_samples[0]:
        raise L0MoEError(
            f"The index {prefix} holds {len(dataset)} samples but --train-iters {args.train_iters} x "
            f"--global-batch-size {args.global_batch_size} needs {num_samples[0]}; train fewer steps or curate more."
        )
    return dataset, None, None
