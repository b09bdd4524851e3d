"""What each stage of the chain does, in a function of its name; each imports what it needs when it runs.

A function writes the stage's files into its folder and returns the numbers for its manifest. Around it,
`run_local.carry_out` begins the folder and writes manifest and marker.
"""

from collections.abc import Callable
from pathlib import Path

from megatron_l0moe.chain import run_local
from megatron_l0moe.chain.run_local import Numbers
from megatron_l0moe.runs.stage_folder import StageFolder, write_json
from megatron_l0moe.runs.stages import Run


def work_of(name: str) -> Callable[[Run, StageFolder], Numbers]:
    """Return the function of a stage of the chain."""
    work: Callable[[Run, StageFolder], Numbers] = globals()[name]
    return work


def convert(run: Run, stage: StageFolder) -> Numbers:
    """Turn the dense Hugging Face checkpoint into a Megatron checkpoint."""
    from megatron_l0moe.conversion.convert import convert_dense, weight_files
    from megatron_l0moe.runs import digests

    dense = Path(run.recipe.model.path)
    weights = weight_files(dense)
    for file in weights:
        digests.begin(file)  # beside the conversion, which reads them too
    return {**convert_dense(dense, stage.folder), "weights": [file.name for file in weights]}


def curate(run: Run, stage: StageFolder) -> Numbers:
    """Cluster the corpus and cut it into ordered sets."""
    from megatron_l0moe.curate.curate import curate as curate_corpus

    return curate_corpus(run.recipe, stage.folder)


def experts(run: Run, stage: StageFolder) -> Numbers:
    """Make one expert: train masks and cut them out, or choose the units without training."""
    if run.recipe.construction is not None:
        return run_local.construct_expert(run, stage)
    if not run_local.is_extracted(stage.folder):
        run_local.train_expert(run, stage)
    return after_training(run, stage)


def assemble(run: Run, stage: StageFolder) -> Numbers:
    """Put the experts and the start of the routers into one MoE checkpoint."""
    from megatron_l0moe.experts.merging import assemble as assemble_experts

    model = run.recipe.model
    files = [run.expert_folder(k) / "expert.safetensors" for k in range(model.num_experts)]
    dense = run.stage_folder("convert") / "megatron"
    router_init = run.recipe.moe_training.router_init
    return assemble_experts(
        dense, files, stage.folder, top_k=model.top_k, router_init=router_init, seed=run.recipe.seed
    )


def moe(run: Run, stage: StageFolder) -> Numbers:
    """Train experts and routers together, or the dense model as another method has it."""
    run_local.train_moe(run, stage)
    return after_training(run, stage)


def after_training(run: Run, stage: StageFolder) -> Numbers:
    """Do what is left of a stage that trains once its last step is saved."""
    if stage.name != "experts":
        return {"steps": run.recipe.moe_steps}

    def extract() -> Numbers:
        from megatron_l0moe.experts.extraction import extract_expert

        out = stage.folder / "expert.safetensors"
        return extract_expert(stage.folder / "checkpoints", out, width=run.recipe.model.expert_ffn)

    return run_local.extract_once(stage.folder, extract)


def export(run: Run, stage: StageFolder) -> Numbers:
    """Write the trained model as a Hugging Face checkpoint."""
    from megatron_l0moe.conversion.export import export_run

    return export_run(run.recipe, run.stage_folder("moe") / "checkpoints", stage.folder)


def evaluate(run: Run, stage: StageFolder) -> Numbers:
    """Measure benchmarks, parity with Megatron, perplexity and speed."""
    benchmarks: Numbers = {}
    if (section := run.recipe.evaluation.benchmarks) is not None:
        # Before this process takes memory; and a rerun goes on with the next task.
        from megatron_l0moe.evaluation.harness.benchmarks import run_in_chain

        benchmarks = run_in_chain(run.recipe, section, run.folder, stage.folder)
    logits = run_local.write_logits(run, stage)  # in a process of its own, which frees its memory
    from megatron_l0moe.evaluation.evaluate import evaluate as evaluate_models
    from megatron_l0moe.evaluation.evaluate import parity

    agreement = parity(logits, run.stage_folder("export"))
    write_json(stage.folder / "parity.json", agreement)
    logits.unlink()
    numbers = evaluate_models(run.recipe, run.folder, stage.folder)
    return {**benchmarks, **numbers, "parity": agreement}


def report(run: Run, stage: StageFolder) -> Numbers:
    """Write the HTML report and summary.json."""
    from megatron_l0moe.reports.page import report as write_report

    return write_report(run.recipe, run.folder, stage.folder)
