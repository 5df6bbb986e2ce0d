"""What ``generate`` is told: one token after another, on a cache of ours, drawn as asked for."""

import copy
from typing import Any

#: Below this temperature the most likely token is the only one; the logits over it would be infinite.
_COLDEST = 1e-5
# What a generation config may ask for that is not one token after another into a cache that is given, and the
# values with which it does not ask.
_OTHER_WAYS: dict[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "use_mtp": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "cache_implementation": (None,),
    "use_cache": (None, True),
    "prefill_chunk_size": (None,),
    "token_healing": (None, False),
    "return_dict_in_generate": (None, False),
}


def write_in_order(model: Any) -> list[str]:
    """Make ``generate`` write one token after another into the cache it is given, whatever the model's own
    generation config asks for; returns the names of what it asked for instead.

    Assisted decoding would come with several tokens at once, beams with several texts, and a cache of another
    kind is refused where one is given. ``generate`` takes what is None in the config of a call from that of
    the model: it has to go there.
    """
    config = model.generation_config
    asked = [name for name, neutral in _OTHER_WAYS.items() if getattr(config, name, None) not in neutral]
    for name in asked:
        setattr(config, name, None)
    return asked


def padding_token(tokenizer: Any) -> int | None:
    """The token id to pad with: the tokenizer's own, which may be 0, or the one that ends a text."""
    own: int | None = tokenizer.pad_token_id
    return tokenizer.eos_token_id if own is None else own


def writing_config(
    model: Any, tokenizer: Any, max_new_tokens: int, *, temperature: float | None, top_p: float | None
) -> Any:
    """The model's own generation config for an answer of so many tokens; None leaves its own value.

    Args:
        temperature: 0 or more; 0 takes the most likely token every time.
        top_p: from 0 to 1, of which 0 is the most likely token alone. Greedy models take no notice of it.
    """
    config = copy.deepcopy(model.generation_config)
    config.max_length, config.max_new_tokens = None, max_new_tokens
    if config.pad_token_id is None:
        config.pad_token_id = padding_token(tokenizer)
    if temperature is not None and temperature < _COLDEST:
        config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
    elif temperature is not None:
        config.do_sample, config.temperature = True, temperature
    # The most likely token, which greedy models take, is in every nucleus; that of 0 is it alone.
    if config.do_sample and top_p is not None:
        config.top_p = max(top_p, 1e-9)
    if config.do_sample and config.top_k is None:
        config.top_k = 0  # Transformers' default of 50 is nobody's wish
    return config
