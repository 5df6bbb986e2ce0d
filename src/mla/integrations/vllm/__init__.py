"""vLLM's MLA on CPUs with our kernels: the plugin that vLLM loads by itself. docs/vllm.md has the why."""


def register() -> None:
    """The entry point of the group ``vllm.general_plugins``."""
    from mla.integrations.vllm import plugin

    plugin.register()
