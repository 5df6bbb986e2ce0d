"""The module against itself: incremental decoding, padding, cross-attention, masks, dtypes."""

import copy

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812

from mla.cache import LatentCache
from mla.nn import MultiheadLatentAttention
from mla.ops import reference
from tests.nn.cases import SIZES, build, make_config, poison_new_memory, random
from tests.ops.cases import record_paths

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ROPES = {
    "interleaved": {},
    "half": {"layout": "half"},
    "no rotation": {"layout": "none"},
    "no rope dimensions": {"qk_rope_head_dim": 0},
    "yarn": {"rope": "yarn"},
    "query compression": {"q_lora_rank": 24},
}


def run_in_chunks(
    module: MultiheadLatentAttention, x: Tensor, chunks: list[int], cache: LatentCache, **options: object
) -> Tensor:
    return torch.cat([module(part, cache=cache, **options) for part in x.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("path", ["auto", "absorbed", "expanded"])
@pytest.mark.parametrize("chunks", [[1] * 13, [13], [5, 1, 4, 3], [1, 12]])
@torch.no_grad()
def test_chunks_equal_one_call(monkeypatch, rope, path, chunks):
    module = build(**ROPES[rope])
    x = random(2, 13, SIZES["hidden_size"])
    want = module(x, path="expanded")
    poison_new_memory(monkeypatch)
    cache = LatentCache(capacity=7)
    got = run_in_chunks(module, x, chunks, cache, path=path)
    torch.testing.assert_close(got, want, **CLOSE)
    assert cache.get_seq_length() == 13


@pytest.mark.parametrize("rope", ["interleaved", "no rope dimensions"])
@torch.no_grad()
def test_the_cache_holds_latents_only(rope):
    module = build(**ROPES[rope])
    cache = LatentCache(capacity=50)
    run_in_chunks(module, random(2, 8, SIZES["hidden_size"]), [5, 1, 1, 1], cache)
    config = module.config
    assert cache.nbytes == 2 * 50 * 4 * (config.kv_lora_rank + config.qk_rope_head_dim)
    assert cache.layers[0].latents.c_kv.shape == (2, 8, config.kv_lora_rank)
    assert cache.layers[0].latents.k_rope.shape == (2, 8, config.qk_rope_head_dim)


@torch.no_grad()
def test_roll_back_and_redo(monkeypatch):
    module = build()
    x, wrong = random(2, 12, SIZES["hidden_size"]), random(2, 4, SIZES["hidden_size"], seed=1)
    want = module(x)
    poison_new_memory(monkeypatch)
    cache = LatentCache(capacity=20)
    first = module(x[:, :6], cache=cache)
    module(wrong * 1e3, cache=cache)
    cache.crop(-4)
    cache.layers[0]._rows._buffer[:, 6:] = torch.nan  # nothing of the rejected tokens may be read
    rest = run_in_chunks(module, x[:, 6:], [3, 1, 2], cache)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), want, **CLOSE)


@torch.no_grad()
def test_beams_reorder_and_repeat():
    module = build()
    x = random(2, 9, SIZES["hidden_size"])
    cache = LatentCache()
    module(x[:, :5], cache=cache)
    cache.batch_repeat_interleave(2)
    beams = torch.tensor([2, 2, 0, 3])
    cache.reorder_cache(beams)
    histories = x.repeat_interleave(2, dim=0)[beams]
    new = random(4, 3, SIZES["hidden_size"], seed=2)
    got = run_in_chunks(module, new, [1, 2], cache)
    want = module(torch.cat([histories[:, :5], new], dim=1))[:, 5:]
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("path", ["absorbed", "expanded"])
@torch.no_grad()
def test_padded_batch_equals_single_sequences(side, mask_dtype, path):
    module = build()
    lengths, width, steps = [7, 3, 1], 7, 3
    sequences = [random(1, n + steps, SIZES["hidden_size"], seed=n) for n in lengths]
    batch, mask = random(3, width, SIZES["hidden_size"], seed=99) * 50, torch.zeros(3, width)
    for i, (length, sequence) in enumerate(zip(lengths, sequences, strict=True)):
        real = slice(width - length, width) if side == "left" else slice(0, length)
        batch[i, real], mask[i, real] = sequence[0, :length], 1
    mask = mask.to(mask_dtype)
    cache = LatentCache()
    prompt = module(batch, attention_mask=mask, cache=cache, path=path)
    assert prompt.isfinite().all()
    new_tokens = torch.cat(
        [sequence[:, length:] for length, sequence in zip(lengths, sequences, strict=True)]
    )
    decoded = []
    for step in range(steps):
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        decoded.append(module(new_tokens[:, step : step + 1], attention_mask=mask, cache=cache, path=path))
    for i, (length, sequence) in enumerate(zip(lengths, sequences, strict=True)):
        want = module(sequence)
        real = slice(width - length, width) if side == "left" else slice(0, length)
        torch.testing.assert_close(prompt[i : i + 1, real], want[:, :length], **CLOSE)
        torch.testing.assert_close(torch.cat(decoded, dim=1)[i : i + 1], want[:, length:], **CLOSE)


@torch.no_grad()
def test_query_without_keys_gives_the_projection_of_zero():
    module = build(attention_bias=True)
    x = random(1, 4, SIZES["hidden_size"])
    out = module(x, attention_mask=torch.tensor([[0, 0, 1, 1]]))
    torch.testing.assert_close(out[0, :2], module.o_proj.bias.expand(2, -1))


@torch.no_grad()
def test_position_ids_default_to_the_order_of_tokens():
    module = build()
    x = random(2, 6, SIZES["hidden_size"])
    want = module(x)
    for positions in (torch.arange(6), torch.arange(6)[None], torch.arange(6).expand(2, 6) + 100):
        torch.testing.assert_close(module(x, position_ids=positions), want, **CLOSE)  # only distances count
    assert not torch.allclose(module(x, position_ids=torch.arange(6) * 2), want, atol=1e-3)


@pytest.mark.parametrize("heads", [1, SIZES["num_attention_heads"]])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("causal", [None, False])
@torch.no_grad()
def test_full_mask(heads, kind, causal):
    module = build(layout="none")
    x = random(2, 5, SIZES["hidden_size"])
    keep = torch.rand(2, heads, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    mask = keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    got = module(x, attention_mask=mask, is_causal=causal)
    config = module.config
    n, r = config.qk_nope_head_dim, config.kv_lora_rank
    q = module.q_proj(x).unflatten(-1, (config.num_attention_heads, -1))
    compressed = module.kv_a_proj_with_mqa(x)
    c_kv = F.rms_norm(compressed[..., :r], (r,), module.kv_a_layernorm.weight, module.kv_a_layernorm.eps)
    w_kv = module.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
    out, _ = reference.expanded(
        q[..., :n],
        q[..., n:],
        c_kv,
        compressed[..., r:],
        w_kv[:, :n],
        w_kv[:, n:],
        scale=config.softmax_scale,
        causal=causal is None,
        mask=mask,
    )
    torch.testing.assert_close(got, module.o_proj(out.flatten(2)), **CLOSE)


@pytest.mark.parametrize("path", ["absorbed", "expanded"])
@torch.no_grad()
def test_cross_attention_equals_torch_multihead_attention(path):
    """Without RoPE, cross-attention is torch's over the latents, with kv_b_proj as its two projections."""
    h, n, r, d = 4, 8, 24, 32  # torch wants h·n = d
    module = build(
        hidden_size=d,
        num_attention_heads=h,
        qk_nope_head_dim=n,
        v_head_dim=n,
        kv_lora_rank=r,
        qk_rope_head_dim=0,
        context_size=19,
    )
    x, context = random(2, 5, d), random(2, 7, 19, seed=1)
    padding = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 0]])
    theirs = torch.nn.MultiheadAttention(d, h, bias=False, kdim=r, vdim=r, batch_first=True)
    w_kv = module.kv_b_proj.weight.unflatten(0, (h, 2 * n))
    theirs.q_proj_weight.copy_(module.q_proj.weight)
    theirs.k_proj_weight.copy_(w_kv[:, :n].flatten(0, 1))
    theirs.v_proj_weight.copy_(w_kv[:, n:].flatten(0, 1))
    theirs.out_proj.weight.copy_(module.o_proj.weight)
    latent = F.rms_norm(
        module.kv_a_proj_with_mqa(context), (r,), module.kv_a_layernorm.weight, module.kv_a_layernorm.eps
    )
    want, _ = theirs(x, latent, latent, key_padding_mask=padding == 0)
    got = module(x, context=context, attention_mask=padding, path=path)
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("rope", ["interleaved", "half"])
@pytest.mark.parametrize("path", ["absorbed", "expanded"])
@torch.no_grad()
def test_cross_attention_with_rope_equals_torch_sdpa(rope, path):
    """Queries and keys are rotated to positions of their own; the rotation here is a complex product."""
    module = build(context_size=19, **ROPES[rope])
    config = module.config
    h, n, p, r = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, 40
    x, context = random(2, 5, SIZES["hidden_size"]), random(2, 7, 19, seed=1)
    queries_at, keys_at = torch.arange(5) + 3, torch.arange(7) * 2

    def rotate(y: Tensor, positions: Tensor) -> Tensor:  # [b, tokens, heads, p]
        angles = positions[:, None] * 10000.0 ** (-torch.arange(0, p, 2) / p)
        pairs = y.unflatten(-1, (-1, 2)) if rope == "interleaved" else y.unflatten(-1, (2, -1)).mT
        return torch.view_as_real(
            torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
        ).flatten(-2)

    q = module.q_proj(x).unflatten(-1, (h, n + p))
    compressed = module.kv_a_proj_with_mqa(context)
    latent = F.rms_norm(compressed[..., :r], (r,), module.kv_a_layernorm.weight, module.kv_a_layernorm.eps)
    k_nope, value = module.kv_b_proj(latent).unflatten(-1, (h, -1)).split([n, config.v_head_dim], dim=-1)
    key = torch.cat([k_nope, rotate(compressed[:, :, None, r:], keys_at).expand(-1, -1, h, -1)], dim=-1)
    query = torch.cat([q[..., :n], rotate(q[..., n:], queries_at)], dim=-1)
    out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (query, key, value)))
    got = module(x, context=context, position_ids=queries_at, context_position_ids=keys_at, path=path)
    torch.testing.assert_close(got, module.o_proj(out.transpose(1, 2).flatten(2)), **CLOSE)


@pytest.mark.parametrize("rope", ["interleaved", "no rope dimensions"])
@torch.no_grad()
def test_cross_attention_caches_the_context_once(monkeypatch, rope):
    module = build(context_size=19, **ROPES[rope])
    x, context = random(2, 6, SIZES["hidden_size"]), random(2, 7, 19, seed=1)
    padding = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 0]])
    want = module(x, context=context, attention_mask=padding)
    compressions = []
    module.kv_a_proj_with_mqa.register_forward_hook(lambda *_: compressions.append(1))
    poison_new_memory(monkeypatch)
    cache = LatentCache(capacity=11)
    got = [module(x[:, :2], context=context, attention_mask=padding, cache=cache)]
    for i in range(2, 6):
        options = {"position_ids": torch.tensor([i])} if rope == "interleaved" else {}
        got.append(module(x[:, i : i + 1], attention_mask=padding, cache=cache, **options))
    torch.testing.assert_close(torch.cat(got, dim=1), want, **CLOSE)
    assert len(compressions) == 1
    assert cache.get_seq_length() == 7


@torch.no_grad()
def test_self_and_cross_attention_share_a_cache_by_layer():
    here, there = build(layer_idx=0), build(layer_idx=1, context_size=19, qk_rope_head_dim=0)
    x, context = random(1, 4, SIZES["hidden_size"]), random(1, 7, 19, seed=1)
    want = there(here(x), context=context)
    cache, got = LatentCache(), []
    for i in range(4):
        y = here(x[:, i : i + 1], cache=cache)
        got.append(there(y, context=context if i == 0 else None, cache=cache))
    torch.testing.assert_close(torch.cat(got, dim=1), want, **CLOSE)
    cache.crop(-2)  # a roll-back forgets tokens, not the context
    again = there(here(x[:, 2:], cache=cache), cache=cache)
    torch.testing.assert_close(again, want[:, 2:], **CLOSE)


def test_gradients_flow_through_the_tokens_of_the_call():
    module = build().double()
    x = random(2, 7, SIZES["hidden_size"]).double()
    cache = LatentCache()
    with torch.no_grad():
        module(x[:, :4], cache=cache)
    new = x[:, 4:].clone().requires_grad_()
    out = module(new, cache=cache)
    assert not cache.layers[0].latents.c_kv.requires_grad
    with torch.no_grad():
        module(x[:, :2], cache=cache)  # writes beside the rows of the graph
    out.square().sum().backward()

    whole = torch.cat([x[:, :4], x[:, 4:].clone()], dim=1).requires_grad_()
    fixed = build().double()
    fixed(whole)[:, 4:].square().sum().backward()
    torch.testing.assert_close(new.grad, whole.grad[:, 4:], atol=1e-10, rtol=1e-10)


def test_token_by_token_without_no_grad_holds_no_graph():
    module = build()
    x = random(1, 5, SIZES["hidden_size"])
    cache = LatentCache()
    got = run_in_chunks(module, x, [1] * 5, cache)
    torch.testing.assert_close(got, module(x), **CLOSE)
    assert cache.layers[0].latents.c_kv.grad_fn is None
    got.sum().backward()


def test_the_tokens_of_the_call_learn_beside_int8_latents():
    """Those of earlier calls are rounded constants; the first call meets none of them."""
    module, whole = build(), build()
    x, cache = random(1, 6, SIZES["hidden_size"]), LatentCache(format="int8")
    module(x[:, :4], cache=cache).sum().backward()
    whole(x[:, :4]).sum().backward()
    for parameter, want in zip(module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, want.grad)
    module(x[:, 4:], cache=cache).sum().backward()
    with forward_ad.dual_level():
        out = module(forward_ad.make_dual(x, torch.ones_like(x)), cache=LatentCache(format="int8"))
        assert forward_ad.unpack_dual(out).tangent is not None


@pytest.mark.parametrize("recompute_kv", [False, True])
def test_the_up_projection_alone_learns_beside_a_cache(recompute_kv):
    module, whole = build(recompute_kv=recompute_kv).double(), build().double()
    for name, parameter in [*module.named_parameters(), *whole.named_parameters()]:
        parameter.requires_grad_(name.startswith("kv_b_proj"))
    x = random(1, 6, SIZES["hidden_size"]).double()
    run_in_chunks(module, x, [3, 2, 1], LatentCache(capacity=20)).square().sum().backward()
    whole(x).square().sum().backward()
    torch.testing.assert_close(module.kv_b_proj.weight.grad, whole.kv_b_proj.weight.grad)


def test_a_cached_context_may_change_before_the_backward_pass():
    module = build(context_size=19, qk_rope_head_dim=0)
    x, cache = random(1, 2, SIZES["hidden_size"]), LatentCache(capacity=9)
    with torch.no_grad():
        module(x, context=random(1, 7, 19), cache=cache)
    loss = module(x, cache=cache).square().sum()
    cache.reset()
    with torch.no_grad():
        module(x, context=random(1, 7, 19, seed=1), cache=cache)
    loss.backward()


@torch.no_grad()
def test_a_context_without_tokens_is_cached_as_one():
    module, cache = build(context_size=19, qk_rope_head_dim=0, attention_bias=True), LatentCache()
    x, context = random(2, 3, SIZES["hidden_size"]), torch.zeros(2, 0, 19)
    want = module.o_proj.bias.expand(2, 3, -1)
    torch.testing.assert_close(module(x, context=context, cache=cache), want)
    torch.testing.assert_close(module(x, cache=cache), want)
    with pytest.raises(ValueError, match="already holds a context of 0 tokens"):
        module(x, context=random(2, 4, 19), cache=cache)
    cache.reset()
    module(x, context=random(2, 4, 19), cache=cache)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
@torch.no_grad()
def test_nothing_in_nothing_out(shape):
    x = torch.zeros(*shape, SIZES["hidden_size"])
    cache = LatentCache()
    assert build()(x, cache=cache).shape == x.shape
    assert (
        build(context_size=19, qk_rope_head_dim=0)(x, context=torch.zeros(shape[0], 4, 19)).shape == x.shape
    )


def test_dropout_acts_in_training_only():
    module = build(attention_dropout=0.5)
    x = random(1, 6, SIZES["hidden_size"])
    torch.manual_seed(0)
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    module.eval()
    torch.testing.assert_close(module(x), build()(x), **CLOSE)


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_half_precision_module(q_lora_rank):
    module = build(q_lora_rank=q_lora_rank)
    half = copy.deepcopy(module).to(torch.bfloat16)
    x = random(2, 6, SIZES["hidden_size"])
    want = module(x)
    cache = LatentCache()
    got = torch.cat([half(y, cache=cache) for y in x.to(torch.bfloat16).split([4, 1, 1], dim=1)], dim=1)
    assert got.dtype == torch.bfloat16
    assert cache.layers[0].latents.c_kv.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=3e-2, rtol=3e-2)
    got.float().sum().backward()
    assert half.kv_b_proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("recompute_kv", [False, True])
@pytest.mark.parametrize("path", ["absorbed", "expanded"])
def test_autocast(recompute_kv, path):
    module = build(q_lora_rank=24, recompute_kv=recompute_kv)
    x = random(2, 6, SIZES["hidden_size"])
    cache = LatentCache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.cat([module(y, cache=cache, path=path) for y in x.split([4, 2], dim=1)], dim=1)
    assert got.dtype == torch.bfloat16
    assert cache.layers[0].latents.c_kv.dtype == cache.layers[0].latents.k_rope.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), module(x), atol=3e-2, rtol=3e-2)
    got.float().sum().backward()
    assert module.kv_b_proj.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("context_size", [None, 19])
def test_state_dict_deepcopy_and_repr(context_size):
    module = build(context_size=context_size, q_lora_rank=24, attention_bias=True)
    other = MultiheadLatentAttention(module.config, context_size=context_size)
    other.load_state_dict(module.state_dict(), strict=True)
    x = random(1, 3, SIZES["hidden_size"])
    context = None if context_size is None else random(1, 4, 19)
    want = module(x, context=context)
    torch.testing.assert_close(other(x, context=context), want)
    torch.testing.assert_close(copy.deepcopy(module)(x, context=context), want)
    assert f"context_size={context_size}" in repr(module)
    assert "rank=40" in repr(module)


def test_device_and_dtype():
    module = MultiheadLatentAttention(make_config(q_lora_rank=24), device="meta", dtype=torch.bfloat16)
    assert {(x.device.type, x.dtype) for x in module.parameters()} == {("meta", torch.bfloat16)}
    out = module(torch.empty(2, 3, SIZES["hidden_size"], device="meta", dtype=torch.bfloat16))
    assert out.shape == (2, 3, SIZES["hidden_size"])


def test_every_layer_can_be_reset_after_meta():
    """What torch does to build a large model, FSDP for one: empty memory, then reset_parameters."""
    module = MultiheadLatentAttention(make_config(q_lora_rank=24), device="meta").to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.detach().fill_(torch.nan)
    for layer in module.children():
        layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert (module.kv_a_layernorm.weight == 1).all()


@pytest.mark.parametrize("context_size", [None, 19])
def test_another_default_device(context_size):
    """Tensors that are made on the way lie where the module does."""
    module = build(context_size=context_size, q_lora_rank=24)
    x = random(1, 3, SIZES["hidden_size"])
    context = None if context_size is None else random(1, 4, 19)
    want = module(x, context=context)
    with torch.device("meta"):
        assert torch.equal(module(x, context=context), want)


def test_path_is_an_attribute_and_an_argument(monkeypatch):
    calls = record_paths(monkeypatch)
    module = build()
    x = random(1, 64, SIZES["hidden_size"])
    cache = LatentCache()
    with torch.no_grad():
        module(x, cache=cache)
        module(x[:, :1], cache=cache)
        module.path = "expanded"
        module(x[:, :1], cache=cache)
        module(x[:, :1], cache=cache, path="absorbed")
    assert [path for _, path in calls] == ["expanded", "absorbed", "expanded", "absorbed"]
