"""``mla serve --engine vllm``: what vLLM's own server is started with."""

import json
import shutil

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.test_serve import KEY
from tests.families import ROPE_SCALINGS


@pytest.fixture
def became(monkeypatch):
    """The commands and environments that this process was replaced by, vLLM installed."""
    from mla.cli import vllm

    commands = []
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(vllm.os, "execve", lambda *command: commands.append(command[1:]) or exit(0))
    for name in ("MLA_CACHE_FORMAT", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
    return commands


def test_the_vllm_engine_is_vllms_own_server(mla, mla_folder, monkeypatch):
    from mla.cli import vllm

    says = mla("serve", mla_folder, "--engine", "vllm")
    assert "vLLM is not installed here" in says.err
    became = []
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(vllm.os, "execve", lambda *command: became.append(command) or exit(0))
    options = ("--port", 9000, "--max-model-len", 256, "--cache-format", "int8", "--memory", "500MB")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert mla("serve", mla_folder, *options, "--api-key", KEY).status == 0
    (_, command, environment), *_ = became
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(mla_folder)]
    assert " ".join(command[5:]) == (
        "--middleware mla.integrations.vllm.middleware.Gate --host 127.0.0.1 --port 9000 --max-model-len 256 "
        "--dtype float32 --kv-cache-memory-bytes 500000000"
    )
    assert environment["MLA_CACHE_FORMAT"] == "int8"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment  # vLLM would heed it rather than the option
    assert environment["VLLM_API_KEY"] == KEY
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    warning = "anybody who reaches 0.0.0.0 can use this server: --api-key asks for a key"
    assert warning in mla("serve", mla_folder, "--host", "0.0.0.0").err
    assert warning not in mla("serve", mla_folder, "--host", "0.0.0.0", "--api-key", KEY).err
    assert warning not in mla("serve", mla_folder).err
    assert " ".join(became[-1][1][-4:]) == "--max-model-len auto --dtype float32"
    assert became[-1][2]["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert "--kv-cache-memory-bytes" not in became[-1][1]
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    mla("serve", mla_folder)
    assert became[-1][1][-2] == "--kv-cache-memory-bytes"
    assert 0 < int(became[-1][1][-1]) < psutil.virtual_memory().available
    count = len(became)
    asked = ("serve", mla_folder, "--engine", "vllm")
    assert "auto, fp32, bf16, int8, got fp16; take --engine t" in mla(*asked, "--cache-format", "fp16").err
    assert len(became) == count


def test_strangers_are_kept_out_as_by_the_other_engine(mla, mla_folder, monkeypatch, became):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    gate = ["--middleware", "mla.integrations.vllm.middleware.Gate"]
    local = [*gate, "--allowed-origins", "[]"]  # by itself vLLM lets any page read its answers
    for options, first in (
        ((), local),
        (("--host", "0.0.0.0"), ["--host", "0.0.0.0"]),
        (("--host", "0.0.0.0", "--", "--host=localhost"), local),
        (("--api-key", KEY), [*gate, "--host"]),
        (("--host", "0.0.0.0", "--api-key", KEY), [*gate, "--host"]),
    ):
        mla("serve", mla_folder, *options)
        command, _ = became[-1]
        assert command[5 : 5 + len(first)] == first
        assert KEY not in command
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    mla("serve", mla_folder)
    assert became[-1][0][5:8] == [*gate, "--host"]
    for further in (("--api-key", KEY), (f"--api_key={KEY}",), ("--api-k", KEY)):
        run = mla("serve", mla_folder, "--", *further)
        assert (run.status, "--api-key: expected before --, or in MLA_API_KEY" in run.err) == (2, True)


def test_vllms_own_options_follow_ours(mla, mla_folder, became):
    mla("serve", mla_folder, "--served-model-name", "small", "--", "--tensor-parallel-size", 2, "--seed=3")
    ((command, _),) = became
    assert command[command.index("--served-model-name") + 1] == "small"
    assert command[-3:] == ["--tensor-parallel-size", "2", "--seed=3"]
    run = mla("serve", mla_folder, "--engine", "transformers", "--", "--seed=3")
    assert (run.status, "--seed=3: options after -- are vLLM's; take --engine vllm" in run.err) == (2, True)


def test_a_file_of_options_is_refused(mla, mla_folder, became):
    """Ours would win over it, and what it says of ranks and formats is not read."""
    for further in (("--config", "file.yaml"), ("--config=file.yaml",)):
        run = mla("serve", mla_folder, "--", *further)
        assert (run.status, run.err.count("\n")) == (2, 1)
        assert "--config: expected vLLM's options themselves after --, got a file of them" in run.err
    mla("serve", mla_folder, "--", "--config-format", "hf")
    assert len(became) == 1


@pytest.mark.parametrize(("cores", "own", "told"), [(2, None, "0"), (2, "1", "1"), (64, None, None)])
def test_few_cores_all_compute(mla, mla_folder, monkeypatch, became, cores, own, told):
    """vLLM would keep one of two for its scheduler."""
    monkeypatch.setattr("mla.cli.vllm.usable_cores", lambda: cores)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    if own is not None:
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", own)
    mla("serve", mla_folder)
    assert became[0][1].get("VLLM_ENABLE_V1_MULTIPROCESSING") == told


def test_a_quota_is_not_filled_with_threads(mla, mla_folder, monkeypatch, became):
    """vLLM binds a thread to every core that it sees, and sets OMP_NUM_THREADS to their number."""
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    for allowed, told in ((64, "nobind"), (8, None)):
        monkeypatch.setattr("mla.cli.vllm.usable_cores", lambda: 8)
        monkeypatch.setattr("mla.cli.vllm.allowed_cores", lambda allowed=allowed: allowed)
        mla("serve", mla_folder)
        assert became[-1][1].get("VLLM_CPU_OMP_THREADS_BIND") == told


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        (("--tensor-parallel-size", 2), 2),
        (("-tp=2", "--data-parallel-size=3"), 6),
        (("-dp", 2, "-dp", 4), 4),
        (("--tensor-parallel-size", "two"), 1),  # vLLM's to refuse
        (("--tensor_parallel_size", 2, "--pipeline_parallel-size=3"), 6),
        (("-pp", 2), 2),
        (("--tensor-parallel", 2, "--pipe=3"), 6),  # vLLM takes beginnings of names
        (("--tensor_par=2",), 2),
        ((), 1),
    ],
)
def test_memory_is_that_of_all_ranks(mla, mla_folder, monkeypatch, became, options, ranks):
    mla("serve", mla_folder, "--memory", "600MB", "--", *options)
    command, _ = became[0]
    assert int(command[command.index("--kv-cache-memory-bytes") + 1]) == 6 * 10**8 // ranks
    weights = (mla_folder / "model.safetensors").stat().st_size
    replicas = {("-tp=2", "--data-parallel-size=3"): 3, ("-dp", 2, "-dp", 4): 4}.get(options, 1)
    monkeypatch.setattr("mla.cli.vllm.free_memory", lambda: replicas * weights + 10**6)
    mla("serve", mla_folder, "--", *options)
    command, _ = became[1]
    share = int(command[command.index("--kv-cache-memory-bytes") + 1])
    assert 500_000 // ranks <= share < 560_000 // ranks  # and headers, which do not count in fp32


def test_a_format_in_vllms_own_words_is_the_format(mla, mla_folder, became):
    """The variable that says what the dtype comes to would contradict it."""
    own = ("--kv-cache-dtype", "int8_per_token_head")
    for options in (own, ("=".join(own),), ("--kv_cache_dtype", own[1])):
        mla("serve", mla_folder, "--", *options)
        assert "MLA_CACHE_FORMAT" not in became[-1][1]
    run = mla("serve", mla_folder, "--cache-format", "bf16", "--", *own)
    assert (run.status, "--kv-cache-dtype int8_per_token_head: expected one of them" in run.err) == (2, True)


def test_prefixes_on_disk_beneath_vllm(mla, mla_folder, tmp_path, monkeypatch, became):
    mla("serve", mla_folder, "--cache-dir", tmp_path / "latents", "--cache-dir-size", "3GB")
    ((command, environment),) = became
    assert environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "1"  # two beside a connector, by itself
    setting = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert setting["kv_connector_extra_config"] == {"folder": str(tmp_path / "latents"), "size": 3 * 10**9}
    assert (setting["kv_connector"], setting["kv_load_failure_policy"]) == ("LatentConnector", "recompute")
    bare = shutil.copytree(mla_folder, tmp_path / "bare")
    (bare / "model.safetensors").rename(bare / "model.bin")
    run = mla("serve", bare, "--cache-dir", tmp_path, "--memory", "1GB", "--dtype", "float32")
    assert (run.status, "--cache-dir: expected safetensors in" in run.err) == (2, True)
    monkeypatch.setattr("mla.cli.vllm.importlib.metadata.version", lambda name: "0.32.0")
    run = mla("serve", mla_folder, "--cache-dir", tmp_path)
    assert (run.status, "--cache-dir: expected a vLLM for CPUs, got one for GPUs" in run.err) == (2, True)


def test_what_no_server_could_serve_is_refused_before_vllm_starts(mla, mla_folder, llama_folder, became):
    for folder, options, words in (
        ("./nothing", (), "no such folder or file"),
        (llama_folder, (), "is not an MLA model"),
        (mla_folder, ("--max-model-len", 10**6), "--max-model-len: expected 1 to 512"),
    ):
        run = mla("serve", folder, *options)
        assert (run.status, words in run.err, run.err.count("\n")) == (2, True, 1)
    assert not became


@pytest.fixture
def changed(mla_folder, tmp_path):
    """Makes a folder of the model with another configuration."""

    def change(**options):
        folder = shutil.copytree(mla_folder, tmp_path / f"changed-{len(list(tmp_path.iterdir()))}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | options))
        return folder

    return change


def test_what_vllm_cannot_serve_is_left_to_transformers(mla, mla_folder, changed, monkeypatch, became):
    from mla.cli import serve

    monkeypatch.setattr(serve, "_load", lambda *arguments: None)
    monkeypatch.setattr(serve, "_run", lambda *arguments: exit(7))
    for folder, options, reason in (
        (mla_folder, ("--cache-format", "fp16"), "vLLM takes auto, fp32, bf16, int8, got fp16"),
        (changed(attention_bias=True), (), "(attention_bias), for which vLLM has no place"),
        (changed(rope_interleave=False), (), "where vLLM always rotates pairs"),
        (changed(model_type="deepseek_v32", index_topk=8), (), "which vLLM does not have on CPUs"),
    ):
        run = mla("serve", folder, "--port", 0, *options)
        assert (run.status, f"{reason}; Transformers serves" in run.err) == (7, True)
        assert mla("serve", folder, *options, "--engine", "vllm").status == 2
    assert not became
    monkeypatch.setattr("mla.cli.vllm.importlib.metadata.version", lambda name: "0.32.0")  # one for GPUs
    mla("serve", changed(index_topk=8, model_type="deepseek_v32"))
    assert became


def test_rope_that_vllm_computes_otherwise_is_left_to_transformers(changed):
    from mla.integrations.loading import load_mla_config
    from mla.integrations.vllm.unfit import why_unfit

    def why(scaling, limit=512, own_code=True, **options):
        config, _ = load_mla_config(str(changed(rope_parameters=ROPE_SCALINGS[scaling] | options)))
        return why_unfit(config, limit, own_code=own_code)

    assert why("yarn") is why("yarn-plain") is why("yarn-smooth", own_code=False) is None
    assert "has yarn with attention_factor, which vLLM does not compute as" in why("yarn-smooth")
    assert "has yarn with truncate: false" in why("yarn", truncate=False)
    assert "has yarn with only one of mscale and mscale_all_dim" in why("yarn-plain", mscale=0.7)
    assert "has RoPE of type llama3, where vLLM computes default and yarn only" in why("llama3")
    assert "expected --max-model-len up to 64, got 65" in why("longrope", 65, own_code=False)
    assert why("linear", own_code=False) is None


def test_vllm_keeps_fp32_and_gets_what_fits_beside_the_weights(mla, mla_folder, monkeypatch, became):
    weights = (mla_folder / "model.safetensors").stat().st_size  # and a header
    monkeypatch.setattr("mla.cli.vllm.free_memory", lambda: weights + 10**6)
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
    from mla.cli import vllm

    monkeypatch.setattr(vllm.importlib.metadata, "version", lambda name: "0.32.0")
    mla("serve", mla_folder)
    ((command, environment),) = became
    assert command[-4:] == ["--max-model-len", "auto", "--dtype", "auto"]
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
