"""The MLP of Mixture-of-Masks: hand-checkable reference first, then whole models against the dense one.

Mixture-of-Masks: numbers worked by hand, then the naive references in float64 with gradients.
"""

import itertools
import math

import equations
import megatron_models as models
import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.modules.mixture_of_masks import (
    MaskConfig,
    MoMMLP,
    activated,
    channel_factors,
    choose_masks,
    hard_masks,
    mask_sets,
    set_index,
    set_places,
)
from megatron_l0moe.modules.retention import GateStep, Phase
from megatron_l0moe.modules.router import balance_loss
from megatron_l0moe.runtime import cpu

FLOAT32_SUM_ATOL = 2e-6  # sums of 24 float32 products of size 1, in another order
IDENTITY_ATOL = 1e-5  # three layers of float32 sums in another order, logits of size 1
MASKS = 8


@pytest.fixture(autouse=True)
def process_group():
    with cpu.one_process_group():
        torch.manual_seed(0)
        yield


def masked_layers(model: torch.nn.Module) -> list[MoMMLP]:
    return [module for module in model.modules() if isinstance(module, MoMMLP)]


def one_layer() -> MoMMLP:
    """Return a layer whose router chooses with weights far from 1/2 and whose masks differ."""
    mlp = masked_layers(models.build("mom"))[0]
    mlp.mask_router.weight.data.mul_(30.0)
    mlp.masks.log_alpha.data.copy_(2 * torch.randn(mlp.masks.log_alpha.shape))
    return mlp


def step(phase: Phase, iteration: int = 5, retention: float = 0.5, scale: float = 1.0) -> GateStep:
    return GateStep(iteration=iteration, phase=phase, retention=retention, penalty_scale=scale)


def test_only_layers_above_the_dense_ones_have_masks():
    layers = masked_layers(models.build("mom"))
    assert [mlp.masks.layer for mlp in layers] == [mlp.mask_router.layer for mlp in layers] == [1, 2]
    assert layers[0].masks.log_alpha.shape == (MASKS, models.FFN)


def test_all_masks_open_is_the_dense_model_exactly():
    dense, masked = models.build("dense"), models.build("mom")
    models.copy_backbone(dense, masked)
    expected = models.logits(dense)
    assert torch.equal(expected, models.logits(masked.eval()))  # the masks as they start, without noise
    for mlp in masked_layers(masked):
        mlp.masks.begin_iteration(step(Phase.OPEN))
    assert torch.equal(expected, models.logits(masked.train()))
    for mlp in masked_layers(masked):
        mlp.masks.begin_iteration(step(Phase.LEARN))
    masked_layers(masked)[0].masks.log_alpha.data[:, 3] = -9.0  # control: one unit closed in every mask
    assert not torch.allclose(expected, models.logits(masked.eval()), atol=IDENTITY_ATOL)


def test_output_is_the_mixture_of_the_chosen_masks():
    mlp = one_layer().train()
    mlp.masks.begin_iteration(step(Phase.LEARN))
    x = torch.randn(5, 1, models.HIDDEN)
    output, _ = mlp(x)
    z = mlp.masks().tolist()
    gate, up = mlp.linear_fc1.weight.double().chunk(2)
    down = mlp.linear_fc2.weight.double()

    def expected(row: list[float], k: int) -> list[float]:
        logits = [sum(w * v for w, v in zip(y, row, strict=True)) for y in mlp.mask_router.weight.tolist()]
        factors = torch.tensor(equations.mix_masks(logits, z, k).factors).double()
        return equations.swiglu(row, gate.tolist(), up.tolist(), (down * factors).tolist())

    rows = x[:, 0].double().tolist()
    right, wrong = (torch.tensor([expected(row, k) for row in rows]) for k in (2, 3))
    assert torch.allclose(output[:, 0], right, atol=FLOAT32_SUM_ATOL)
    assert not torch.allclose(output[:, 0], wrong, atol=FLOAT32_SUM_ATOL)  # control: a third mask


def test_noise_differs_by_mask_layer_and_iteration():
    one, two = (mlp.masks.train() for mlp in masked_layers(models.build("mom")))
    draws = []
    for masks, iteration in ((one, 5), (one, 6), (two, 5)):
        masks.log_alpha.data.zero_()
        masks.begin_iteration(step(Phase.LEARN, iteration))
        draws += [masks()]
        assert torch.equal(draws[-1], masks())
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])


def test_router_masks_and_lambdas_get_their_gradients():
    mlp = one_layer().train()
    mlp.masks.begin_iteration(step(Phase.LEARN, scale=0.25))
    mlp.masks.controller.lambdas.data.copy_(torch.tensor([0.4, 0.9]))
    mlp.linear_fc2.weight.data.zero_()  # leaves the gradients of both losses alone
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.25))
    x = torch.randn(6, 1, models.HIDDEN)
    output, _ = mlp(x)
    output.sum().backward()
    fraction = mlp.masks._activated(mlp.masks._open_probability()).mean()  # uniform load in the first batch
    difference = fraction - 0.5
    penalty = 0.4 * difference + 0.9 * difference**2
    (expected,) = torch.autograd.grad(penalty, mlp.masks.log_alpha)
    assert torch.allclose(mlp.masks.log_alpha.grad, 0.25 * expected, atol=1e-8)
    assert expected.abs().max() > 1e-4
    ascent = -0.25 * torch.stack([difference, difference**2])
    assert torch.allclose(mlp.masks.controller.lambdas.grad, ascent.detach(), atol=1e-7)
    weight = mlp.mask_router.weight
    probability = torch.softmax(x[:, 0] @ weight.T, dim=-1).mean(dim=0)
    loss = balance_loss(torch.full((MASKS,), 1 / MASKS), probability)
    (expected,) = torch.autograd.grad(loss, weight)
    assert torch.allclose(weight.grad, 0.25 * 0.01 * expected, atol=1e-9)


def test_choices_are_counted_once_and_weigh_in_the_next_step():
    mlp = one_layer().train()
    masks = mlp.masks
    masks.begin_iteration(step(Phase.LEARN))
    masks.log_alpha.data[:4] -= 4  # masks are of different width, and tokens alike, so that choices tell
    x = torch.randn(models.HIDDEN) + 0.3 * torch.randn(7, 2, models.HIDDEN)
    mlp(x)
    with torch.no_grad():
        mlp(-x)  # other tokens, without gradients as in the first pass of a recomputation: not counted
    choices = [
        equations.mix_masks(row.tolist(), [[0.0]] * MASKS, 2).chosen
        for row in (x @ mlp.mask_router.weight.T).reshape(-1, MASKS)
    ]
    probability = masks._open_probability().double().tolist()
    before = masks.expected_retention()
    masks.begin_iteration(step(Phase.LEARN, 6))
    after = masks.expected_retention()
    assert after == pytest.approx(equations.activated_fraction(probability, choices), abs=1e-6)
    assert before != pytest.approx(after, abs=1e-3)  # control: of an even load
    counts = [sum(mask in chosen for chosen in choices) for mask in range(MASKS)]
    assert masks.mask_load.tolist() == pytest.approx([count / 28 for count in counts])


def test_masks_freeze_at_the_target_and_stay():
    mlp = one_layer().train()
    mlp.masks.begin_iteration(step(Phase.FROZEN))
    z = mlp.masks().clone()
    assert set(z.unique().tolist()) == {0.0, 1.0}
    assert mlp.masks.expected_retention() == pytest.approx(0.5, abs=1 / models.FFN)
    assert mlp.masks.expected_retention() <= 0.5 + 1e-6
    mlp.masks.log_alpha.data.neg_()
    mlp.masks.begin_iteration(step(Phase.FROZEN, 6))
    assert torch.equal(mlp.masks(), z)
    assert mlp.masks.penalty(z) is None
    mlp.masks.step = step(Phase.LEARN)  # as after loading a checkpoint for evaluation
    assert torch.equal(mlp.eval().masks(), z)


def test_bad_masks_do_not_freeze_in_silence(caplog: pytest.LogCaptureFixture):
    mlp = one_layer().train()
    mlp.masks.begin_iteration(step(Phase.FROZEN))
    assert "keep no channel" not in caplog.text  # control
    mlp = one_layer().train()
    mlp.masks.log_alpha.data[2:4] = -10.0
    mlp.masks.begin_iteration(step(Phase.FROZEN))
    assert "Masks [2, 3] of layer 1 keep no channel" in caplog.text
    mlp.mask_router.weight.data[2:4] = 1.0
    mlp.mask_router.weight.data[[0, 1, 4, 5, 6, 7]] *= 0.01
    x = torch.ones(2, 1, models.HIDDEN)  # a token that chooses the empty masks, and one that chooses others
    x[1] *= -1
    output, _ = mlp(x)
    assert (output[0] == 0).all()
    assert output[1].isfinite().all()
    assert (output[1] != 0).any()
    mlp = one_layer().train()
    mlp.masks.log_alpha.data[1, 5] = torch.nan
    with pytest.raises(L0MoEError, match="log_alpha of layer 1 holds NaN in iteration 5"):
        mlp.masks.begin_iteration(step(Phase.FROZEN))


def test_the_penalty_alone_brings_the_activated_fraction_to_its_target():
    mlp = masked_layers(models.build("mom"))[0].train()
    mlp.linear_fc2.weight.data.zero_()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    masks = mlp.masks
    optimizer = torch.optim.Adam([masks.log_alpha, *masks.controller.parameters()], lr=0.3)
    x = torch.randn(16, 1, models.HIDDEN)
    fractions = []
    for iteration in range(160):
        target = max(0.5, 1 - iteration / 160)
        masks.begin_iteration(step(Phase.LEARN, iteration, target))
        optimizer.zero_grad()
        mlp(x)[0].sum().backward()
        optimizer.step()
        fractions.append(masks.expected_retention())
    assert fractions[0] > 0.95
    assert fractions[-1] == pytest.approx(0.5, abs=0.05)  # it swings on the way, as the lambdas do


def test_checkpoint_keys_are_the_dense_ones_with_masks_and_router():
    def keys(stage: str) -> set[str]:
        state = models.build(stage).sharded_state_dict()
        return {entry.key for entry in state.values() if "_extra_state" not in entry.key}

    masks = ("log_alpha", "hard_mask", "frozen", "controller.lambdas", "set_load.counts", "set_load.load")
    names = [*(f"masks.{name}" for name in masks), "mask_router.weight"]
    added = {f"decoder.layers.{layer}.mlp.{name}" for layer in (1, 2) for name in names}
    assert keys("mom") - keys("dense") == added
    assert keys("dense") - keys("mom") == set()


FLOAT64_ATOL = 1e-12  # the same few products in another order
STEP = 1e-6  # of central differences, whose error is of size 1e-9 here
DIFFERENCE_ATOL = 1e-8
THIRD, TWO_THIRDS = 1 / 3, 2 / 3


def doubles(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_numbers_worked_by_hand():
    # logits log 2, 0, log 4, of which the first and last are chosen: weights 2/6 and 4/6
    weights, chosen = choose_masks(doubles([[math.log(2), 0.0, math.log(4)]]), 2)
    assert chosen.tolist() == [[0, 2]]
    assert torch.allclose(weights, doubles([[THIRD, 0.0, TWO_THIRDS]]))
    # channels: in all masks, in the first alone, in the one that is not chosen, in the last at half, in none
    z = doubles([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 0.5, 0]])
    factors = channel_factors(weights, z)
    assert torch.allclose(factors, doubles([[1, THIRD, 0, THIRD, 0]]))
    assert (factors[0, 0], factors[0, 2], factors[0, 4]) == (1, 0, 0)  # exactly


def test_all_masks_open_is_a_factor_of_one_exactly():
    weights, _ = choose_masks(torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)), 4)
    z = torch.ones(8, 3)
    assert (channel_factors(weights, z) == 1).all()
    assert not (weights @ z == 1).all()  # control: the bare sum of weights


def test_sets_are_found_at_their_place():
    assert mask_sets(4, 2).tolist() == [[0, 1], [0, 2], [1, 2], [0, 3], [1, 3], [2, 3]]
    for masks, k in ((3, 2), (6, 2), (7, 3), (8, 4)):
        sets = mask_sets(masks, k)
        assert len(sets) == math.comb(masks, k)
        assert set_index(sets, set_places(masks, k)).tolist() == list(range(len(sets)))
    assert set_index(torch.tensor([[[1, 3]], [[0, 1]]]), set_places(4, 2)).tolist() == [[4], [0]]


def test_activated_fraction_worked_by_hand():
    # of four tokens three choose masks 0 and 1, and one 1 and 2
    probability = doubles([[1.0, 0.5, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.2]])
    load = doubles([0.75, 0.0, 0.25])
    found = activated(probability, mask_sets(3, 2), load)
    assert torch.allclose(found, doubles([0.75, 0.75 * 0.75 + 0.25 * 0.5, 0.25 * 0.2]))
    evenly = activated(probability, mask_sets(3, 2), doubles([THIRD] * 3))  # control: who chooses matters
    assert not torch.allclose(found, evenly)


@pytest.mark.parametrize(("masks", "k"), [(3, 2), (5, 2), (6, 3)])
def test_naive_references(masks: int, k: int):
    generator = torch.Generator().manual_seed(masks)
    tokens, channels = 7, 5
    logits = torch.randn(tokens, masks, generator=generator, dtype=torch.float64)
    z = torch.rand(masks, channels, generator=generator, dtype=torch.float64)
    z[:, 1] = 1.0
    z[0, 2], z[1, 3] = 0.0, 1.0
    weights, chosen = choose_masks(logits, k)
    rows = [equations.mix_masks(row.tolist(), z.tolist(), k) for row in logits]
    assert chosen.tolist() == [row.chosen for row in rows]
    expected = doubles([row.factors for row in rows])
    assert (channel_factors(weights, z) - expected).abs().max() < FLOAT64_ATOL
    sets = mask_sets(masks, k)
    load = torch.bincount(set_index(chosen, set_places(masks, k)), minlength=len(sets)) / tokens
    fraction = float(activated(z, sets, load.double()).mean())
    right = equations.activated_fraction(z.tolist(), [row.chosen for row in rows])
    # the load came in float32
    assert fraction == pytest.approx(right, abs=1e-7)


def test_gradients_are_those_of_central_differences():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    z = (0.1 + 0.8 * torch.rand(4, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    sets, load = mask_sets(4, 2), doubles([0.3, 0.1, 0.2, 0.2, 0.2, 0.0])

    def value() -> torch.Tensor:
        weights, _ = choose_masks(logits, 2)
        return (channel_factors(weights, z) * upstream).sum() + 2 * activated(z, sets, load).mean()

    found = torch.autograd.grad(value(), (logits, z))
    for tensor, gradient in zip((logits, z), found, strict=True):
        for place in itertools.product(*(range(n) for n in tensor.shape)):
            with torch.no_grad():
                tensor[place] += STEP
                above = value()
                tensor[place] -= 2 * STEP
                below = value()
                tensor[place] += STEP
            assert float((above - below) / (2 * STEP) - gradient[place]) == pytest.approx(
                0, abs=DIFFERENCE_ATOL
            )
        assert gradient.abs().max() > 1e-2


def test_hard_masks_worked_by_hand():
    # sets 01, 02, 12 with half, a quarter and a quarter of the tokens; entries by score:
    # mask 0 channel 0 -> 3/4 of a channel; mask 1 channel 0 -> 1; mask 2 channel 3 -> 1.5; mask 1 channel 3 -> 2
    log_alpha = torch.tensor([[9.0, 1, 1, 0], [8, 1, 1, 6], [0, 0, 0, 7]])
    load = doubles([0.5, 0.25, 0.25])
    sets = mask_sets(3, 2)
    assert hard_masks(log_alpha, sets, load, 0.5).tolist() == [[1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1]]
    assert hard_masks(log_alpha, sets, load, 0.49).tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    # ties of 1: channel 1 before channel 2, mask 0 before mask 1
    assert hard_masks(log_alpha, sets, load, 0.7).tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1]]
    all_alike = hard_masks(torch.ones(3, 4), sets, load, 0.5)
    assert all_alike.tolist() == [[1, 1, 0, 0]] * 3  # and not mask 0 before all others
    assert hard_masks(log_alpha, sets, load, 1e-3).sum() == 1
    assert hard_masks(log_alpha, sets, load, 1.0).sum() == 12


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_hard_masks_come_close_to_the_target_from_below(target: float):
    generator = torch.Generator().manual_seed(2)
    log_alpha = torch.randn(5, 200, generator=generator)
    sets = mask_sets(5, 2)
    load = torch.rand(len(sets), generator=generator)
    load /= load.sum()
    masks = hard_masks(log_alpha, sets, load, target)
    fraction = float(activated(masks.double(), sets, load).mean())
    assert target - 1 / 200 <= fraction <= target + 1e-6
    assert log_alpha[masks == 1].min() > log_alpha[masks == 0].max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l0_masks_top_k": 1}, r"l0_masks_top_k must be at least 2 and below l0_masks \(8\), got 1"),
        ({"l0_masks": 2}, r"at least 2 and below l0_masks \(2\), got 2"),
        ({"l0_masks": 33}, "make 528 sets of masks, which must be at most 512"),
        ({"l0_masks_target": 1.0}, "l0_masks_target must be above 0 and below 1, got 1.0"),
        ({"l0_masks_balance_coeff": -0.1}, "l0_masks_balance_coeff must be at least 0"),
        ({"l0_masks_init_std": 0.0}, "l0_masks_init_std must be above 0"),
    ],
)
def test_wrong_settings_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**change)
