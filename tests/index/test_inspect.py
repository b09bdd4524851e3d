"""`l0moe inspect` on the result of a real, small curate stage: what it shows, and what it finds."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_l0moe import cli
from megatron_l0moe.curate.curate import curate
from megatron_l0moe.index.index import index_files
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.runs.stage_folder import StageFolder, finish, sealed, sha256_file, write_json

K, Q, S, P = 3, 3, 16, 2


def write_corpus(folder: Path, topic_text) -> None:
    """Some lines of it are bad."""
    lines = [
        json.dumps(
            {"text": topic_text(domain, seed, 40 + seed), "meta": {"source": domain, "language": "en"}}
        )
        for seed in range(20)
        for domain in ("cooking", "physics", "sailing")
    ]
    lines += ["broken", lines[0], json.dumps({"text": "----", "meta": {"source": "cooking"}})]
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.jsonl").write_text("\n".join(lines))


def recipe_of(corpus: Path, tiny_lm: Path, tiny_encoder: Path, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "seed": 11,
            "model": {"path": str(tiny_lm), "dense_layers": 1, "num_experts": K, "expert_ffn": 8},
            "data": {
                "corpus": str(corpus), "embedding_model": str(tiny_encoder), "embedding_max_tokens": 16,
                "iterations": Q, "seq_length": S, "tokens_per_expert": 8 * S, "tokens_per_set": K * P * S * 2,
                "include_initial_tokens": K * P * S, "heldout_tokens_per_domain": 2 * S, "max_quarantined": 0.1,
                "filters": {"languages": ["en"]}, **data,
            },
            "expert_training": {"global_batch_size": 4},
            "moe_training": {"sequences_per_domain": P},
        }
    )  # fmt: skip


def finish_curate(folder: Path, recipe: Recipe) -> Path:
    stage = StageFolder("curate", folder / "curate", "0" * 16)
    finish(stage, ["test"], curate(recipe, stage.folder))
    return stage.folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Path, tiny_encoder: Path, topic_text) -> Path:
    """A run folder with a corpus and a finished curate stage."""
    folder = tmp_path_factory.mktemp("run")
    write_corpus(folder, topic_text)
    finish_curate(folder, recipe_of(folder / "corpus", tiny_lm, tiny_encoder))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished / "curate", tmp_path / "run" / "curate")).parent


def inspect(*words: object) -> tuple[int, str, str]:
    words = ("inspect", *(str(word) for word in words))
    result = CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"})  # type: ignore[arg-type]
    return result.exit_code, result.stdout, result.stderr


def rows(output: str) -> list[list[str]]:
    """Return the cells of all tables."""
    lines = [line for line in output.splitlines() if line.startswith("\u2502")]
    return [[cell.strip() for cell in line.strip("\u2502").split("\u2502")] for line in lines]


def test_what_is_shown(finished: Path) -> None:
    code, out, err = inspect(finished, "--heads", 1)
    assert (code, err) == (0, "")
    summary = json.loads((finished / "curate" / "summary.json").read_text())
    cells = rows(out)
    order = summary["order"]
    uses = [row[1] for row in cells if row[1].startswith(("experts", "MoE"))]
    assert uses == ["experts", "MoE, place 1 (replay)", "MoE, place 2", "MoE, place 3"]
    assert [row[0] for row in cells if row[1].startswith("MoE, place")] == [
        "0",
        *(str(number) for number in order),
    ]
    assert "finished" in out
    assert "3 domains, 3 sets, sequences of 16 tokens" in out
    assert "clusters: kmeans; order of sets: ascending d_ds; global batches: balanced, " in out
    assert ["left out: not JSON", "1"] in cells
    assert ["left out: exact repetition", "1"] in cells
    assert ["left out: one repeated character", "1"] in cells
    assert ["in the corpus", "63"] in cells
    assert "quarantine.jsonl" in out
    heads = [row for row in cells if len(row) == 3 and row[0] in "012"]
    assert [row[0] for row in heads] == ["0", "1", "2"]
    text = (finished / "corpus" / "a.jsonl").read_text()
    assert all(row[2].split()[1] in text for row in heads)  # decoded with the recipe's tokenizer
    assert not any(row[2].replace(" ", "").isdigit() for row in heads)


def test_sets_that_are_gone_through_twice(
    finished: Path, tiny_lm: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = finish_curate(tmp_path, recipe_of(finished / "corpus", tiny_lm, tiny_encoder, set_passes=2))
    code, out, _ = inspect(folder, "--verify")
    assert code == 0
    order = json.loads((folder / "summary.json").read_text())["order"]
    sets = [row for row in rows(out) if row[1].startswith("MoE, place")]
    assert [row[0] for row in sets] == ["0", *map(str, order * 2)]
    assert sets[1][2:] == sets[1 + len(order)][2:]  # as many documents in each pass
    # control: another order in the list
    (folder / "manifest.json").unlink()
    (folder / "ccm.json").write_text(json.dumps({"order": order[::-1]}))
    assert "says the order" in inspect(folder, "--verify")[2]


def test_sample_heads_without_a_tokenizer(run: Path, tiny_lm: Path, tmp_path: Path) -> None:
    summary_file = run / "curate" / "summary.json"
    summary = json.loads(summary_file.read_text())
    summary_file.write_text(json.dumps({**summary, "model": str(tmp_path / "elsewhere")}))
    code, out, _ = inspect(run / "curate")
    assert code == 0
    assert "heads are shown as ids" in out
    assert all(row[2].replace(" ", "").isdigit() for row in rows(out) if len(row) == 3 and row[0] in "012")
    assert "heads are shown as ids" not in inspect(run, "--tokenizer", tiny_lm)[1]
    other = tmp_path / "tokenizer.json"
    other.write_text((tiny_lm / "tokenizer.json").read_text() + " ")
    code, out, err = inspect(run, "--tokenizer", other)
    assert (code, out) == (2, "")
    assert "tokenizer.json is not the tokenizer that" in err
    code, _, err = inspect(run, "--tokenizer", tmp_path / "none")
    assert code == 2
    assert "does not exist, so it is not what" in err


def test_verify(finished: Path) -> None:
    code, out, _ = inspect(finished, "--verify", "--heads", 0)
    assert code == 0
    shards = len(list(finished.glob("curate/iter_*/*.bin")))
    samples, batches = 3 * 8 + K * P + 2 * 2 * K * P, 3 * 2 + 5
    assert (
        f"verified: 4 indexes, checksums of {2 * 4 + 2 * shards} files (0.00 GB), {samples} records, {batches} global"
        in out
    )


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("iter_001/shard_00000.bin", "sha256 differs"),
        ("iter_000/shard_00000.idx", "sha256 differs"),
        ("moe.ccm.samples.npy", "sha256 differs"),
        ("expert_002.ccm.docs.npy", "sha256 differs"),
    ],
)
def test_damaged_files(run: Path, name: str, message: str) -> None:
    damage(run / "curate" / name)
    code, out, err = inspect(run, "--verify")
    assert (code, out) == (2, "")
    sentence = err.splitlines()[-1]
    assert name.split("/")[-1].split(".")[0] in sentence
    assert message in sentence


def rewrite(run: Path, **records: object) -> None:
    """Change record 7 of the MoE index, with a header that fits, and without the manifest that would show it."""
    (run / "curate" / "manifest.json").unlink(missing_ok=True)
    header_file, _, samples_file = index_files(run / "curate" / "moe")
    samples = np.load(samples_file)
    for field, value in records.items():
        samples[7][field] = value
    np.save(samples_file, samples)
    header = json.loads(header_file.read_text())
    del header["checksum"]
    write_json(header_file, sealed({**header, "samples_sha256": sha256_file(samples_file)}))


def test_records_that_checksums_do_not_show(run: Path) -> None:
    rewrite(run)
    assert inspect(run, "--verify")[0] == 0  # control: rewriting alone is no damage
    rewrite(run, offset=10**6)
    code, _, err = inspect(run, "--verify")
    assert code == 2
    assert "Record 7 of sample index" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ccm.json", {"order": [2, 2]}, r"says the order [2, 2]"),
        ("summary.json", [], "must hold a JSON object"),
        ("summary.json", "{", "is not valid JSON"),
    ],
    ids=["order", "list", "damaged"],
)
def test_lists_that_do_not_fit(run: Path, name: str, content: object, message: str) -> None:
    (run / "curate" / "manifest.json").unlink()
    (run / "curate" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    code, out, err = inspect(run, "--verify")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_other_folders(tmp_path: Path, run: Path) -> None:
    code, _, err = inspect(tmp_path)
    assert code == 2
    assert "is no curate folder (moe.ccm.json is not there or in curate/)" in err
    (run / "curate" / "DONE").unlink()
    assert "NOT finished" in inspect(run)[1]
    (run / "curate" / "heldout.jsonl").write_text("")
    code, _, err = inspect(run, "--verify")
    assert code == 2
    assert "heldout.jsonl has 0 bytes instead of" in err
    (run / "curate" / "expert_001.ccm.json").unlink()
    assert "expert_001.ccm.json does not exist" in inspect(run)[2]


@pytest.mark.parametrize("name", ["heldout.jsonl", "clusters.npz", "ccm.json", "summary.json"])
def test_a_flipped_bit_in_any_file_is_found(run: Path, name: str) -> None:
    """The size stays; ccm.json and summary.json get another digit, so that they are JSON still."""
    file = run / "curate" / name
    whole = file.read_bytes()
    place = max(whole.rfind(digit) for digit in (b"1", b"3", b"5", b"7"))
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
    code, out, err = inspect(run, "--verify")
    assert (code, out) == (2, "")
    assert f"{name} is not the file that was written (its sha256 differs)" in err.splitlines()[-1]
    file.write_bytes(whole)
    assert inspect(run, "--verify")[0] == 0  # control


@pytest.mark.parametrize("damage", [b"{", b"\xff", b"[]", b'{"outputs": 5}', b'{"outputs": {"a": "b"}}'])
def test_a_damaged_manifest_is_one_sentence(run: Path, damage: bytes) -> None:
    (run / "curate" / "manifest.json").write_bytes(damage)
    code, out, err = inspect(run, "--verify")
    assert (code, out) == (2, "")
    assert "curate/manifest.json" in err.splitlines()[-1]
    assert "Traceback" not in err
