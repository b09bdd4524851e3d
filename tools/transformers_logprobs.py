"""Log-probabilities of given tokens by transformers. Runs in any environment that has it: nothing else is imported.

    python transformers_logprobs.py REQUESTS

REQUESTS: JSON file with a list of {"model": folder, "tokens": [ids]}. The answer, on stdout, is one JSON line:
`{"version": ..., "results": [{"logprobs": [...], "argmax": [...]}]}`, where entry i of both lists is of position
i + 1: the log-probability of the token there, and the token that the model finds likeliest there.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer on stdout."""
    import torch
    import transformers

    torch.set_num_threads(1)
    results = []
    for request in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            request["model"], torch_dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
        results.append(_of_tokens(model, request["tokens"]))
    sys.stdout.write(json.dumps({"version": transformers.__version__, "results": results}) + "\n")


def _of_tokens(model: Any, tokens: "list[int]") -> "dict[str, list[Any]]":
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return {"logprobs": logprobs.tolist(), "argmax": logits.argmax(-1).tolist()}


if __name__ == "__main__":
    main()
