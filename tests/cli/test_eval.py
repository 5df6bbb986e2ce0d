"""``mla eval``: windows as the model meets text in use, and options that agree."""

import json
import shutil

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from mla.integrations import loading


@torch.no_grad()
def test_every_window_begins_as_in_use(mla, mla_folder, tmp_path):
    """With the token that the tokenizer starts every text with; the text's own tokens are all predicted."""
    folder, first = shutil.copytree(mla_folder, tmp_path / "model"), "!"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.convert_tokens_to_ids(first)
    tokenizer.bos_token = first
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, bos)]
    )
    tokenizer.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    run = mla("eval", folder, "--text", text, "--window", 32, "--max-tokens", 100, "--json")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    windows = torch.cat([torch.full((3, 1), bos), ids[: 3 * 31].view(3, 31)], 1)
    want = sum(float(model(w[None], labels=w[None]).loss) for w in windows) / 3
    found = json.loads(run.out)
    assert found["tokens"] == 3 * 31
    assert found["nll"] == pytest.approx(want, rel=1e-4)


def test_fewer_tokens_than_a_window(mla, mla_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("x" * 2000)
    run = mla("eval", mla_folder, "--text", text, "--max-tokens", 500, "--window", 512)
    assert run.status == 2
    said = " ".join(run.err.split())
    assert "--max-tokens: expected at least one window (--window 512), got 500: allow more tokens" in said


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_reference_computes_in_what_the_model_does(
    mla, mla_folder, llama_folder, tmp_path, monkeypatch, stored
):
    """By default, too: what "auto" is for the reference alone may be another dtype."""
    monkeypatch.setattr(loading, "computes_in_half", lambda _: True)
    other = torch.bfloat16 if stored == torch.float32 else torch.float32
    model, reference = tmp_path / "model", tmp_path / "reference"
    for place, folder, dtype in ((model, mla_folder, stored), (reference, llama_folder, other)):
        shutil.copytree(folder, place)
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(place)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    command = ("eval", model, "--text", text, "--window", 32, "--against", reference)
    dtype = str(stored).removeprefix("torch.")
    result = json.loads(mla(*command, "--json").out)
    assert (result["dtype"], result["reference_dtype"]) == (dtype, dtype)
    table = mla(*command, "--dtype", "float32").out
    assert table.count("float32") == 2
    assert json.loads(mla(*command[:-2], "--json").out)["reference_dtype"] is None
