"""Tiny random teachers, and a tokenizer. Weights are large enough that attention is far from uniform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 97


def teacher(
    kind: str = "llama", *, seed: int = 0, **changes: object
) -> LlamaForCausalLM | MistralForCausalLM | Qwen2ForCausalLM:
    """A tiny random teacher in fp32; ``changes`` go into its config. Biases, if any, are large."""
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    settings |= changes
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(sliding_window=None, **settings)).eval()
    model = (
        Qwen2ForCausalLM(Qwen2Config(**settings))
        if kind == "qwen2"
        else LlamaForCausalLM(LlamaConfig(**settings))
    )
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=1.0)
    return model.eval()


def tokens(windows: int, length: int, *, seed: int = 1) -> torch.Tensor:
    """Random token ids [windows, length]."""
    return torch.randint(3, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


def divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean KL(first ‖ second) in nats per token."""
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


class Letters:
    """A tokenizer of single characters that starts every text with token 1 where it is told to."""

    chat_template = None
    all_special_ids = (1, 2)

    def __init__(self, bos: int | None = 1) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        start = [] if self.bos_token_id is None or not add_special_tokens else [self.bos_token_id]
        return {"input_ids": start + [3 + ord(letter) % 90 for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(93)}

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def save_pretrained(self, folder: Path) -> None:
        pass
