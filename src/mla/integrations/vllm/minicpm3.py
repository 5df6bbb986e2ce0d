"""MiniCPM3 on latents. vLLM's own model of it caches keys and values of every head, 28 times the bytes."""

from typing import Any

from vllm.model_executor.models import transformers


class TransformersForCausalLM(transformers.TransformersForCausalLM):
    """vLLM's wrapper of Transformers' model, which fuses MLA; vLLM knows such models by the class's name.

    The wrapper leaves out that MiniCPM3 divides its last hidden state, but scales the logits of a config that
    says so.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if vllm_config.model_config.trust_remote_code:
            raise ValueError(
                "MiniCPM3 runs on latents by Transformers' own code, and --trust-remote-code asks for the "
                'checkpoint\'s: leave it out, or leave mla out (VLLM_PLUGINS="")'
            )
        config = vllm_config.model_config.hf_text_config
        config.logit_scale = config.dim_model_base / config.hidden_size
        super().__init__(vllm_config=vllm_config, prefix=prefix)
