"""What the plugin does when vLLM loads it: nothing where it does not fit."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import DeepseekV3Config, MiniCPM3Config
from transformers.models.minicpm3.modeling_minicpm3 import MiniCPM3RotaryEmbedding

from mla.integrations.vllm import plugin
from tests.vllm.models import LONGROPE

pytestmark = pytest.mark.vllm


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # vLLM's logger keeps its lines
    caplog.set_level(logging.INFO, logger="vllm.mla")
    return caplog


@pytest.fixture
def state():
    """What the plugin changes in vLLM."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return lambda: (AttentionBackendEnum.CPU_MLA.get_path(), CpuPlatform.check_and_update_config)


def test_the_tested_version_has_every_seam(vllm):
    assert vllm.__version__ in plugin.TESTED
    assert plugin.missing_seams(plugin._SEAMS) == []


def test_a_missing_seam_leaves_vllm_as_it_is(monkeypatch, log, state):
    before = state()
    monkeypatch.setitem(plugin._SEAMS, "vllm.platforms.cpu:CpuPlatform.gone", "")
    plugin.register()
    assert state() == before
    (line,) = log.messages
    assert "lacks vllm.platforms.cpu.CpuPlatform.gone: vLLM keeps its own MLA backend" in line


def test_a_backend_that_does_not_load_leaves_vllm_as_it_is(monkeypatch, log, state):
    """Where a seam is not in the table, or has another meaning."""
    before = state()
    seam = next(name for name in plugin._SEAMS if name.endswith(":split_kv_b_proj"))
    monkeypatch.delitem(plugin._SEAMS, seam)
    monkeypatch.delattr(seam.replace(":", "."))
    monkeypatch.delitem(sys.modules, "mla.integrations.vllm.backend", raising=False)
    plugin.register()
    assert state() == before
    (line,) = log.messages
    assert line.startswith("mla does not fit vLLM")
    assert "cannot import name 'split_kv_b_proj'" in line
    assert line.endswith("vLLM keeps its own MLA backend")


def test_what_has_no_signature_is_missing():
    seams = {"math:pi": "x y", "builtins:type": "x", "math:tau": ""}
    assert plugin.missing_seams(seams) == ["x, y of math.pi", "x of builtins.type"]


def test_without_kernels_vllm_keeps_its_own(monkeypatch, log):
    monkeypatch.setattr(plugin.native, "best", lambda: None)
    monkeypatch.setattr(plugin, "_install", lambda: pytest.fail("installed"))
    plugin.register()
    (line,) = log.messages
    assert "without its C++ kernels" in line
    monkeypatch.setenv("MLA_CACHE_FORMAT", "int8")
    plugin.register()
    assert log.messages[-1].endswith("keeps its own MLA backend, and MLA_CACHE_FORMAT=int8 does nothing")


def test_an_untested_version_warns(monkeypatch, log, vllm):
    installed = []
    monkeypatch.setattr(vllm, "__version__", "9.9")
    monkeypatch.setattr(plugin, "_install", lambda: installed.append(True))
    plugin.register()
    assert installed
    (line,) = log.messages
    assert line.startswith(f"mla was tested with vLLM {', '.join(plugin.TESTED)}, this is 9.9")
    monkeypatch.setattr(vllm, "__version__", f"{plugin.TESTED[0]}+cpu")  # vLLM's own build of it
    plugin.register()
    assert log.messages == [line]


def test_what_vllm_would_compute_wrongly_is_refused():
    adapt = plugin.keeping_settings(lambda cls, config: "went on")

    def start(own_code=True, **options):
        model = SimpleNamespace(
            model="a model",
            use_mla=True,
            max_model_len=4096,
            hf_text_config=DeepseekV3Config(**options),
            using_transformers_backend=lambda: not own_code,
        )
        adapt(None, SimpleNamespace(model_config=model))

    with pytest.raises(ValueError, match=r"a model has biases.*attention_bias.*--engine transformers"):
        start(attention_bias=True)
    with pytest.raises(ValueError, match="rope_interleave"):
        start(rope_interleave=False)
    with pytest.raises(AttributeError):  # past the check, to the settings
        start(own_code=False, rope_interleave=False)


def test_longrope_with_one_set_of_factors_is_compiled_as_any_other():
    """As MiniCPM3-4B has it. Transformers asks at every call which set is needed, and a graph cannot."""
    from mla.integrations.vllm.minicpm3 import fix_frequencies

    config = MiniCPM3Config(rope_parameters=dict(LONGROPE), max_position_embeddings=4096)
    positions = torch.arange(4096)[None]
    want = MiniCPM3RotaryEmbedding(config)(torch.zeros(1), positions)
    rotary = MiniCPM3RotaryEmbedding(config)
    fix_frequencies(torch.nn.ModuleList([rotary]))
    got = torch.compile(rotary, fullgraph=True, backend="eager")(torch.zeros(1), positions)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
