"""Every family there and back, dense and as L0-MoE: same bytes, and real Megatron models with transformers' logits.

docs/convert.md holds the result as tables; after a wanted change: L0MOE_UPDATE_GOLDEN=1 pytest FILE.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conversion.in_megatron import megatron_logits
from conversion.toy_checkpoints import MODELS, VOCAB, WINDOW
from conversion.toy_moe import assert_same_checkpoint, export, make_moe, rewrite_megatron
from transformers import AutoModelForCausalLM

from megatron_l0moe.checkpoints.rules import QKV, Experts, GatedMLP, Piece
from megatron_l0moe.checkpoints.safetensors_files import SafetensorsFolder
from megatron_l0moe.conversion.convert import convert_moe
from megatron_l0moe.conversion.export import export_dense

pytestmark = pytest.mark.slow

# Two float32 programs that sum in other orders, logits of size 1 and more; a wrong rule gives a hundred times it.
LOGITS_TOLERANCE = 1e-5
LOGITS_SIZE = 1.0
NOTICEABLE = 1e-3
UNNORMALISED = ("llama3", "qwen2")  # without and with biases, their gate weights not renormalised
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "convert.md"
START, END = "<!-- written by tests/checkpoints/test_families.py -->", "<!-- end of the tables -->"


@dataclass
class Measured:
    """What was seen of one model: the checkpoint that Megatron loads, and the folders that transformers loads."""

    family: str
    gates: str
    megatron: Path
    exports: dict[str, Path]
    controls: dict[str, Path]
    same_bytes: bool
    differences: dict[str, float] = field(default_factory=dict)


def same_files(one: Path, two: Path) -> bool:
    a, b = SafetensorsFolder(one), SafetensorsFolder(two)
    return a.names == b.names and all(
        a.read(name).dtype is b.read(name).dtype
        and torch.equal(a.read(name).flatten().view(torch.uint8), b.read(name).flatten().view(torch.uint8))
        for name in a.names
    )


def swapped(rule, read):
    """Up under the name of gate, and the other way round."""
    names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    for piece in ORIGINAL[type(rule)](rule, read):
        part = piece.name.split(".")[-2]
        yield dataclasses.replace(piece, name=piece.name.replace(part, names.get(part, part)))


def concatenated(rule, read):
    """q, k, v as if Megatron kept them one after the other and not group by group."""
    rows = [rule.heads * rule.head_dim, rule.groups * rule.head_dim, rule.groups * rule.head_dim]
    parts = read(f"{rule.megatron}.{rule.suffix}").split(rows)
    for n, part in zip("qkv", parts, strict=True):
        yield Piece(name=f"{rule.hf}.{n}_proj.{rule.suffix}", tensor=part, begin=0, total_rows=len(part))


ORIGINAL = {rule: rule.to_hf for rule in (GatedMLP, Experts, QKV)}
FAULTS = {"gate and up swapped": swapped, "q, k, v not by group": concatenated}


def with_faults(out: Path, write) -> dict[str, Path]:
    """Write the export once with each fault."""
    folders = {}
    for name, fault in FAULTS.items():
        folders[name] = out.with_name(f"{out.name} {len(folders)}")
        with pytest.MonkeyPatch.context() as patch:
            for rule in (GatedMLP, Experts) if fault is swapped else (QKV,):
                patch.setattr(rule, "to_hf", fault)
            write(folders[name])
    return folders


def dense_case(folder: Path, family: str) -> Measured:
    megatron = folder / "convert/megatron"
    export_dense(megatron, folder / "hf", folder / "back")
    return Measured(
        family=family,
        gates="dense",
        megatron=megatron,
        exports={"own": folder / "hf"},
        controls=with_faults(folder / "fault", lambda out: export_dense(megatron, folder / "hf", out)),
        same_bytes=same_files(folder / "hf", folder / "back"),
    )


def moe_case(folder: Path, family: str, gates: str, target: str) -> Measured:
    megatron = folder / "assemble/megatron"
    forms = export(folder, gates, target=target)["folders"]
    exports = {entry["form"]: folder / gates / name for name, entry in forms.items()}
    for form, path in exports.items():
        convert_moe(path, folder / f"again_{gates}_{form}")
        assert_same_checkpoint(megatron, folder / f"again_{gates}_{form}/megatron")
    form = next(iter(exports))
    controls = with_faults(
        folder / f"fault_{gates}", lambda out: export(folder, out.name, target="transformers")
    )
    if form == "qwen2_moe":
        controls["other norm_topk_prob"] = other_norm(exports[form])
    return Measured(
        family=family, gates=gates, megatron=megatron, exports=exports, controls=controls, same_bytes=True
    )


def other_norm(export: Path) -> Path:
    """The same weights with a config.json that says the opposite about the gate weights."""
    folder = export.with_name(f"{export.name}_other_norm")
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(export / "model.safetensors")
    config = json.loads((export / "config.json").read_text())
    config["norm_topk_prob"] = not config["norm_topk_prob"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def in_megatron(cases: list[Measured], ids: torch.Tensor, folder: Path) -> list[torch.Tensor]:
    checkpoints = {str(i): case.megatron / "release" for i, case in enumerate(cases)}
    logits = megatron_logits(checkpoints, ids, folder)
    return [logits[name] for name in checkpoints]


def make_cases(root: Path) -> list[Measured]:
    cases = []
    for family in MODELS:
        make_moe(root / family, family)
        cases += [dense_case(root / family, family), moe_case(root / family, family, "renormalised", "all")]
    for family in UNNORMALISED:
        folder = root / f"{family}-plain"
        make_moe(folder, family)
        rewrite_megatron(folder, moe_router_pre_softmax=True)
        cases.append(moe_case(folder, family, "softmax's own", "transformers"))
    return cases


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[Measured]:
    root = tmp_path_factory.mktemp("families")
    cases = make_cases(root)
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    assert ids.shape[1] <= WINDOW
    for case, got in zip(cases, in_megatron(cases, ids, root), strict=True):
        assert got.abs().max() > LOGITS_SIZE  # else the tolerance would mean little
        for name, folder in {**case.exports, **case.controls}.items():
            case.differences[name] = float((got - logits_of(folder, ids)).abs().max())
    return cases


def test_logits_are_those_of_transformers_and_every_fault_is_seen(measured):
    for case in measured:
        assert case.same_bytes, case
        for name in case.exports:
            assert case.differences[name] < LOGITS_TOLERANCE, (
                case.family,
                case.gates,
                name,
                case.differences,
            )
        for name in case.controls:
            assert case.differences[name] > NOTICEABLE, (case.family, case.gates, name, case.differences)


def test_a_window_is_exact_up_to_its_length_and_no_further(measured, tmp_path):
    (case,) = (case for case in measured if (case.family, case.gates) == ("mistral-v0.1", "dense"))
    ids = torch.randint(0, VOCAB, (1, WINDOW + 16), generator=torch.Generator().manual_seed(1))
    (got,) = in_megatron([case], ids, tmp_path)
    difference = (got - logits_of(case.exports["own"], ids)).abs().amax(dim=(0, 2))
    assert difference[:WINDOW].max() < LOGITS_TOLERANCE
    assert difference[WINDOW:].max() > NOTICEABLE


def bound(difference: float) -> str:
    return "below 1e-5" if difference < LOGITS_TOLERANCE else f"{difference:.0e}"


def tables(measured: list[Measured]) -> str:
    """Return the tables as markdown, with bounds instead of numbers that change from machine to machine."""
    head = ["family", "model", "layout", "there and back", "largest difference of logits"]
    rows = []
    for case in measured:
        there = "HF, Megatron, HF" if case.gates == "dense" else "Megatron, HF, Megatron"
        what = "dense" if case.gates == "dense" else f"L0-MoE, gate weights {case.gates}"
        for form in case.exports:
            bytes_ = f"{there}: {'same bytes' if case.same_bytes else 'differs'}"
            rows.append([case.family, what, form, bytes_, bound(case.differences[form])])
    controls: dict[str, float] = {}
    for case in measured:
        for name in case.controls:
            controls[name] = min(controls.get(name, torch.inf), case.differences[name])
    faults = [
        [name, "above 1e-3" if smallest > NOTICEABLE else "not seen"] for name, smallest in controls.items()
    ]
    return "\n\n".join(
        [
            markdown(head, rows),
            "Faults on purpose, the smallest difference over all models:",
            markdown(["fault", "difference"], faults),
        ]
    )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_page_says_what_was_seen(measured):
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    wanted = f"{before}{START}\n\n{tables(measured)}\n\n{END}{rest.split(END)[1]}"
    if os.environ.get("L0MOE_UPDATE_GOLDEN"):
        PAGE.write_text(wanted, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == wanted, "after a wanted change: L0MOE_UPDATE_GOLDEN=1"
