"""Parameters of exports by method, against the weights that transformers makes of their config.json."""

import pytest
from planning.test_parameters import MOE, TINY
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.modules.mixture_of_masks import MOST_SETS
from megatron_l0moe.recipe.recipe import MOST_SETS as MOST_SETS_OF_A_RECIPE
from megatron_l0moe.sizes.parameters import count_parameters, exported_counts


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_mom(shared):
    config = Ernie4_5_MoeConfig(**TINY, **{**MOE, "moe_num_shared_experts": shared}, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    weights = sum(w.numel() for name, w in model.named_parameters() if "e_score_correction_bias" not in name)
    counts = exported_counts("mom", config.to_dict())
    assert counts.total == weights
    idle = 2 * (4 - 2) * 3 * 32 * 12  # of two layers the experts that a token does not use
    assert counts.active == weights - idle
    if shared:
        with pytest.raises(L0MoEError, match="shared experts"):  # an L0-MoE never has them
            exported_counts("l0moe", config.to_dict())
    else:
        assert counts == count_parameters(config.to_dict())


def test_a_recipe_allows_as_many_sets_of_masks_as_a_job():
    assert MOST_SETS_OF_A_RECIPE == MOST_SETS
