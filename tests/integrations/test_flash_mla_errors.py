"""What the drop-in of FlashMLA refuses: which argument, what was expected, what came."""

import pytest
import torch

from mla.integrations.flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache
from tests.integrations.test_flash_mla import HUGE, dense, random

TOKENS = torch.zeros(5, 1, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {"q": random(5, 16, 576, seed=0)},
            {},
            r"q \[b, s, h, d\]: expected .*got torch.float32 \(5, 16, 576\)",
        ),
        ({"q": random(5, 1, 16, 576, seed=0)}, {}, r"k_cache .*expected torch.float32 .*got torch.bfloat16"),
        ({"q": random(5, 1, 16, 500, seed=0).bfloat16()}, {}, r"expected torch.bfloat16 of shape .*500"),
        ({"block_table": None}, {}, r"block_table: expected a tensor without indices .*, got None"),
        ({"cache_seqlens": None}, {}, r"cache_seqlens: expected a tensor without indices .*, got None"),
        ({"cache_seqlens": torch.zeros(4, dtype=torch.int32)}, {}, r"cache_seqlens \[b\]: expected .*\[5\]"),
        ({"cache_seqlens": torch.zeros(5)}, {}, "expected torch.int32 or torch.int64"),
        (
            {"cache_seqlens": torch.tensor([0, 0, -1, 0, 0])},
            {},
            r"cache_seqlens .*: expected 0 to 320, got -1",
        ),
        ({"cache_seqlens": torch.tensor([0, 0, 0, 321, 0])}, {}, "expected 0 to 320, got 321"),
        (
            {"cache_seqlens": torch.tensor([0, 0, 0, 320, 0])},
            {},
            rf"block_table\[3, 3\]: expected 0 to 24 within the lengths, got {HUGE}",
        ),
        ({"block_table": torch.full((5, 5), -1)}, {}, r"block_table\[1, 0\]: expected 0 to 24 .*, got -1"),
        ({}, {"head_dim_v": 577}, "head_dim_v: expected 1 to 576, got 577"),
        (
            {},
            {"attn_sink": torch.zeros(15)},
            r"attn_sink \[h\]: expected .*\[16\], got torch.float32 \(15,\)",
        ),
        (
            {},
            {"attn_sink": torch.zeros(16).bfloat16()},
            "attn_sink .*expected torch.float32 .*got torch.bfloat16",
        ),
        ({}, {"is_fp8_kvcache": True}, "k_cache .*expected torch.float8_e4m3fn .*656"),
        ({}, {"topk_length": torch.zeros(5)}, "^topk_length: expected None without indices .*, got a tensor"),
        (
            {},
            {"extra_topk_length": torch.zeros(5), "extra_k_cache": torch.zeros(1)},
            "^extra_k_cache and extra_topk_length: expected None without indices",
        ),
        ({}, {"softmax_scale": float("nan")}, "^softmax_scale: expected a finite number in fp32, got nan"),
        ({}, {"indices": TOKENS, "causal": True}, "causal: expected False with indices"),
        (
            {},
            {"indices": TOKENS[:4]},
            r"indices \[b, s, top k\]: expected .*\[5, 1, any\], got .*\(4, 1, 4\)",
        ),
        ({}, {"indices": TOKENS.float()}, "indices .*expected torch.int32 or torch.int64"),
        (
            {},
            {"indices": TOKENS, "topk_length": torch.zeros(4).int()},
            r"length of indices \[b\]: expected .*\[5\]",
        ),
        (
            {},
            {"indices": TOKENS, "extra_indices_in_kvcache": TOKENS},
            "extra_indices_in_kvcache: expected extra_k_cache and .* together, got nothing else",
        ),
        ({}, {"indices": TOKENS, "extra_k_cache": torch.zeros(1)}, "^extra_k_cache: expected extra_k_cache"),
        (
            {},
            {"indices": TOKENS, "extra_topk_length": torch.zeros(5)},
            "extra_topk_length: expected extra_k_cache and",
        ),
        ({"k_cache": torch.zeros(25, 64, 3, 576).bfloat16()}, {}, "divides the 16 of q, got 3"),
        ({"k_cache": torch.zeros(25, 64, 1, 576, device="meta").bfloat16()}, {}, "expected a CPU tensor"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(change, options, message):
    case = dense()
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(ValueError, match=message):
        case.run(**options)


def test_errors_of_sparse_prefill():
    q, kv = torch.zeros(5, 2, 64), torch.zeros(3, 1, 64)
    with pytest.raises(ValueError, match=r"^sm_scale: expected a finite number in fp32, got inf"):
        flash_mla_sparse_fwd(q, kv, TOKENS, float("inf"), 64)
    with pytest.raises(ValueError, match=r"^d_v: expected 1 to 64, got 65"):
        flash_mla_sparse_fwd(q, kv, TOKENS, 0.1, 65)


def test_what_is_not_implemented():
    case = dense(h_k=2)
    with pytest.raises(
        NotImplementedError, match="k_cache: sparse and fp8 attention have one key head, got 2"
    ):
        case.run(indices=TOKENS)
    case = dense(d=88)
    with pytest.raises(NotImplementedError, match=r"is_fp8_kvcache: .* not for 88"):
        case.run(is_fp8_kvcache=True)
    with pytest.raises(NotImplementedError, match=r"kv: .* one key head, got 2"):
        flash_mla_sparse_fwd(torch.zeros(5, 2, 64), torch.zeros(3, 2, 64), TOKENS, 0.1, 64)
    cells = torch.zeros(2, 7, 2, 584, dtype=torch.uint8)[:, :, :1]
    with pytest.raises(ValueError, match="fp8 cache: expected contiguous pages, got strides"):
        flash_mla_with_kvcache(
            *(torch.zeros(5, 1, 9, 512), cells, None, None, 512), is_fp8_kvcache=True, indices=TOKENS
        )
