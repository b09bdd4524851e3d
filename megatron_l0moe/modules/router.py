"""The top-k router with the losses of paper eq. 3, and counts of which experts take the tokens of which domain.

Shapes: T = tokens of the micro-batch on this rank (s * b), K = experts, s = sequence on this rank, b = micro-batch,
D = domains.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_l0moe.modules.hard_concrete import Float32State
from megatron_l0moe.modules.tensor_parallel import summed
from megatron_l0moe.modules.trained_part import ROUTER_GROUP, Metrics, Schedule, TrainedPart, choice_margins


class DomainLoad:
    """Counts of routed tokens by the domain of their sequence and by expert: one router, this rank alone.

    `domains` is set only while a micro-batch is in its forward pass. A recomputation in the backward pass, at which
    time the last forward pass may have been another micro-batch's, thus counts nothing.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        """int64 [D, K] of the running step; None in a step in which nothing is counted."""
        self.domains: Tensor | None = None
        """int64 [b], the domain of each sequence of the micro-batch that passes now."""

    def begin_iteration(self, num_domains: int, num_experts: int, device: torch.device) -> None:
        """Count in this step."""
        self.counts = torch.zeros((num_domains, num_experts), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, routing_map: Tensor) -> None:
        """Add a micro-batch's routing map [s * b, K], bool."""
        if self.counts is None or self.domains is None:
            return
        by_sequence = routing_map.view(-1, self.domains.shape[0], routing_map.shape[1]).sum(dim=0)
        self.counts.index_add_(0, self.domains, by_sequence)


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Losses of the router (paper eq. 3); their weights are Megatron's --moe-aux-loss-coeff and --moe-z-loss-coeff."""

    l0_balance_loss: Literal["paper", "megatron"] = "paper"
    """paper: eq. 3 with counts normalised to sum 1. megatron: the loss of --moe-router-load-balancing-type."""
    l0_balance_scope: Literal["global", "micro_batch"] = "global"
    """Which counts eq. 3 sees: those of the last global batch, or those of the micro-batch at hand."""
    l0_z_loss: Literal["squared", "printed"] = "squared"
    """squared: mean of logsumexp^2, as in the cited source. printed: mean of logsumexp, which has no lower bound."""


def balance_loss(load: Tensor, probability: Tensor) -> Tensor:
    """Return the balance loss of eq. 3, sum_i (c_i / B - 1 / N)^2, with a straight-through gradient; scalar.

    Args:
        load: [K], c_i normalised to sum 1 (with top-k counts the printed c_i / B would sum to k, and perfect balance
            would cost something).
        probability: [K], mean router probability of each expert, which carries the gradient: counts have none.
    """
    straight_through = load + probability - probability.detach()
    return ((straight_through - 1.0 / load.shape[0]) ** 2).sum()


def z_loss(logits: Tensor, form: str) -> Tensor:
    """Return the router z-loss of eq. 3 over logits [T, K]; scalar float32."""
    log_z = torch.logsumexp(logits.float(), dim=-1)
    return (log_z**2).mean() if form == "squared" else log_z.mean()


class ExpertLoad(Float32State):
    """Counts of routed tokens, summed over all ranks, as they are needed by eq. 3 and for logging.

    `counts` [K] of the running global batch, `load` [K] of the last whole one, normalised to sum 1. Counts are
    summed over the tokens' ranks as they arise, so that both are the same on every rank, in every data-parallel
    size, and after a resume. Eq. 3's gradient needs the load of a global batch before its first backward pass,
    so it is that of the batch before.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_experts: int,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.group = group
        device = torch.cuda.current_device()
        self.register_buffer("counts", torch.zeros(num_experts, dtype=torch.float32, device=device))
        self.register_buffer("load", torch.full((num_experts,), 1.0 / num_experts, device=device))

    @torch.no_grad()
    def add(self, routing_map: Tensor) -> Tensor:
        """Add a micro-batch's routing map [T, K]; return its counts [K] over all ranks that hold its batch."""
        counts = routing_map.sum(dim=0).float()
        if self.group.size() > 1:
            torch.distributed.all_reduce(counts, group=self.group)
        self.counts += counts
        return counts

    @torch.no_grad()
    def begin_iteration(self) -> None:
        """Make the running counts the last batch's load."""
        total = self.counts.sum()
        if total > 0:
            self.load.copy_(self.counts / total)
            self.counts.zero_()


class L0Router(TopKRouter, TrainedPart):
    """Megatron's top-k router (softmax after top-k unless --moe-router-pre-softmax) with eq. 3's losses."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        router_config: RouterConfig,
    ) -> None:
        super().__init__(config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.router_config = router_config
        self.expert_load = ExpertLoad(config, config.num_moe_experts, self.tp_dp_cp_group)
        self.domain_load = DomainLoad()
        self.loss_sums: dict[str, Tensor] = {}
        """The running step's losses without their coefficients, summed over this rank's micro-batches; scalars."""

    def begin_iteration(self) -> None:
        """Begin a step: its counts and sums start at zero."""
        self.expert_load.begin_iteration()
        self.domain_load.counts = None
        self.loss_sums = {}

    def begin_step(self, schedule: Schedule) -> None:
        """Begin a step; routers follow no schedule."""
        self.begin_iteration()

    def parameter_groups(self) -> Iterator[tuple[torch.nn.Parameter, str]]:
        """Yield the weight."""
        yield self.weight, ROUTER_GROUP

    @classmethod
    def metrics(cls, parts: Sequence[Self]) -> Metrics:
        """Return load and losses by layer, and in the steps that count it the load by domain."""
        layers = [str(router.layer_number - 1) for router in parts]
        counts = torch.stack([router.expert_load.counts for router in parts])
        load = counts / counts.sum(dim=-1, keepdim=True).clamp_min(1)
        metrics: Metrics = {"load": dict(zip(layers, load.tolist(), strict=True))}
        for name, means in _mean_losses(parts).items():
            metrics[name] = dict(zip(layers, means, strict=True))
        by_domain = _load_by_domain(parts)
        if by_domain is not None:
            metrics["domain_load"] = {
                layers[0]: by_domain.sum(dim=0).tolist()
            }  # of this chunk's layers together
            if by_domain.shape[1] == by_domain.shape[2]:
                own = by_domain.diagonal(dim1=1, dim2=2).mean(dim=1)
                metrics["own_expert"] = dict(zip(layers, own.tolist(), strict=True))
        return metrics

    def margins(self, hidden_states: Tensor) -> Tensor | None:
        """Return how far each token is from choosing other experts, [s * b], relative; None where all are chosen."""
        if self.topk >= self.num_experts:
            return None
        logits = self.gating(hidden_states).float().reshape(-1, self.num_experts)
        return choice_margins(logits, self.topk)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route logits [s, b, K]; returns the gate weights and the map, both [T, K]."""
        probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        self.domain_load.add(routing_map)
        if not (self.training and torch.is_grad_enabled()):
            return probs, routing_map
        counts = self.expert_load.add(routing_map)
        if self.router_config.l0_balance_loss == "paper":
            load = self.expert_load.load
            if self.router_config.l0_balance_scope == "micro_batch":
                load = counts / counts.sum()
            probs = self._attach_balance_loss(probs, logits.reshape(-1, self.num_experts), load)
        return probs, routing_map

    def _attach_balance_loss(self, probs: Tensor, logits: Tensor, load: Tensor) -> Tensor:
        probability = torch.softmax(logits.float(), dim=-1).mean(dim=0)
        loss = balance_loss(load, probability)
        self._record("balance_loss", loss)
        # Each rank of a sequence-sharded micro-batch adds the gradient of its own tokens' mean; their sum over the
        # tensor-parallel group must be the gradient of the whole mean.
        scale = self.config.moe_aux_loss_coeff / self.tp_cp_group.size()
        attached: Tensor = MoEAuxLossAutoScaler.apply(probs, loss * scale)
        return attached

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach the z-loss to logits [T, K]; Megatron's own, squared, unless the printed form is asked for."""
        active = self.config.moe_z_loss_coeff is not None and self.training and torch.is_grad_enabled()
        if active:
            self._record("z_loss", z_loss(logits, self.router_config.l0_z_loss))
        if not active or self.router_config.l0_z_loss == "squared":
            result: Tensor = super().apply_z_loss(logits, padding_mask)
            return result
        scale = self.config.moe_z_loss_coeff / self.tp_cp_group.size()
        attached: Tensor = MoEAuxLossAutoScaler.apply(logits, z_loss(logits, "printed") * scale)
        return attached

    def _record(self, name: str, loss: Tensor) -> None:
        before = self.loss_sums.get(name)
        self.loss_sums[name] = loss.detach() if before is None else before + loss.detach()
        if name != "z_loss":  # Megatron records its own z-loss
            get_moe_metrics_tracker().record(
                name, loss.detach(), self.layer_number, self.config.num_layers, avg_group=self.tp_dp_cp_group
            )


def _mean_losses(routers: Sequence[L0Router]) -> dict[str, list[float]]:
    """Return each loss by layer, the mean over all tokens of the global batch."""
    names = sorted(routers[0].loss_sums)
    if not names:
        return {}
    sums = torch.stack([torch.stack([router.loss_sums[name] for router in routers]) for name in names])
    means = summed(sums, routers[0].expert_load.group) / (
        routers[0].expert_load.group.size() * get_num_microbatches()
    )
    return dict(zip(names, means.tolist(), strict=True))


def _load_by_domain(routers: Sequence[L0Router]) -> Tensor | None:
    """Return the fraction of a domain's routed tokens that each expert took, [L, D, K]; None if not counted."""
    counts = [router.domain_load.counts for router in routers if router.domain_load.counts is not None]
    if not counts:
        return None
    total = summed(torch.stack(counts), routers[0].expert_load.group)
    return total / total.sum(dim=-1, keepdim=True).clamp_min(1)
