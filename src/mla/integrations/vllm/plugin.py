"""Putting the backend in place: vLLM's version, the seams that it must have, and three small changes."""

import importlib
import inspect
import logging
import os
from typing import Any

from mla.integrations.vllm.unfit import why_unfit
from mla.ops import native

#: Releases of vLLM that the tests have passed with.
TESTED = ("0.32.0",)

#: Tokens per page where the user asks for none.
BLOCK_SIZE = 64

# Below "vllm", so that vLLM's own settings of the log govern it.
_log = logging.getLogger("vllm.mla")

_FORMAT = "MLA_CACHE_FORMAT"
_BACKEND = "mla.integrations.vllm.backend.Backend"
_MINICPM3 = "mla.integrations.vllm.minicpm3:TransformersForCausalLM"
_MLA = "vllm.model_executor.layers.attention.mla_attention"
_V1 = "vllm.v1.attention.backend"

# What is used of vLLM: an object, and the parameters or fields that it must have.
_SEAMS = {
    "vllm.config:get_current_vllm_config": "",
    "vllm.platforms.cpu:CpuPlatform.check_and_update_config": "vllm_config",
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm": "layer remove_weight",
    "vllm.v1.attention.backends.registry:register_backend": "backend class_path",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.CPU_MLA": "",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.AMX_MLA": "",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.get_path": "",
    "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding.forward_cpu": "positions query key",
    "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding.forward_native": "positions query key",
    "vllm.model_executor.models:ModelRegistry.register_model": "model_arch model_cls",
    "vllm.model_executor.models.transformers:TransformersForCausalLM": "",
    "vllm.v1.kv_cache_interface:MLAAttentionSpec": "head_size dtype cache_dtype_str state_content_bytes",
    f"{_V1}:CommonAttentionMetadata": (
        "query_start_loc query_start_loc_cpu seq_lens num_reqs num_actual_tokens max_query_len max_seq_len "
        "block_table_tensor slot_mapping causal"
    ),
    f"{_V1}:AttentionMetadataBuilder": "kv_cache_spec layer_names vllm_config device",
    f"{_V1}:AttentionMetadataBuilder.build": "common_prefix_len common_attn_metadata fast_build",
    f"{_V1}:AttentionMetadataBuilder._init_reorder_batch_threshold": "reorder_batch_threshold",
    f"{_V1}:MultipleOf": "base",
    f"{_MLA}:MLACommonBackend": "",
    f"{_MLA}:MLACommonMetadata": (
        "num_reqs max_query_len max_seq_len num_actual_tokens query_start_loc slot_mapping num_decodes "
        "num_decode_tokens num_prefills"
    ),
    f"{_MLA}:MLACommonImpl": "num_heads head_size scale kv_cache_dtype kv_lora_rank kv_b_proj",
    f"{_MLA}:MLACommonImpl.forward_mha": (
        "q kv_c_normed k_pe kv_c_and_k_pe_cache attn_metadata k_scale output output_scale"
    ),
    f"{_MLA}:MLACommonImpl.do_kv_cache_update": "kv_c_normed k_pe kv_cache slot_mapping",
    f"{_MLA}:MLACommonImpl.process_weights_after_loading": "act_dtype",
    f"{_MLA}:split_kv_b_proj": "kv_b_proj out_dtype kv_lora_rank num_heads qk_nope_head_dim v_head_dim",
    f"{_MLA}:MLAAttention.get_kv_cache_spec": "vllm_config",
}


def missing_seams(seams: dict[str, str]) -> list[str]:
    """Those of ``seams`` that the installed vLLM does not have, in words."""
    missing = []
    for seam, names in seams.items():
        module, _, path = seam.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            missing.append(f"{module}.{path}")
            continue
        try:
            known = set(inspect.signature(found).parameters) if names else set()
        except (TypeError, ValueError):  # not callable any more, or written in C
            known = set()
        lost = set(names.split()) - known
        if lost:
            missing.append(f"{', '.join(sorted(lost))} of {module}.{path}")
    return missing


def register() -> None:
    """vLLM calls this in each of its processes, before it builds a model.

    Where the kernels or a seam are missing it says so in one line and changes nothing.

    Raises:
        MLAError: ``MLA_CACHE_FORMAT`` names no format.
    """
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        if _FORMAT in os.environ:
            _stand_aside("mla serves vLLM on CPUs only")
        return
    if native.best() is None:
        _stand_aside("mla runs without its C++ kernels here")
        return
    unfit = f"mla does not fit vLLM {vllm.__version__} (tested with {', '.join(TESTED)})"
    missing = missing_seams(_SEAMS)
    if missing:
        _stand_aside(f"{unfit}, which lacks {'; '.join(missing)}")
        return
    try:
        # Classes built on vLLM's. MLA_CACHE_FORMAT is read here, too: a wrong one ends the start.
        importlib.import_module("mla.integrations.vllm.backend")
    except (ImportError, AttributeError, TypeError) as error:
        _stand_aside(f"{unfit}: {error}")
        return
    if vllm.__version__.partition("+")[0] not in TESTED:  # 0.32.0+cpu is vLLM's own build of it
        _log.warning(
            "mla was tested with vLLM %s, this is %s: compare its answers before you rely on them",
            ", ".join(TESTED),
            vllm.__version__,
        )
    _install()


def _stand_aside(reason: str) -> None:
    """vLLM runs as it would without us; a format that was asked for is not dropped in silence."""
    asked = f", and {_FORMAT}={os.environ[_FORMAT]} does nothing" if _FORMAT in os.environ else ""
    _log.warning("%s: vLLM keeps its own MLA backend%s", reason, asked)


def _install() -> None:
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from mla.integrations.vllm import backend, settings
    from mla.integrations.vllm.linear import with_plain_weights

    if AttentionBackendEnum.CPU_MLA.get_path() == _BACKEND:
        return
    ModelRegistry.register_model("MiniCPM3ForCausalLM", _MINICPM3)
    for name in (AttentionBackendEnum.CPU_MLA, AttentionBackendEnum.AMX_MLA):
        register_backend(name, _BACKEND)
    CpuPlatform.check_and_update_config = classmethod(
        keeping_settings(CpuPlatform.check_and_update_config.__func__)
    )
    MLAAttention.get_kv_cache_spec = backend.with_rows(MLAAttention.get_kv_cache_spec)
    RotaryEmbedding.forward_cpu = for_strided(RotaryEmbedding.forward_cpu)
    utils.dispatch_cpu_unquantized_gemm = with_plain_weights(utils.dispatch_cpu_unquantized_gemm)
    _log.info(
        "mla: attention on latents in C++ (%s), cache format %s",
        native.best(),
        settings.WANTED or "as the model",
    )


def keeping_settings(original: Any) -> Any:
    """vLLM's adaptation of a configuration to CPUs, without the limits of its own MLA backend, which takes
    pages of 16 only and neither chunks of a prompt nor cached prefixes."""

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        _check_fit(vllm_config.model_config)
        cache, scheduler, model = (
            vllm_config.cache_config,
            vllm_config.scheduler_config,
            vllm_config.model_config,
        )
        block_size = cache.block_size if cache.user_specified_block_size else BLOCK_SIZE
        prefixes = cache.enable_prefix_caching
        chunks, tokens = scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens
        original(cls, vllm_config)
        # DeepSeek-V4 has backends of its own, whose settings stay.
        if model is not None and model.use_mla and model.hf_config.model_type != "deepseek_v4":
            cache.block_size = block_size
            cache.enable_prefix_caching = prefixes
            scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens = chunks, tokens
            _log.info(
                "mla: pages of %d tokens, chunked prefill %s and prefix caching %s after all",
                block_size,
                *("on" if each else "off" for each in (chunks, prefixes)),
            )

    return check_and_update_config


def _check_fit(model: Any) -> None:
    """Refuse what vLLM would compute without a word, and wrongly.

    Raises:
        ValueError: the model is of that kind.
    """
    if model is None or not model.use_mla:
        return
    own_code = not model.using_transformers_backend()
    reason = why_unfit(model.hf_text_config, model.max_model_len, own_code=own_code)
    if reason is not None:
        raise ValueError(f"{model.model} {reason}; serve it with `mla serve --engine transformers`")


def for_strided(original: Any) -> Any:
    """vLLM's rotary operator reads three-dimensional queries as if their heads lay side by side. The rotated
    parts of MLA's queries do not: they take the way in torch."""

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        dense = all(x is None or x.dim() < 3 or x.is_contiguous() for x in (query, key))
        return original(self, positions, query, key) if dense else self.forward_native(positions, query, key)

    return forward_cpu
