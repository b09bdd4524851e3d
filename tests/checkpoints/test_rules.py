"""Rules against naive loops and hand-worked numbers, in both directions, each with a control that fails."""

import pytest
import torch

from megatron_l0moe.checkpoints import rules
from megatron_l0moe.checkpoints.rules import (
    QKV,
    Experts,
    GatedMLP,
    Rename,
    Zeros,
    blocks,
    check_names,
    check_shape,
    half_split_rows,
    hf_shapes,
    interleaved_rows,
)
from megatron_l0moe.errors import L0MoEError

HEADS, GROUPS, HEAD_DIM, HIDDEN = 4, 2, 4, 3


def random_state(rule, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in rule.hf_shapes().items()}


def megatron_state(rule, state):
    """Run a rule towards Megatron and put its pieces together."""
    return joined(rule.to_megatron(reader(state)))


def joined(pieces):
    merged = {}
    for piece in pieces:
        rows = merged.setdefault(piece.name, torch.full(piece.shape, torch.nan))
        part = rows[piece.begin : piece.begin + len(piece.tensor)]
        assert part.isnan().all(), "written twice"
        part.copy_(piece.tensor)
    return merged


def reader(state):
    return lambda name, begin=0, end=None: state[name][begin:end]


def hf_state(rule, merged):
    return joined(rule.to_hf(reader(merged)))


def qkv(**changes):
    values = {"megatron": "qkv", "hf": "attn", "suffix": "weight", "heads": HEADS, "groups": GROUPS}
    return QKV(**{**values, "head_dim": HEAD_DIM, "hidden": HIDDEN, **changes})


RULES = {
    "rename": Rename(megatron="m", hf="h", shape=(3, 2)),
    "qkv": qkv(),
    "qkv-bias": qkv(suffix="bias"),
    "qkv-interleaved-rope": qkv(interleaved_rope=True),
    "qkv-one-group": qkv(groups=1),
    "qkv-no-grouping": qkv(groups=HEADS),
    "gated-mlp": GatedMLP(megatron="fc1", gate="g", up="u", ffn=5, hidden=3),
    "experts": Experts(fc1="fc1", fc2="fc2", hf="experts.{expert}", num_experts=3, expert_ffn=2, hidden=4),
}


@pytest.mark.parametrize("block", [1, 7, 2**22])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_there_and_back_gives_the_same_bits_and_the_announced_shapes(rule, block, monkeypatch):
    monkeypatch.setattr(rules, "BLOCK_VALUES", block)
    state = random_state(rule)
    merged = megatron_state(rule, state)
    assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == rule.megatron_shapes()
    monkeypatch.setattr(rules, "BLOCK_VALUES", 2**22)
    whole = megatron_state(rule, state)
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    monkeypatch.setattr(rules, "BLOCK_VALUES", block)
    back = hf_state(rule, merged)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_blocks_by_hand(monkeypatch):
    monkeypatch.setattr(rules, "BLOCK_VALUES", 10)
    assert list(blocks((5, 4))) == [(0, 2), (2, 4), (4, 5)]
    assert list(blocks((3,))) == [(0, 3)]
    assert list(blocks((2, 99))) == [(0, 1), (1, 2)]  # a row is never cut


def naive_qkv(q, k, v, heads, groups, head_dim):
    """Row by row: for each group its q heads, then its k head, then its v head."""
    rows = []
    per_group = heads // groups
    for g in range(groups):
        for head in range(g * per_group, (g + 1) * per_group):
            rows += [q[head * head_dim + d] for d in range(head_dim)]
        rows += [k[g * head_dim + d] for d in range(head_dim)]
        rows += [v[g * head_dim + d] for d in range(head_dim)]
    return torch.stack(rows)


def test_qkv_equals_the_naive_loop_and_plain_concatenation_does_not():
    rule = qkv()
    state = random_state(rule)
    q, k, v = (state[f"attn.{n}_proj.weight"] for n in "qkv")
    merged = megatron_state(rule, state)["qkv.weight"]
    assert torch.equal(merged, naive_qkv(q, k, v, HEADS, GROUPS, HEAD_DIM))
    assert not torch.equal(merged, torch.cat([q, k, v]))


def test_qkv_by_hand():
    """2 heads, 2 groups, head_dim 1: rows are q0 k0 v0 q1 k1 v1."""
    rule = qkv(heads=2, groups=2, head_dim=1, hidden=1)
    state = {
        "attn.q_proj.weight": torch.tensor([[10.0], [11.0]]),
        "attn.k_proj.weight": torch.tensor([[20.0], [21.0]]),
        "attn.v_proj.weight": torch.tensor([[30.0], [31.0]]),
    }
    assert megatron_state(rule, state)["qkv.weight"].flatten().tolist() == [10, 20, 30, 11, 21, 31]


def test_interleaved_rows_by_hand():
    """One head of dimension 4: halves (0, 1 | 2, 3) become neighbours 0 2 1 3."""
    x = torch.arange(8.0)
    assert interleaved_rows(x, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert half_split_rows(interleaved_rows(x, 4), 4).tolist() == x.tolist()


def test_interleaved_rope_changes_q_and_k_but_not_v():
    state = random_state(qkv())
    merged = megatron_state(qkv(), state)
    exported = hf_state(qkv(interleaved_rope=True), merged)
    for n in "qk":
        name = f"attn.{n}_proj.weight"
        assert torch.equal(exported[name], interleaved_rows(state[name], HEAD_DIM))
        assert not torch.equal(exported[name], state[name])
    assert torch.equal(exported["attn.v_proj.weight"], state["attn.v_proj.weight"])


def test_scores_do_not_depend_on_the_rope_layout():
    """q.k after half-split RoPE equals q.k of the reordered rows after interleaved RoPE; without it, not."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(2))

    def rotated(x, position, pairs):
        out = x.clone()
        for i, (a, b) in enumerate(pairs):
            angle = torch.tensor(position * 10000.0 ** (-2 * i / HEAD_DIM), dtype=torch.float64)
            out[a] = x[a] * angle.cos() - x[b] * angle.sin()
            out[b] = x[b] * angle.cos() + x[a] * angle.sin()
        return out

    halves, neighbours = [(0, 2), (1, 3)], [(0, 1), (2, 3)]
    expected = rotated(q, 5, halves) @ rotated(k, 2, halves)
    reordered = [interleaved_rows(x, HEAD_DIM) for x in (q, k)]
    got = rotated(reordered[0], 5, neighbours) @ rotated(reordered[1], 2, neighbours)
    control = rotated(q, 5, neighbours) @ rotated(k, 2, neighbours)
    assert torch.isclose(got, expected, atol=1e-12)
    assert not torch.isclose(control, expected, atol=1e-3)


def test_gated_mlp_by_hand_puts_gate_first():
    rule = GatedMLP(megatron="fc1", gate="g", up="u", ffn=2, hidden=1)
    state = {"g": torch.tensor([[1.0], [2.0]]), "u": torch.tensor([[3.0], [4.0]])}
    assert megatron_state(rule, state)["fc1"].flatten().tolist() == [1, 2, 3, 4]
    swapped = {"g": state["u"], "u": state["g"]}
    assert megatron_state(rule, swapped)["fc1"].flatten().tolist() != [1, 2, 3, 4]


def test_experts_equal_the_naive_loop():
    rule = RULES["experts"]
    state = random_state(rule)
    merged = megatron_state(rule, state)
    for k in range(3):
        gate, up, down = (state[f"experts.{k}.{n}_proj.weight"] for n in ("gate", "up", "down"))
        for unit in range(2):
            assert torch.equal(merged["fc1"][k][unit], gate[unit])
            assert torch.equal(merged["fc1"][k][2 + unit], up[unit])
            assert torch.equal(merged["fc2"][k][:, unit], down[:, unit])


def test_zeros_are_written_in_float32_and_checked_on_import():
    rule = Zeros(hf="bias", shape=(1, 3))
    (written,) = rule.to_hf(reader({}))
    assert written.tensor.dtype is torch.float32
    assert not written.tensor.any()
    assert list(rule.to_megatron(reader({"bias": torch.zeros(1, 3)}))) == []
    with pytest.raises(L0MoEError, match="bias must be all zeros"):
        rule.to_megatron(reader({"bias": torch.ones(1, 3)}))


def test_unknown_and_missing_names_stop_with_the_name():
    with pytest.raises(L0MoEError, match=r"model holds the tensor a\.wieght.*did you mean 'a\.weight'"):
        check_names({"a.wieght", "a.weight"}, {"a.weight"}, "model")
    with pytest.raises(
        L0MoEError, match=r"model lacks the tensor b .*\(1 more like it\)|model lacks the tensor b"
    ):
        check_names({"a"}, {"a", "b", "c"}, "model")
    check_names({"a"}, {"a"}, "model")


def test_wrong_shape_stops_with_both_shapes():
    with pytest.raises(L0MoEError, match=r"tensor w has the shape \[2, 3\].*needs \[3, 2\]"):
        check_shape("w", (2, 3), {"w": (3, 2)}, "model")


def test_a_table_that_uses_a_tensor_twice_is_our_bug():
    rule = RULES["rename"]
    with pytest.raises(AssertionError, match="two rules use"):
        hf_shapes([rule, rule])
