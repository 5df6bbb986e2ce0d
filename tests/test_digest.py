"""Digests: equal for equal things, different for any difference that matters."""

import copy

import torch

from mla.digest import canonical, digest, digest_of_files, digest_of_weights
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


def test_a_changed_or_other_file_is_seen(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(bytes(1 << 20))
    two.write_bytes(b"short")
    found = {
        digest_of_files([one, two]),
        digest_of_files([two, one]),
        digest_of_files([one]),
        digest_of_files([]),
    }
    content = bytearray(one.read_bytes())
    content[-1] = 1
    one.write_bytes(content)
    found.add(digest_of_files([one, two]))
    assert len(found) == 5
    assert digest_of_files([one, two]) == digest_of_files([one, two])
