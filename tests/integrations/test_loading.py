"""What a model is computed in where nobody says, and how large it is before it is read."""

import platform
import shutil

import pytest
import torch

from mla.errors import MLAError
from mla.integrations import loading
from mla.integrations.loading import computes_in_half, load_config, load_model, weight_bytes
from tests.families import build


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


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A bf16 model with experts, whose router's correction Transformers keeps in fp32."""
    folder = tmp_path_factory.mktemp("half")
    build("deepseek_v3").to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_the_size_of_a_folder_is_that_of_the_files_that_are_read(half, tmp_path):
    model = load_model(str(half), dtype="bfloat16")
    numbers = sum(each.numel() for each in model.state_dict().values())
    bare = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    folder = shutil.copytree(half, tmp_path / "twice")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    config = load_config(str(half))
    for place in (half, folder):
        assert weight_bytes(str(place), config, "float32") == 4 * numbers
        assert bare <= weight_bytes(str(place), config, "auto") < bare + 20_000  # and a header


def test_a_hub_id_has_the_size_that_its_config_makes(half, monkeypatch):
    config = load_config(str(half))
    monkeypatch.setattr(loading, "load_config", lambda source: config)
    parameters = sum(each.numel() for each in build("deepseek_v3").parameters())
    assert weight_bytes("some/model", config, "float32") == 4 * parameters
    assert weight_bytes("some/model", config, "auto") == 2 * parameters
    monkeypatch.setattr(loading, "free_memory", lambda: 2 * parameters - 1)
    with pytest.raises(MLAError, match="the weights of some/model would need"):
        load_model("some/model")


@pytest.mark.parametrize(
    ("stored", "native", "free", "wanted"),
    [
        ("bfloat16", True, 10**9, "bfloat16"),
        ("bfloat16", False, 10**9, "float32"),
        ("bfloat16", False, 500_000, "bfloat16"),  # no memory to spare
        ("float16", True, 10**9, "float32"),
    ],
)
def test_what_is_computed_in(half, tmp_path, monkeypatch, stored, native, free, wanted):
    folder = tmp_path / "model"
    build("deepseek_v3").to(getattr(torch, stored)).save_pretrained(folder)
    monkeypatch.setattr(loading, "computes_in_half", lambda device: native)
    monkeypatch.setattr(loading, "free_memory", lambda: free)
    assert load_model(str(folder)).get_input_embeddings().weight.dtype == getattr(torch, wanted)
