"""Run as a program: savers are killed at random moments, files replaced under a reader, a folder shared.

A process of its own, with one thread: its children are forked, and torch's threads do not survive a fork.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from mla.cache import LatentCache
from mla.cache.folder import PrefixFolder
from mla.cache.store import load_cache, read_tokens, save_cache
from mla.errors import MLAError

CPU = torch.device("cpu")
FINGERPRINT = {"weights": "w"}
TOKENS = 400


def filled(tokens: list[int]) -> LatentCache:
    """A cache whose latents tell the token: what does not belong to its tokens is found out."""
    cache = LatentCache()
    latents = torch.tensor(tokens, dtype=torch.float32)[None, None, :, None]
    for layer in range(4):
        cache.update(latents.expand(-1, -1, -1, 32) + layer, latents.expand(-1, -1, -1, 8) - layer, layer)
    return cache


def check(cache: LatentCache, tokens: list[int]) -> None:
    """The cache holds exactly what ``filled`` puts there."""
    want = filled(tokens)
    for have, right in zip(cache.latent_layers, want.latent_layers, strict=True):
        assert torch.equal(have.held()["rows"], right.held()["rows"])


def forked(work) -> int:
    """The id of a child that does the work and ends."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - a child must end here
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
    return child


def kill_savers(folder: Path) -> None:
    """Whatever is killed when: the file is there as it was before the save, or as it is after it."""
    file = folder / "prefix"
    contents = [list(range(TOKENS)), list(range(1000, 1000 + TOKENS // 2))]

    def save_for_ever() -> None:
        while True:
            for tokens in contents:
                save_cache(file, filled(tokens), tokens, FINGERPRINT)

    save_cache(file, filled(contents[0]), contents[0], FINGERPRINT)
    seen = set()
    for _ in range(100):
        child = forked(save_for_ever)
        time.sleep(random.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cache = LatentCache()
        tokens = load_cache(file, cache, FINGERPRINT, device=CPU)
        assert tokens in contents
        check(cache, tokens)
        seen.add(len(tokens))
    left = list(folder.glob(".mla-writing-*"))
    assert left, "no saver was killed in the middle: the test has shown nothing"
    for saving in left:
        for path in (saving, *saving.iterdir()):
            os.utime(path, (0, 0))
    save_cache(file, filled(contents[0]), contents[0], FINGERPRINT)
    assert list(folder.iterdir()) == [file]
    print(f"100 killed, {len(left)} of them half-way; {len(seen)} contents seen")


def replace_under_a_reader(folder: Path) -> None:
    """Files are put in one place and removed from it: what is loaded is one of them, or nothing is there."""
    file = folder / "prefix"
    contents = [list(range(100)), list(range(TOKENS))]
    for tokens in contents:
        save_cache(folder / str(len(tokens)), filled(tokens), tokens, FINGERPRINT)

    def replace_for_ever() -> None:
        while True:
            for tokens in contents:
                shutil.copy(folder / str(len(tokens)), folder / "next")
                os.replace(folder / "next", file)
                time.sleep(random.uniform(0.0, 0.001))
            file.unlink()

    def load() -> int:
        return len(load_cache(file, LatentCache(), FINGERPRINT, device=CPU))

    child = forked(replace_for_ever)
    try:
        seen: Counter[int] = Counter()
        while min(seen[len(tokens)] for tokens in contents) < 150:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "nobody replaces the file any more"
            for read in (load, lambda: len(read_tokens(file))):
                try:
                    seen[read()] += 1
                except MLAError as error:
                    if str(error) != f"{file}: no such file":
                        raise
                    seen[0] += 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(seen) == 3
    print(f"read while it was replaced: {dict(seen)}")


def share_folder(folder: Path) -> None:
    """Two processes save, find, load and remove in one folder of which only some files fit."""

    def work(seed: int) -> None:
        draw = random.Random(seed)
        shelf = PrefixFolder(folder, FINGERPRINT, limit=4 * filled(list(range(TOKENS))).nbytes)
        for _ in range(60):
            start = draw.randrange(8) * 1000
            tokens = list(range(start, start + draw.randrange(100, TOKENS)))
            file, common = shelf.longest(tokens)
            cache = LatentCache()
            if file is not None:
                try:
                    shelf.load(file, cache, common, CPU)
                except MLAError:
                    assert not file.exists()  # the other one removed it
                    continue
                check(cache, tokens[:common])
            shelf.save(filled(tokens), tokens)

    children = [forked(lambda seed=seed: work(seed)) for seed in (1, 2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    print("two processes shared a folder")


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_savers(Path(sys.argv[1]) / "kill")
    replace_under_a_reader(Path(sys.argv[1]) / "replace")
    share_folder(Path(sys.argv[1]) / "share")
