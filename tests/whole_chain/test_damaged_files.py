"""Every file of a finished run, damaged in every way: the next stage refuses it with its name, or does not read it.

What a stage reads is compared by `carry_out` around the stage's own work, and the token files by the dataset of the
training jobs; both are called here as the commands call them, but for the work itself, which must not be reached.
"""

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_l0moe import cli
from megatron_l0moe.chain import provenance
from megatron_l0moe.chain.run_local import carry_out
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.dataset import CurriculumDataset
from megatron_l0moe.recipe.recipe import load_recipe
from megatron_l0moe.runs.stage_folder import StageFolder, read_manifest
from megatron_l0moe.runs.stages import STAGE_NAMES, Run

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "survival.md"
NEXT = ("experts", "assemble", "moe", "export", "evaluate", "report")
ARTEFACTS = {
    "dense model: config.json, generation_config.json, tokenizer": ("model/*.json",),
    "dense model: weights": ("model/*.safetensors",),
    "convert: the Megatron checkpoint": ("toy/convert/megatron/*",),
    "curate: headers of the indexes": ("toy/curate/*.ccm.json",),
    "curate: documents and samples of the indexes, token files": (
        "toy/curate/*.npy",
        "toy/curate/*.bin",
        "toy/curate/*.idx",
    ),
    "curate: heldout.jsonl": ("toy/curate/heldout.jsonl",),
    "curate: ccm.json, summary.json": ("toy/curate/ccm.json", "toy/curate/summary.json"),
    "an expert: expert.safetensors": ("toy/experts/*/expert.safetensors",),
    "experts, moe: metrics.jsonl": ("toy/experts/*/metrics.jsonl", "toy/moe/metrics.jsonl"),
    "assemble: the Megatron checkpoint": ("toy/assemble/megatron/*",),
    "moe: the last checkpoint, latest_checkpointed_iteration.txt": (
        "toy/moe/checkpoints/iter_0000008/*",
        "toy/moe/checkpoints/latest*",
    ),
    "moe: earlier checkpoints": ("toy/moe/checkpoints/iter_0000003/*", "toy/moe/checkpoints/iter_0000006/*"),
    "export: config.json": ("toy/export/config.json",),
    "export: weights, tokenizer, generation_config.json": (
        "toy/export/*.safetensors",
        "toy/export/tokenizer*",
        "toy/export/generation_config.json",
    ),
    "evaluate: perplexity, speed, parity, router_load": ("toy/evaluate/*.json",),
    "manifest.json and DONE of the stages that are read": ("*/manifest.json", "*/DONE"),
    "logs, records, clusters.npz, the model card, extraction.json": ("*",),
}
"""The first row whose pattern fits a file is its row."""
NOT_READ = ("moe: earlier checkpoints", "logs, records, clusters.npz, the model card, extraction.json")
LEFT_OUT = ("toy/recipe.json", "toy/summary.json", "toy/logs/*", "toy/.lock*", "toy/report/*")
"""No artefact of a stage that another reads."""


class ReachedError(Exception):
    """The stage began to compute."""


def flipped(content: bytes) -> bytes:
    """Change one bit in the middle, of a digit where there is one, so that JSON stays JSON."""
    digits = [
        place for place in range(len(content) // 2, len(content)) if content[place : place + 1].isdigit()
    ]
    place = digits[0] if digits else len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "a bit flipped": lambda own, other: flipped(own),
    "cut to half": lambda own, other: own[: len(own) // 2],
    "zeros": lambda own, other: bytes(len(own)),
    "exchanged": lambda own, other: other,
}


def row_of(name: str) -> str:
    return next(row for row, patterns in ARTEFACTS.items() if any(fnmatch.fnmatch(name, p) for p in patterns))


def another(file: Path, files: list[Path]) -> bytes:
    """Return the content of the most similar other file: the same name elsewhere, or else the next in the folder."""
    same = [other for other in files if other.name == file.name and other.read_bytes() != file.read_bytes()]
    near = [other for other in files if other.parent == file.parent and other != file]
    return (same or near or [Path(__file__)])[0].read_bytes()


@pytest.fixture
def run(recipe: Path, straight: Path, tmp_path: Path) -> Run:
    """A copy of the run; the dense model stays where the manifests say that it is."""
    shutil.copytree(straight, tmp_path / "toy")
    return Run(recipe=load_recipe(recipe), recipe_file=recipe, runs_dir=tmp_path)


def work_of(run: Run, name: str) -> Callable[[StageFolder], dict[str, object]]:
    """Return what a stage does first with its files, then says that it began to compute."""

    def work(stage: StageFolder) -> dict[str, object]:
        if name in ("experts", "moe"):
            index = f"expert_{stage.folder.name}" if name == "experts" else "moe"
            CurriculumDataset(run.stage_folder("curate") / index)
        raise ReachedError

    return work


def outcome(run: Run, name: str, said: Path) -> bool:
    """Carry out a stage; whether it refused, which it must do by naming the damaged file."""
    for later in STAGE_NAMES[STAGE_NAMES.index(name) :]:
        shutil.rmtree(run.stage_folder(later), ignore_errors=True)
    for k in range(2) if name == "experts" else (None,):
        with pytest.raises((ReachedError, L0MoEError)) as ended:
            carry_out(run, name, work_of(run, name), only=k)
        if ended.type is not ReachedError:
            sentence = str(ended.value)
            assert "\n" not in sentence
            # a marker or manifest by its folder, a token file by its prefix in the index
            name_said = said.parent.name if said.name in ("DONE", "manifest.json") else said.name
            assert name_said.removesuffix(".bin").removesuffix(".idx") in sentence, (name, said, sentence)
            return True
    return False


def artefacts(run: Run, name: str) -> list[tuple[Path, str]]:
    """Return the files that lie there before a stage, with their names in the table."""
    later = [run.stage_folder(stage) for stage in STAGE_NAMES[STAGE_NAMES.index(name) :]]
    found = []
    for file in sorted(run.folder.rglob("*")):
        relative = file.relative_to(run.runs_dir).as_posix()
        known = any(fnmatch.fnmatch(relative, pattern) for pattern in LEFT_OUT)
        if file.is_file() and not known and not any(folder in file.parents for folder in later):
            found.append((file, relative))
    return found + [(file, f"model/{file.name}") for file in sorted(Path(run.recipe.model.path).iterdir())]


def test_every_artefact(run: Run, straight: Path) -> None:
    """Fill the table of docs/survival.md: which stages refuse a file of each row, by damage."""
    refused: dict[tuple[str, str], set[str]] = {}
    for name in NEXT:
        shutil.rmtree(run.folder)
        shutil.copytree(straight, run.folder)
        assert not outcome(run, name, run.folder)  # control: nothing is damaged
        listed = artefacts(run, name)
        for file, relative in listed:
            whole, other = file.read_bytes(), another(file, [one for one, _ in listed])
            for damage, change in list(DAMAGES.items())[: 1 if row_of(relative) == NOT_READ[-1] else None]:
                content = change(whole, other)
                if content == whole:
                    continue
                file.write_bytes(content)
                try:
                    stages = refused.setdefault((relative, damage), set())
                    stages |= {name} if outcome(run, name, file) else set()
                finally:
                    file.write_bytes(whole)
    unread = {relative for (relative, _), stages in refused.items() if not stages}
    assert {row_of(relative) for relative in unread} == set(NOT_READ)
    assert rendered(refused) in PAGE.read_text(encoding="utf-8"), rendered(refused)


def rendered(refused: dict[tuple[str, str], set[str]]) -> str:
    lines = ["| file | " + " | ".join(DAMAGES) + " |", "|---" * (1 + len(DAMAGES)) + "|"]
    for row in ARTEFACTS:
        if row in NOT_READ:
            lines.append(f"| {row} |" + " not read |" * len(DAMAGES))
            continue
        cells = []
        for damage in DAMAGES:
            found = [
                stages for (name, how), stages in refused.items() if (row_of(name), how) == (row, damage)
            ]
            cells.append(", ".join(name for name in NEXT if any(name in stages for stages in found)))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def l0moe(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, list(words))
    return result.exit_code, result.stdout, result.stderr


def test_verify_says_what_is_wrong_file_by_file(run: Run) -> None:
    code, out, err = l0moe("verify", "toy", "--runs-dir", str(run.runs_dir))
    assert (code, err) == (0, "")
    assert out.count("yes") == 10  # 7 stages, 2 experts, the dense model
    files = [
        run.expert_folder(1) / "expert.safetensors",
        run.folder / "summary.json",
        Path(run.recipe.model.path) / "model.safetensors",
        run.stage_folder("moe") / "checkpoints" / "iter_0000003" / "__0_0.distcp",
    ]
    kept = [file.read_bytes() for file in files]
    try:
        for file, content in zip(files[:3], kept, strict=False):
            file.write_bytes(flipped(content))
        files[3].write_bytes(flipped(kept[3]))  # of no step that is used: only its size is known
        code, out, err = l0moe("verify", str(run.folder))
        assert code == 1
        assert out.count("1 WRONG") == 3
        assert len(err.splitlines()) == 3
        for file in files[:3]:
            assert str(file.resolve()) in str(
                Path(err.splitlines()[files.index(file)].split(" is not")[0]).resolve()
            )
        files[3].write_bytes(kept[3][:-1])
        assert "iter_0000003/__0_0.distcp has" in l0moe("verify", str(run.folder))[2]
    finally:
        for file, content in zip(files, kept, strict=True):
            file.write_bytes(content)


def test_verify_needs_a_run(tmp_path: Path) -> None:
    code, _, err = l0moe("verify", "toi", "--runs-dir", str(tmp_path))
    assert code == 2
    assert err.startswith("There is no run 'toi'")


def test_the_commands_refuse_and_no_verify_goes_on(run: Run) -> None:
    """Two experts exchanged: both files are sound, so without the comparison the chain goes on with them."""
    one, two = (run.expert_folder(k) / "expert.safetensors" for k in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    sound = read_manifest(run.stage_folder("assemble"))["sha256"]["megatron/release/__0_0.distcp"]
    for name in ("assemble", "moe", "export", "evaluate", "report"):
        shutil.rmtree(run.stage_folder(name))
    words = ("assemble", str(run.recipe_file), "--runs-dir", str(run.runs_dir))
    code, _, err = l0moe(*words)
    assert code == 2
    assert "experts/000/expert.safetensors is not the file that was written (its sha256 differs)" in err
    assert "or use --no-verify." in err
    assert not (run.stage_folder("assemble") / "DONE").exists()
    code, _, err = l0moe(*words, "--no-verify")
    assert code == 0, err
    manifest = read_manifest(run.stage_folder("assemble"))
    assert manifest["command"][-1] == "--no-verify"
    assert manifest["sha256"]["megatron/release/__0_0.distcp"] != sound  # other numbers without a word


def test_a_run_from_before_sha256_is_compared_by_size(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for name in STAGE_NAMES[2:]:
        shutil.rmtree(run.stage_folder(name))
    for name in ("convert", "curate"):
        file = run.stage_folder(name) / "manifest.json"
        older = read_manifest(file.parent)
        del older["sha256"], older["model"]
        file.write_text(json.dumps(older))
    caplog.set_level("INFO", "megatron_l0moe")
    provenance._TOLD.clear()
    shard = run.stage_folder("convert") / "megatron" / "release" / "__0_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(flipped(whole))
    assert not outcome(run, "experts", shard)
    assert caplog.text.count("Compared by size only") == 1
    shard.write_bytes(whole[:-1])
    assert outcome(run, "experts", shard)
