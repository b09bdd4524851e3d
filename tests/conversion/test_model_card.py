"""What lies beside the weights: tokenizer, generation config, licence, and a card that says where the model is from."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
import yaml
from conversion.toy_checkpoints import FFN, save_tokenizer
from conversion.toy_moe import WIDTH, export, make_moe
from toy_recipe import write_recipe

from megatron_l0moe.conversion.export import export_dense
from megatron_l0moe.conversion.model_card import CardFacts, recipe_facts, rewrite_card, summary_facts
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import load_recipe

SCRIPTS = Path(__file__).parents[2] / "checkpoints_conversion"
BASE_CARD = "---\nlicense: other\nlicense_name: toy-licence\nlanguage: [en]\n---\n# Toy\n"


LICENCES = ("LICENSE.txt", "NOTICE")
TEXTS = ("tokenizer.model", "tokenizer.model.v3", "additional_chat_templates/tool_use.jinja")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_moe(tmp_path)
    base = tmp_path / "hf"
    (base / "README.md").write_text(BASE_CARD)
    for name in (*LICENCES, "secret.txt"):
        (base / name).write_text(name)
    return tmp_path


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_tokenizer_and_licence_are_copied_and_nothing_else(folder):
    base = save_tokenizer(folder / "hf")
    (base / "generation_config.json").unlink(missing_ok=True)
    (base / "additional_chat_templates").mkdir()
    for name in (*TEXTS, "additional_chat_templates/notes.txt"):
        (base / name).write_text(name)
    export(folder)
    out = folder / "export"
    for name in (*TEXTS, *LICENCES):
        assert (out / name).read_text() == name
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == {
        *("config.json", "model.safetensors", "generation_config.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", *TEXTS, *LICENCES),
    }


@pytest.mark.slow
def test_a_sentencepiece_tokenizer_encodes_as_that_of_the_base(folder):
    base, out = save_tokenizer(folder / "hf"), folder / "dense_back"
    text = ["a mixture of experts", "the experts of a layer", "one layer after the other"] * 20
    with (base / "tokenizer.model").open("wb") as file:
        settings = {"vocab_size": 24, "byte_fallback": False, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=file, **settings)
    export(folder)
    export_dense(folder / "convert/megatron", base, out)
    wanted = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model")).encode(text[0])
    assert len(wanted) > 3
    for copy in (folder / "export", out):
        got = sentencepiece.SentencePieceProcessor(model_file=str(copy / "tokenizer.model")).encode(text[0])
        assert got == wanted


def test_the_generation_config_is_the_bases_or_says_where_text_ends(folder):
    base = folder / "hf"
    (base / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": [7, 9], "pad_token_id": None}))
    export(folder)
    written = json.loads((folder / "export/generation_config.json").read_text())
    assert written["eos_token_id"] == [7, 9]
    assert "pad_token_id" not in written
    (base / "generation_config.json").write_text('{"temperature": 0.6}')
    export(folder, "second")
    assert (folder / "second/generation_config.json").read_text() == '{"temperature": 0.6}'


def test_the_card_says_base_licence_sizes_engines_recipe_and_tokens(folder):
    export(folder, card=CardFacts(base_name="org/toy", recipe="name: toy", tokens={"MoE": 12345}))
    card = (folder / "export/README.md").read_text()
    assert front_matter(card) == {
        "license": "other",
        "license_name": "toy-licence",
        "base_model": "org/toy",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    for text in (
        f"each expert holds {WIDTH} of the {FFN} units",
        "| experts of a layer | 4, 2 for each token |",
        "| layers | 3, the bottom 1 of them dense |",
        "`Ernie4_5_MoeForCausalLM`, without code of its own, for transformers, vllm, sglang",
        "```yaml\nname: toy\n```",
        "| MoE | 12,345 |",
        "Nothing was given to the export.",
        "toy-licence. See LICENSE.txt, NOTICE.",
        f"| parameters | {parameters(folder / 'export'):,} |",
    ):
        assert text in card, text


def parameters(export: Path) -> int:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export)
    return sum(w.numel() for name, w in model.named_parameters() if "e_score_correction_bias" not in name)


@pytest.mark.parametrize(
    "text", ["# no front matter\n", "---\n: [\n---\n", "---\n- a list\n---\n", "---\nday: 2026-13-45\n---\n"]
)
def test_a_base_without_a_licence_is_said_so(folder, text):
    (folder / "hf/README.md").write_text(text)
    export(folder)
    card = (folder / "export/README.md").read_text()
    assert "license" not in front_matter(card)
    assert "its checkpoint does not name it. See LICENSE.txt" in card


def summary(folder: Path) -> Path:
    values = {
        "recipe": load_recipe(write_recipe(folder)).model_dump(mode="json"),
        "perplexity": {"dense": {"overall": 12.5}, "l0moe": {"overall": 13.25}},
        "speed": {"prefill_ratio": 1.875, "decode_b1_ratio": 1.25, "decode_b8_ratio": 0.9},
        "parity": {"megatron_vs_hf_max_abs": 1.5e-5},
    }
    file = folder / "summary.json"
    file.write_text(json.dumps(values))
    return file


def test_measured_numbers_come_in_when_they_are_known(folder):
    export(folder)
    rewrite_card(folder / "export", folder / "hf", summary_facts(summary(folder)))
    card = (folder / "export/README.md").read_text()
    for text in (
        "dense | 12.500 |",
        "L0-MoE | 13.250 |",
        "prefill | 1.88 times |",
        "| 1.5e-05 |",
        "name: toy",
    ):
        assert text in card, text
    with pytest.raises(L0MoEError, match="LlamaForCausalLM, not an L0-MoE"):
        rewrite_card(folder / "hf", folder / "hf", CardFacts())


def test_another_file_is_no_summary(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(L0MoEError, match=r"is not the summary\.json of a finished run"):
        summary_facts(tmp_path / "summary.json")
    with pytest.raises(L0MoEError, match=r"is not the summary\.json of a finished run"):
        summary_facts(tmp_path / "gone.json")


def test_tokens_are_those_of_whole_steps(tmp_path):
    facts = recipe_facts(load_recipe(write_recipe(tmp_path)))
    # 640 tokens in steps of 2 x 32; two sets of 1280 tokens in steps of 4 x 32
    assert facts.tokens == {"experts, 4 runs together": 4 * 640, "MoE": 2 * 1280}


def command(name: str, *words: object) -> int:
    """Run a script of checkpoints_conversion/ in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return int(end.value.code or 0)


def test_the_commands_write_and_rewrite(folder, capsys):
    facts = ["--base", folder / "hf", "--summary", summary(folder)]
    moe = ["--dense-layers", "1", "--target", "vllm", "--out", folder / "export"]
    assert command("megatron_to_hf.py", folder / "assemble/megatron", *moe, *facts) == 0
    written = json.loads(capsys.readouterr().out)["folders"]
    assert written == {".": {"form": "ernie4_5_moe", "engines": ["vllm"]}}
    (folder / "export/README.md").unlink()
    assert command("model_card.py", folder / "export", *facts, "--base-name", "org/toy") == 0
    assert "base_model: org/toy" in (folder / "export/README.md").read_text()
    capsys.readouterr()
    assert command("hf_to_megatron.py", folder / "export", "--out", folder / "again") == 0
    assert json.loads(capsys.readouterr().out)["num_experts"] == 4
    shutil.rmtree(folder / "export")
    assert command("model_card.py", folder / "export", *facts) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_card_tells_nothing_of_the_machines(tmp_path):
    """Folders by their own names, no password, and nothing of the cluster that curate ran on."""
    executor = {"kind": "slurm", "slurm": {"partition": "p", "environment": "source /home/me/secret.sh"}}
    recipe = load_recipe(
        write_recipe(
            tmp_path,
            model__path="/home/me/models/llama",
            data__corpus="s3://key:hunter2@bucket/text/v1",
            data__embedding_model="BAAI/bge-m3",
            data__executor=executor,
            moe_training={
                "flags": {"tensorboard-dir": "../me/boards", "data-cache-path": "a:/home/me/b,~/c/d"}
            },
        )
    )
    text = recipe_facts(recipe).recipe
    for word in ("/home", "hunter2", "me/", "secret", "partition", "~"):
        assert word not in text, word
    raw = yaml.safe_load(text)
    assert raw["model"]["path"] == "llama"
    assert raw["data"]["corpus"] == "s3://bucket/text/v1"
    assert raw["data"]["embedding_model"] == "BAAI/bge-m3"
    assert raw["moe_training"]["flags"] == {"tensorboard-dir": "boards", "data-cache-path": "a:b,d"}
    assert raw["seed"] == recipe.seed
