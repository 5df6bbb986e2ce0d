"""Healing: the converted attention learns the teacher's next-token distribution.

Layer by layer the conversion has already matched the teacher's block outputs (refit.py). Only what it wrote
is trained (the query projection, kv_a_proj_with_mqa, kv_b_proj, o_proj); everything else is the teacher's
and stays so. Healing runs on a clock, not for a number of steps: the learning rate falls to zero when the
minutes are over, whatever the machine. Held-out windows decide: on them the result is never worse than what
came in.

The latent norm is folded out while training (checkpoint.py has why it is folded in): under it the latent rows
are 2^-30 of their size and their gradients as much too large.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM, PreTrainedModel

from mla.convert.arithmetic import faster_dtype, mixed
from mla.convert.checkpoint import LATENT_GAIN, LATENT_SCALE
from mla.convert.descent import Muon, Views, column_apart, schedule
from mla.convert.fused import fused
from mla.convert.parts import damaged, mark
from mla.errors import MLAError
from mla.whole import whole

# Relative to each matrix's root mean square, at a KL of one nat. A conversion that is close already is shaken
# by steps that a rough one needs: the rate goes with the root of the KL that it starts from.
_RATE = 1e-3
_WARM_UP = 0.02  # share of the time
_TOKENS_PER_STEP = 512
_ROWS = 256  # logits of so many tokens exist at a time
_SAVE_EVERY = 90.0  # seconds
# Measurements on the held-out windows while healing, at most, the last of them at its end, and the share of
# the time before the first: recorded curves fall to the end, weights of an early check never were best.
_CHECKS, _UNCHECKED = 4, 1 / 3
_CHECKING = 0.05  # share of the time that they may take, but for the last
_FORMAT = 3  # of the state on disk
_KEPT = 2 * 2**30  # bytes of the teacher's outputs, at most, that are kept for the next time a window is read


@dataclass(frozen=True)
class Healing:
    """What healing gave. KL(teacher ‖ student) in nats per token on the held-out windows.

    Attributes:
        kl_before, kl_after: as it came in, and as it is now.
        tokens: trained on, with repetition.
        seconds: spent, over all runs when it was resumed.
        curve: (seconds, kl) at every check.
    """

    kl_before: float
    kl_after: float
    tokens: int
    seconds: float
    curve: tuple[tuple[float, float], ...]


def heal(
    student: DeepseekV3ForCausalLM,
    teacher: PreTrainedModel,
    windows: Tensor,
    held_out: Tensor,
    *,
    minutes: float,
    seed: int = 0,
    state: Path | None = None,
    on_progress: Callable[[str, float, float], None] | None = None,
) -> Healing:
    """Train the converted attention against the teacher for ``minutes`` of wall time.

    Muon on KL(teacher ‖ student) over the full vocabulary; the best weights on ``held_out`` are kept.

    Args:
        student: fp32, from :func:`mla.convert.convert`; changed in place.
        teacher: the model it came from, on the same device.
        windows: int64 token ids [w, t] to learn from, read in an order that ``seed`` fixes, again and again.
        held_out: int64 token ids [v, t'] that only measure.
        minutes: of wall time, above 0.
        seed: order of the windows.
        state: file that holds optimiser, weights and best weights; a call with the same file continues where
            the last one was killed, or takes what it ended with. The caller removes it.
        on_progress: called as (stage, seconds done, seconds in all).

    Returns:
        What it gave.

    Raises:
        MLAError: arguments that make no sense, a ``state`` of another run, or one that cannot be written.
    """
    if not minutes > 0:
        raise MLAError(f"healing takes a number of minutes above 0, got {minutes}")
    if windows.ndim != 2 or held_out.ndim != 2 or not len(windows) or not len(held_out):
        raise MLAError(
            f"healing takes token ids [windows, tokens] to learn from and to measure on, got "
            f"{list(windows.shape)} and {list(held_out.shape)}"
        )
    student.requires_grad_(False)
    with _unfolded(student), fused(student):
        run = _Run(student, teacher, windows, held_out, minutes * 60, seed, state, on_progress)
        return run.finish()


class _Run:
    """One healing: its clock, its best weights, its state on disk."""

    def __init__(
        self,
        student: DeepseekV3ForCausalLM,
        teacher: PreTrainedModel,
        windows: Tensor,
        held_out: Tensor,
        seconds: float,
        seed: int,
        state: Path | None,
        on_progress: Callable[[str, float, float], None] | None,
    ) -> None:
        self.student, self.teacher, self.windows = student, teacher, windows
        self.total, self.state, self.on_progress = seconds, state, on_progress
        self.order = _order(len(windows), seed)
        matrices = _matrices(student.config)
        self.parameters = {
            f"{index}.{name}": getattr(layer.self_attn, name).weight
            for index, layer in enumerate(student.model.layers)
            for name in matrices
        }
        self.views = [view for _ in student.model.layers for view in matrices.values()]
        self.held_out = held_out
        self.reference = _hidden(teacher, held_out)
        # Of windows that are alike, a shorter text's that are repeated, the teacher's outputs are the same.
        self.alike = torch.unique(windows, dim=0, return_inverse=True)[1].tolist()
        self.theirs: dict[int, Tensor] = {}
        # What is trained, not all of the student: the constant biases beside it are sums, whose last digits a
        # process with other threads may find otherwise.
        trained = nn.ParameterList(self.parameters.values())
        self.mark = [_FORMAT, seconds, seed, mark([windows, held_out], [trained, teacher])]
        self.started, self.spent, self.saved_at = time.monotonic(), 0.0, 0.0
        self.step, self.tokens = 0, 0
        self.checked, self.check_takes = 0, 0.0  # the step of the last check, and its seconds
        self.ended: float | None = None  # the seconds it took, once it is finished
        self.curve: list[tuple[float, float]] = []
        self.optimiser_state: dict[str, Any] | None = None
        if state is not None and state.exists():
            self._resume()
        else:
            self.best_kl = self._measure()
            self.curve.append((0.0, self.best_kl))
            self.best = self._copy()

    def seconds(self) -> float:
        if self.ended is not None:
            return self.ended
        return self.spent + time.monotonic() - self.started

    def finish(self) -> Healing:
        if self.ended is None:
            self._learn()
        self._restore(self.best)
        return Healing(
            self.curve[0][1], self.best_kl, self.tokens, round(self.seconds(), 1), tuple(self.curve)
        )

    def _learn(self) -> None:
        """The whole student against the teacher's next-token distribution."""
        parameters = list(self.parameters.values())
        per_step = max(1, _TOKENS_PER_STEP // self.windows.shape[1])
        largest = _RATE * math.sqrt(min(1.0, max(0.0, self.curve[0][1])))  # rounding has either sign
        dtype = faster_dtype(self.student.device)
        with _trainable(parameters):
            frozen = _Frozen(self.student, dtype)
            own, theirs = _heads(self.student, self.teacher, dtype)
            optimiser = Muon(parameters, self.views)
            if self.optimiser_state is not None:
                optimiser.load_state_dict(self.optimiser_state)
                self.optimiser_state = None
            # Nothing is begun after which the last check would not end in time.
            longest = 0.0
            while (now := self.seconds()) + longest + self.check_takes < self.total:
                rate = largest * schedule(max(now / self.total, 1e-3), warm_up=_WARM_UP)
                places = self._next(per_step)
                ids, reference = self.windows[places].to(self.student.device), self._wanted(places, dtype)
                with frozen, mixed(dtype, ids.device):
                    hidden = self.student.model(input_ids=ids, use_cache=False).last_hidden_state
                hidden.backward(_slope(own, theirs, hidden.detach(), reference))
                optimiser.step(rate)
                self.step += 1
                self.tokens += ids.numel()
                longest = max(longest, self.seconds() - now)
                self._tell()
                now = self.seconds()
                every = max(self.total * (1 - _UNCHECKED) / (_CHECKS - 1), self.check_takes / _CHECKING)
                due = max(self.total * _UNCHECKED, self.curve[-1][0] + every)
                if now > due and now + longest + 2 * self.check_takes < self.total:
                    self._check()
                if self.seconds() - self.saved_at >= _SAVE_EVERY:
                    self._save(optimiser)
            if self.step > self.checked:
                self._check()
            self.ended = self.seconds()
            self._save(optimiser)

    def _wanted(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """The teacher's outputs for these windows in ``dtype``, which a step's products take them in.

        Those of as many windows as there is room for are computed once: each is read once in a round, so it
        does not matter which.
        """
        found = []
        for place in places.tolist():
            hidden = self.theirs.get(self.alike[place])
            if hidden is None:
                with mixed(dtype, self.student.device):
                    hidden = _hidden(self.teacher, self.windows[place][None])[0].to(dtype)
                if (len(self.theirs) + 1) * hidden.nbytes <= _KEPT:
                    self.theirs[self.alike[place]] = hidden
            found.append(hidden)
        return torch.stack(found)

    def _next(self, count: int) -> Tensor:
        """Places of the next ``count`` windows: every window once, then every one again in another order."""
        first = self.step * count
        n = len(self.windows)
        return torch.stack([self.order(place // n)[place % n] for place in range(first, first + count)])

    # What is kept.

    def _check(self) -> None:
        kl = self._measure()
        self.curve.append((round(self.seconds(), 1), kl))
        self.checked = self.step
        if kl < self.best_kl:
            self.best_kl, self.best = kl, self._copy()

    def _measure(self) -> float:
        begun = time.monotonic()
        own, theirs = _heads(self.student, self.teacher, torch.float32)
        kl = [
            _kl(own, theirs, _hidden(self.student, ids[None]), reference[None])
            for ids, reference in zip(self.held_out, self.reference, strict=True)
        ]
        self.check_takes = time.monotonic() - begun
        return sum(kl) / len(kl)

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _restore(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])

    def _save(self, optimiser: Muon) -> None:
        """A killed run loses at most what it did since the last time."""
        if self.state is None:
            return
        content = {
            "mark": self.mark,
            "ended": self.ended,
            "spent": self.seconds(),
            "step": self.step,
            "tokens": self.tokens,
            "checked": self.checked,
            "check_takes": self.check_takes,
            "curve": self.curve,
            "best_kl": self.best_kl,
            "best": self.best,
            "weights": self._copy(),
            "optimiser": optimiser.state_dict(),
        }
        with whole(self.state, RuntimeError) as partial:  # all that torch says of a full disk
            torch.save(content, partial)
        self.saved_at = self.seconds()

    def _resume(self) -> None:
        assert self.state is not None
        try:
            content = torch.load(self.state, map_location="cpu", weights_only=True)
        except Exception as error:  # torch says it in many ways; advice that does not help here follows
            said = str(error).partition(". ")[0]
            raise damaged(self.state, f"{type(error).__name__} {said}".strip()) from error
        if content["mark"] != self.mark:
            raise MLAError(
                f"{self.state} belongs to another healing (other text, minutes, seed, models or mla): "
                "delete it to begin anew"
            )
        self._restore(content["weights"])
        self.ended = content["ended"]
        self.spent = self.saved_at = content["spent"]
        self.step, self.tokens = content["step"], content["tokens"]
        self.checked, self.check_takes = content["checked"], content["check_takes"]
        self.curve = [tuple(point) for point in content["curve"]]
        self.best_kl, self.best = content["best_kl"], content["best"]
        self.optimiser_state = content["optimiser"]

    def _tell(self) -> None:
        if self.on_progress is not None:
            self.on_progress("healing", min(self.seconds(), self.total), self.total)


# The pieces.


def _matrices(config: Any) -> dict[str, Views]:
    """The weights that are trained, and the matrices of every head in them."""
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim

    def queries(w: Tensor) -> list[Tensor]:
        stack = w.view(heads, nope + rope, -1)
        parts = [stack[:, :nope], stack[:, nope:]]
        return [each for part in parts for each in column_apart(part)] if config.attention_bias else parts

    return {
        "q_proj" if config.q_lora_rank is None else "q_b_proj": queries,
        "kv_a_proj_with_mqa": lambda w: w.split([rank, rope]),
        "kv_b_proj": lambda w: w.view(heads, nope + value, -1).split([nope, value], 1),
        "o_proj": lambda w: [w.view(-1, heads, value).transpose(0, 1)],
    }


@contextlib.contextmanager
def _unfolded(student: DeepseekV3ForCausalLM) -> Iterator[None]:
    """The latent norm gone while inside: the rows at their own size, the norm an identity."""
    blocks = [layer.self_attn for layer in student.model.layers]
    norms = [block.kv_a_layernorm for block in blocks]
    rank = student.config.kv_lora_rank
    down = [x for block in blocks for x in block.kv_a_proj_with_mqa.parameters()]  # weights, biases if any
    with torch.no_grad():
        for parameter in down:
            parameter[:rank] /= LATENT_SCALE
        for block in blocks:
            block.kv_a_layernorm = nn.Identity()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in down:
                parameter[:rank] *= LATENT_SCALE
            for block, norm in zip(blocks, norms, strict=True):
                block.kv_a_layernorm = norm
                assert float(norm.weight[0]) == LATENT_GAIN


@contextlib.contextmanager
def _trainable(parameters: list[Tensor]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


@torch.no_grad()
def _hidden(model: Any, ids: Tensor) -> Tensor:
    """[w, t, d], what the language model head reads, one window at a time."""
    ids = ids.to(model.device)
    return torch.cat([model.model(input_ids=x[None], use_cache=False).last_hidden_state for x in ids]).float()


class _Frozen:
    """The weights that stay as they are, in ``dtype`` while inside: ``with frozen:`` any number of times.

    Autocast keeps what it has cast only of weights that learn, and would cast these at every step. The
    modules get parameters of their own for it: those that they had are never written, and are theirs again
    outside. At the peak of a step the copies take no memory more, all that autocast has cast would lie there
    for the gradient.
    """

    def __init__(self, student: DeepseekV3ForCausalLM, dtype: torch.dtype) -> None:
        self.held = [
            (module, name, full, nn.Parameter(full.detach().to(dtype), requires_grad=False))
            for module in student.model.modules()
            if isinstance(module, nn.Linear) and dtype != torch.float32
            for name, full in module.named_parameters(recurse=False)
            if not full.requires_grad
        ]

    def __enter__(self) -> None:
        for module, name, _full, cast in self.held:
            setattr(module, name, cast)

    def __exit__(self, *_: object) -> None:
        for module, name, full, _cast in self.held:
            setattr(module, name, full)


def _heads(student: Any, teacher: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The language model heads [v, d] of both, in ``dtype`` where it is not float32, else as they are.

    The student's is the teacher's: cast they are one tensor.
    """
    own, theirs = (model.get_output_embeddings().weight.detach() for model in (student, teacher))
    if dtype == torch.float32:
        return own, theirs
    own, theirs = own.to(dtype), theirs.to(dtype)
    return own, own if torch.equal(own, theirs) else theirs


# Logits of a thousand tokens over a vocabulary are larger than the activations: both take them in rows.


@torch.no_grad()
def _kl(own: Tensor, theirs: Tensor, hidden: Tensor, reference: Tensor) -> float:
    """Mean KL(teacher ‖ student) over all tokens.

    Args:
        own, theirs: heads [v, d] of student and teacher.
        hidden, reference: fp32 [w, t, d], what they read.
    """
    rows, wanted = hidden.flatten(0, -2), reference.flatten(0, -2)
    total = 0.0
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        guess = (rows[part] @ own.T).log_softmax(-1)
        truth = (wanted[part].to(theirs.dtype) @ theirs.T).float().log_softmax(-1)
        chance = truth.exp()
        total += float(truth.sub_(guess).mul_(chance).sum())
    return total / len(rows)


@torch.no_grad()
def _slope(own: Tensor, theirs: Tensor, hidden: Tensor, reference: Tensor) -> Tensor:
    """The gradient of :func:`_kl` by ``hidden``, fp32 [w, t, d], from products in the dtypes of the heads.

    ``reference`` may be of any dtype.
    """
    rows, wanted = hidden.flatten(0, -2), reference.flatten(0, -2)
    slope = torch.empty_like(rows)
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        guess = (rows[part].to(own.dtype) @ own.T).softmax(-1, dtype=torch.float32)
        truth = (wanted[part].to(theirs.dtype) @ theirs.T).softmax(-1, dtype=torch.float32)
        slope[part] = guess.sub_(truth).to(own.dtype) @ own
    return slope.div_(len(rows)).view_as(hidden)


def _order(count: int, seed: int) -> Callable[[int], Tensor]:
    """Order of the windows in every round over them."""

    def order(epoch: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))

    return order
