"""What training_cost.py measures: our modules and Megatron's of the same shape, on the same weights and inputs.

Import this after `cpu.install_training()`. Which spec, kernels and dispatcher are used is what `platform_flags` says
for this machine, the same on both sides.

Shapes: s = sequence, b = micro-batch (1), h = hidden.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import training as megatron_training

from megatron_l0moe.modules.hard_concrete import HardConcreteConfig, HardConcreteGate
from megatron_l0moe.modules.layer_specs import LayerPlan, ModelKind, block_spec
from megatron_l0moe.modules.retention import GateStep, Phase, RetentionConfig
from megatron_l0moe.modules.router import L0Router, RouterConfig
from megatron_l0moe.modules.trained_part import parts
from megatron_l0moe.runtime.platform import platform_flags
from megatron_l0moe.training.arguments import JobSettings, StageConfig
from megatron_l0moe.training.model import (
    group_overrides,
    prepare_for_training,
)

L0_MLP_GOAL, MOE_GOAL = 1.05, 1.02
RETENTION = 0.6  # r somewhere on its way to the target
AUX_LOSS_COEFFICIENT, Z_LOSS_COEFFICIENT = 0.01, 0.003
MoE = Literal["ours", "our_router", "stock"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes: by default SmolLM2-135M's layer and its quickstart experts."""

    tokens: int = 1024
    dtype: str = "fp32"
    hidden: int = 576
    ffn: int = 1536
    heads: int = 9
    groups: int = 3
    experts: int = 4
    expert_ffn: int = 384
    layers: int = 4
    vocab: int = 4096


@dataclasses.dataclass(kw_only=True)
class Subject:
    """Something to measure: `prepare` is not timed, `forward`, the backward pass and `finish` are."""

    module: torch.nn.Module
    prepare: Callable[[int], None]
    forward: Callable[[], torch.Tensor]
    gradient: torch.Tensor | None = None
    """Of the output; None for a loss."""
    finish: Callable[[], None] = lambda: None
    state: Callable[[], Iterator[torch.Tensor]] = lambda: iter(())
    """Tensors kept beside the module's own: gradient buffers, optimizer state."""

    def run(self) -> None:
        """Do one step."""
        self.forward().backward(self.gradient)
        self.finish()

    def state_bytes(self) -> int:
        """Return the bytes of parameters, buffers, gradients and optimizer state."""
        tensors = (*self.module.parameters(), *self.module.buffers(), *self.state())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two subjects, built when they are measured."""

    name: str
    goal: float | None
    ours: Callable[[], Subject]
    stock: Callable[[], Subject]


def comparisons(shape: Shape) -> list[Comparison]:
    """Return what is measured, in order."""
    layer = functools.partial(_layer, shape)
    step = functools.partial(_step, shape)
    return [
        Comparison(
            name=f"L0 MLP, forward and backward, {control}",
            goal=L0_MLP_GOAL,
            ours=functools.partial(layer, stage="expert", control=control),
            stock=functools.partial(layer, stage="dense"),
        )
        for control in ("lagrangian", "budget")
    ] + [
        Comparison(
            name="L0 MLP, whole training step",
            goal=L0_MLP_GOAL,
            ours=functools.partial(step, stage="expert"),
            stock=functools.partial(step, stage="dense"),
        ),
        Comparison(
            name="masks only against masks and weights, whole training step",
            goal=None,
            ours=functools.partial(step, stage="expert", train_weights="off"),
            stock=functools.partial(step, stage="expert"),
        ),
        Comparison(
            name="MoE layer, forward and backward",
            goal=MOE_GOAL,
            ours=functools.partial(layer, stage="moe"),
            stock=functools.partial(layer, stage="moe", moe="stock"),
        ),
        Comparison(
            name="MoE layer, forward and backward, our router with Megatron's experts",
            goal=MOE_GOAL,
            ours=functools.partial(layer, stage="moe", moe="our_router"),
            stock=functools.partial(layer, stage="moe", moe="stock"),
        ),
        Comparison(
            name="MoE layer, forward and backward, our router with Megatron's experts, load by domain counted",
            goal=MOE_GOAL,
            ours=functools.partial(layer, stage="moe", moe="our_router", counts_domains=True),
            stock=functools.partial(layer, stage="moe", moe="stock"),
        ),
        Comparison(
            name="MoE, whole training step",
            goal=MOE_GOAL,
            ours=functools.partial(step, stage="moe"),
            stock=functools.partial(step, stage="moe", moe="stock"),
        ),
    ]


def _layer(
    shape: Shape,
    *,
    stage: ModelKind,
    control: str = "lagrangian",
    moe: MoE = "ours",
    counts_domains: bool = False,
) -> Subject:
    """One MLP or MoE layer with the norm before it, which Transformer Engine's MLP has inside."""
    model = _model(shape, _plan(shape, stage, control), layers=1, moe=moe, has_buffers=False).train()
    layer = model.decoder.layers[0]
    parts = torch.nn.ModuleList([layer.pre_mlp_layernorm, layer.mlp])
    inputs: list[torch.Tensor] = []

    def prepare(step: int) -> None:
        _begin(model, step)
        if counts_domains:
            _count_domains(model, shape.experts)
        parts.zero_grad(set_to_none=True)
        inputs[:] = [_random(step, (shape.tokens, 1, shape.hidden), model).requires_grad_()]

    def forward() -> torch.Tensor:
        output, _ = layer.mlp(layer.pre_mlp_layernorm(inputs[0]))
        result: torch.Tensor = output
        return result

    gradient = _random(-1, (shape.tokens, 1, shape.hidden), model)
    return Subject(module=parts, prepare=prepare, forward=forward, gradient=gradient)


def _step(
    shape: Shape, *, stage: ModelKind, moe: MoE = "ours", train_weights: Literal["on", "off"] = "on"
) -> Subject:
    """A whole training step of a model: loss, gradients, clip, Adam. In the expert stage the MLPs are trained."""
    plan = _plan(shape, stage)
    model = _model(shape, plan, layers=shape.layers, moe=moe, has_buffers=True).train()
    config = StageConfig(l0_stage=stage, l0_train_weights=train_weights)
    if stage == "dense":  # train what the expert stage trains
        model.requires_grad_(False)
        for layer in model.decoder.layers:
            layer.mlp.requires_grad_(True)
    else:
        prepare_for_training([model], JobSettings(config, plan))
    bf16 = shape.dtype == "bf16"
    buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=bf16)
    wrapped = DistributedDataParallel(
        model.config, buffers, Float16Module(model.config, model) if bf16 else model
    )
    options = OptimizerConfig(
        optimizer="adam",
        lr=1e-5,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=bf16,
        params_dtype=model.config.params_dtype,
    )
    optimizer = megatron_training.get_megatron_optimizer(
        options, [wrapped], config_overrides=group_overrides(config)
    )
    batch: list[torch.Tensor] = []

    def prepare(step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        words = torch.randint(shape.vocab, (1, shape.tokens + 1), generator=generator).cuda()
        batch[:] = [words[:, :-1], torch.arange(shape.tokens).cuda()[None], words[:, 1:]]
        _begin(model, step)

    def forward() -> torch.Tensor:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        tokens, positions, labels = batch
        loss: torch.Tensor = wrapped(tokens, positions, None, labels=labels).mean()
        return loss

    def finish() -> None:
        wrapped.finish_grad_sync()
        optimizer.step()

    def state() -> Iterator[torch.Tensor]:
        yield from (b.grad_data for b in (*wrapped.buffers, *wrapped.expert_parallel_buffers))
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            yield from (parameter for group in part.param_groups for parameter in group["params"])
            yield from (t for s in part.optimizer.state.values() for t in s.values() if torch.is_tensor(t))

    return Subject(module=model, prepare=prepare, forward=forward, finish=finish, state=state)


def _begin(model: GPTModel, step: int) -> None:
    for gate in parts(model, HardConcreteGate):
        gate.begin_iteration(GateStep(step, Phase.LEARN, RETENTION, 1.0))
    for router in parts(model, L0Router):
        router.begin_iteration()


def _count_domains(model: GPTModel, domains: int) -> None:
    """As in the steps in which training records the load by domain."""
    for router in parts(model, L0Router):
        router.domain_load.begin_iteration(domains, router.num_experts, router.weight.device)
        router.domain_load.domains = torch.zeros(1, dtype=torch.int64, device=router.weight.device)


def _random(seed: int, size: tuple[int, ...], model: GPTModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(size, generator=generator).cuda().to(model.config.params_dtype)


def _plan(shape: Shape, stage: ModelKind, control: str = "lagrangian") -> LayerPlan:
    return LayerPlan(
        stage=stage,
        dense_layers=0,
        gate=HardConcreteConfig(),
        retention=RetentionConfig(l0_expert_ffn=shape.expert_ffn, l0_retention_control=control),  # type: ignore[arg-type]
        router=RouterConfig(),
    )


def _model(shape: Shape, plan: LayerPlan, *, layers: int, moe: MoE, has_buffers: bool) -> GPTModel:
    """Build a model; the same seed gives both sides of a comparison the same weights."""
    torch.manual_seed(0)
    destroy_moe_metrics_tracker()  # it keeps the number of layers of the model before
    config = _config(shape, plan.stage, layers, stock_losses=moe == "stock", has_buffers=has_buffers)
    spec = block_spec(config, plan)
    if plan.stage == "moe" and moe != "ours":
        te = config.transformer_impl == "transformer_engine"
        stock = get_gpt_decoder_block_spec(config, use_transformer_engine=te, normalization="RMSNorm")
        for ours, theirs in zip(spec.layer_specs, stock.layer_specs, strict=True):
            mlp = theirs.submodules.mlp
            if moe == "our_router":
                parts = copy.copy(mlp.keywords["submodules"])
                parts.router = ours.submodules.mlp.keywords["submodules"].router
                mlp = functools.partial(mlp.func, *mlp.args, **{**mlp.keywords, "submodules": parts})
            ours.submodules.mlp = mlp
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.vocab,
        max_sequence_length=shape.tokens,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    ).cuda()
    if config.bf16:
        model.bfloat16()
    _spread_weights(model)
    return model


def _spread_weights(model: GPTModel) -> None:
    """Give parameters of one name the same values on both sides, and gates that are shut, half open and open."""
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("log_alpha"):
            parameter.data.copy_(torch.linspace(-6, 6, parameter.numel()))
        elif "norm" not in name and "lambdas" not in name:
            generator = torch.Generator().manual_seed(len(name) + parameter.numel())
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def _config(
    shape: Shape, stage: ModelKind, layers: int, *, stock_losses: bool, has_buffers: bool
) -> TransformerConfig:
    """Return Megatron's config; `stock_losses`: Megatron's own balance loss instead of eq. 3, with the same weight."""
    flags = platform_flags([], moe=stage == "moe")
    values = dict(itertools.pairwise(flags))
    moe: dict[str, Any] = {}
    if stage == "moe":
        moe = {
            "num_moe_experts": shape.experts,
            "moe_ffn_hidden_size": shape.expert_ffn,
            "moe_router_topk": 2,
            "moe_layer_freq": [1] * layers,
            "moe_router_load_balancing_type": "aux_loss" if stock_losses else "none",
            "moe_aux_loss_coeff": AUX_LOSS_COEFFICIENT,
            "moe_z_loss_coeff": Z_LOSS_COEFFICIENT,
            "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": values["--moe-token-dispatcher-type"],
            "moe_grouped_gemm": "--moe-grouped-gemm" in flags,
        }
    dtype = torch.bfloat16 if shape.dtype == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=shape.dtype == "bf16",
        transformer_impl=values["--transformer-impl"],
        use_cpu_initialization="--use-cpu-initialization" in flags,
        bias_activation_fusion="--no-bias-swiglu-fusion" not in flags,
        masked_softmax_fusion="--no-masked-softmax-fusion" not in flags,
        # adds to the gradient buffers, which a layer without Megatron's data parallelism does not have
        gradient_accumulation_fusion=has_buffers and "--no-gradient-accumulation-fusion" not in flags,
        hetereogenous_dist_checkpoint=True,
        **moe,
    )
