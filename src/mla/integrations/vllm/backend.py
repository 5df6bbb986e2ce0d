"""The attention backend that takes the place of vLLM's CPU MLA: classes in the forms that vLLM calls.

Loaded by vLLM through the name that ``plugin.register`` gives it. To vLLM every token of a step is one of a
prefill: ``forward_mha`` gets them all with the queries as they are, and the plan of each run decides whether
it is absorbed. So the up-projections are ours on both paths, in a dtype that the machine multiplies fast.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonImpl,
    MLACommonMetadata,
    split_kv_b_proj,
)
from vllm.v1.attention.backend import AttentionMetadataBuilder, MultipleOf

from mla.formats import cache_format
from mla.integrations.loading import computes_in_half
from mla.integrations.vllm import pages, settings
from mla.ops import arguments
from mla.ops.attention import make_plan
from mla.ops.latent import store


class Backend(MLACommonBackend):
    """What vLLM asks before it allocates a cache: any size of pages and heads, rows of bytes."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(settings.KV_CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        return "CPU_MLA"  # vLLM looks the name up among its own

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return True

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @staticmethod
    def get_impl_cls() -> type["Impl"]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type["MetadataBuilder"]:
        return MetadataBuilder


def with_rows(original: Any) -> Any:
    """``MLAAttention.get_kv_cache_spec`` with rows of bytes in our format. The layer is asked, because the
    backend's own hook (``customize_spec``) learns neither rank nor rotary width."""

    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = original(self, vllm_config)
        if not isinstance(self.impl, Impl):
            return spec
        row = cache_format(self.impl.cache_format).row_bytes(self.kv_lora_rank, self.qk_rope_head_dim)
        return replace(spec, dtype=torch.uint8, state_content_bytes=row)

    return get_kv_cache_spec


@dataclass
class Metadata(MLACommonMetadata):
    """One step: its tokens in runs. vLLM and its connectors know it by its base."""

    runs: list[pages.Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        """The base takes three widths only."""


class MetadataBuilder(AttentionMetadataBuilder):
    """Cuts the requests of a step into runs, once for all layers."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # vLLM puts the requests with one new token first: they make one run.
        self._init_reorder_batch_threshold(1)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.sizes = {
            "h": layer.num_heads,
            "n": layer.qk_nope_head_dim,
            "r": layer.kv_lora_rank,
            "p": layer.qk_rope_head_dim,
            "v": layer.v_head_dim,
        }

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Metadata:
        """Raises NotImplementedError for attention that is not causal."""
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("mla: expected causal attention, got causal=False from vLLM")
        return Metadata(
            num_reqs=common.num_reqs,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            slot_mapping=common.slot_mapping,
            num_decodes=0,
            num_decode_tokens=0,
            num_prefills=common.num_reqs,
            runs=list(self._runs(common)),
        )

    def _runs(self, common: Any) -> Iterator[pages.Run]:
        lengths = common.seq_lens.to(torch.int32).contiguous()
        table = common.block_table_tensor.to(torch.int32)
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        first = 0
        while first < common.num_reqs:
            s = starts[first + 1] - starts[first]
            end = first + 1
            while end < common.num_reqs and starts[end + 1] - starts[end] == s:
                end += 1
            if s > 0:  # padding has no tokens
                mine = lengths[first:end]
                plan = make_plan(s=s, t=int(mine.max()), **self.sizes)
                yield pages.Run(slice(starts[first], starts[end]), s, mine, table[first:end], plan)
            first = end


class Impl(MLACommonImpl):
    """One layer.

    Raises:
        NotImplementedError: a feature of attention that the kernels do not have: which.
        MLAError: a dtype of the cache that we have no format for.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            "a cap on the logits": logits_soft_cap,
            "a sparse indexer": mla_args.get("indexer"),
        }
        for what, value in refused.items():
            if value is not None:
                raise NotImplementedError(f"mla: expected plain MLA, got a layer with {what}")
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **mla_args,
        )
        dtype = get_current_vllm_config().model_config.dtype
        self.cache_format = settings.format_name(kv_cache_dtype, dtype)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Keep the up-projections [h, n, r] and [h, v, r]: views where the machine multiplies their dtype."""
        w_uk, w_uv = split_kv_b_proj(
            self.kv_b_proj,
            act_dtype,
            self.kv_lora_rank,
            self.num_heads,
            self.qk_nope_head_dim,
            self.v_head_dim,
        )  # [r, h, n], [r, h, v]
        # Rows as the kernels read them: weights that were quantised come the other way round.
        self.w_uk, self.w_uv = (arguments.rows(x.permute(1, 2, 0)) for x in (w_uk, w_uv))
        if act_dtype != torch.bfloat16 or not computes_in_half("cpu"):
            self.w_uk, self.w_uv = (x.float().contiguous() for x in (self.w_uk, self.w_uv))

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> None:
        if kv_cache.numel():
            # k_pe is [tokens, 1, p]. What is padding has negative slots.
            latents = self._latents(kv_cache)
            store(latents, kv_c_normed.unsqueeze(1), k_pe, slots=slot_mapping.flatten())

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: Metadata,
        k_scale: Tensor,
        output: Tensor,
        output_scale: Tensor | None = None,
    ) -> None:
        """q [tokens, h, n + p] and output [tokens, h · v]; the new latents lie in the cache already."""
        if output_scale is not None:
            raise NotImplementedError(
                "mla: expected output in the model's dtype, got a request to quantise it"
            )
        latents = self._latents(kv_c_and_k_pe_cache)
        out = output.view(-1, self.num_heads, self.v_head_dim)
        for run in attn_metadata.runs:
            pages.attend(q, latents, self.w_uk, self.w_uv, run, scale=self.scale, out=out)

    def forward_mqa(self, q: Any, kv_c_and_k_pe_cache: Tensor, attn_metadata: Metadata, layer: Any) -> Any:
        raise NotImplementedError("mla: expected no tokens on vLLM's decode path; the metadata count none")

    def _latents(self, kv_cache: Tensor) -> Any:
        return pages.split(
            kv_cache.view(torch.uint8), self.cache_format, self.kv_lora_rank, self.qk_rope_head_dim
        )
