"""Prefixes on disk beneath vLLM: taken up by other processes, refused where they are not the model's own."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mla.cache.store import read_tokens
from mla.cli.vllm import keep_prefixes
from tests.vllm import engine, models
from tests.vllm.test_engine import LONG, TOKENS, job, tokens

pytestmark = pytest.mark.vllm

PAGE = 16
#: What lies in whole pages of LONG, but for its last token.
KEPT = (len(LONG) - 1) // PAGE * PAGE
LONGER = [*LONG, *range(3, 40)]

#: Options of a process that reads LONG, and of the one that takes it up after a restart.
SETTINGS = {
    "plain": {},
    # A prompt that is read in several steps is whole when it is kept.
    "chunks": {"max_num_batched_tokens": 32, "max_num_seqs": 4, "enable_prefix_caching": False},
    "int8": {"kv_cache_dtype": "int8_per_token_head"},
}
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("connector")


@pytest.fixture(scope="module")
def model(folder):
    return models.write("deepseek-v3", folder)


@pytest.fixture(scope="module")
def reference(model):
    return models.Reference(model)


def keeping(model, place, rounds=([LONG],), **options):
    transfer = json.loads(keep_prefixes(Path(place), 10**9))
    return job(model, rounds, kv_transfer_config=transfer, **{"block_size": PAGE, **options})


def cached(answer):
    """How many tokens of each prompt were there before."""
    return [each["cached"] for asked in answer["rounds"] for each in asked]


@pytest.fixture(scope="module")
def first(model, folder):
    """Answers by setting of a process that finds nothing, and keeps what it reads."""
    jobs = [keeping(model, folder / name, **options) for name, options in SETTINGS.items()]
    return dict(zip(SETTINGS, engine.run(jobs), strict=True))


@pytest.fixture(scope="module")
def second(first, model, folder):
    """Answers of another process, which finds that, also changed or where it is not its own."""
    longer, damaged, left, strange = (
        shutil.copytree(folder / "plain", folder / name) for name in ("longer", "damaged", "left", "strange")
    )
    for place in (damaged, left):
        (file,) = place.iterdir()
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
    other = shutil.copytree(model, folder / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    unsized = keeping(model, folder / "plain")
    del unsized["options"]["kv_transfer_config"]["kv_connector_extra_config"]["size"]
    jobs = {name: keeping(model, folder / name, **options) for name, options in SETTINGS.items()}
    jobs |= {
        "longer": keeping(model, longer, [[LONGER], [LONGER[:40]]]),
        "damaged": keeping(model, damaged, [[LONGER]]),
        "left": {
            **keeping(model, left, [[LONGER]], max_num_batched_tokens=32, max_num_seqs=4),
            "left": [LONGER],
        },
        "another model": keeping(str(other), strange),
        "another format": keeping(model, folder / "int8"),
        "without a size": unsized,
    }
    return dict(zip(jobs, engine.run(list(jobs.values())), strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_prefix_survives_a_restart(first, second, reference, folder, name):
    assert cached(first[name]) == [0]
    assert cached(second[name]) == [KEPT]
    assert tokens(first[name]) == tokens(second[name])
    if name != "int8":
        assert tokens(first[name]) == [reference.greedy(LONG, TOKENS)]


def test_a_longer_prompt_reads_the_rest(second, reference, folder):
    """The next turn of a conversation; what it reads replaces the file."""
    assert tokens(second["longer"])[0] == reference.greedy(LONGER, TOKENS)
    assert cached(second["longer"]) == [len(LONG) // PAGE * PAGE, 32]
    assert len(list((folder / "longer").iterdir())) == 1


def test_a_damaged_file_is_computed_again(second, reference, folder):
    """It goes, and what was computed takes its place."""
    assert tokens(second["damaged"]) == [reference.greedy(LONGER, TOKENS)]
    (file,) = (folder / "damaged").iterdir()
    assert read_tokens(file).tolist() == LONGER
    assert "the prefix is computed again" in second["damaged"]["log"]
    assert "checksum" in second["damaged"]["log"]


def test_what_a_client_who_left_would_have_computed_is_not_taken_for_computed(second, reference):
    """The pages that a file could not fill are nobody's: the next one with this prompt finds none of them."""
    assert tokens(second["left"]) == [reference.greedy(LONGER, TOKENS)]
    (count,) = cached(second["left"])
    assert count < len(LONG) // PAGE * PAGE  # what two steps computed before the client left


def test_latents_of_another_model_or_format_are_not_taken(second, folder):
    for name, place in (("another model", "strange"), ("another format", "int8")):
        assert cached(second[name]) == [0]
        assert len(list((folder / place).iterdir())) == 2


def test_settings_that_are_missing_are_refused(second):
    wanted = 'kv_connector_extra_config: expected "folder" and "size"'
    assert wanted in second["without a size"]["error"]


def test_weights_that_cannot_be_told_from_others_are_refused(tmp_path, monkeypatch):
    from mla.integrations.vllm.connector import _fingerprint

    def found(name):
        model = SimpleNamespace(model=name, revision=None, hf_overrides={}, quantization=None, dtype="fp32")
        return _fingerprint(model, "fp32", ["layers.0"])

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(ValueError, match=r"cannot tell the weights of .* others: expected \*.safetensors"):
        found(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"of a/b from others: expected a commit of the Hub"):
        found("a/b")
    names = set()
    for commit in ("1" * 40, "2" * 40):
        repository = tmp_path / "models--a--b"
        for file, content in ((f"snapshots/{commit}/config.json", "{}"), ("refs/main", commit)):
            (repository / file).parent.mkdir(parents=True, exist_ok=True)
            (repository / file).write_text(content)
        names.add(found("a/b")["name"])
    assert names == {f"a/b {'1' * 40}", f"a/b {'2' * 40}"}


def test_layers_with_two_numbers_have_an_order():
    from mla.integrations.vllm.connector import _in_order

    names = [f"model.layers.{i}.self_attn.{j}.attn" for i in range(12) for j in range(2)]
    assert sorted(set(names), key=_in_order) == names


@pytest.mark.parametrize(
    ("name", "options", "env"),
    [
        ("deepseek-v3", {"enforce_eager": False}, PROCESSES),
        ("deepseek-v3", {"tensor_parallel_size": 2}, PROCESSES | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
        # Building it changes its configuration, where it is built.
        ("minicpm3", {}, PROCESSES),
    ],
    ids=["compiled", "ranks", "minicpm3"],
)
def test_in_processes_of_their_own(folder, tmp_path, name, options, env):
    path = models.write(name, folder)
    reference = models.Reference(path)
    before, after = (engine.run([keeping(path, tmp_path, **options)], env)[0] for _ in range(2))
    assert tokens(before) == tokens(after) == [reference.greedy(LONG, TOKENS)]
    assert (cached(before), cached(after)) == ([0], [KEPT])
    assert len(list(tmp_path.iterdir())) == 1
