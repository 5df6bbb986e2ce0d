"""Latents that survive vLLM: a connector that keeps prompts in a folder, as files of ``mla.cache.store``.

vLLM makes one for its scheduler, which knows requests, and one for each worker, which has their pages. In the
step that has read the last of a prompt its latents are copied out of their pages; a thread writes them. A new
request whose prompt begins like a file takes whole pages from it. Ranks hold the same latents: the first one
writes, all of them read.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.model_executor.models.utils import extract_layer_index

from mla.cache import LatentCache
from mla.cache.folder import PrefixFolder
from mla.digest import digest_of_files
from mla.errors import MLAError
from mla.integrations.prefixes import config_fingerprint
from mla.integrations.vllm import settings
from mla.ops.latent import FORMAT_DTYPES
from mla.reading import local_path

_log = logging.getLogger("vllm.mla")

#: Copies that wait to be written; a prompt that is read while so many do is not kept.
_WAITING = 4


@dataclass(frozen=True)
class Load:
    """Tokens ``start`` to ``end`` of a file that go into the pages of a request."""

    file: str
    start: int
    end: int
    pages: list[int]


@dataclass(frozen=True)
class Save:
    """A prompt, and the pages that hold its latents after the step."""

    tokens: list[int]
    pages: list[int]


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
        ValueError: no such setting, a model whose caches are more than latents, or pipeline parallel.
        MLAError: the folder cannot be used.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        if not model.use_mla or len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError(f"mla keeps latents only, and {model.model} caches something else")
        if parallel.pipeline_parallel_size > 1:
            raise ValueError("mla keeps the latents of all layers in one file: expected no pipeline parallel")
        given = vllm_config.kv_transfer_config.kv_connector_extra_config
        if not {"folder", "size"} <= set(given):
            raise ValueError(f'kv_connector_extra_config: expected "folder" and "size", got {given}')
        self._format = settings.format_name(vllm_config.cache_config.cache_dtype, model.dtype)
        self._page = vllm_config.cache_config.block_size
        identity = _fingerprint(model, self._format)
        folder = (Path(given["folder"]), identity, int(given["size"]), _log.warning)
        self._folder = PrefixFolder(*folder)
        # What a folder knows of its files is for one thread.
        self._folder_of_thread = PrefixFolder(*folder)
        self._sizes = model.hf_text_config.kv_lora_rank, model.hf_text_config.qk_rope_head_dim
        # Of the scheduler: what is found for a request before it has pages, the requests whose prompts are
        # being read, and the work of the next step.
        self._found: dict[str, tuple[str, int]] = {}
        self._reading: dict[str, Any] = {}
        self._next = Work()
        # Of a worker.
        self._layers: dict[int, Tensor] = {}
        self._failed: set[int] = set()
        self._writes = parallel.rank == 0
        self._writing: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1, "mla-latents")

    # The scheduler's side.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens that lie in a file beyond those in memory, in whole pages; they are read within the step."""
        tokens = _tokens(request)
        # The last token must run, to give the logits of the next one.
        file, common = self._folder.longest(tokens[:-1]) if tokens else (None, 0)
        end = common // self._page * self._page
        if file is None or end <= num_computed_tokens:
            return 0, False
        self._found[request.request_id] = (str(file), num_computed_tokens)
        return end - num_computed_tokens, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The pages of a request are known now."""
        found = self._found.pop(request.request_id, None)
        if found is not None and num_external_tokens > 0:
            file, start = found
            (pages,) = blocks.get_block_ids()
            self._next.loads.append(Load(file, start, start + num_external_tokens, list(pages)))
        self._reading[request.request_id] = request

    def build_connector_meta(self, scheduler_output: Any) -> Work:
        """What the workers have to do: read what was found, keep the prompts whose end this step reads."""
        work, self._next = self._next, Work()
        for name, count in scheduler_output.num_scheduled_tokens.items():
            request = self._reading.get(name)
            if request is None or request.num_computed_tokens + count < request.num_prompt_tokens:
                continue
            del self._reading[name]
            tokens = _tokens(request)
            if tokens and self._folder.wants(tokens):
                (pages,) = scheduler_output.kv_connector_block_state.get_block_ids(name)
                work.saves.append(Save(tokens, list(pages)))
        return work

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """Its pages may be taken by others at once."""
        self._found.pop(request.request_id, None)
        self._reading.pop(request.request_id, None)
        return False, None

    # The workers' side.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """The pages of every layer: bytes, [pages, page size, row]."""
        for name, pages in kv_caches.items():
            rows = pages.view(torch.uint8)
            self._layers[extract_layer_index(name)] = rows.squeeze(1) if rows.ndim == 4 else rows

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Fill pages from files, before the layers of this step read them."""
        for load in self._work().loads:
            cache = LatentCache(format=self._format)
            try:
                self._folder.load(Path(load.file), cache, load.end, torch.device("cpu"))
            except MLAError as error:
                _log.warning("%s; the prefix is computed again", error)
                self._folder.remove(Path(load.file))  # or the scheduler would find it again
                self._failed.update(load.pages[load.start // self._page : -(-load.end // self._page)])
                continue
            where = self._where(load.pages, load.start, load.end)
            for index, pages in self._layers.items():
                (rows,) = cache.layer_at(index).held()["rows"]
                pages[where] = rows[load.start : load.end].contiguous().view(torch.uint8)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that could not be filled; vLLM computes them, with ``kv_load_failure_policy`` "recompute"."""
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_save(self) -> None:
        """Copy prompts out of their pages, after the layers of this step; a thread writes them."""
        self._writing = [each for each in self._writing if not each.done()]
        for save in self._work().saves if self._writes else ():
            # Pages that could not be filled hold nothing yet.
            if len(self._writing) < _WAITING and not self._failed & set(save.pages):
                self._writing.append(self._thread.submit(self._write, self._copy(save), save.tokens))

    def shutdown(self) -> None:
        """Write what has been copied."""
        self._thread.shutdown(wait=True)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is under way: files are read before the first layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """See :meth:`wait_for_save`."""

    def _work(self) -> Work:
        work = self._get_connector_metadata()
        assert isinstance(work, Work)
        return work

    def _copy(self, save: Save) -> LatentCache:
        cache, (rank, rope) = LatentCache(format=self._format), self._sizes
        where = self._where(save.pages, 0, len(save.tokens))
        for index, pages in self._layers.items():
            rows = pages[where][None]
            if self._format != "int8":
                rows = rows.view(FORMAT_DTYPES[self._format])
            cache.layer_at(index).restore({"rows": rows}, rank=rank, rope=rope, device=rows.device)
        return cache

    def _write(self, cache: LatentCache, tokens: list[int]) -> None:
        try:
            self._folder_of_thread.save(cache, tokens)
        except MLAError as error:
            _log.warning("%s", error)

    def _where(self, pages: Sequence[int], start: int, end: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, end)
        return torch.tensor(pages)[positions // self._page], positions % self._page


def _tokens(request: Any) -> list[int]:
    """The prompt of a request; nothing where its tokens do not tell its latents.

    An adapter computes other latents; an image or embeddings have no token ids; a salt says that nobody else
    may learn what was read.
    """
    others = (request.lora_request, request.mm_features or None, request.prompt_embeds, request.cache_salt)
    if any(each is not None for each in others):
        return []
    return list(request.prompt_token_ids or ())


def _fingerprint(model: Any, cache_format: str) -> dict[str, str]:
    """What must be equal for latents of one model to be latents of another. The scheduler has no weights:
    they are told by their files, or by the commit of the Hub."""
    folder = local_path(model.model)
    files = [] if folder is None else sorted(folder.glob("*.safetensors"))
    return {
        **config_fingerprint(model.hf_config),
        "engine": "vllm",
        "name": f"{model.model} {model.revision}" if folder is None else "",
        "weights": digest_of_files(files),
        "dtype": str(model.dtype).removeprefix("torch."),
        "cache format": cache_format,
    }
