"""The next-item objective under the paper's layer and SASRec: no position sees a later one."""

import numpy as np
import pytest

from tests.model import test_next_item as shared

_PAPER = {
    "use_silu_qkv": True,
    "use_position_bias": True,
    "use_time_bias": True,
    "time_bias_query": "own",  # a prefix's newest token has no next one
    "attn_alpha": 1.0,
}
OPTIONS = {
    "paper": {"stu": _PAPER, "hstu": shared.positions(use_time_encoding=False)},
    "sasrec": {"encoder": "sasrec", "hstu": shared.positions(use_time_encoding=False)},
}


@pytest.fixture(autouse=True)
def _options(monkeypatch):
    for name, options in OPTIONS.items():
        monkeypatch.setitem(shared.OPTIONS, name, options)


@pytest.mark.parametrize("name", OPTIONS)
def test_output_at_a_token_is_the_user_vector_of_the_tokens_up_to_it(name):
    shared.test_output_at_a_token_is_the_user_vector_of_the_tokens_up_to_it(name)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_gradient_comes_from_what_is_later(name):
    model, params, _, lookups, batch = shared.setting(name)
    found, seen = shared.leaks(*shared.gradients(model, params, lookups, batch))
    assert found == []
    assert seen == sum(n * (n + 1) // 2 for n in np.array(shared.LENGTHS) - shared.CONTEXTUAL)
