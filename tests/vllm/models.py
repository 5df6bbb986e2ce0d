"""Small random models with the attention dimensions of large ones, in files, and what Transformers says."""

import os
from pathlib import Path
from typing import Any

import torch

_COMMON = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_MOE = {
    # What Transformers takes for granted with DeepSeek-V3, vLLM reads in the configuration.
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
}
#: As MiniCPM3-4B has it: both sets of factors are one, and the lengths, too.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 1.0,
    "short_factor": [1 + i / 8 for i in range(16)],
    "long_factor": [1 + i / 8 for i in range(16)],
    "original_max_position_embeddings": 4096,
}


def _dims(h: int, q: int | None, r: int, n: int, p: int, v: int) -> dict[str, Any]:
    return {
        "num_attention_heads": h,
        "num_key_value_heads": h,
        "q_lora_rank": q,
        "kv_lora_rank": r,
        "qk_nope_head_dim": n,
        "qk_rope_head_dim": p,
        "v_head_dim": v,
    }


#: Name: model type and configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v2-lite": (
        "deepseek_v2",
        {
            **_dims(16, None, 512, 128, 64, 128),
            **_MOE,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "rope_parameters": _YARN,
            "max_position_embeddings": 163840,
        },
    ),
    # Its heads must divide the hidden size.
    "minicpm3": (
        "minicpm3",
        {**_dims(40, 768, 256, 64, 32, 64), "hidden_size": 320, "rope_parameters": LONGROPE},
    ),
    "youtu": ("youtu", _dims(16, 1536, 512, 128, 64, 128)),
    # Default RoPE, the widths that vLLM's own kernel has.
    "deepseek-v3": ("deepseek_v3", {**_dims(4, None, 512, 128, 64, 128), **_MOE}),
    # Nothing here is a multiple of anything.
    "odd": ("deepseek_v3", {**_dims(6, 40, 75, 20, 26, 12), **_MOE, "first_k_dense_replace": 2}),
}


def write(name: str, folder: Path, **changes: Any) -> str:
    """A random model in files, its configuration changed; weights so large that its logits are not flat."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, options = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_COMMON | options | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    path = folder / name
    model.to(torch.bfloat16).save_pretrained(path)
    return str(path)


def converted() -> str | None:
    """The folder of a converted SmolLM2, which ``make vllm`` names."""
    return os.environ.get("MLA_TEST_CONVERTED")


class Reference:
    """What Transformers says in fp32."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        self.model.generation_config.eos_token_id = None  # an end of text is a token like any other here
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        return out[0, len(prompt) :].tolist()

    @torch.no_grad()
    def deviations(self, prompt: list[int], answer: dict[str, Any]) -> list[float]:
        """How far each of vLLM's log-probabilities lies from ours for the same text."""
        tokens = answer["tokens"]
        logits = self.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1)
        return [
            abs(value - float(expected[i, int(token)]))
            for i, step in enumerate(answer["logprobs"])
            for token, value in step.items()
        ]
