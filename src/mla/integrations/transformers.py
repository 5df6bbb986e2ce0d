"""``absorb(model)``: an MLA model of Transformers runs on its latents, without rebuilding keys and values.

Every MLA family of Transformers calls ``expand_kv(latents, rotary keys)`` between its cache and its attention
interface. An absorbed module answers that call with the latents themselves, and the attention function
registered here receives them in place of keys and values. Plain linear layers and experts compute what they
did, for few rows by the kernel (``layers.py``). Everything else of the family stays its own: query path,
RoPE, gates, sinks, sparse indexers, masks.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mla.cache import LatentCache
from mla.errors import MLAError
from mla.integrations.layers import Method, give_back, take_over
from mla.nn.layers import check_weight_says_all
from mla.ops.arguments import has_values
from mla.ops.attention import Path, check_path, plan_for, prefill
from mla.ops.latent import Latents, split_rows

IMPLEMENTATION = "mla_absorbed"

Model = TypeVar("Model", bound=PreTrainedModel)

# Keywords that families hand to the attention interface and that change nothing here: what they say is
# already in the mask, the queries or the positions, or concerns other outputs.
_IGNORED = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "ignore_index",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "seq_idx",
        "shift_labels",
        "sliding_window",
        "use_cache",
    }
)


@dataclass(frozen=True)
class _Absorbed:
    """What ``restore`` needs."""

    modules: tuple[Any, ...]
    layers: tuple[nn.Module, ...]
    implementations: tuple[tuple[PreTrainedConfig, str | None], ...]


def absorb(model: Model, *, path: Path | Literal["auto"] = "auto") -> Model:
    """Make an MLA model run absorbed, in place; :func:`restore` undoes it.

    Works for every family that has the ``expand_kv`` seam, hybrid models included: layers that are not
    latent attention keep their attention. Linear layers and experts read their weights by the C++ kernel
    where few rows meet them (``integrations.layers``). ``generate`` then uses a preallocated ``LatentCache``
    unless it is given another cache; any cache of Transformers works, since all of them hold the latents.

    Args:
        model: a model of Transformers, weights in any floating dtype, on any device, training or not, also in
            the wrapper of torch.compile.
        path: "auto" chooses absorbed or expanded for each call by operation count (``ops.attention``);
            a name forces that path.

    Returns:
        The same model.

    Raises:
        ValueError: a path that does not exist.
        MLAError: not a model of Transformers, or not MLA, or its latent up-projection is not a plain linear
            layer (quantised, offloaded, or wrapped by an adapter); nothing has been changed then.
    """
    check_path(path)
    given, model = model, _uncompiled(model)
    if not isinstance(model, PreTrainedModel):
        raise MLAError(
            f"expected a model of Transformers (PreTrainedModel), got {type(model).__name__}; take the model "
            "out of its wrapper, or merge an adapter into it (merge_and_unload)"
        )
    modules = latent_attentions(model)
    if not modules:
        raise MLAError(
            f"{type(model).__name__} (model type {model.config.model_type}) is not an MLA model: none of its "
            "modules has a latent up-projection (kv_b_proj); convert it first: mla convert MODEL OUT"
        )
    for name, module in modules.items():
        _check_up_projection(name, module)
    restore(model)
    configs = {id(module.config): module.config for module in modules.values()}
    record = _Absorbed(
        tuple(modules.values()),
        take_over(model, but={module.kv_b_proj for module in modules.values()}),
        tuple((config, _implementation(model, config)) for config in configs.values()),
    )
    for module in record.modules:
        module.expand_kv = partial(_keep_latents, module.config)
        module._mla_path = path
    for config, _ in record.implementations:
        config._attn_implementation = IMPLEMENTATION
    if hasattr(model, "_prepare_cache_for_generation"):
        model._prepare_cache_for_generation = Method(_prepare_latent_cache, model)
    model._mla_absorbed = record
    return given


def restore(model: Model) -> Model:
    """Undo :func:`absorb`: the model runs as Transformers made it. Returns the same model.

    Hooks that another library has put around layers since then stay, with a warning.
    """
    given, model = model, _uncompiled(model)
    record = vars(model).pop("_mla_absorbed", None)
    if record is not None:
        for module in record.modules:  # restored already where another model has them, too
            vars(module).pop("expand_kv", None)
            vars(module).pop("_mla_path", None)
        give_back(record.layers)
        for config, implementation in record.implementations:
            config._attn_implementation = implementation
        if "_prepare_cache_for_generation" in vars(model):
            del model._prepare_cache_for_generation
    return given


def is_absorbed(model: PreTrainedModel) -> bool:
    """Whether :func:`absorb` is in force."""
    record = vars(_uncompiled(model)).get("_mla_absorbed")
    return record is not None and all("_mla_path" in vars(module) for module in record.modules)


def absorbed_path(model: PreTrainedModel) -> Path | Literal["auto"] | None:
    """The ``path`` that :func:`absorb` was given; None where it is not in force."""
    return next(iter(_uncompiled(model)._mla_absorbed.modules))._mla_path if is_absorbed(model) else None


def _uncompiled(model: Model) -> Model:
    """The model in the wrapper that torch.compile puts around it, which hands only some attributes on."""
    return cast(Model, getattr(model, "_orig_mod", model))


def latent_attentions(model: nn.Module) -> dict[str, Any]:
    """The latent attention modules of a model by name, in order; empty for a model that is not MLA."""
    # A compiled module and its wrapper are two modules, of which the wrapper comes first.
    found = {name: _uncompiled(x) for name, x in model.named_modules() if hasattr(x, "kv_b_proj")}
    names = {id(module): name for name, module in reversed(found.items())}
    return {name: module for name, module in found.items() if names[id(module)] == name}


def up_projections(weight: Tensor, h: int, n: int) -> tuple[Tensor, Tensor]:
    """Views (w_uk [h, n, r], w_uv [h, v, r]) of a ``kv_b_proj`` weight [h·(n + v), r]."""
    per_head = weight.view(h, -1, weight.shape[-1])
    return per_head[:, :n], per_head[:, n:]


def _keep_latents(config: PreTrainedConfig, c_kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    """What an absorbed module has for ``expand_kv``: [b, 1, t, r] and [b, 1, t, p] pass as they are."""
    if config._attn_implementation != IMPLEMENTATION:
        raise MLAError(
            f"this model's attention was set to {config._attn_implementation} since absorb(), or by "
            "restore() of a model with the same config object: absorb(model) again, or restore(model)"
        )
    return c_kv, k_rope


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    indices: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface: query [b, h, s, n + p], latents [b, 1, t, r] as key, [b, 1, t, p] as value."""
    if not hasattr(module, "_mla_path"):
        must = indices is not None or s_aux is not None
        if must or hasattr(module, "kv_b_proj"):
            _say_not_absorbed(module, must=must)
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return _other_attention(module, query, key, value, attention_mask, options)
    for name, given in kwargs.items():
        if name not in _IGNORED and given is not None and given is not False:
            raise NotImplementedError(f"absorbed attention has no {name}; restore(model) to run without it")
    if scaling is None:
        raise ValueError("absorbed attention needs the softmax scale of the family (scaling)")
    check_weight_says_all(f"layer {module.layer_idx}.kv_b_proj", module.kv_b_proj)
    if module.kv_b_proj.weight.is_meta and not query.is_meta:
        raise _offloaded(f"layer {module.layer_idx}", "restore(model), or ")
    h, s, p = query.shape[1], query.shape[2], value.shape[-1]
    n = query.shape[-1] - p
    w_uk, w_uv = up_projections(module.kv_b_proj.weight, h, n)
    if key.dtype == torch.uint8:  # rows of an int8 LatentCache
        held = split_rows(key.squeeze(1), w_uk.shape[-1], p)
    else:
        held = Latents(key.squeeze(1), value.squeeze(1))
    if attention_mask is not None:
        held, attention_mask = _without_unseen_end(held, attention_mask)
    causal = attention_mask is None and s > 1 and (module.is_causal if is_causal is None else is_causal)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        # The lowest finite number means "hidden" in additive masks; a query that sees nothing gives zero,
        # not the mean of everything that is hidden from it.
        if not attention_mask.is_floating_point():
            raise ValueError(f"attention_mask: expected bool or a floating dtype, got {attention_mask.dtype}")
        lowest = torch.finfo(attention_mask.dtype).min
        attention_mask = attention_mask.masked_fill(attention_mask <= lowest, -torch.inf)
    if indices is not None:
        held, attention_mask = _only_indexed(indices, held, attention_mask)
    query = query.transpose(1, 2)
    q_nope, q_rope = query[..., :n], query[..., n:]
    out, _ = prefill(
        q_nope,
        q_rope,
        held.c_kv,
        held.k_rope,
        w_uk,
        w_uv,
        scale=scaling,
        causal=bool(causal),
        mask=attention_mask,
        sinks=s_aux,
        latent_scale=held.scale,
        dropout=dropout,
        plan=plan_for(q_nope, held.c_kv, held.k_rope, w_uv, causal=bool(causal), path=module._mla_path),
    )
    return out, None


def _say_not_absorbed(module: Any, *, must: bool) -> None:
    """A module came to ours by its config alone; ``must``: torch's attention cannot take its place."""
    text = (
        f"{type(module).__name__} has the config of an absorbed model, or a copy of it, and is not absorbed: "
        "absorb(model), or model.set_attn_implementation('sdpa')"
    )
    if must:
        raise MLAError(text)
    if not torch.compiler.is_compiling():
        warnings.warn(f"{text}. It runs as Transformers does, on keys and values", stacklevel=2)


def _offloaded(name: str, remedy: str = "") -> MLAError:
    return MLAError(
        f"{name}.kv_b_proj: expected weights in memory, got none; {remedy}load the model without offloading"
    )


def _without_unseen_end(held: Latents, mask: Tensor) -> tuple[Latents, Tensor]:
    """Latents and mask up to the last key that any query sees: a StaticCache hands over all rows it has.

    What is left is causal, or a mask of keys, which the kernels take, and as long as what has been written:
    padding at the end, which nobody sees, either, has been.
    """
    # Only where looking at values is possible, and free: not on another device.
    if mask.dtype != torch.bool or mask.device.type != "cpu" or not has_values(mask) or mask.shape[-1] < 2:
        return held, mask
    if bool(mask[..., -1].any()):
        return held, mask
    by_query = mask.flatten(0, 1).any(0)  # [s, t]
    seen, first = by_query.any(0).nonzero(), by_query[0].nonzero()
    if not len(seen):
        return held, mask
    # The first query's own key is the last that it sees; those of the others follow it.
    written = int(first[-1]) + len(by_query) if len(first) else 0
    t = min(max(int(seen[-1]) + 1, written), mask.shape[-1])
    scale = None if held.scale is None else held.scale[:, :t]
    return Latents(held.c_kv[:, :t], held.k_rope[:, :t], scale), mask[..., :t]


def _only_indexed(indices: Tensor, held: Latents, mask: Tensor | None) -> tuple[Latents, Tensor | None]:
    """Restrict attention to the keys that a sparse indexer chose, ``indices`` [b, s, k]; -1 is no key."""
    b, s, _ = indices.shape
    t = held.c_kv.shape[1]
    indices = indices.long()
    exists = (indices >= 0) & (indices < t)
    if s == 1:
        # One query: gather its few keys and read nothing else of the cache.
        indices = indices.clamp(0, max(t - 1, 0))
        rows = indices[:, 0, :, None]
        held = Latents(
            held.c_kv.gather(1, rows.expand(-1, -1, held.c_kv.shape[2])),
            held.k_rope.gather(1, rows.expand(-1, -1, held.k_rope.shape[2])),
            None if held.scale is None else held.scale.gather(1, indices[:, 0]),
        )
        chosen = exists[:, None]
        if mask is not None:
            mask = mask.expand(b, -1, -1, -1).gather(3, indices[:, None].expand(-1, mask.shape[1], -1, -1))
    else:
        # What is no key goes to a place behind the last one.
        chosen = torch.zeros(b, s, t + 1, dtype=torch.bool, device=indices.device)
        chosen = chosen.scatter_(2, torch.where(exists, indices, t), True)[:, None, :, :t]
    if mask is None:
        return held, chosen
    if mask.dtype == torch.bool:
        return held, mask & chosen
    return held, mask.masked_fill(~chosen, -torch.inf)


def _other_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, None]:
    """Attention of a module that shares the config of absorbed ones but is not latent: torch's own."""
    s, t = query.shape[2], key.shape[2]
    causal = options["is_causal"] is not False and getattr(module, "is_causal", True)
    if mask is None and causal and 1 < s < t:
        # Our masks may be None here too (the last s of t keys); torch's causal flag means the first s.
        mask = torch.ones(s, t, dtype=torch.bool, device=query.device).tril(t - s)[None, None]
    out, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    return out, None


def _attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask interface: bool [b, 1, s, t], or None where "the last s of t causal keys" says it all."""
    if (
        allow_is_causal_skip
        and not isinstance(q_offset, Tensor)
        and kv_offset + kv_length == q_offset + q_length
        and (local_size is None or kv_length < local_size)
        and (attention_mask is None or (has_values(attention_mask) and bool(attention_mask.all())))
    ):
        return None
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )
    return mask


def _prepare_latent_cache(
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Let ``generate`` make its cache as always, but where that is a growing one, make it ours."""
    given = model_kwargs.get("past_key_values")
    type(model)._prepare_cache_for_generation(
        model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )
    made: Any = model_kwargs.get("past_key_values")
    # Ours holds constants: where generate is called with gradients, Transformers' own carries them.
    wanted = given is None and not torch.is_grad_enabled()
    if wanted and type(made) is DynamicCache and not made.offloading:
        cache = LatentCache(model.config.get_text_config(decoder=True), capacity=max_cache_length)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache


def _implementation(model: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    """What a config had before ours; the family's usual one where it is that of another absorbed model."""
    name: str | None = config._attn_implementation
    if name != IMPLEMENTATION:
        return name
    return "sdpa" if model._supports_sdpa else "eager"


def _check_up_projection(name: str, module: Any) -> None:
    if not hasattr(module, "expand_kv"):
        raise MLAError(
            f"{name} is latent attention, but Transformers has no expand_kv there to absorb through; "
            "load the model without remote code, with Transformers 5.19 or later"
        )
    check_weight_says_all(f"{name}.kv_b_proj", module.kv_b_proj)
    if module.kv_b_proj.weight.is_meta:
        raise _offloaded(name)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _attention_mask)
