"""What the smallest cache has to keep of the original."""

from __future__ import annotations

from dataclasses import dataclass

from mla.errors import MLAError


@dataclass(frozen=True)
class Promise:
    """How far from the original a converted model may be, on held-out text.

    Attributes:
        max_kl: KL(original ‖ converted) at most so many nats per token; None for any.
        max_ppl_increase: perplexity at most so much above the original's, as a share (0.05 is 5%); likewise.

    Raises:
        MLAError: nothing is promised, or something that is not above 0.
    """

    max_kl: float | None = None
    max_ppl_increase: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is None and self.max_ppl_increase is None:
            raise MLAError(
                "say what the smallest cache must keep: a largest KL, or a largest increase of perplexity"
            )
        for name, value in (("KL", self.max_kl), ("increase of perplexity", self.max_ppl_increase)):
            if value is not None and not value > 0:
                raise MLAError(f"the largest {name} must be above 0, got {value}")

    def kept(self, *, kl: float, perplexity: float, original: float) -> bool:
        """Whether a model of this KL and perplexity keeps it; ``original`` is the original's perplexity."""
        increase = perplexity / original - 1
        return (self.max_kl is None or kl <= self.max_kl) and (
            self.max_ppl_increase is None or increase <= self.max_ppl_increase
        )

    def __str__(self) -> str:
        parts = [] if self.max_kl is None else [f"a KL of at most {self.max_kl:g}"]
        if self.max_ppl_increase is not None:
            parts.append(f"a perplexity at most {self.max_ppl_increase:.1%} above the original's")
        return " and ".join(parts)
