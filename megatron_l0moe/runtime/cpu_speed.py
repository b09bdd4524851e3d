"""How fast the cores of this machine multiply matrices in float32 and in bfloat16.

`python -m megatron_l0moe.runtime.cpu_speed SHAPES` prints the answer as one line of JSON. It is a program of its own so
that the commands that plan and start a run need neither torch nor its threads. SHAPES is a JSON list of pairs
[in, out], the weights of a model's layer.

A CPU without bf16 units computes bf16 in software, several times slower than float32; one with them (AMX, avx512_bf16)
is the faster in bf16. No flag of the processor says by how much, so the model's own products are timed.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_l0moe.runtime.hardware import usable_cores

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS = 0.8
"""Time that the products are repeated for, all dtypes together."""
ROUND_FLOPS = 2e9
"""About what one round of all shapes takes, so that a slow dtype does not make the measurement a long one."""
MOST_TOKENS, FEWEST_TOKENS = 512, 16


def measure(shapes: Sequence[tuple[int, int]], seconds: float = SECONDS) -> dict[str, float]:
    """Return FLOP/s of matrix products on all usable cores together, by dtype; the median of several rounds.

    The dtypes take turns, so that what else the machine does slows them all down alike.

    Args:
        shapes: [in, out] of the weights that a batch of tokens is multiplied with.
        seconds: how long rounds are started, after one of each dtype that warms up.
    """
    round_flops = 2.0 * sum(rows * columns for rows, columns in shapes)
    tokens = int(min(max(ROUND_FLOPS / round_flops, FEWEST_TOKENS), MOST_TOKENS))
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        operands = {
            name: [(torch.ones(tokens, i, dtype=dtype), torch.ones(o, i, dtype=dtype)) for i, o in shapes]
            for name, dtype in DTYPES.items()
        }
        rounds: dict[str, list[float]] = {name: [] for name in DTYPES}
        end = math.inf
        while time.perf_counter() < end:
            for name, pairs in operands.items():
                rounds[name].append(_seconds_of_a_round(pairs))
            if end == math.inf:  # the first round compiled oneDNN's kernels
                rounds = {name: [] for name in DTYPES}
                end = time.perf_counter() + seconds
        return {name: tokens * round_flops / statistics.median(taken) for name, taken in rounds.items()}
    finally:
        torch.set_num_threads(before)


def _seconds_of_a_round(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    start = time.perf_counter()
    for inputs, weights in pairs:
        torch.nn.functional.linear(inputs, weights)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure([(int(i), int(o)) for i, o in json.loads(sys.argv[1])])) + "\n")
