"""LatentCache: growth, exact roll-back, beams, poisoned memory, misuse."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from mla.cache import LatentCache
from mla.cache.contiguous import IndexedLatentLayer, LatentLayer, _Rows
from mla.cache.store import copy_prefix
from mla.config import MLAConfig
from mla.integrations.transformers import absorb
from tests.families import FAMILY_NAMES, build, make_config, token_ids

R, P = 24, 6
TINY = {
    "model_type": "deepseek_v3",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "kv_lora_rank": R,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": P,
    "v_head_dim": 8,
}


def latents(s, b=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(b, 1, s, R, generator=generator).to(dtype),
        torch.randn(b, 1, s, P, generator=generator).to(dtype),
    )


def poison(cache):
    """NaN in every row that is allocated but not in use."""
    for layer in cache.latent_layers:
        for rows in layer._buffers():
            rows._buffer[:, rows.length :] = torch.nan


@pytest.mark.parametrize("capacity", [None, 1, 7, 200])
def test_update_returns_everything_in_order(capacity):
    cache = LatentCache(capacity=capacity)
    c_kv, k_rope = latents(60)
    start = 0
    for size in [1, 5, 1, 1, 20, 32]:
        part = slice(start, start + size)
        got_c, got_k = cache.update(c_kv[:, :, part], k_rope[:, :, part], layer_idx=1)
        start += size
        assert torch.equal(got_c, c_kv[:, :, :start])
        assert torch.equal(got_k, k_rope[:, :, :start])
        assert cache.get_seq_length(1) == start
        poison(cache)
    assert torch.equal(cache.layers[1].latents.c_kv, c_kv[:, 0])
    assert torch.equal(cache.layers[1].latents.k_rope, k_rope[:, 0])


def test_known_capacity_allocates_once_and_exactly():
    cache = LatentCache(capacity=40)
    c_kv, k_rope = latents(40)
    addresses = set()
    for i in range(40):
        cache.update(c_kv[:, :, i : i + 1], k_rope[:, :, i : i + 1], 0)
        addresses.add(cache.layers[0].latents.c_kv.data_ptr())
    assert len(addresses) == 1
    assert cache.nbytes == 2 * 40 * (R + P) * 4


def test_growing_copies_rarely_and_holds_little_more_than_it_uses():
    cache = LatentCache()
    c_kv, k_rope = latents(4096, b=1, dtype=torch.bfloat16)
    addresses, total = [], 0
    cache.update(c_kv[:, :, :3000], k_rope[:, :, :3000], 0)
    for i in range(3000, 4096):
        cache.update(c_kv[:, :, i : i + 1], k_rope[:, :, i : i + 1], 0)
        addresses.append(cache.layers[0]._rows._buffer.data_ptr())
        total = cache.nbytes
        assert total <= 1.01 * (i + 1) * (R + P) * 2
    moves = sum(a != b for a, b in itertools.pairwise(addresses))
    assert moves < 1096 / 20


def test_a_reserved_capacity_is_allocated_when_more_is_needed_and_exactly():
    cache = LatentCache(capacity=10)
    c_kv, k_rope = latents(70)

    def write(start, end):
        cache.update(c_kv[:, :, start:end], k_rope[:, :, start:end], 0)
        return cache.nbytes // (2 * (R + P) * 4)

    assert write(0, 10) == 10
    cache.reserve(50)
    cache.reserve(20)  # fewer than were asked for
    assert cache.nbytes == 2 * 10 * (R + P) * 4
    assert write(10, 11) == write(11, 50) == 50
    assert write(50, 51) == 67  # nobody has said how many
    cache.reserve(70)
    assert write(51, 70) == 70
    assert torch.equal(cache.layers[0].latents.c_kv, c_kv[:, 0])
    assert cache.update(c_kv, k_rope, 1)[0].shape[2] == 70  # a layer that comes later
    with pytest.raises(ValueError, match="capacity: expected at least 1 token, got 0"):
        cache.reserve(0)


def test_room_that_is_given_back():
    cache, c_kv, k_rope = LatentCache(capacity=70), *latents(70)

    def rooms():
        return [layer.nbytes // (2 * (R + P) * 4) for layer in cache.layers]

    for layer in range(2):
        cache.update(c_kv, k_rope, layer)
    cache.crop(-50)
    cache.shrink(80)
    assert rooms() == [70, 70]
    cache.shrink(30)
    assert rooms() == [30, 30]
    assert torch.equal(cache.update(c_kv[:, :, 20:30], k_rope[:, :, 20:30], 0)[0], c_kv[:, :, :30])
    cache.shrink(5)  # less than is held
    assert rooms() == [30, 20]
    assert torch.equal(cache.layers[1].keys, c_kv[:, :, :20])
    cache.reserve(40)
    cache.update(c_kv[:, :, 30:31], k_rope[:, :, 30:31], 0)
    assert rooms() == [40, 20]
    with pytest.raises(ValueError, match="capacity: expected at least 1 token, got 0"):
        cache.shrink(0)


def test_paper_dimensions_take_1152_bytes_per_token_and_layer():
    cache = LatentCache(capacity=4096)
    cache.update(torch.zeros(1, 1, 4096, 512, dtype=torch.bfloat16), torch.zeros(1, 1, 4096, 64), 0)
    assert cache.nbytes / 4096 == 1152


@pytest.mark.parametrize(
    ("name", "bytes_per_token"), [("fp32", 120), ("fp16", 60), ("bf16", 60), ("int8", 40)]
)
def test_formats(name, bytes_per_token):
    """What is stored is the rounded latent, in whatever order it came, in the bytes of the format."""
    cache = LatentCache(format=name)
    c_kv, k_rope = latents(50)
    for start, end in [(0, 7), (7, 8), (8, 50)]:
        cache.update(c_kv[:, :, start:end], k_rope[:, :, start:end], 0)
    held = cache.layers[0].latents
    got_c, got_k = held.numbers(torch.float32)
    step = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "int8": 1 / 254}[name]
    largest = c_kv[:, 0].abs().amax(-1, keepdim=True)
    assert ((got_c - c_kv[:, 0]).abs() <= step * largest * 1.001).all()
    assert ((got_k - k_rope[:, 0]).abs() <= min(step, 2**-8) * k_rope[:, 0].abs()).all()
    assert MLAConfig.from_dict(TINY).cache_bytes_per_token_and_layer(name) == bytes_per_token
    exact = LatentCache(format=name, capacity=50)
    exact.update(c_kv, k_rope, 0)
    assert exact.nbytes == 2 * 50 * bytes_per_token
    assert torch.equal(exact.layers[0].keys, cache.layers[0].keys)
    cache.crop(-30)
    cache.update(c_kv[:, :, 20:], k_rope[:, :, 20:], 0)
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].keys, exact.layers[0].keys.repeat_interleave(2, 0))


def test_crop_is_exact():
    cache = LatentCache()
    c_kv, k_rope = latents(30)
    wrong_c, wrong_k = latents(9, seed=5)
    cache.update(c_kv[:, :, :20], k_rope[:, :, :20], 0)
    cache.update(wrong_c, wrong_k, 0)
    cache.crop(-9)
    assert cache.get_seq_length() == 20
    poison(cache)
    got_c, got_k = cache.update(c_kv[:, :, 20:], k_rope[:, :, 20:], 0)
    assert torch.equal(got_c, c_kv)
    assert torch.equal(got_k, k_rope)
    assert cache.is_croppable


def test_reset_keeps_the_memory_and_takes_another_batch():
    cache = LatentCache(capacity=16)
    cache.update(*latents(10), 0)
    before = cache.layers[0]._rows._buffer.data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.layers[0]._rows._buffer.data_ptr() == before
    c_kv, k_rope = latents(3, b=5)
    got_c, _ = cache.update(c_kv, k_rope, 0)
    assert torch.equal(got_c, c_kv)


def test_beams():
    cache = LatentCache(capacity=9)
    c_kv, k_rope = latents(4, b=3)
    cache.update(c_kv, k_rope, 0)
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].latents.c_kv, c_kv[:, 0].repeat_interleave(2, 0))
    order = torch.tensor([5, 0, 0, 3, 2, 1])
    cache.reorder_cache(order)
    assert torch.equal(cache.layers[0].latents.k_rope, k_rope[:, 0].repeat_interleave(2, 0)[order])
    cache.batch_select_indices(torch.tensor([1]))
    got_c, _ = cache.update(*latents(1, b=1), 0)
    assert torch.equal(got_c[0, 0, :4], c_kv[0, 0])
    assert cache.nbytes == 9 * (R + P) * 4


def test_beams_under_another_default_device():
    cache, c_kv = _filled(), latents(5)[0]
    with torch.device("meta"):
        cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].keys, c_kv.repeat_interleave(2, 0))


def test_a_view_taken_earlier_stays_right_after_growth():
    cache = LatentCache()
    c_kv, k_rope = latents(50)
    early, _ = cache.update(c_kv[:, :, :10], k_rope[:, :, :10], 0)
    cache.update(c_kv[:, :, 10:], k_rope[:, :, 10:], 0)
    assert torch.equal(early, c_kv[:, :, :10])


def test_offload_and_prefetch(monkeypatch):
    """To the CPU, and back to the device of the first write; there is one device here, so moves are noted."""
    cache = LatentCache()
    c_kv, k_rope = latents(5)
    cache.update(c_kv, k_rope, 0)
    layer = cache.layers[0]
    moves, move = [], _Rows.to
    monkeypatch.setattr(_Rows, "to", lambda rows, device: moves.append(device) or move(rows, device))
    layer.offload()
    layer.prefetch()
    assert moves == [torch.device("cpu")] * 2
    assert torch.equal(layer.keys, c_kv)
    layer._rows.home = torch.device("meta")
    layer.prefetch()
    assert layer.keys.device.type == "meta"


@pytest.mark.parametrize("name", FAMILY_NAMES)
@torch.no_grad()
def test_layers_of_each_family(name):
    """Latent layers where the family has them, Transformers' own elsewhere, bytes as the config says."""
    model, ids = build(name), token_ids(2, 20)
    config = MLAConfig.from_transformers(model.config)
    cache = LatentCache(make_config(name).get_text_config(decoder=True), capacity=20)
    model(ids, past_key_values=cache)
    held = [
        i for i, layer in enumerate(cache.layers) if isinstance(layer, LatentLayer) and layer.is_initialized
    ]
    sliding = [i for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicSlidingWindowLayer)]
    assert sorted(held + sliding) == list(config.mla_layers)
    indexed = [i for i, layer in enumerate(cache.layers) if isinstance(layer, IndexedLatentLayer)]
    assert {i for i in indexed if cache.layers[i].is_indexer_initialized} == set(config.indexer_layers)
    assert cache.nbytes == 2 * config.cache_bytes(20, "fp32")
    # Windows of Transformers keep the model's dtype.
    if not sliding:
        small = LatentCache(make_config(name).get_text_config(decoder=True), capacity=20, format="int8")
        absorb(model)(ids, past_key_values=small)
        assert small.nbytes == 2 * config.cache_bytes(20, "int8")
    if name in ("kimi_linear", "bailing_hybrid", "glm5_next"):
        assert any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LatentCache(capacity=0), "capacity: expected at least 1"),
        (
            lambda: LatentCache(format="int4"),
            "cache format: expected one of fp32, fp16, bf16, int8, got 'int4'",
        ),
        (
            lambda: LatentCache().update(torch.zeros(1, 2, 3, R), torch.zeros(1, 2, 3, P), 0),
            "holds latents only",
        ),
        (
            lambda: LatentCache().update(torch.zeros(1, 1, 3, R), torch.zeros(1, 1, 2, P), 0),
            "holds latents only",
        ),
        (lambda: _filled().update(*latents(1, b=3), 0), "expected rows of batch 2 and width 30, got batch 3"),
        (
            lambda: _filled().update(torch.zeros(2, 1, 1, R - 2), torch.zeros(2, 1, 1, P + 2), 0),
            "expected latents of 24 numbers and rotary keys of 6",
        ),
        (lambda: _filled().crop(-6), "cannot remove 6 tokens from a cache that holds 5"),
        (lambda: _filled().crop(2), "expected minus the number of tokens"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _filled():
    cache = LatentCache()
    cache.update(*latents(5), 0)
    return cache


def test_after_a_reset_the_cache_takes_other_sizes_and_dtypes():
    cache = LatentCache()
    cache.update(*latents(4, dtype=torch.bfloat16), 0)
    cache.reset()
    got_c, got_k = cache.update(torch.ones(2, 1, 3, R - 4), torch.zeros(2, 1, 3, P + 4), 0)
    assert (got_c.shape[-1], got_k.shape[-1], got_c.dtype) == (R - 4, P + 4, torch.float32)
    assert torch.equal(got_c, torch.ones(2, 1, 3, R - 4))


def test_a_roll_back_leaves_contexts_alone_and_crops_all_layers_or_none():
    cache = LatentCache()
    for index, length in enumerate([6, 7, 2]):
        cache.update(*latents(length), index)
    with pytest.raises(ValueError, match="cannot remove 3 tokens from a cache that holds 2"):
        cache.crop(-3)
    assert [cache.get_seq_length(i) for i in range(3)] == [6, 7, 2]
    cache.layers[1].holds_context = True
    cache.crop(-2)
    assert [cache.get_seq_length(i) for i in range(3)] == [4, 7, 0]
    cache.reset()
    assert [cache.get_seq_length(i) for i in range(3)] == [0, 0, 0]
    cache.update(*latents(5), 1)  # not of a context any more
    cache.layers[1].crop(-2)
    assert cache.get_seq_length(1) == 3


@pytest.mark.parametrize(
    ("other", "size"),
    [(DynamicSlidingWindowLayer(4), 5), (LinearAttentionLayer(), 3)],
    ids=["window", "linear"],
)
def test_a_layer_of_transformers_that_cannot_be_cropped_leaves_all_as_they_were(other, size):
    cache = LatentCache()
    cache.layers = [LatentLayer(), other]

    def write():
        cache.update(*latents(size), 0)
        if isinstance(other, LinearAttentionLayer):
            cache.update_conv_state(torch.ones(2, 3, size), 1, conv_kernel_size=2)
        else:
            cache.update(*latents(size), 1)

    write()
    with pytest.raises(RuntimeError, match=r"Layer as layer 1, .* call activate_past_recording\(\)"):
        cache.crop(-2)
    assert cache.get_seq_length(0) == size
    cache.reset()
    cache.activate_past_recording()
    write()
    cache.crop(-2)
    assert cache.get_seq_length(0) == size - 2


@pytest.mark.parametrize("name", [None, "bf16"])
def test_gradients_flow_through_the_new_tokens_only(name):
    cache = LatentCache(capacity=20, format=name)
    weight = torch.ones(R, requires_grad=True)
    c_kv, k_rope = latents(6, b=1)
    total = torch.zeros(())
    for start in (0, 2, 4):
        part = slice(start, start + 2)
        keys, values = cache.update(c_kv[:, :, part] * weight, k_rope[:, :, part], 0)
        assert torch.equal(keys, cache.layers[0].keys)
        assert torch.equal(values, cache.layers[0].values)
        total = total + keys.square().sum()
    assert not cache.layers[0].keys.requires_grad
    total.backward()
    close = {} if name is None else {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(weight.grad, 2 * c_kv.square().sum((0, 1, 2)), **close)


def test_int8_refuses_latents_that_carry_gradients():
    """Rows of bytes would drop them."""
    cache = LatentCache(format="int8")
    c_kv, k_rope = latents(3)
    cache.update(c_kv, k_rope, 0)
    for new in ((c_kv.clone().requires_grad_(), k_rope), (c_kv, k_rope.clone().requires_grad_())):
        with pytest.raises(ValueError, match=r"expected latents without gradients, .* another format"):
            cache.update(*new, 0)
        with torch.no_grad():
            cache.update(*new, 0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(c_kv, torch.ones_like(c_kv))
        with pytest.raises(ValueError, match="expected latents without gradients"):
            cache.update(dual, k_rope, 0)
        cache.update(c_kv, k_rope, 0)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("name", [None, "int8"])
def test_queries_learn_beside_frozen_latents(name):
    """What a call was given stays as it was until the backward pass, whatever the cache holds by then."""
    cache = LatentCache(capacity=20, format=name)
    q = torch.ones(P, dtype=torch.bfloat16, requires_grad=True)
    c_kv, k_rope = latents(6, b=1, dtype=torch.bfloat16)
    total, wrong = torch.zeros(()), latents(2, b=1, seed=5, dtype=torch.bfloat16)
    for start in (0, 2, 4):
        part = slice(start, start + 2)
        _, values = cache.update(c_kv[:, :, part], k_rope[:, :, part], 0)
        total = total + (values * q).float().sum()
        cache.update(*wrong, 0)
        cache.crop(-2)
    total.backward()
    want = sum(k_rope[:, :, :end].float().sum((0, 1, 2)) for end in (2, 4, 6))
    torch.testing.assert_close(q.grad.float(), want, atol=0.05, rtol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("name", [None, "int8"])
def test_inference_copies_nothing(name):
    cache = LatentCache(capacity=20, format=name)
    keys, values = cache.update(*latents(5), 0)
    assert keys.data_ptr() == cache.layers[0].keys.data_ptr()
    assert values.data_ptr() == cache.layers[0].values.data_ptr()


def test_what_inference_mode_wrote_can_be_continued_outside():
    cache = LatentCache(capacity=20)
    c_kv, k_rope = latents(5)
    with torch.inference_mode():
        cache.update(c_kv[:, :, :3], k_rope[:, :, :3], 0)
    got_c, got_k = cache.update(c_kv[:, :, 3:], k_rope[:, :, 3:], 0)
    assert torch.equal(got_c, c_kv)
    assert torch.equal(got_k, k_rope)


@pytest.mark.parametrize("indices", [[True, False], [-1], [1, 0, 1]])
def test_sequences_are_chosen_as_in_transformers(indices):
    chosen = torch.tensor(indices)
    cache, c_kv = _filled(), latents(5)[0]
    cache.batch_select_indices(chosen)
    assert torch.equal(cache.layers[0].keys, c_kv[chosen])


def test_a_cache_without_sequences_can_be_cropped():
    cache = _filled()
    cache.batch_select_indices(torch.tensor([], dtype=torch.long))
    cache.crop(-2)
    assert cache.get_seq_length() == 3


def test_a_layer_of_indexer_keys_alone_is_copied():
    source, target = LatentCache(), LatentCache()
    for cache in (source, target):
        cache.layers = [IndexedLatentLayer()]
    keys = torch.randn(1, 5, 4)
    assert not source.layers[0].update_indexer(keys.clone().requires_grad_()).requires_grad
    source.layers[0].offload()
    source.layers[0].prefetch()
    copy_prefix(source, target, 3)
    assert torch.equal(target.layers[0].indexer_keys, keys[:, :3])
