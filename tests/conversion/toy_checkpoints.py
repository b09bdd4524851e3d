"""Small random checkpoints of the true architectures, made with transformers, and expert runs made from them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from conversion.reference import Sizes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader, CheckpointWriter

LAYERS, HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, VOCAB = 3, 32, 48, 4, 2, 16, 64
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,  # 4 x 16 is not the hidden size, on purpose
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_TIED = {**_COMMON, "tie_word_embeddings": True}
WINDOW = 32
EXPERT_RUN = {
    "l0_temperature": 0.83,
    "l0_stretch_low": -0.1,
    "l0_stretch_high": 1.1,
    "l0_train_weights": "on",
    "l0_retention_control": "lagrangian",
}
# Of random weights: a layer's output is about as large as its input, so logits are of size 1 as in a trained network.
STD = HIDDEN**-0.5


def _without_head_dim(sizes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sizes.items() if key != "head_dim"}


def _rope(base: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}}


MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama2": lambda: LlamaConfig(**{**_COMMON, "num_key_value_heads": HEADS}),
    "llama3": lambda: LlamaConfig(**_COMMON, **_rope(500000.0)),
    "llama3.1": lambda: LlamaConfig(**_COMMON, rope_parameters=LLAMA3),
    "llama3.2": lambda: LlamaConfig(**_TIED, rope_parameters={**LLAMA3, "factor": 32.0}),
    "mistral-v0.1": lambda: MistralConfig(**_COMMON, sliding_window=WINDOW),
    "mistral-v0.2": lambda: MistralConfig(**_COMMON, sliding_window=None, **_rope(1000000.0)),
    "qwen2": lambda: Qwen2Config(**_without_head_dim(_COMMON), **_rope(1000000.0)),
    "qwen2.5-tied": lambda: Qwen2Config(**_without_head_dim(_TIED), **_rope(1000000.0)),
}
# for single tests
OTHERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "llama-tied": lambda: LlamaConfig(**_TIED),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=None),
    "llama-square": lambda: LlamaConfig(**_without_head_dim(_COMMON)),
}


def save_model(
    folder: Path, name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a random model; every parameter is random, norms and biases too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config({**MODELS, **OTHERS}[name]())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(STD * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> Path:
    """Write a byte-level BPE that knows every byte, and what transformers needs to know about it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def sizes_of(folder: Path) -> Sizes:
    config = AutoConfig.from_pretrained(folder)
    rope = config.rope_parameters
    return Sizes(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        eps=config.rms_norm_eps,
        base=rope["rope_theta"],
        llama3_factor=rope.get("factor"),
    )


def write_expert_run(
    folder: Path,
    dense: Path,
    *,
    dense_layers: int = 1,
    seed: int = 0,
    keep: int | None = None,
    settings: dict[str, Any] | None = None,
    without: Sequence[str] = (),
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
) -> Path:
    """Write a checkpoint like that of an expert run: the dense tensors and gates; frozen to `keep` units if given."""
    stored = {name: value for name, value in (EXPERT_RUN | (settings or {})).items() if name not in without}
    source = CheckpointReader(dense)
    generator = torch.Generator().manual_seed(seed)
    with CheckpointWriter(folder, {"iteration": 60, "l0moe": stored}) as writer:
        for name in sorted(source.model_names()):
            writer.write(name, change(name, source.read(name)))
        for layer in range(dense_layers, LAYERS):
            log_alpha = 0.5 * torch.randn(FFN, generator=generator)
            mask = torch.ones(FFN)
            if keep is not None:
                mask[torch.randperm(FFN, generator=generator)[keep:]] = 0
            gates = {
                "log_alpha": log_alpha,
                "hard_mask": mask,
                "frozen": torch.tensor([int(keep is not None)]),
                "controller.lambdas": torch.zeros(2),
                "input_mean": torch.randn(HIDDEN, generator=generator),
                "input_count": torch.ones(1),
            }
            for key, tensor in gates.items():
                name = f"decoder.layers.{layer}.mlp.gate.{key}"
                writer.write(name, change(name, tensor))
    return folder
