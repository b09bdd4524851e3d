"""A base model's tokenizer is tried with transformers, in a process of its own and without its code."""

import json

import pytest
from conversion.toy_checkpoints import save_tokenizer

from megatron_l0moe.conversion.companions import check_tokenizer, problem_of, tokenizer_files
from megatron_l0moe.errors import L0MoEError

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300}


def without_decoder(folder):
    """Texts can be encoded, but what comes back is full of signs for spaces."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "decoder": None}))


def own_code(folder):
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(folder.parent / 'RAN')!r}, 'w')\nclass Own: pass\n")


DAMAGE = {
    "empty": lambda folder: (folder / "tokenizer.json").write_bytes(b""),
    "an empty object": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "zeros": lambda folder: (folder / "tokenizer.json").write_bytes(bytes(1000)),
    "settings cut": lambda folder: (folder / "tokenizer_config.json").write_text('{"tok'),
    "no decoder": without_decoder,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(CONFIG))
    return save_tokenizer(tmp_path / "base")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_seen(folder, damage):
    assert problem_of(folder) == "ok"
    damage(folder)
    assert problem_of(folder) != "ok"


@pytest.mark.slow
def test_it_runs_apart_and_without_the_folders_code(folder):
    check_tokenizer(folder, tokenizer_files(folder), CONFIG)
    own_code(folder)
    with pytest.raises(L0MoEError, match=r"The tokenizer in .*base cannot be used \("):
        check_tokenizer(folder, [*tokenizer_files(folder), folder / "own.py"], CONFIG)
    assert not (folder.parent / "RAN").exists()
