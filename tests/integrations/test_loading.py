"""What a model is computed in where nobody says."""

import platform

import pytest
import torch

from mla.integrations.loading import computes_in_half


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
@pytest.mark.parametrize(("bf16", "amx"), [(False, False), (True, False), (False, True)])
def test_avx512_alone_multiplies_no_bf16(monkeypatch, machine, bf16, amx):
    """Whatever oneDNN says: Skylake to Rocket Lake have AVX-512 and no product of bf16."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert computes_in_half("cpu") is (bf16 or amx)


def test_apples_torch_has_no_operator_to_ask(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert computes_in_half("cpu") is False


def test_elsewhere_half_is_computed(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert computes_in_half("cuda:0") is True
