"""Digests: equal for equal things, different for any difference that matters."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from mla.digest import canonical, digest, digest_of_checkpoint, digest_of_weights
from mla.errors import MLAError
from tests.convert.tiny import teacher


def test_where_a_part_ends_matters():
    assert digest(b"ab", b"c") == digest(b"ab", b"c")
    assert len({digest(b"ab", b"c"), digest(b"a", b"bc"), digest(b"abc"), digest(b"ab", b"c", b"")}) == 4


def test_the_order_of_keys_does_not_matter():
    assert canonical({"a": 1, "b": [2, 3]}) == canonical({"b": [2, 3], "a": 1})
    assert canonical({"a": 1}) != canonical({"a": 2})


def test_a_changed_matrix_a_dtype_and_a_buffer_are_seen():
    model = teacher()
    found = {digest_of_weights(model), digest_of_weights(copy.deepcopy(model).bfloat16())}
    trained, turned = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        trained.model.layers[1].self_attn.o_proj.weight.mul_(1 + 1e-6)
    turned.model.rotary_emb.inv_freq.mul_(1.5)
    found |= {digest_of_weights(trained), digest_of_weights(turned)}
    assert len(found) == 4
    assert digest_of_weights(model) == digest_of_weights(teacher())


def test_a_changed_or_other_checkpoint_is_seen(tmp_path):
    """However small a part of the file: an adapter that was merged changes one of many matrices."""
    weights = {"large": torch.zeros(1 << 20), "small": torch.zeros(3), "one": torch.zeros(())}
    file, found = tmp_path / "model.safetensors", set()
    changes = [{}, {"small": torch.ones(3)}, {"one": torch.ones(())}, {"large": torch.ones(1 << 20)}]
    changes += [{"small": torch.zeros(3, 1)}, {"more": torch.zeros(1)}, {"none": torch.zeros(0, 1)}]
    for change in changes:
        save_file(weights | change, file)
        found.add(digest_of_checkpoint([file]))
    assert len(found) == len(changes)
    assert digest_of_checkpoint([file]) in found
    assert digest_of_checkpoint([]) not in found


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 9, b"\2" + bytes(7) + b"[]"])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(MLAError, match=r"x.safetensors is damaged: expected safetensors"):
        digest_of_checkpoint([tmp_path / "x.safetensors"])
