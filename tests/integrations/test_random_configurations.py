"""Random dimensions of random families: absorbed equals stock, at once and token by token on a cache."""

import copy

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla.cache import LatentCache
from mla.config import MLAConfig
from mla.integrations.transformers import absorb, latent_attentions
from tests.families import FAMILY_NAMES, build, token_ids

# Families whose RoPE width, query rank and heads are free; the others tie them to other fields.
FREE = [name for name in FAMILY_NAMES if name not in ("dots3_note", "glm5_next", "kimi_linear")]


@st.composite
def configurations(draw):
    name = draw(st.sampled_from(FREE))
    heads = draw(st.sampled_from([1, 2, 3, 5, 8]))
    overrides = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        # Even, because stock DeepSeek-V2 views the rotary part behind them as complex numbers.
        "kv_lora_rank": 2 * draw(st.integers(1, 35)),
        "qk_nope_head_dim": 2 * draw(st.integers(1, 20)),
        "v_head_dim": draw(st.integers(1, 40)),
    }
    if "rope_interleave" in vars(build(name).config):
        overrides["rope_interleave"] = draw(st.booleans())
    return name, overrides, draw(st.integers(2, 30)), draw(st.integers(1, 3))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(configurations())
@torch.no_grad()
def test_absorbed_equals_stock(case):
    name, overrides, length, batch = case
    stock = build(name, **overrides)
    absorbed = absorb(copy.deepcopy(stock))
    ids = token_ids(batch, length)
    want = stock(ids, use_cache=False).logits
    torch.testing.assert_close(absorbed(ids, use_cache=False).logits, want, atol=1e-4, rtol=1e-4)

    cache = LatentCache(absorbed.config.get_text_config(decoder=True))
    cut = length // 2
    steps = [ids[:, :cut], *ids[:, cut:].split(1, dim=1)]
    got = torch.cat([absorbed(step, past_key_values=cache).logits for step in steps if step.shape[1]], dim=1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

    config = MLAConfig.from_transformers(stock.config)
    for layer, module in enumerate(latent_attentions(stock).values()):
        if name != "longcat_flash":  # two attentions per layer: its slots are not its modules' indices
            assert abs(config.at_layer(layer).softmax_scale - module.scaling) < 1e-9
