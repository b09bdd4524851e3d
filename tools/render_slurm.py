"""Write the batch scripts of slurm/llama3_8b/ from examples/llama3_8b.yaml and slurm/clusters/plain.yaml."""

from pathlib import Path

from megatron_l0moe.chain.slurm import sbatch
from megatron_l0moe.chain.slurm.cluster import load_cluster
from megatron_l0moe.plan.plan import find_architecture
from megatron_l0moe.recipe.recipe import load_recipe
from megatron_l0moe.runs.stages import STAGE_NAMES, Run

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Path("examples/llama3_8b.yaml")


def texts() -> dict[str, str]:
    """Return the scripts by their paths below the repository's root."""
    run = Run(recipe=load_recipe(ROOT / RECIPE), recipe_file=RECIPE, runs_dir=Path("runs"))
    cluster = load_cluster(ROOT / "slurm" / "clusters" / "plain.yaml")
    architecture, _ = find_architecture(run.recipe.model.path)
    place = sbatch.Place(scripts=Path("slurm") / run.recipe.name, logs=run.folder / "slurm" / "logs")
    return {
        str(place.script(name)): sbatch.render(run, architecture, cluster, name, place)
        for name in STAGE_NAMES
    }


def main() -> None:
    """Write them."""
    for path, text in texts().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
