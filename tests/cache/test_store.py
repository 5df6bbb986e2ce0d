"""Latents in files: exact, whole or absent, and refused whenever they are not what was asked for."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mla.cache import LatentCache
from mla.cache import folder as folder_module
from mla.cache.folder import PrefixFolder, common_length
from mla.cache.store import _checksum, copy_prefix, is_storable, load_cache, read_tokens, save_cache
from mla.errors import MLAError
from mla.integrations.prefixes import fingerprint, require_storable
from mla.integrations.transformers import absorb
from tests.families import FAMILIES, build

CPU = torch.device("cpu")
MODEL = {"weights": "abc", "dtype": "float32"}
TOKENS = [5, 3, 8, 1, 9, 2, 7]


def filled(tokens=TOKENS, format=None, seed=0) -> LatentCache:  # noqa: A002
    generator = torch.Generator().manual_seed(seed)
    cache = LatentCache(format=format)
    for layer in range(2):
        c_kv, k_rope = (torch.randn(1, 1, len(tokens), width, generator=generator) for width in (16, 4))
        cache.update(c_kv, k_rope, layer)
    return cache


def equal(one: LatentCache, other: LatentCache) -> bool:
    pairs = zip(one.latent_layers, other.latent_layers, strict=True)
    return all(torch.equal(a.held()[name], b.held()[name]) for a, b in pairs for name in a.held())


@pytest.mark.parametrize("format", [None, "fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("keep", [None, 7, 4, 1])
def test_what_is_saved_comes_back(tmp_path, format, keep):  # noqa: A002
    cache = filled(format=format)
    save_cache(tmp_path / "file", cache, TOKENS, MODEL)
    back = LatentCache(format=format)
    assert load_cache(tmp_path / "file", back, MODEL, device=CPU, keep=keep) == TOKENS[:keep]
    cache.layers[0].crop((keep or 7) - 7)
    cache.layers[1].crop((keep or 7) - 7)
    assert equal(cache, back)
    for layer, other in zip(cache.layers, back.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
        assert (layer.rank, layer.rope) == (other.rank, other.rope)


@torch.no_grad()
# The layers of mistral_large4 read the latents of others, their indexers have keys of their own, or neither.
@pytest.mark.parametrize(
    "family", [name for name in ("deepseek_v3", "deepseek_v32", "mistral_large4") if name in FAMILIES]
)
def test_a_model_goes_on_from_a_file(tmp_path, family):
    model = absorb(build(family))
    require_storable(model)
    ids = torch.randint(2, 200, (1, 40))
    text = model.config.get_text_config(decoder=True)
    cache = LatentCache(text)
    model(ids[:, :30], past_key_values=cache)
    save_cache(tmp_path / "file", cache, ids[0, :30].tolist(), MODEL)
    back = LatentCache(text, capacity=40)
    load_cache(tmp_path / "file", back, MODEL, device=CPU)
    copy = LatentCache(text)
    copy_prefix(cache, copy, 20)
    want = model(ids[:, 30:], past_key_values=cache).logits
    assert torch.equal(model(ids[:, 30:], past_key_values=back).logits, want)
    again = model(ids[:, 20:], past_key_values=copy).logits[:, 10:]
    torch.testing.assert_close(again, want, atol=1e-5, rtol=1e-4)


def test_files_that_name_a_dtype_beside_the_widths_are_read(tmp_path):
    save_cache(tmp_path / "file", filled(), TOKENS, MODEL)
    with safe_open(tmp_path / "file", framework="pt") as file:
        header = file.metadata()
    header["layers"] = json.dumps({str(index): [16, 4, "float32"] for index in range(2)})
    tensors = load_file(tmp_path / "file")
    header["checksum"] = _checksum(header, tensors)
    save_file(tensors, tmp_path / "old", metadata=header)
    back = LatentCache()
    load_cache(tmp_path / "old", back, MODEL, device=CPU)
    assert equal(filled(), back)


def test_a_copy_is_independent():
    cache, copy = filled(format="int8"), LatentCache(format="int8", capacity=20)
    copy_prefix(cache, copy, 3)
    assert copy.get_seq_length() == 3
    before = copy.layers[0].held()["rows"].clone()
    cache.layers[0].held()["rows"].zero_()
    assert torch.equal(copy.layers[0].held()["rows"], before)


def test_only_latents_are_stored(tmp_path):
    model = build("kimi_linear")
    cache = LatentCache(model.config)
    assert not is_storable(cache)
    with pytest.raises(ValueError, match="latents only"):
        save_cache(tmp_path / "file", cache, TOKENS, MODEL)
    with pytest.raises(ValueError, match="expected rows"):
        save_cache(tmp_path / "file", filled(), TOKENS[:3], MODEL)


def test_contexts_are_neither_stored_nor_copied(tmp_path):
    """A prefix of the tokens says nothing about the context beside them."""
    cache, copy = filled(), LatentCache()
    cache.layers[1].holds_context = True
    assert not is_storable(cache)
    for use in (
        lambda: save_cache(tmp_path / "file", cache, TOKENS, MODEL),
        lambda: copy_prefix(cache, copy, 3),
    ):
        with pytest.raises(ValueError, match=r"latents only, .* context of a cross-attention"):
            use()
    assert not copy.layers


def refused(path, match, model=MODEL):
    cache = LatentCache()
    with pytest.raises(MLAError, match=match):
        load_cache(path, cache, model, device=CPU)
    assert not cache.layers


def test_what_is_not_such_a_file_is_refused(tmp_path):
    refused(tmp_path / "none", "no such file")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "damaged")
    (tmp_path / "pickle").write_bytes(b"\x80\x04\x95cos\nsystem\n" * 20)
    refused(tmp_path / "pickle", "damaged")
    save_file({"w": torch.zeros(3)}, tmp_path / "weights")
    refused(tmp_path / "weights", "expected a file of format 'mla latent cache 1', got None")


def test_a_file_of_another_model_is_refused_with_the_reason(tmp_path):
    save_cache(tmp_path / "file", filled(), TOKENS, MODEL)
    refused(tmp_path / "file", "its weights is abc, expected def", {**MODEL, "weights": "def"})
    refused(tmp_path / "file", "its dtype is float32, expected bfloat16", {**MODEL, "dtype": "bfloat16"})
    refused(tmp_path / "file", "its RoPE is missing, expected yarn", {**MODEL, "RoPE": "yarn"})
    refused(tmp_path / "file", "its weights is abc, expected none", {"dtype": "float32"})


def with_header(source: Path, target: Path, **changes) -> None:
    """The content of a file under another header, its checksum left as it was."""
    with safe_open(source, framework="pt") as file:
        header = {**file.metadata(), **changes}
    save_file(load_file(source), target, metadata=header)


def test_every_damaged_file_is_refused(tmp_path):
    """A thousand of them: flipped bytes, cut ends, added ends, parts of two files put together."""
    one, two, bad = tmp_path / "one", tmp_path / "two", tmp_path / "bad"
    save_cache(one, filled(), TOKENS, MODEL)
    save_cache(two, filled(seed=1), TOKENS[::-1], {**MODEL, "weights": "other"})
    good, foreign = one.read_bytes(), two.read_bytes()
    with safe_open(one, framework="pt") as file:
        header = file.metadata()
    draw = random.Random(0)
    used = 0
    for round_ in range(1000):
        kind = round_ % 6
        data = bytearray(good)
        if kind in (0, 1):  # one flipped bit; a few random bytes
            for _ in range(1 if kind == 0 else draw.randrange(2, 9)):
                place = draw.randrange(len(data))
                data[place] ^= 1 << draw.randrange(8) if kind == 0 else draw.randrange(1, 256)
            bad.write_bytes(data)
        elif kind == 2:
            bad.write_bytes(data[: draw.randrange(len(data))])
        elif kind == 3:
            bad.write_bytes(data + bytes(draw.randrange(1, 100)))
        elif kind == 4:  # the beginning of one file and the end of the other
            place = draw.randrange(8, len(data) - 1)
            bad.write_bytes(data[:place] + foreign[place:])
            if bad.read_bytes() in (good, foreign):
                continue
        else:  # tokens, model or widths changed by hand
            changes = [
                {"fingerprint": json.dumps({**MODEL, "weights": str(round_)})},
                {"layers": header["layers"].replace("16", str(draw.randrange(1, 16)))},
                {"layers": header["layers"].replace("4]", "5]")},
                {"checksum": f"{draw.getrandbits(256):064x}"},
                {},
            ][draw.randrange(5)]
            with_header(one, bad, **changes)
            if not changes:
                tensors = load_file(one)
                tensors["tokens"][draw.randrange(len(TOKENS))] += 1
                save_file(tensors, bad, metadata=header)
        cache = LatentCache()
        try:
            tokens = load_cache(bad, cache, MODEL, device=CPU)
        except MLAError:
            continue
        # A space of the header may have become another one: then everything that counts is as it was.
        assert kind in (0, 1)
        assert tokens == TOKENS
        assert equal(cache, filled())
        used += 1
    assert used <= 5


def test_a_failed_save_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MLAError, match="latents cannot be written: "):
        save_cache(tmp_path / "file" / "latents", filled(), TOKENS, MODEL)
    (tmp_path / "folder").mkdir()
    with pytest.raises(MLAError, match="expected a file, got a folder"):
        save_cache(tmp_path / "folder", filled(), TOKENS, MODEL)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


def test_killed_savers_and_shared_folders(tmp_path):
    (tmp_path / "kill").mkdir()
    (tmp_path / "replace").mkdir()
    command = [sys.executable, "-m", "tests.cache.killing", str(tmp_path)]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert "100 killed" in run.stdout
    assert "read while it was replaced" in run.stdout


def test_another_default_device(tmp_path):
    """Files are read and written where the rows are."""
    cache = filled()
    with torch.device("meta"):
        shelf, back = PrefixFolder(tmp_path, MODEL, limit=10**6), LatentCache()
        shelf.save(cache, TOKENS)
        file, common = shelf.longest(TOKENS)
        shelf.load(file, back, common, CPU)
    assert common == len(TOKENS)
    assert equal(cache, back)


def test_the_folder_finds_the_longest_prefix(tmp_path):
    shelf = PrefixFolder(tmp_path / "new", MODEL, limit=10**6)
    assert shelf.longest([1, 2, 3]) == (None, 0)
    shelf.save(filled([1, 2, 3]), [1, 2, 3])
    shelf.save(filled([1, 2, 9, 9]), [1, 2, 9, 9])
    file, common = shelf.longest([1, 2, 9, 4])
    assert common == 3
    assert read_tokens(file).tolist() == [1, 2, 9, 9]
    other = PrefixFolder(tmp_path / "new", {**MODEL, "weights": "other"}, limit=10**6)
    assert other.longest([1, 2, 9, 4]) == (None, 0)
    shelf.save(filled([1, 2, 3, 4]), [1, 2, 3, 4])  # the file with [1, 2, 3] has nothing of its own now
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_of_many_files_few_are_compared(tmp_path, monkeypatch):
    """A scheduler waits for it."""
    compared = []

    def counting(one, other):
        compared.append(None)
        return common_length(one, other)

    monkeypatch.setattr(folder_module, "common_length", counting)
    shelf, start = PrefixFolder(tmp_path, MODEL, limit=10**9), list(range(40))
    for number in range(30):
        tokens = [*start, 100 + number, *range(60 - number)]
        shelf.save(filled(tokens), tokens)
    file, common = shelf.longest([*start, 7, 8])
    assert (common, len(read_tokens(file))) == (40, 40 + 1 + 31)
    compared.clear()
    assert shelf.longest([*start, 100, 0, 1])[1] == 43
    assert shelf.longest([*start, 7, 8], beyond=40) == (None, 0)
    assert shelf.longest([5, *start]) == (None, 0)
    assert 1 <= len(compared) <= 31  # at worst the first comes last, and each is shorter than those before


def test_the_folder_stays_within_its_size(tmp_path):
    size = filled(list(range(100))).nbytes
    shelf = PrefixFolder(tmp_path, MODEL, limit=4 * size)
    for start in range(3):
        shelf.save(filled(list(range(start, start + 100))), list(range(start, start + 100)))
    for age, start in enumerate((1, 2, 0)):  # the one saved first is the one used last
        file, _ = shelf.longest(list(range(start, start + 100)))
        os.utime(file, (time.time() - 100 + age,) * 2)
    shelf.save(filled(list(range(50, 150))), list(range(50, 150)))
    held = [shelf.longest(list(range(start, start + 100)))[1] for start in range(3)]
    assert held == [100, 0, 100]
    shelf.save(filled(list(range(500))), list(range(500)))  # larger than all of the folder may be
    assert shelf.longest(list(range(500)))[1] == 100


def test_the_folder_counts_what_is_written_not_what_is_allocated(tmp_path):
    tokens = list(range(100))
    roomy = LatentCache(capacity=10_000)
    copy_prefix(filled(tokens), roomy, 100)
    shelf = PrefixFolder(tmp_path, MODEL, limit=2 * filled(tokens).nbytes)
    assert roomy.nbytes > shelf.limit
    shelf.save(roomy, tokens)
    assert shelf.longest(tokens)[1] == 100


def test_a_damaged_file_in_the_folder_is_told_once(tmp_path):
    shelf = PrefixFolder(tmp_path, MODEL, limit=10**6)
    shelf.save(filled(), TOKENS)
    file, _ = shelf.longest(TOKENS)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(MLAError, match="damaged"):
        shelf.load(file, LatentCache(), 7, CPU)
    assert shelf.longest(TOKENS) == (None, 0)
    shelf.save(filled(), TOKENS)  # and written anew
    shelf.load(shelf.longest(TOKENS)[0], LatentCache(), 7, CPU)


def test_a_cut_file_in_the_folder_is_told_once(tmp_path):
    notes = []
    shelf = PrefixFolder(tmp_path, MODEL, limit=10**6, note=notes.append)
    shelf.save(filled(), TOKENS)
    file, _ = shelf.longest(TOKENS)
    shelf = PrefixFolder(tmp_path, MODEL, limit=10**6, note=notes.append)
    file.write_bytes(file.read_bytes()[:-5])
    for _ in range(2):
        assert shelf.longest(TOKENS) == (None, 0)
    (note,) = notes
    assert f"{file} is damaged" in note


@pytest.mark.parametrize(
    "tokens",
    [
        torch.tensor(TOKENS, dtype=torch.uint32),
        torch.tensor(TOKENS, dtype=torch.int32)[:, None],
        torch.tensor(7),
    ],
    ids=["uint32", "a column", "a number"],
)
def test_tokens_in_another_form_are_told_once(tmp_path, tokens):
    """They are compared with every prompt: no checksum has been looked at then."""
    notes = []
    shelf = PrefixFolder(tmp_path, MODEL, limit=10**6, note=notes.append)
    shelf.save(filled(), TOKENS)
    file, _ = shelf.longest(TOKENS)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    save_file({**load_file(file), "tokens": tokens.contiguous()}, file, metadata=header)
    shelf = PrefixFolder(tmp_path, MODEL, limit=10**6, note=notes.append)
    for _ in range(2):
        assert shelf.longest(TOKENS) == (None, 0)
    (note,) = notes
    assert f"{file} is damaged: expected its tokens as int32 [t], got" in note


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MLAError, match="expected a folder to keep latents in"):
        PrefixFolder(tmp_path / "file", MODEL, limit=1)


def test_the_fingerprint_tells_models_apart():
    model = build("deepseek_v3")
    first = fingerprint(absorb(model), "fp32")
    assert first == fingerprint(build("deepseek_v3"), "fp32")
    assert fingerprint(model, "int8") != first
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.add_(1e-4)
    tuned = fingerprint(model, "fp32")
    assert [name for name in first if tuned[name] != first[name]] == ["weights"]
    changed = fingerprint(build("deepseek_v3").to(torch.bfloat16), "fp32")
    assert {"dtype", "weights"} <= {name for name in first if changed[name] != first[name]}
