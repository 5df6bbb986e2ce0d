"""Prefixes on disk beneath vLLM: taken up by other processes, refused where they are not the model's own."""

import json
import shutil
from pathlib import Path

import pytest

from mla.cli.serve import _connector
from tests.vllm import engine, models
from tests.vllm.test_engine import LONG, TOKENS, job

pytestmark = pytest.mark.vllm

PAGE = 16
#: What lies in whole pages of LONG, but for its last token.
KEPT = (len(LONG) - 1) // PAGE * PAGE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("connector")


@pytest.fixture(scope="module")
def model(folder):
    return models.write("deepseek-v3", folder)


@pytest.fixture(scope="module")
def text(model):
    return models.Reference(model).greedy(LONG, TOKENS)


def ask(model, place, rounds=([LONG],), size=10**9, env=None, **options):
    """One process; answers of its rounds, how many tokens of each were there before, and its log."""
    transfer = json.loads(_connector(Path(place), size))
    (answer,) = engine.run(
        [job(model, rounds, kv_transfer_config=transfer, **{"block_size": PAGE, **options})], env
    )
    assert "error" not in answer, answer["error"]
    found = [each for asked in answer["rounds"] for each in asked]
    return [each["tokens"] for each in found], [each["cached"] for each in found], answer["log"]


@pytest.mark.parametrize(
    ("options", "env"),
    [
        ({}, {}),
        # A prompt that is read in several steps is whole when it is kept.
        ({"max_num_batched_tokens": 32, "max_num_seqs": 4, "enable_prefix_caching": False}, {}),
        ({"enforce_eager": False}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
        (
            {"tensor_parallel_size": 2},
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        ),
    ],
    ids=["plain", "chunks", "processes", "ranks"],
)
def test_a_prefix_survives_a_restart(model, text, tmp_path, options, env):
    said, cached, _ = ask(model, tmp_path / "latents", env=env, **options)
    assert (said, cached) == ([text], [0])
    assert len(list((tmp_path / "latents").iterdir())) == 1
    said, cached, _ = ask(model, tmp_path / "latents", env=env, **options)
    assert (said, cached) == ([text], [KEPT])


@pytest.fixture(scope="module")
def kept(model, text, folder):
    """A folder with what one process has read: LONG."""
    ask(model, folder / "kept")
    return folder / "kept"


def test_a_longer_prompt_reads_the_rest(model, kept, tmp_path):
    """The next turn of a conversation; what it reads replaces the file."""
    place = shutil.copytree(kept, tmp_path / "latents")
    longer = [*LONG, *range(3, 40)]
    said, cached, _ = ask(model, place, [[longer], [longer[:40]]])
    assert said[0] == models.Reference(model).greedy(longer, TOKENS)
    assert cached == [len(LONG) // PAGE * PAGE, 32]
    assert len(list(place.iterdir())) == 1


def test_int8_latents(model, tmp_path):
    env = {"MLA_CACHE_FORMAT": "int8"}
    before, _, _ = ask(model, tmp_path / "latents", env=env)
    after, cached, _ = ask(model, tmp_path / "latents", env=env)
    assert (after, cached) == (before, [KEPT])
    _, cached, _ = ask(model, tmp_path / "latents")  # of another format
    assert cached == [0]


def test_a_file_that_changes_is_computed_again(model, text, kept, tmp_path):
    place = shutil.copytree(kept, tmp_path / "latents")
    (file,) = place.iterdir()
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    said, _, log = ask(model, place)
    assert said == [text]
    assert "the prefix is computed again" in log
    assert "checksum" in log


def test_another_models_latents_are_not_taken(model, kept, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    place = shutil.copytree(kept, tmp_path / "latents")
    _, cached, _ = ask(str(other), place)
    assert cached == [0]
    assert len(list(place.iterdir())) == 2


def test_what_cannot_be_kept_is_refused(model, tmp_path):
    transfer = json.loads(_connector(tmp_path, 10**9))
    del transfer["kv_connector_extra_config"]["size"]
    (refused,) = engine.run([job(model, kv_transfer_config=transfer)])
    assert 'kv_connector_extra_config: expected "folder" and "size"' in refused["error"]
