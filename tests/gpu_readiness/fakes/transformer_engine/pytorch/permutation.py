"""Permutation of tokens to experts.

Shapes: T = tokens, K = experts, R = routed rows (sorted by expert), h = hidden.
"""

import torch


def _rows(routing_map):
    """Return the token and the expert of each row, sorted by expert."""
    expert, token = routing_map.bool().T.nonzero(as_tuple=True)
    return token, expert


def moe_permute(inp, routing_map, num_out_tokens, max_token_num=-1, map_type="mask"):
    token, expert = _rows(routing_map)
    return inp.index_select(0, token), torch.stack([token, expert])


def moe_permute_with_probs(inp, probs, routing_map, num_out_tokens):
    permuted, row_id_map = moe_permute(inp, routing_map, num_out_tokens)
    return permuted, probs[row_id_map[0], row_id_map[1]], row_id_map


def moe_unpermute(
    inp, row_id_map, merging_probs=None, restore_shape=None, map_type="mask", probs=None, pad_offsets=None
):
    assert restore_shape is not None
    if merging_probs is not None:
        inp = inp * merging_probs[row_id_map[0], row_id_map[1]].unsqueeze(-1)
    return inp.new_zeros(restore_shape).index_add(0, row_id_map[0], inp)


def moe_sort_chunks_by_index_with_probs(inp, probs, split_sizes, sorted_index):
    order = torch.cat([torch.arange(len(inp)).split(split_sizes.tolist())[i] for i in sorted_index.tolist()])
    return inp[order], probs[order] if probs is not None else None


def moe_sort_chunks_by_index(inp, split_sizes, sorted_index):
    return moe_sort_chunks_by_index_with_probs(inp, None, split_sizes, sorted_index)[0]
