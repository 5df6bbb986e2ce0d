"""Is this model safe to run absorbed? Compare it with itself as Transformers runs it, layer by layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mla.cache import LatentCache
from mla.config import MLAConfig
from mla.errors import MLAError
from mla.integrations.loading import DTYPE_FORMATS
from mla.integrations.transformers import absorb, absorbed_path, latent_attentions, restore
from mla.nn.layers import check_weight_says_all

# Relative error of a layer's output that rounding alone explains, by the dtype of the weights. Half-precision
# runs differ from themselves by this much when the order of a sum changes.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
#: Two chunks and three single tokens have to come of them.
_FEWEST = 8


@dataclass(frozen=True)
class LayerReport:
    """One latent attention: its name and the largest relative error over all checked positions."""

    name: str
    error: float


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        model_type: family as Transformers names it.
        layers: one report per latent attention.
        logit_error: relative error of the logits.
        agreement: share of checked positions with the same most likely token.
        positions: the position spans that were checked, [first, last].
        scale: softmax scale of the config and of the model's first latent attention.
        bytes_per_token: what the cache allocated per token, and what the configuration says.
        problems: empty when the model is safe.
    """

    model_type: str
    layers: tuple[LayerReport, ...]
    logit_error: float
    agreement: float
    positions: tuple[tuple[int, int], ...]
    scale: tuple[float, float]
    bytes_per_token: tuple[float, float]
    problems: tuple[str, ...]

    @property
    def safe(self) -> bool:
        """Whether no check failed."""
        return not self.problems


@contextmanager
def _left_as_it_came(model: Any) -> Iterator[None]:
    path = absorbed_path(model)
    try:
        yield
    finally:
        restore(model)
        if path is not None:
            absorb(model, path=path)


@torch.no_grad()
def diagnose(model: Any, ids: Tensor, *, on_progress: Callable[[int, int], None] | None = None) -> Diagnosis:
    """Run ``ids`` through the stock model at once, and absorbed in chunks and single tokens on a cache.

    Both ends of the position range are checked: the first positions and the last the model allows. The
    model is left as it came, absorbed or not absorbed.

    Args:
        model: an MLA model of Transformers.
        ids: [1, t] token ids, t from 8 to the positions that the model has.
        on_progress: called with (runs done, runs in all).

    Raises:
        MLAError: the model is not MLA or cannot be absorbed, its weights are in a dtype that no cache format
            has (fp64), or the ids are other than these.
    """
    config = MLAConfig.from_transformers(model.config)
    if ids.ndim != 2 or len(ids) != 1 or not _FEWEST <= ids.shape[1] <= config.max_position_embeddings:
        wanted = f"[1, t] with t from {_FEWEST} to {config.max_position_embeddings}"
        raise MLAError(f"ids: expected {wanted}, got shape {tuple(ids.shape)}")
    modules = latent_attentions(model)
    for name, module in modules.items():
        check_weight_says_all(f"{name}.kv_b_proj", module.kv_b_proj)
    dtypes = {module.kv_b_proj.weight.dtype for module in modules.values()}
    if strange := dtypes - set(TOLERANCE):
        raise MLAError(
            f"expected weights in fp32, bf16 or fp16, got {strange.pop()}; convert them: model.float()"
        )
    t = ids.shape[1]
    spans = [(0, t - 1)]
    last = config.max_position_embeddings - t
    if last > 0:
        spans.append((last, last + t - 1))
    errors: dict[str, float] = {}
    logit_error, agreed, checked = 0.0, 0, 0
    bytes_per_token = 0.0
    with _left_as_it_came(model):
        for done, (first, _) in enumerate(spans):
            restore(model)
            positions = torch.arange(first, first + t, device=ids.device)[None]
            with _record(model) as stock_outputs:
                stock = model(ids, position_ids=positions, use_cache=False).logits
            absorb(model)
            cache = LatentCache(model.config.get_text_config(decoder=True), capacity=t)
            with _record(model) as outputs:
                parts = []
                for start, end in [(0, t // 2), (t // 2, t - 3), *((i, i + 1) for i in range(t - 3, t))]:
                    chunk = {"position_ids": positions[:, start:end], "past_key_values": cache}
                    parts.append(model(ids[:, start:end], **chunk).logits)
            logits = torch.cat(parts, dim=1)
            for name, want in stock_outputs.items():
                error = _relative_error(torch.cat(outputs[name], dim=1), torch.cat(want, dim=1))
                errors[name] = max(errors.get(name, 0.0), error)
            logit_error = max(logit_error, _relative_error(logits, stock))
            agreed += int((logits.argmax(-1) == stock.argmax(-1)).sum())
            checked += t
            bytes_per_token = cache.nbytes / t
            if on_progress is not None:
                on_progress(done + 1, len(spans))
    scale = (config.softmax_scale, float(next(iter(modules.values())).scaling))
    dtype = next(iter(modules.values())).kv_b_proj.weight.dtype
    expected_bytes = config.cache_bytes(t, DTYPE_FORMATS[dtype]) / t
    tolerance = TOLERANCE[dtype]
    problems = [f"{name} differs by {error:.1e}" for name, error in errors.items() if not error <= tolerance]
    if not logit_error <= tolerance:
        problems.append(f"logits differ by {logit_error:.1e}")
    if abs(scale[0] - scale[1]) > 1e-6 * abs(scale[1]):
        problems.append(f"softmax scale is {scale[1]:.6g} in the model, {scale[0]:.6g} by its configuration")
    if bytes_per_token != expected_bytes:
        problems.append(
            f"the cache takes {bytes_per_token:.1f} bytes per token, expected {expected_bytes:.1f}"
        )
    return Diagnosis(
        model_type=str(config.model_type),
        layers=tuple(LayerReport(name, error) for name, error in errors.items()),
        logit_error=logit_error,
        agreement=agreed / checked,
        positions=tuple(spans),
        scale=scale,
        bytes_per_token=(bytes_per_token, expected_bytes),
        problems=tuple(problems),
    )


@contextmanager
def _record(model: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the output [1, s, d] of every latent attention, call by call."""
    outputs: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in latent_attentions(model).items():
        outputs[name] = []

        def keep(_module: Any, _inputs: Any, output: Any, name: str = name) -> None:
            outputs[name].append(output[0])

        hooks.append(module.register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference at any position, relative to the root mean square of what was expected there."""
    difference = (got.double() - want.double()).abs().amax(-1)
    size = want.double().square().mean(-1).sqrt()
    # A NaN anywhere must not hide behind a maximum.
    return float((difference / size.clamp_min(1e-30)).nan_to_num(nan=float("inf")).max())
