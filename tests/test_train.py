"""The example that trains a language model."""

import pytest
import torch

from examples.train import BATCH, WINDOW, ByteModel, loss, main, read, train, windows, write
from mla import LatentCache


def test_it_learns_and_writes_what_it_read(capsys):
    torch.manual_seed(0)
    text = torch.tensor(list(b"The quick brown fox jumps over the lazy dog. " * 200))
    model = ByteModel(layers=1)
    before = float(loss(model, windows(text)).detach())
    train(model, text, 80)
    assert "step 80: " in capsys.readouterr().out
    assert float(loss(model, windows(text)).detach()) < before / 8
    assert write(model, "The quick brown ", 24) == "The quick brown fox jumps over the lazy "


def test_what_it_reads_from_its_cache_is_what_a_whole_pass_reads():
    torch.manual_seed(0)
    model, cache = ByteModel(layers=2).eval(), LatentCache()
    ids = torch.randint(256, (1, 30))
    with torch.no_grad():
        whole = model(ids)
        parts = torch.cat([model(part, cache) for part in ids.split([17, 1, 12], 1)], 1)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


def test_windows_are_of_the_text():
    text = torch.arange(20 * WINDOW)
    found = windows(text)
    assert found.shape == (BATCH, WINDOW + 1)
    assert (found == found[:, :1] + torch.arange(WINDOW + 1)).all()


@pytest.mark.parametrize("mistake", [["--steps", "0"], ["--prompt", ""], ["no such file"]])
def test_mistakes_are_named_before_anything_is_trained(mistake, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", *mistake])
    monkeypatch.setattr("examples.train.train", lambda *_: pytest.fail("it trained"))
    with pytest.raises(SystemExit) as caught:
        main()
    assert mistake[0] in f"{caught.value.code} {capsys.readouterr().err}"


def test_without_a_file_it_reads_the_language_reference():
    assert b"import" in bytes(read(None).tolist())
