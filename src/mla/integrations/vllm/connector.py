"""Latents that survive vLLM: a connector that keeps prompts in a folder, as files of ``mla.cache.store``.

vLLM makes one for its scheduler, which knows requests, and one for each worker, which has their pages. In the
step that has read the last of a prompt its latents are copied out of their pages; a thread writes them. A new
request whose prompt begins like a file waits for one step, in which whole pages are filled from it: only what
has arrived is known to vLLM as computed. Ranks hold the same latents: the first one writes, all of them read.
"""

import logging
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)

from mla.cache import LatentCache
from mla.cache.folder import PrefixFolder
from mla.digest import canonical, digest, digest_of_checkpoint
from mla.errors import MLAError
from mla.formats import cache_format
from mla.integrations.vllm import settings
from mla.machine import free_memory
from mla.ops.latent import FORMAT_DTYPES
from mla.reading import local_path

_log = logging.getLogger("vllm.mla")

#: Copies that wait to be written; a prompt that is read while so many do is not kept.
_WAITING = 4


@dataclass(frozen=True)
class Load:
    """Tokens ``start`` to ``end`` of a file that go into the pages of a request."""

    request: str
    file: str
    start: int
    end: int
    pages: list[int]


@dataclass(frozen=True)
class Save:
    """A prompt, and the pages that hold its latents after the step."""

    tokens: list[int]
    pages: list[int]


@dataclass(frozen=True)
class _Found:
    """A file that begins like a prompt: ``common`` tokens of it, ``start`` of them in memory already."""

    file: Path | None
    common: int
    start: int


@dataclass
class Work(KVConnectorMetadata):
    """What the scheduler asks of the workers in one step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


class LatentConnector(KVConnectorBase_V1):
    """Prefixes in a folder, as for ``mla serve --cache-dir``.

    Settings in ``kv_connector_extra_config``: "folder", and "size" in bytes, beyond which the prefixes not
    used for longest go.

    Raises:
        ValueError: other settings, a model whose caches are more than latents or not on a CPU, weights that
            cannot be told from others, or pipeline parallel.
        MLAError: the folder cannot be used, or a file of weights is damaged.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        if not model.use_mla or len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError(f"mla keeps latents only, and {model.model} caches something else")
        if parallel.pipeline_parallel_size > 1:
            raise ValueError("mla keeps the latents of all layers in one file: expected no pipeline parallel")
        given = vllm_config.kv_transfer_config.kv_connector_extra_config
        if set(given) != {"folder", "size"}:
            raise ValueError(f'kv_connector_extra_config: expected "folder" and "size", got {given}')
        self._format = settings.format_name(vllm_config.cache_config.cache_dtype, model.dtype)
        self._page = vllm_config.cache_config.block_size
        self._names = sorted(kv_cache_config.kv_cache_groups[0].layer_names, key=_in_order)
        identity = _fingerprint(model, self._format, self._names)
        folder = (Path(given["folder"]), identity, int(given["size"]), _log.warning)
        self._folder = PrefixFolder(*folder)
        # What a folder knows of its files is for one thread.
        self._folder_of_thread = PrefixFolder(*folder)
        self._sizes = model.hf_text_config.kv_lora_rank, model.hf_text_config.qk_rope_head_dim
        self._token_bytes = len(self._names) * cache_format(self._format).row_bytes(*self._sizes)
        # Of the scheduler: what is found for a request before it has pages, the requests that have got what
        # was found, those whose prompts are being read, and the work of the next step.
        self._found: dict[str, _Found] = {}
        self._served: set[str] = set()
        self._reading: dict[str, Any] = {}
        self._next = Work()
        # Of a worker: the pages of its layers, and the requests whose loads have ended, well or not.
        self._layers: list[Tensor] = []
        self._arrived: set[str] = set()
        self._failed: set[str] = set()
        self._writes = parallel.rank == 0
        self._writing: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1, "mla-latents")

    # The scheduler's side.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens that lie in a file beyond those in memory, in whole pages, and whether they come later.

        Asked again in every step in which a request finds no pages: the folder is searched once.
        """
        name = request.request_id
        if name in self._served:  # where loading has failed, it would fail again
            return 0, False
        if name in self._found:
            file, common = self._found[name].file, self._found[name].common
        else:
            tokens = _tokens(request)
            # The last token must run, to give the logits of the next one.
            file, common = self._folder.longest(tokens[:-1]) if tokens else (None, 0)
        self._found[name] = _Found(file, common, num_computed_tokens)
        count = self._whole_pages(common) - num_computed_tokens
        return (0, False) if file is None or count <= 0 else (count, True)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The pages of a request are known now."""
        name = request.request_id
        found = self._found.pop(name, None)
        if found is not None and num_external_tokens > 0:
            (pages,) = blocks.get_block_ids()
            end = found.start + num_external_tokens
            self._next.loads.append(Load(name, str(found.file), found.start, end, list(pages)))
            self._served.add(name)
        self._reading[name] = request

    def build_connector_meta(self, scheduler_output: Any) -> Work:
        """What the workers have to do: read what was found, keep the prompts whose end this step reads."""
        work, self._next = self._next, Work()
        for name, count in scheduler_output.num_scheduled_tokens.items():
            request = self._reading.get(name)
            if request is None or request.num_computed_tokens + count < request.num_prompt_tokens:
                continue
            del self._reading[name]
            tokens = _tokens(request)
            fits = len(tokens) * self._token_bytes <= self._folder.limit
            if tokens and fits and self._folder.wants(tokens):
                (pages,) = scheduler_output.kv_connector_block_state.get_block_ids(name)
                work.saves.append(Save(tokens, list(pages)))
        return work

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """Its pages may be taken by others at once."""
        name = request.request_id
        self._found.pop(name, None)
        self._reading.pop(name, None)
        self._served.discard(name)
        return False, None

    # The workers' side.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """The pages of every layer: bytes, [pages, page size, row]."""
        for name in self._names:
            pages = kv_caches[name]
            if pages.device.type != "cpu":
                raise ValueError(f"mla keeps latents of CPUs: expected pages there, got {pages.device}")
            rows = pages.view(torch.uint8)
            self._layers.append(rows.squeeze(1) if rows.ndim == 4 else rows)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Fill pages from files."""
        for load in self._work().loads:
            self._arrived.add(load.request)
            cache = LatentCache(format=self._format)
            try:
                self._folder.load(Path(load.file), cache, load.end, torch.device("cpu"))
            except MLAError as error:
                _log.warning("%s; the prefix is computed again", error)
                self._folder.remove(Path(load.file))  # or other requests would find it
                self._failed.add(load.request)
                continue
            where = self._where(load.pages, load.start, load.end)
            for index, pages in enumerate(self._layers):
                (rows,) = cache.layer_at(index).held()["rows"]
                pages[where] = rows[load.start : load.end].contiguous().view(torch.uint8)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The requests that may go on; vLLM computes what did not arrive, by ``kv_load_failure_policy``
        "recompute"."""
        results = KVConnectorTransferResults(finished_recving=self._arrived, failed_recving=self._failed)
        self._arrived, self._failed = set(), set()
        return results

    def wait_for_save(self) -> None:
        """Copy prompts out of their pages, after the layers of this step; a thread writes them."""
        self._writing = [each for each in self._writing if not each.done()]
        for save in self._work().saves if self._writes else ():
            size, free = len(save.tokens) * self._token_bytes, free_memory()
            if size > free // 2:
                _log.warning("a prompt of %d tokens is not kept: no room for a copy of it", len(save.tokens))
            elif len(self._writing) < _WAITING:
                written = self._thread.submit(self._folder_of_thread.save, self._copy(save), save.tokens)
                written.add_done_callback(_tell)
                self._writing.append(written)

    def shutdown(self) -> None:
        """Write what has been copied."""
        self._thread.shutdown(wait=True)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is under way: a request whose pages are being filled is not in the step."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """See :meth:`wait_for_save`."""

    def _work(self) -> Work:
        work = self._get_connector_metadata()
        assert isinstance(work, Work)
        return work

    def _copy(self, save: Save) -> LatentCache:
        cache, (rank, rope) = LatentCache(format=self._format), self._sizes
        where = self._where(save.pages, 0, len(save.tokens))
        for index, pages in enumerate(self._layers):
            rows = pages[where][None]
            if self._format != "int8":
                rows = rows.view(FORMAT_DTYPES[self._format])
            cache.layer_at(index).restore({"rows": rows}, rank=rank, rope=rope, device=rows.device)
        return cache

    def _whole_pages(self, tokens: int) -> int:
        whole: int = tokens // self._page * self._page
        return whole

    def _where(self, pages: Sequence[int], start: int, end: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, end)
        return torch.tensor(pages)[positions // self._page], positions % self._page


def _tell(written: Future[None]) -> None:
    """Nobody else asks how it ended."""
    error = written.exception()
    if isinstance(error, MLAError):
        _log.warning("%s", error)
    elif error is not None:
        _log.error("a prompt could not be written", exc_info=error)


def _in_order(name: str) -> tuple[list[int], str]:
    """By the numbers in the name of a layer, of which there may be two."""
    return [int(number) for number in re.findall(r"\d+", name)], name


def _tokens(request: Any) -> list[int]:
    """The prompt of a request; nothing where its tokens do not tell its latents.

    An adapter computes other latents; an image or embeddings have no token ids; a salt says that nobody else
    may learn what was read.
    """
    others = (request.lora_request, request.mm_features or None, request.prompt_embeds, request.cache_salt)
    if any(each is not None for each in others):
        return []
    return list(request.prompt_token_ids or ())


def _fingerprint(model: Any, kind: str, layers: list[str]) -> dict[str, str]:
    """What must be equal for latents of one model to be latents of another.

    Of files and settings alone: the scheduler has no weights, and building a model changes its configuration.
    """
    folder = local_path(model.model)
    # What lies in the Hub's cache is named by its commit; the weights may not be there yet.
    of_hub = "" if folder else try_to_load_from_cache(model.model, "config.json", revision=model.revision)
    commit = Path(of_hub).parent.name if isinstance(of_hub, str) else ""
    files = sorted(folder.glob("*.safetensors")) if folder else []
    if not files and not commit:
        wanted = "*.safetensors there" if folder else "a commit of the Hub"
        raise ValueError(f"mla cannot tell the weights of {model.model} from others: expected {wanted}")
    return {
        "engine": "vllm",
        "name": "" if folder else f"{model.model} {commit}",
        "config": digest((folder / "config.json").read_bytes()) if folder else "",
        "weights": digest_of_checkpoint(files),
        "overrides": digest(canonical(model.hf_overrides)),
        "quantization": str(model.quantization),
        "layers": digest(canonical(layers)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "cache format": kind,
    }
