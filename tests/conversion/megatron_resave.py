"""Load checkpoints into Megatron models of a parallel layout and save them again; one of the processes of a world.

Usage: python megatron_resave.py RANK WORLD STORE JOBS.json, where JOBS.json lists {"checkpoint", "out", "sizes"}.
"""

import json
import sys
from pathlib import Path

from conversion.megatron_logits import build  # patches torch for the CPU

import torch  # isort: skip
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.safe_globals import register_safe_globals
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def resave(job):
    sizes = {"tensor": 1, "pipeline": 1, "expert": 1, **job["sizes"]}
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes["tensor"],
        pipeline_model_parallel_size=sizes["pipeline"],
        expert_model_parallel_size=sizes["expert"],
        expert_tensor_parallel_size=1 if sizes["expert"] > 1 else sizes["tensor"],
    )
    model_parallel_cuda_manual_seed(1)
    common = dist_checkpointing.load_common_state_dict(job["checkpoint"])
    parallel = {
        "tensor_model_parallel_size": sizes["tensor"],
        "sequence_parallel": sizes["tensor"] > 1,
    }
    if common["l0moe"]["stage"] == "moe":
        parallel |= {
            "expert_model_parallel_size": sizes["expert"],
            "expert_tensor_parallel_size": 1 if sizes["expert"] > 1 else sizes["tensor"],
        }
    if sizes["pipeline"] > 1:
        parallel |= {
            "pipeline_model_parallel_size": sizes["pipeline"],
            "pipeline_dtype": torch.float32,
            "num_layers_in_first_pipeline_stage": common["args"].num_layers - 1,
            "num_layers_in_last_pipeline_stage": 1,
        }
    model = build(common["args"], common["l0moe"], parallel)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    wanted = {"model": model.sharded_state_dict(metadata=metadata)}
    state, _, lacking = dist_checkpointing.load(wanted, job["checkpoint"], strict=StrictHandling.RETURN_ALL)
    assert not {key for key in lacking if ".router.expert_load." not in key}, lacking
    model.load_state_dict(state["model"], strict=False)
    if torch.distributed.get_rank() == 0:
        Path(job["out"]).mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save({**common, "model": model.sharded_state_dict(metadata=metadata)}, job["out"])


def main():
    rank, world, store, jobs = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    register_safe_globals()
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for job in json.loads(Path(jobs).read_text(encoding="utf-8")):
        resave(job)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
