"""DSMoE for transformers: a Llama whose MLP computes for each token only the blocks that the token's gates open.

This file lies beside the weights of an exported checkpoint; transformers imports it with `trust_remote_code=True`. For
inference: gates are trained in Megatron, where closed blocks are computed too. It imports nothing but torch and
transformers.

Shapes: T = tokens, h = hidden, n = blocks.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class DSMoEConfig(LlamaConfig):
    """The dense model's config with `num_blocks`, `block_threshold` and `num_dense_layers`."""

    model_type = "dsmoe_llama"
    base_model_tp_plan = None  # blocks are cut out of whole tensors


class DSMoEMLP(LlamaMLP):
    """The dense MLP's weights, used a block of channels at a time."""

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__(config)
        self.block_gate = nn.Linear(config.hidden_size, config.num_blocks, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("A DSMoE checkpoint of transformers is for inference; call model.eval().")
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        factors = self.factors(tokens)
        output = torch.zeros_like(tokens)
        width = self.intermediate_size // self.config.num_blocks
        for block in factors.any(dim=0).nonzero().flatten().tolist():
            rows = factors[:, block].nonzero().flatten()
            channels = slice(block * width, (block + 1) * width)
            x = tokens if len(rows) == len(tokens) else tokens[rows]
            gate, up = (
                nn.functional.linear(x, part.weight[channels]) for part in (self.gate_proj, self.up_proj)
            )
            activation = self.act_fn(gate) * up * factors[rows, block, None].to(x.dtype)
            output.index_add_(0, rows, nn.functional.linear(activation, self.down_proj.weight[:, channels]))
        return output.view_as(hidden_states)

    def factors(self, tokens: Tensor) -> Tensor:
        """Return score * n / #active of each token's open blocks, 0 for closed ones; [T, h] -> float32 [T, n].

        A block is open if its score is above the threshold; if none is, that of the highest score.
        """
        scores = torch.sigmoid(nn.functional.linear(tokens.float(), self.block_gate.weight.float()))
        is_open = scores > self.config.block_threshold
        highest = scores.argmax(dim=-1, keepdim=True)
        is_open = is_open.scatter(
            -1, highest, is_open.gather(-1, highest) | ~is_open.any(dim=-1, keepdim=True)
        )
        active: Tensor = is_open.sum(dim=-1, keepdim=True)
        return torch.where(is_open, scores, 0.0) * (scores.shape[-1] / active)


class DSMoEForCausalLM(LlamaForCausalLM):
    """The dense model with `DSMoEMLP` in all layers but the bottom `num_dense_layers`."""

    config_class = DSMoEConfig

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers[config.num_dense_layers :]:
            layer.mlp = DSMoEMLP(config)
