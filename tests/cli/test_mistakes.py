"""A user's mistake: one clear line, exit status 2, no traceback."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run


@pytest.fixture
def broken(mla_folder, tmp_path):
    """A copy of the model folder to be damaged."""
    return shutil.copytree(mla_folder, tmp_path / "broken")


def says(run, *parts):
    assert run.status == 2, run
    lines = run.err.strip().splitlines()
    assert len(lines) == 1, run.err
    assert lines[0].startswith("mla: error: ")
    for part in parts:
        assert part in lines[0]
    assert run.out == ""


def test_missing_folder(mla):
    says(mla("generate", "./nothing", "Hi"), "./nothing: no such folder or file")
    says(mla("doctor", "nothing-here"), "no such folder or file, and not a Hub id")


@pytest.mark.parametrize("name", ["~nosuchuser/model", "x" * 300])
def test_names_that_no_path_can_have(mla, mla_folder, name):
    says(mla("doctor", name), "expected a folder, a file or a Hub id")
    says(mla("eval", mla_folder, "--text", name), "is not readable as UTF-8 text")


def test_folder_without_a_config(mla, tmp_path):
    says(mla("doctor", tmp_path), "expected a model folder with a config.json")


def test_device_that_is_not_there(mla, mla_folder):
    says(
        mla("generate", mla_folder, "Hi", "--device", "cuda:77"), "--device cuda:77: this torch cannot use it"
    )


def test_arguments_that_are_no_text(mla, mla_folder, monkeypatch):
    """Python reads bytes on the command line that are not UTF-8 as halves of surrogate pairs."""
    says(mla("generate", mla_folder, "a \udcff"), "PROMPT: expected UTF-8 text, got other bytes at letter 3")
    says(mla("chat", mla_folder, "--system", "\udcff"), "--system: expected UTF-8 text")
    for options in ((), ("--explore",)):
        says(
            mla("convert", "\udcff", "out", *options),
            "MODEL: expected UTF-8 text, got other bytes at letter 1",
        )
        says(mla("convert", mla_folder, "\udcff", *options), "OUT: expected UTF-8 text")
        text = ("--calibration", "self", "--calibration", "\udcff")
        says(mla("convert", mla_folder, "out", *text, *options), "--calibration: expected UTF-8 text")
    monkeypatch.setattr("sys.stdin", io.StringIO("a \udcff\n"))
    run = mla("chat", mla_folder)
    assert (run.status, "the prompt: expected UTF-8 text" in run.err) == (2, True)


def test_other_file(mla, tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    says(mla("generate", file, "Hi"), "expected a folder, a .gguf file or a Hub id")


def test_broken_config(mla, broken):
    (broken / "config.json").write_text("{")
    says(mla("generate", broken, "Hi"), str(broken), "does not open")


def test_unknown_family(mla, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "mystery"}))
    says(mla("generate", broken, "Hi"), "mystery")


@pytest.mark.parametrize("keep", [0, 4, 1000, -100])
def test_damaged_weights(mla, broken, keep):
    file = broken / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    says(mla("generate", broken, "Hi"), "model.safetensors is damaged", "fetch or convert it again")


def test_missing_weights(mla, broken):
    (broken / "model.safetensors").unlink()
    says(mla("generate", broken, "Hi"), "does not open")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        # Transformers would draw the last layer's weights at random.
        ({"num_hidden_layers": 3}, ["lacks 9 tensors (model.layers.2.input_layernorm.weight"]),
        # ... and leave one that is there aside.
        ({"num_hidden_layers": 1}, ["holds 9 tensors (model.layers.1.", "config.json would not use"]),
        ({"intermediate_size": 40}, ["down_proj.weight is [32, 48], its config.json makes it [32, 40]"]),
        ({"hidden_size": 33}, ["does not open", "33) is not a multiple of"]),
        ({"num_attention_heads": "x"}, ["does not open", "expected int, got str"]),
    ],
)
def test_weights_and_configuration_that_do_not_agree(mla, llama_folder, tmp_path, changes, parts):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    text = tmp_path / "text"
    text.write_text("Once upon a time. " * 20)
    says(mla("eval", folder, "--text", text, "--window", 32), *parts)


def test_weights_that_may_be_left_aside(mla, mla_folder, tmp_path):
    """Drafters after the last layer, towers of images; not a norm of the queries."""
    folder = shutil.copytree(mla_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    weights = load_file(folder / "model.safetensors")
    aside = {f"model.layers.{layers}.eh_proj.weight", "vision_tower.blocks.0.w", "model.mtp.0.w"}
    save_file(
        weights | {name: torch.zeros(1) for name in aside}, folder / "model.safetensors", {"format": "pt"}
    )
    assert mla("generate", folder, "Hi", "--max-new-tokens", 1).status == 0
    norm = "model.layers.0.self_attn.q_norm.weight"
    save_file(weights | {norm: torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    says(mla("generate", folder, "Hi"), f"holds 1 tensor ({norm}) that a deepseek_v3 model")


def test_not_an_mla_model(mla, llama_folder):
    for verb in (("generate", llama_folder, "Hi"), ("chat", llama_folder), ("doctor", llama_folder)):
        says(mla(*verb), "is not an MLA model", "mla convert MODEL OUT")


def test_prompt_longer_than_the_model(mla, mla_folder):
    says(mla("generate", mla_folder, "x" * 600, "--raw"), "the prompt has 600 tokens, the model takes 512")
    says(
        mla("generate", mla_folder, "x" * 60, "--raw", "--max-model-len", 50), "60 tokens, the model takes 50"
    )


def test_empty_prompt(mla, mla_folder):
    says(mla("generate", mla_folder, "", "--raw"), "the prompt is empty")


def test_not_enough_memory_for_the_cache(mla, mla_folder, monkeypatch):
    from mla.integrations import loading

    monkeypatch.setattr(loading, "free_memory", lambda: 100_000)
    monkeypatch.setattr(loading, "_size", lambda source, config: None)
    run = mla("generate", mla_folder, "x" * 400, "--raw")
    says(run, "a cache of 512 tokens would need 0.00 GiB of memory, 0.00 GiB are available")


def test_not_enough_memory_for_the_weights(mla, mla_folder, monkeypatch):
    from mla.integrations import loading

    monkeypatch.setattr(loading, "free_memory", lambda: 100_000)
    says(mla("generate", mla_folder, "Hi"), "the weights of", "would need")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-new-tokens", 0), "--max-new-tokens: expected at least 1"),
        (("--temperature", -1), "--temperature: expected 0 or more"),
        (("--temperature", "nan"), "--temperature: expected 0 or more"),
        (("--temperature", "inf"), "--temperature: expected 0 or more"),
        (("--top-p", "nan"), "--top-p: expected a number above 0"),
        (("--seed", 2**64), "--seed: expected an integer from -2^63 to 2^64 - 1"),
        (("--seed", -(2**63) - 1), "--seed: expected an integer from -2^63 to 2^64 - 1"),
        (("--top-p", 0), "--top-p: expected a number above 0"),
        (("--max-model-len", 10**6), "--max-model-len: expected 1 to 512"),
        (("--dtype", "int3"), "--dtype: expected one of auto, float32, bfloat16, float16, got int3"),
    ],
)
def test_options_out_of_range(mla, mla_folder, options, message):
    says(mla("generate", mla_folder, "Hi", *options), message)


def test_eval_of_no_tokens(mla, mla_folder, tmp_path):
    (tmp_path / "text").write_text("Once upon a time. " * 20)
    for count in (0, -5):
        run = mla("eval", mla_folder, "--text", tmp_path / "text", "--window", 32, "--max-tokens", count)
        says(run, f"--max-tokens: expected at least 1, got {count}")


def test_standard_input_that_is_no_text(mla, mla_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe" * 9), encoding="utf-8"))
    says(mla("eval", mla_folder, "--text", "-", "--window", 32), "standard input is not readable as text")


def test_text_files(mla, mla_folder, tmp_path):
    says(mla("eval", mla_folder, "--text", "none.txt"), "none.txt: no such text file")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    says(mla("eval", mla_folder, "--text", binary), "not readable as UTF-8")
    short = tmp_path / "short.txt"
    short.write_text("Hi")
    run = mla("eval", mla_folder, "--text", short, "--window", 256)
    says(run, "the text has 2 tokens, less than one window of 256")
    long = tmp_path / "long.txt"
    long.write_text("x" * 2000)
    says(mla("eval", mla_folder, "--text", long), "window: expected 2 to 512 tokens, which", "got 1024")


def test_unknown_verbs_and_options(mla, mla_folder):
    assert mla("transmogrify").status == 2
    assert mla("generate", mla_folder).status == 2
    assert mla("generate", mla_folder, "Hi", "--nonsense").status == 2


def test_an_instruction_set_that_is_not_there(mla_folder):
    """Read when the kernels load: another process."""
    done = subprocess.run(
        [sys.executable, "-m", "mla", "generate", mla_folder, "Hi"],
        env=os.environ | {"MLA_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    run = Run(done.returncode, done.stdout, done.stderr)
    says(run, "environment variable MLA_ISA: expected", "got mmx", "unset the variable")
