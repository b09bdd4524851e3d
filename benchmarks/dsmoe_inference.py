"""Prefill and decode of a DSMoE that skips closed blocks, beside its dense model, in transformers.

    python benchmarks/dsmoe_inference.py [--active 0.25 0.5 1.0] [--json FILE]

Random weights and random text. The threshold is set so that the asked share of blocks is open; gates are independent of
each other here, which trained ones are not, and the share that was really open is measured. Both models have the same
weights and run in pairs, next to each other in time (`evaluation/timing.py`). Needs no data and no checkpoint.
"""

import argparse
import json
import logging
import random
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_l0moe.conversion.dsmoe_modelling import DSMoEConfig, DSMoEForCausalLM, DSMoEMLP
from megatron_l0moe.evaluation.timing import (
    Mode,
    Spread,
    TransformersRunner,
    pinned_threads,
    ratios,
    time_pairs,
)
from megatron_l0moe.runtime.hardware import describe_machine

PROMPT = 32


def main() -> None:
    """Measure, print a line for each mode and share and all as a table, write JSON."""
    logging.disable(logging.WARNING)
    options = _options()
    torch.manual_seed(0)
    dense = build(LlamaForCausalLM, LlamaConfig(**sizes(options)), options)
    text = random.Random(0).choices(range(options.vocab), k=8 * max(options.prefill, PROMPT + options.decode))  # noqa: S311
    modes = [
        Mode(name=f"prefill {options.prefill}", batch=1, tokens=options.prefill, prompt=0, last_logits=True)
    ]
    modes += [
        Mode(name=f"decode, batch {b}", batch=b, tokens=options.decode, prompt=PROMPT)
        for b in options.batches
    ]
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine(device=options.device, threads=options.threads),
        "ffn_share": ffn_share(dense),
        "results": [],
    }
    print(json.dumps(report, indent=2))
    with pinned_threads(options.threads):
        for active in options.active:
            moe = sparse(dense, active, options)
            share = open_share(moe, torch.tensor([text[: options.prefill]], device=options.device))
            bound = 1 / (1 - report["ffn_share"] * (1 - share))
            for mode in modes:
                pairs = time_pairs(
                    TransformersRunner(dense), TransformersRunner(moe), text, mode, options.repeats
                )
                report["results"].append(
                    {
                        "mode": mode.name,
                        "asked_share": active,
                        "open_share": share,
                        "bound": bound,
                        "ratio": Spread.of(ratios(pairs)).to_json(),
                        "seconds": [
                            statistics.median(pair[side].seconds for pair in pairs) for side in (0, 1)
                        ],
                    }
                )
                print(line(report["results"][-1]), flush=True)
    print(table(report["results"]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the dense config."""
    return {
        "vocab_size": options.vocab,
        "hidden_size": options.hidden,
        "intermediate_size": options.ffn,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": max(options.hidden // 256, 1),
        "tie_word_embeddings": True,
    }


def build(kind: Any, config: LlamaConfig, options: argparse.Namespace) -> Any:
    """Return a random model on the device."""
    return kind(config).eval().to(device=options.device, dtype=getattr(torch, options.dtype))


def sparse(dense: LlamaForCausalLM, active: float, options: argparse.Namespace) -> DSMoEForCausalLM:
    """Return the DSMoE of the dense model's weights whose gates open a share of `active`."""
    logit = statistics.NormalDist().inv_cdf(1 - active) if active < 1 else -torch.inf
    threshold = float(torch.sigmoid(torch.tensor(logit)))
    config = DSMoEConfig(
        **sizes(options), num_blocks=options.blocks, num_dense_layers=0, block_threshold=threshold
    )
    moe: DSMoEForCausalLM = build(DSMoEForCausalLM, config, options)
    found = moe.load_state_dict(dense.state_dict(), strict=False)
    assert all("block_gate" in key for key in found.missing_keys), found
    for layer in moe.model.layers:  # logits of a normalised input are then normal with deviation 1
        nn.init.normal_(layer.mlp.block_gate.weight, std=options.hidden**-0.5)
    return moe


def ffn_share(dense: LlamaForCausalLM) -> float:
    """Return the FFNs' share of the weights that a token is multiplied with."""
    ffn = sum(p.numel() for name, p in dense.named_parameters() if ".mlp." in name)
    return ffn / sum(p.numel() for p in dense.parameters() if p.dim() == 2)


@torch.inference_mode()
def open_share(model: DSMoEForCausalLM, ids: Tensor) -> float:
    """Return the share of blocks that the tokens [1, s] open, mean over layers."""
    shares: list[float] = []

    def watch(mlp: DSMoEMLP, inputs: tuple[Tensor, ...]) -> None:
        shares.append(float((mlp.factors(inputs[0].flatten(0, 1)) > 0).float().mean()))

    hooks = [layer.mlp.register_forward_pre_hook(watch) for layer in model.model.layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    return statistics.mean(shares)


def line(result: dict[str, Any]) -> str:
    """Return a result as text."""
    ratio, (dense, moe) = result["ratio"], result["seconds"]
    return (
        f"{result['mode']}: {result['open_share']:.3f} open, {ratio['median']:.2f} times as fast as dense "
        f"(quartiles {ratio['q1']:.2f} to {ratio['q3']:.2f}; bound {result['bound']:.2f}); "
        f"{1e3 * dense:.1f} ms dense, {1e3 * moe:.1f} ms"
    )


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as markdown, as docs/methods.md has them."""
    modes = list(dict.fromkeys(result["mode"] for result in results))
    rows = [["blocks open", "bound", *modes], ["---"] * (2 + len(modes))]
    for share in dict.fromkeys(result["asked_share"] for result in results):
        own = {result["mode"]: result for result in results if result["asked_share"] == share}
        ratios = [own[mode]["ratio"] for mode in modes]
        first = own[modes[0]]
        cells = [f"{r['median']:.2f} ({r['q1']:.2f} to {r['q3']:.2f})" for r in ratios]
        rows.append([f"{100 * first['open_share']:.0f} %", f"{first['bound']:.2f}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--active", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="shares of open blocks"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8], help="sequences that decode together"
    )
    for name, default in (("hidden", 1024), ("ffn", 4096), ("layers", 4), ("blocks", 8), ("vocab", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the model")
    for name, default in (("prefill", 256), ("decode", 32), ("repeats", 11), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the measurement")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="file to write the report to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
