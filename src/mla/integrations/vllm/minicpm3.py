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
        rope = config.rope_parameters
        if rope.get("rope_type") == "longrope":
            # Transformers 5.19 reads it, and MiniCPM3-4B has none.
            original = rope["original_max_position_embeddings"]
            rope.setdefault("factor", config.max_position_embeddings / original)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        fix_frequencies(self.model)


def fix_frequencies(model: Any) -> None:
    """MiniCPM3-4B has LongRoPE with one set of factors. Transformers asks at every call which set the longest
    position needs, which cannot be compiled; what it chooses is there already. Where there is something to
    choose, the plugin has refused the model."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            module.rope_type = "default"  # of which nothing is asked; frequencies and scaling stay
