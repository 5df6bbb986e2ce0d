"""Arguments that make no sense are named, and the cache is as it was."""

import pytest
import torch
import torch.nn.utils.prune
from transformers import DynamicCache

from mla.cache import LatentCache
from mla.config import MLAConfig, RopeConfig
from mla.nn import MultiheadLatentAttention
from tests.nn.cases import SIZES, build, make_config

X = torch.zeros(2, 3, SIZES["hidden_size"])
CONTEXT = torch.zeros(2, 5, 19)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": X[0]}, r"hidden_states \[b, s, d\]: expected last dimension 52, got shape"),
        ({"hidden_states": X[..., 1:]}, r"expected last dimension 52, got shape \(2, 3, 51\)"),
        ({"context": CONTEXT}, r"context: expected None, .* without context_size, got shape \(2, 5, 19\)"),
        ({"context_position_ids": torch.arange(3)}, "context_position_ids: expected None in self-attention"),
        ({"position_ids": torch.zeros(3)}, "position_ids: expected integers, got torch.float32"),
        ({"position_ids": torch.arange(4)}, r"position_ids: expected shape \(2, 3\) or \(3,\), got \(4,\)"),
        ({"attention_mask": torch.ones(2, 4)}, r"\[b, t\] = \(2, 3\), cached and new .*, got \(2, 4\)"),
        ({"attention_mask": torch.ones(2, 3)}, "expected bool or integers, 0 for padding, got torch.float32"),
        ({"attention_mask": torch.ones(2, 3, 3)}, r"or a shape that broadcasts .* got \(2, 3, 3\)"),
        (
            {"attention_mask": torch.ones(2, 1, 3, 4)},
            r"broadcasts to .* = \(2, 3, 3, 3\), got \(2, 1, 3, 4\)",
        ),
        (
            {"attention_mask": torch.ones(2, 1, 3, 3).int()},
            "expected bool or a floating dtype, got torch.int",
        ),
        (
            {"attention_mask": torch.ones(2, 3, device="meta").int()},
            "expected one on cpu, .* got one on meta",
        ),
        ({"path": "fast"}, 'expected path "auto", "absorbed" or "expanded"'),
    ],
)
def test_misuse_of_self_attention(change, message):
    cache = LatentCache()
    with pytest.raises(ValueError, match=message):
        build()(**({"hidden_states": X, "cache": cache} | change))
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": None}, r"context: expected \[b, t, 19\], because no cached context .* layer 0"),
        ({"context": None, "cache": LatentCache()}, "no cached context exists"),
        ({"context": CONTEXT[..., 1:]}, r"context .* expected last dimension 19 and batch 2"),
        ({"context": CONTEXT[:1]}, r"context .* batch 2, got shape \(1, 5, 19\)"),
        ({"is_causal": True}, "is_causal: expected False or None in cross-attention"),
        ({"attention_mask": torch.ones(2, 3).int()}, r"\[b, t\] = \(2, 5\)"),
        ({"context_position_ids": torch.arange(3)}, r"context_position_ids: expected shape \(2, 5\)"),
        ({"path": "fast"}, 'expected path "auto", "absorbed" or "expanded"'),
    ],
)
def test_misuse_of_cross_attention(change, message):
    with pytest.raises(ValueError, match=message):
        build(context_size=19)(**({"hidden_states": X, "context": CONTEXT} | change))


def test_another_cache_is_refused():
    with pytest.raises(TypeError, match="cache: expected a LatentCache or None, got DynamicCache"):
        build()(X, cache=DynamicCache())
    with pytest.raises(TypeError, match=r"config: expected a configuration of .* got MLAConfig"):
        LatentCache(make_config())


def test_misuse_of_a_cached_context():
    module = build(context_size=19)
    cache = LatentCache()
    module(X, context=CONTEXT, cache=cache)
    with pytest.raises(ValueError, match=r"layer 0 of the cache already holds a context of 5 tokens"):
        module(X, context=CONTEXT, cache=cache)
    with pytest.raises(ValueError, match=r"position_ids: expected .* where RoPE meets a cached context"):
        module(X, cache=cache)
    with pytest.raises(ValueError, match="context_position_ids: expected None for a cached context"):
        module(X, cache=cache, position_ids=torch.arange(3), context_position_ids=torch.arange(5))
    with pytest.raises(ValueError, match=r"c_kv \[b, t, r\]: expected shape \(1, 5, 40\), got \(2, 5, 40\)"):
        module(X[:1], cache=cache, position_ids=torch.arange(3))
    cache.reset()
    module(X, context=CONTEXT[:, :4], cache=cache)
    assert cache.get_seq_length() == 4


def test_a_context_is_no_earlier_tokens_of_a_self_attention():
    cache = LatentCache()
    build(context_size=19)(X, context=CONTEXT, cache=cache)
    with pytest.raises(ValueError, match=r"nothing in layer 0, got the context of a cross-attention"):
        build()(X, cache=cache)
    assert cache.get_seq_length() == 5
    assert cache.holds_context(0)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(torch.Tensor):
    """A tensor as quantisation libraries make them: its dtype is not that of what it holds."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Wrapped(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Wrapped(args[0].codes)
        raise NotImplementedError(function)


def replaced(kind) -> torch.nn.Module:
    """A layer in the place of kv_b_proj that its weight does not describe."""
    rows, rank = build().kv_b_proj.weight.shape
    if kind == "adapter":
        layer = torch.nn.Sequential(torch.nn.Linear(rank, rows, bias=False))
        layer.weight = layer[0].weight
        return layer
    layer = (Doubled if kind == "subclass" else torch.nn.Linear)(rank, rows, bias=kind == "bias")
    if kind == "patched":
        layer.forward = lambda x: 2 * torch.nn.Linear.forward(layer, x)
    codes = torch.ones(rows, rank, dtype=torch.int8)
    if kind == "int8":
        layer.weight = torch.nn.Parameter(codes, requires_grad=False)
    if kind == "pruned":
        torch.nn.utils.prune.identity(layer, "weight")
    if kind == "sharded":
        layer.weight = torch.nn.Parameter(torch.empty(0))
    if kind == "wrapped":
        layer.weight = torch.nn.Parameter(Wrapped(codes), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "adapter",
            r"kv_b_proj: expected a plain linear layer without bias, .* got torch\.nn\.\S*Sequential",
        ),
        ("subclass", r"expected a plain linear layer .* got \S*Doubled"),
        ("patched", r"expected a plain linear layer .* got torch\.nn\.modules\.linear\.Linear; merge"),
        ("bias", r"expected a plain linear layer without bias, .* got Linear with a bias; merge"),
        ("pruned", r"kv_b_proj: expected a layer without hooks, .* got some; make what they do permanent"),
        ("int8", r"expected a plain floating-point weight of shape .*, got Parameter of torch.int8 .*; load"),
        ("wrapped", r"expected a plain floating-point weight of shape .*, got Wrapped of torch.float32"),
        ("sharded", r"of shape \(108, 40\), got Parameter of torch.float32 \(0,\); load this layer .* whole"),
    ],
)
def test_what_the_weight_does_not_say_is_not_left_out(kind, message):
    module = build()
    module.kv_b_proj = replaced(kind)
    with pytest.raises(ValueError, match=message):
        module(X)


def test_a_parametrised_weight_is_one():
    module = build()
    want = module(X)
    torch.nn.utils.parametrizations.weight_norm(module.kv_b_proj)
    assert type(module.kv_b_proj) is not torch.nn.Linear
    torch.testing.assert_close(module(X), want)


def test_a_hook_that_moves_tensors_is_no_adapter():
    hooks = pytest.importorskip("accelerate.hooks")
    module = build()
    want = module(X)
    hooks.add_hook_to_module(module.kv_b_proj, hooks.AlignDevicesHook("cpu"))
    assert "forward" in vars(module.kv_b_proj)
    torch.testing.assert_close(module(X), want)
    module.kv_b_proj._old_forward = lambda x: 2 * x
    with pytest.raises(ValueError, match="expected a plain linear layer"):
        module(X)


def test_the_tokens_of_a_self_attention_are_no_context():
    cache = LatentCache()
    build()(X, cache=cache)
    module = build(context_size=19)
    with pytest.raises(ValueError, match="no cached context exists for layer 0"):
        module(X, cache=cache, position_ids=torch.arange(3))
    with pytest.raises(ValueError, match=r"expected nothing in layer 0, .* got 3 tokens that are no context"):
        module(X, context=CONTEXT, cache=cache)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_size": 0}, "context_size: expected at least 1"),
        ({"attention_dropout": 1.0}, r"attention_dropout: expected a number in \[0, 1\), got 1.0"),
        ({"config": make_config(sliding_window=8)}, "sliding_window: expected None, got 8"),
        ({"config": make_config(indexer_layers=(0,), indexer_width=4)}, "indexer_layers: expected none"),
        (
            {
                "config": MLAConfig(**SIZES, rope=RopeConfig(layout="half", rope_type="dynamic", factor=2.0)),
                "context_size": 19,
            },
            "rope_type: expected one whose frequencies do not follow the length",
        ),
    ],
)
def test_misuse_of_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        MultiheadLatentAttention(**({"config": make_config()} | options))


def test_nested_tensors_are_to_be_padded():
    ragged = torch.nested.nested_tensor([X[0], X[1, :3]], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"hidden_states .* got a nested one; pad it .* attention_mask"):
        build()(ragged)


@torch.no_grad()
def test_one_graph_with_a_cache():
    module, cache, wanted = build(), LatentCache(), LatentCache()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for part in (X[:, :3], X[:, 3:4], X[:, 4:5]):
        torch.testing.assert_close(compiled(part, cache=cache), module(part, cache=wanted))


@pytest.mark.parametrize("grad", [False, True])
def test_one_exported_program_takes_every_size(grad):
    module, dynamic = build(), torch.export.Dim.DYNAMIC
    with torch.set_grad_enabled(grad):
        shapes = {"hidden_states": {0: dynamic, 1: dynamic}}
        program = torch.export.export(module, (X,), dynamic_shapes=shapes).module()
        for b, s in ((1, 2), (3, 1), (3, 200)):
            x = torch.randn(b, s, X.shape[-1])
            torch.testing.assert_close(program(x), module(x), atol=1e-5, rtol=1e-4)
