"""What a user names: a model on the Hub or on this machine, an amount of memory."""

import pytest

from mla.errors import MLAError
from mla.plan import load_shape
from mla.reading import config_file, expect_bytes, is_hub_id


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("deepseek-ai/DeepSeek-V3", True),
        ("openai-community/gpt2", True),
        ("a_b/Model.v1-GGUF", True),
        ("gpt2", False),
        ("./model", False),
        ("../model", False),
        ("/model", False),
        ("~/model", False),
        ("folder/", False),
        ("/", False),
        ("", False),
        ("a/b/c", False),
        ("folder/config.json", False),
        ("folder/model.GGUF", False),
        (r"C:\models/llama", False),
        ("my models/llama", False),
        ("modèles/llama", False),
        ("owner/model\n", False),
    ],
)
def test_hub_ids(name, is_one):
    assert is_hub_id(name) == is_one


@pytest.mark.parametrize("read", [config_file, load_shape])
def test_the_hub_is_asked_for_its_ids_only(read, monkeypatch):
    asked = []

    def refuse(repo, file):
        asked.append((repo, file))
        raise OSError("not here")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(MLAError, match="nobody/nothing is neither a local folder nor a model"):
        read("nobody/nothing")
    assert asked == [("nobody/nothing", "config.json")]
    for name in ("gpt2", "./nothing", "nobody/nothing/", "nobody/config.json", "some where/else"):
        with pytest.raises(MLAError, match=r"a config\.json.* Hub id \(namespace/name\)$"):
            read(name)
    assert len(asked) == 1


def test_refusals_of_a_proxy_are_one_line(monkeypatch):
    from huggingface_hub.errors import HTTPError

    class ProxyError(HTTPError):
        """As the HTTP library's own, which the Hub's client lets through: no OSError."""

    errors = [
        (ProxyError("403 Forbidden\nmore"), "ProxyError 403 Forbidden"),
        (ValueError("Unknown scheme for proxy URL"), "ValueError Unknown scheme for proxy URL"),
        (ImportError("Using SOCKS proxy, but ..."), "ImportError Using SOCKS proxy, but ..."),
        (TimeoutError(), "TimeoutError"),
    ]
    for error, said in errors:

        def refuse(*args, error=error):
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
        with pytest.raises(MLAError, match=f"some/model is neither .*: {said}$"):
            config_file("some/model")


def test_bytes_in_words():
    assert expect_bytes("--memory", "80GB") == 80 * 10**9
    assert expect_bytes("--memory", "24 GiB") == 24 * 2**30
    assert expect_bytes("--memory", "512m") == 512 * 10**6
    assert expect_bytes("--memory", "16") == 16 * 10**9
    assert expect_bytes("--memory", "1.5k") == 1500
    for text in ("lots", "-1GB", "0", "0.5b", "1 parsec", "nan", "", "1e999"):
        with pytest.raises(MLAError, match="--cache-dir-size: expected"):
            expect_bytes("--cache-dir-size", text)
