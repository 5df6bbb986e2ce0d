"""What the vLLM plugin does with tensors and settings, without vLLM."""

import pytest
import torch

from mla.errors import MLAError
from mla.formats import cache_format
from mla.integrations.vllm import pages, plugin, settings
from mla.ops import latent, native, reference
from mla.ops.attention import make_plan

H, N, R, P, V = 3, 20, 75, 26, 12
SCALE = 0.11


def make_run(tokens, s, lengths, table, path):
    plan = make_plan(s=s, t=max(lengths), h=H, n=N, r=R, p=P, v=V, path=path)
    return pages.Run(tokens, s, torch.tensor(lengths, dtype=torch.int32), table, plan)


@pytest.mark.skipif(not native.instruction_sets(), reason="built without kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_runs_over_pages(dtype, name, page_size):
    torch.manual_seed(0)
    lengths, news = [9, 33, 40, 70], [1, 1, 40, 12]  # two that decode, a prompt, a chunk on a prefix
    width = -(-max(lengths) // page_size)
    order = torch.randperm(len(lengths) * width).to(torch.int32)
    table = order.view(len(lengths), width)
    row = cache_format(name).row_bytes(R, P)
    # Twice the row, half of it used: pages of several layers may lie between one another.
    bytes_ = torch.full((len(order), page_size, 2 * row), 0xFF, dtype=torch.uint8)[..., :row]
    latents = pages.split(bytes_, name, R, P)
    c_kv = [torch.randn(t, R) for t in lengths]
    k_rope = [torch.randn(t, P) for t in lengths]
    for i, t in enumerate(lengths):
        at = torch.arange(t)
        slots = table[i][at // page_size].long() * page_size + at % page_size
        padding = torch.tensor([-1])
        latent.store(
            latents,
            torch.cat([torch.full((1, R), torch.nan), c_kv[i]])[:, None],
            torch.cat([torch.full((1, P), torch.nan), k_rope[i]])[:, None],
            slots=torch.cat([padding, slots]),
        )
    q = torch.randn(sum(news), H, N + P).to(dtype)
    weights = torch.float32 if dtype == torch.float16 else dtype
    w_uk, w_uv = torch.randn(H, N, R).to(weights) / R**0.5, torch.randn(H, V, R).to(weights) / R**0.5
    out = torch.full((sum(news), H, V), torch.nan, dtype=dtype)
    runs = [
        make_run(slice(0, 2), 1, lengths[:2], table[:2], "absorbed"),
        make_run(slice(2, 42), 40, lengths[2:3], table[2:3], "expanded"),
        make_run(slice(42, 54), 12, lengths[3:], table[3:], "absorbed"),
    ]
    for run in runs:
        pages.attend(q, latents, w_uk, w_uv, run, scale=SCALE, out=out)
    start = 0
    for i, s in enumerate(news):
        mine = q[start : start + s].double()[None]
        expected, _ = reference.expanded(
            mine[..., :N],
            mine[..., N:],
            c_kv[i].double()[None],
            k_rope[i].double()[None],
            w_uk.double(),
            w_uv.double(),
            scale=SCALE,
            causal=True,
        )
        error = (out[start : start + s].double() - expected[0]).norm() / expected.norm()
        assert error < (0.02 if name == "int8" or dtype == torch.bfloat16 else 6e-3)
        start += s


def test_rows_of_another_width_are_refused():
    with pytest.raises(ValueError, match="expected uint8"):
        pages.split(torch.zeros(2, 4, 100, dtype=torch.uint8), "bf16", R, P)


@pytest.mark.parametrize(
    ("setting", "dtype", "wanted", "expected"),
    [
        ("auto", torch.bfloat16, None, "bf16"),
        ("auto", torch.float32, None, "fp32"),
        ("auto", torch.float16, None, "fp32"),
        ("auto", torch.float32, "int8", "int8"),
        ("bfloat16", torch.float32, None, "bf16"),
        ("int8_per_token_head", torch.bfloat16, None, "int8"),
        ("int8_per_token_head", torch.bfloat16, "int8", "int8"),
    ],
)
def test_format_of_the_cache(setting, dtype, wanted, expected):
    assert settings.format_name(setting, dtype, wanted) == expected


def test_settings_that_have_no_format_are_refused():
    with pytest.raises(MLAError, match="expected one of auto, bfloat16, int8_per_token_head"):
        settings.format_name("fp8", torch.bfloat16, None)
    with pytest.raises(MLAError, match="unset one"):
        settings.format_name("bfloat16", torch.bfloat16, "int8")


def test_missing_seams_are_named():
    seams = {
        "json:dumps": "obj indent",
        "json:JSONDecoder.decode": "s",
        "json:dumps.nothing": "",
        "no_such_module:thing": "",
        "json:loads": "s way",
    }
    found = plugin.missing_seams(seams)
    assert found == ["json.dumps.nothing", "no_such_module.thing", "way of json.loads"]
