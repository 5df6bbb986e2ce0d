"""``mla serve --engine vllm``: what vLLM's own server is started with."""

import json
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.test_serve import KEY


@pytest.fixture
def became(monkeypatch):
    """The commands and environments that this process was replaced by, vLLM installed."""
    from mla.cli import serve

    commands = []
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(serve.os, "execve", lambda *command: commands.append(command[1:]) or exit(0))
    for name in ("MLA_CACHE_FORMAT", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
    return commands


def test_the_vllm_engine_is_vllms_own_server(mla, mla_folder, monkeypatch):
    from mla.cli import serve

    says = mla("serve", mla_folder, "--engine", "vllm")
    assert "vLLM is not installed here" in says.err
    became = []
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(serve.os, "execve", lambda *command: became.append(command) or exit(0))
    options = ("--port", 9000, "--max-model-len", 256, "--cache-format", "int8", "--memory", "500MB")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert mla("serve", mla_folder, *options, "--api-key", KEY).status == 0
    (_, command, environment), *_ = became
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(mla_folder)]
    assert " ".join(command[5:]) == (
        "--host 127.0.0.1 --port 9000 --dtype float32 --max-model-len 256 --kv-cache-memory-bytes 500000000"
    )
    assert environment["MLA_CACHE_FORMAT"] == "int8"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment  # vLLM would heed it rather than the option
    assert environment["VLLM_API_KEY"] == KEY
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    warning = "anybody who reaches 0.0.0.0 can use this server: --api-key asks for a key"
    assert warning in mla("serve", mla_folder, "--host", "0.0.0.0").err
    assert warning not in mla("serve", mla_folder, "--host", "0.0.0.0", "--api-key", KEY).err
    assert warning not in mla("serve", mla_folder).err
    assert " ".join(became[-1][1][-2:]) == "--max-model-len auto"
    assert became[-1][2]["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert "--kv-cache-memory-bytes" not in became[-1][1]
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    mla("serve", mla_folder)
    assert became[-1][1][-2] == "--kv-cache-memory-bytes"
    assert 0 < int(became[-1][1][-1]) < psutil.virtual_memory().available
    assert "auto, fp32, bf16, int8, got fp16" in mla("serve", mla_folder, "--cache-format", "fp16").err
    assert "--engine transformers" in mla("serve", mla_folder, "--cache-dir", "x").err


def test_vllm_keeps_fp32_and_gets_what_fits_beside_the_weights(mla, mla_folder, monkeypatch, became):
    weights = (mla_folder / "model.safetensors").stat().st_size  # and a header
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=weights + 10**6))
    mla("serve", mla_folder)
    ((command, environment),) = became
    assert command[command.index("--dtype") + 1] == "float32"  # it would take bf16 by itself
    assert environment["MLA_CACHE_FORMAT"] == "fp32"
    assert 500_000 <= int(command[command.index("--kv-cache-memory-bytes") + 1]) < 510_000


def test_vllm_takes_quantised_weights_as_it_does(mla, mla_folder, tmp_path, became):
    folder = shutil.copytree(mla_folder, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    mla("serve", folder)
    assert became[0][0][became[0][0].index("--dtype") + 1] == "auto"


def test_a_vllm_for_gpus_is_told_nothing_of_the_cpu(mla, mla_folder, monkeypatch, became):
    from mla.cli import serve

    monkeypatch.setattr(serve.importlib.metadata, "version", lambda name: "0.32.0")
    mla("serve", mla_folder)
    ((command, environment),) = became
    assert command[-4:] == ["--dtype", "auto", "--max-model-len", "auto"]
    assert "MLA_CACHE_FORMAT" not in environment


def test_vllm_computes_as_the_other_engine_does(mla, mla_folder, tmp_path, monkeypatch, became):
    """A CPU without bf16 arithmetic computes a bf16 checkpoint in fp32, on a bf16 cache."""
    from mla.integrations import loading

    shutil.copytree(mla_folder, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(mla_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    told = []
    for native in (False, True):
        monkeypatch.setattr(loading, "computes_in_half", lambda device, native=native: native)
        for options in ((), ("--dtype", "bfloat16"), ("--cache-format", "int8")):
            mla("serve", tmp_path / "half", *options)
            command, environment = became[-1]
            told.append((command[command.index("--dtype") + 1], environment.get("MLA_CACHE_FORMAT")))
    assert told[:3] == [("float32", "bf16"), ("bfloat16", None), ("float32", "int8")]
    assert told[3:] == [("auto", None), ("bfloat16", None), ("auto", "int8")]
