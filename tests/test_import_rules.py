"""The structure of the package, read from its source: who may import what; its shape is tested by test_house.py."""

import ast
import re
import sys
from pathlib import Path

import pytest
from house import PACKAGE, imports, within

ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = set(imports(ast.parse(text)))
    if not relative(path).startswith(("training/", "runtime/")):
        assert not [name for name in names if within(name, "megatron.training")]
    assert path.stem not in {"utils", "helpers", "misc", "common"}
    assert text.isascii()


def test_rules_can_fail() -> None:
    tree = ast.parse("def f():\n    from megatron.training import pretrain\n    import torch.nn")
    assert {"megatron.training", "torch.nn"} <= set(imports(tree))
    assert within("torch.nn", "torch")
    assert not within("torchvision", "torch")


def test_files_take_their_place_in_one_way() -> None:
    """`stage_folder.whole` renames a file that is written whole; the two others publish folders of weights."""
    owners = [relative(path) for path in FILES if "os.replace" in path.read_text(encoding="utf-8")]
    assert owners == ["checkpoints/safetensors_files.py", "checkpoints/torch_dist.py", "runs/stage_folder.py"]


def test_third_party_imports_are_declared() -> None:
    """What the package imports at run time is in pyproject.toml, and what is declared is used."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("dependencies = [", 1)[1].split("]\n", 1)[0]
    declared = {re.split(r"[=<>\[]", name)[0].lower() for name in re.findall(r'^\s*"([^"]+)"', block, re.M)}
    distributions = {
        "yaml": "pyyaml",
        "megatron": "megatron-core",
        "FlagEmbedding": "flagembedding",
        "huggingface_hub": "huggingface-hub",
        "pynvml": "nvidia-ml-py",
    }
    # vllm is imported by a program of its own, in the serving environment.
    optional = {"faiss", "transformer_engine", "apex", "lm_eval", "ray", "vllm", "megatron_l0moe"}
    roots = {
        name.split(".")[0] for path in FILES for name in imports(ast.parse(path.read_text(encoding="utf-8")))
    }
    needed = {
        distributions.get(root, root).lower() for root in roots - optional - set(sys.stdlib_module_names)
    }
    assert needed - declared == set()


def test_no_private_places_or_hosts() -> None:
    """No paths of the machine that this was written on and no addresses in what decides an installation."""
    for name in (
        *("constraints.txt", "constraints-serve.txt", "pyproject.toml", "Makefile", ".ci/run"),
        *("scripts/setup.sh", "scripts/setup_serve.sh"),
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|file:|/(home|root|Users)/|@ ", text), name
