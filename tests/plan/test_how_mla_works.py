"""docs/how-mla-works.md is executed: each Python block in order, its asserts are the page's claims."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "how-mla-works.md"


@pytest.fixture(autouse=True)
def default_dtype():
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def blocks():
    text = PAGE.read_text(encoding="utf-8")
    fences = list(re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S))
    assert all(fence.group(1) == "python" for fence in fences), "every formula is a block that runs"
    return [(text[: fence.start()].count("\n") + 2, fence.group(2)) for fence in fences]


def test_every_formula_of_the_page_holds():
    found = blocks()
    assert len(found) >= 15
    scope = {}
    for line, code in found:
        # Blank lines in front, so that a failure names the page's own line.
        exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), scope)


def test_every_section_with_a_claim_has_a_block():
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    for section in sections[:-1]:
        assert "```python" in section, section.splitlines()[0]
        assert "assert" in section or section.startswith(("1.", "3.")), section.splitlines()[0]
