"""What README and guides say can be followed: their blocks run, links lead somewhere, options exist."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
import typer

from mla.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, language):
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


@pytest.mark.parametrize("index", [1, 2])
def test_what_the_readme_builds(index):
    """All but the block that opens a model."""
    shown = blocks(ROOT / "README.md", "python")
    assert len(shown) == 3
    assert "from_pretrained" in shown[0]
    scope = {}
    exec(shown[index], scope)
    if index == 1:
        assert scope["cache"].get_seq_length() == 8
    else:
        assert (scope["out"].shape, scope["lse"].shape) == ((2, 1, 16, 512), (2, 16, 1))
        assert torch.isfinite(scope["out"]).all()


@cache
def anchors(page):
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.*)$", text, re.M))
    return {title.strip().replace(" ", "-") for title in plain}


@by_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


def commands(page):
    """Every `mla VERB ...` in code: of indented and fenced blocks, and between backticks."""
    text = page.read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    lines += [line.strip() for block in blocks(page, r"\w*") for line in block.splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    return [found[1] for line in lines if (found := re.match(r"(?:[A-Z_]+=\S+ )*(mla [a-z].*)", line))]


@by_page
def test_options_exist(page):
    verbs = typer.main.get_command(app).commands
    for command in commands(page):
        _, verb, *words = shlex.split(command, comments=True)
        assert verb in verbs, command
        known = {name for option in verbs[verb].params for name in (*option.opts, *option.secondary_opts)}
        own = words[: words.index("--")] if "--" in words else words
        for word in own:
            for name in word.split("/"):
                if name.startswith("--"):
                    assert name.partition("=")[0] in {*known, "--help"}, command


def test_commands_are_found():
    assert sum(len(commands(page)) for page in PAGES) > 40
