"""The doctor's refusals; what it finds is tested where the command line shows it."""

import pytest
import torch

from mla.errors import MLAError
from mla.integrations.doctor import diagnose
from mla.integrations.transformers import is_absorbed
from tests.families import build, token_ids


@pytest.mark.parametrize("ids", [token_ids(1, 7), token_ids(1, 513), token_ids(2, 8), token_ids(1, 8)[0]])
def test_ids_that_make_no_chunks(ids):
    with pytest.raises(MLAError, match=r"ids: expected \[1, t\] with t from 8 to 512, got shape"):
        diagnose(build("deepseek_v3"), ids)


def test_the_fewest_ids_and_the_most():
    model = build("deepseek_v3")
    assert diagnose(model, token_ids(1, 8)).safe
    assert diagnose(model, token_ids(1, 512)).positions == ((0, 511),)


def test_weights_that_no_cache_format_holds():
    model = build("deepseek_v3").double()
    with pytest.raises(MLAError, match=r"expected weights in fp32, bf16 or fp16, got torch.float64; convert"):
        diagnose(model, token_ids(1, 8))
    assert not is_absorbed(model)


def test_an_adapter_is_refused_as_absorb_refuses_it():
    model = build("deepseek_v3")
    attention = model.model.layers[1].self_attn
    attention.kv_b_proj = torch.nn.Sequential(attention.kv_b_proj)
    with pytest.raises(MLAError, match=r"layers\.1\.self_attn\.kv_b_proj: .* merge an adapter"):
        diagnose(model, token_ids(1, 8))
