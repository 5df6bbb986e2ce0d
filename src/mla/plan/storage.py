"""What has to be held: cached numbers, weights, what tensor parallel replicates, what fits.

Letters are those of docs/notation.md: b sequences, s query tokens of each, t tokens of context, h heads,
n p v r widths, d hidden. Further names of one group of like layers: ``layers`` attentions in the group,
``stores`` of them keep a cache of their own, ``w`` width of a key in the MHA, GQA and MQA columns, ``groups``
key-value heads of the GQA column, ``window`` and ``topk`` tokens a query may see (0: all), ``indexers``
layers with a sparse indexer and its ``index_width`` cached numbers, ``index_heads``, ``index_dim``,
``index_pool`` (tokens per key it looks at);
``q_rank`` of compressed queries (0: none); ``r0`` the model's own rank. ``output_gate`` is 1
where attention's output is multiplied by a gate.

The columns: mha, gqa, mqa; mla is latent attention absorbed, expanded is the same latents with keys and
values rebuilt at every step, as stock Transformers does.
"""

from __future__ import annotations

from mla.plan.rows import CLASSIC, COLUMNS, COUNTED, LATENT, MEGATRON, NOTATION, SIDE_BY_SIDE, V2, Rows

ROWS = Rows()

# --- What a token leaves in the cache --------------------------------------------------------------------
ROWS.add("kv_mha", "h", "heads", "key-value heads as MHA: one per query head", V2, layer=True)
ROWS.add("kv_gqa", "groups", "heads", "key-value heads as GQA: its own, or 8", V2, layer=True)
ROWS.add("kv_mqa", "1", "heads", "key-value heads as MQA: one", V2, layer=True)
ROWS.each(CLASSIC, "numbers_{a}", "kv_{a} * (w + v)", "numbers", "cached per token and layer", V2, layer=True)
ROWS.add("numbers_mla", "r + p", "numbers", "cached per token and layer: latent, rotary key", V2, layer=True)
ROWS.add(
    "numbers_expanded_cache",
    "h * (n + p + v)",
    "numbers",
    "per token and layer if MLA's expanded keys and values were cached instead of the latent",
    NOTATION,
    layer=True,
)
for _vector, _width in (("latent", "r"), ("key", "w"), ("value", "v"), ("index", "index_width")):
    ROWS.add(
        f"scales_{_vector}",
        f"where(scale_block > 0, ceil({_width} / scale_block), 1)",
        "scales",
        "of one vector in a quantised format: one, or one for every scale_block numbers",
        "docs/planning.md",
        layer=True,
    )
ROWS.add(
    "head_bytes",
    "(w + v) * number_bytes + (scales_key + scales_value) * scale_bytes",
    "B",
    "key and value of one head cached per token",
    COUNTED,
    layer=True,
)
ROWS.each(
    CLASSIC,
    "layer_bytes_{a}",
    "kv_{a} * head_bytes",
    "B",
    "cached per token and layer",
    COUNTED,
    layer=True,
)
ROWS.add(
    "layer_bytes_mla",
    "ceil((r * number_bytes + p * rope_bytes + scales_latent * scale_bytes) / row_multiple) * row_multiple",
    "B",
    "cached per token and layer; rows with a scale start at multiples of 4 bytes",
    "docs/cache-format.md",
    layer=True,
)
ROWS.add(
    "index_layer_bytes",
    "index_width * index_number_bytes + where(index_number_bytes < 2, scales_index * scale_bytes, 0)",
    "B",
    "key of a sparse indexer cached per token; one of one byte per number has scales",
    "DeepSeek-V3.2 technical report, section 2: one key per token, shared by the indexer's heads",
    layer=True,
)
ROWS.add(
    "index_bytes",
    "total(indexers * index_layer_bytes)",
    "B",
    "keys of the sparse indexers cached per token, all layers",
    COUNTED,
)
ROWS.each(
    SIDE_BY_SIDE,
    "token_bytes_{a}",
    "total(stores * layer_bytes_{a}) + index_bytes",
    "B",
    "one more token costs in all layers, while no window is full",
    COUNTED,
)
ROWS.add("seen", "where(window > 0, min(t, window), t)", "tokens", "visible to a query", COUNTED, layer=True)
ROWS.add(
    "attended",
    "where(topk > 0, min(seen, topk), seen)",
    "tokens",
    "a query attends to: what the indexer leaves of the visible ones",
    COUNTED,
    layer=True,
)
ROWS.add(
    "kept",
    "where(window > 0, min(t, window - 1), t)",
    "tokens",
    "in the cache: a window of w keeps w - 1, the next query brings its own",
    "cache layers of Transformers",
    layer=True,
)
ROWS.add(
    "state_bytes_all",
    "linear_layers * (state_numbers * state_bytes + conv_numbers * conv_bytes)",
    "B",
    "recurrent and convolution state of linear attention, per sequence, whatever its length",
    "Kimi Linear, arXiv:2510.26692: one matrix per head",
)
ROWS.each(
    SIDE_BY_SIDE,
    "sequence_bytes_{a}",
    "total(stores * kept * layer_bytes_{a}) + t * index_bytes + state_bytes_all",
    "B",
    "cache of one sequence of t tokens",
    COUNTED,
)
ROWS.each(SIDE_BY_SIDE, "cache_bytes_{a}", "b * sequence_bytes_{a}", "B", "cache of the batch", COUNTED)
ROWS.add(
    "mtp_bytes",
    """mtp_layers * main(where(latent > 0, layer_bytes_mla + where(indexers > 0, index_layer_bytes, 0),
    own_groups * head_bytes))""",
    "B",
    "per token, if the multi-token-prediction layers run as a drafter; not in any other figure",
    "DeepSeek-V3, arXiv:2412.19437, section 2.2: a layer like the others",
)
ROWS.each(
    CLASSIC, "saving_{a}", "1 - token_bytes_mla / token_bytes_{a}", "share", "cache that MLA saves", COUNTED
)

# --- Weights ----------------------------------------------------------------------------------------------
ROWS.each(
    CLASSIC,
    "attention_parameters_{a}",
    "total(layers * (d * h * w + h * v * d) + stores * d * kv_{a} * (w + v))",
    "parameters",
    "projections of queries, keys, values and output",
    COUNTED,
)
ROWS.add(
    "query_parameters",
    "where(q_rank > 0, d * q_rank + q_rank * h * (n + p), d * h * (n + p))",
    "parameters",
    "of MLA's queries in one layer, compressed or not",
    NOTATION,
    layer=True,
)
ROWS.add(
    "up_parameters",
    "total(layers * r * h * (n + v))",
    "parameters",
    "of kv_b_proj: W_UK and W_UV, which absorption applies to queries and outputs",
    NOTATION,
)
ROWS.each(
    LATENT,
    "attention_parameters_{a}",
    "total(layers * (query_parameters + h * v * d) + stores * d * (r + p)) + up_parameters",
    "parameters",
    "projections of queries, latent, keys, values and output",
    COUNTED,
)
ROWS.add(
    "attention_parameters_own",
    """where(latent > 0,
    total(layers * (query_parameters + r0 * h * (n + v) + h * v * d) + stores * d * (r0 + p)),
    total(layers * (d * h * w + h * v * d) + stores * d * own_groups * (w + v)))""",
    "parameters",
    "of the attention as the model was published",
    COUNTED,
)
ROWS.add(
    "gate_parameters",
    "where(output_gate > 0, total(layers * d * h * v), 0)",
    "parameters",
    "of a gate on what attention returns, one per number: the model's own in every column",
    COUNTED,
)
ROWS.add("routed_parameters", "moe_layers * experts * 3 * d * expert_width", "parameters", "experts", COUNTED)
ROWS.add(
    "indexer_parameters",
    """total(indexers * (d * (index_dim + index_heads)
    + where(q_rank > 0, q_rank, d) * index_heads * index_dim))""",
    "parameters",
    "of the sparse indexers, copied to every device",
    COUNTED,
)
ROWS.add(
    "counted_rest",
    """vocab * d * (2 - tied) + dense_layers * mlp_matrices * d * dense_width + routed_parameters
    + moe_layers * (3 * d * shared_width + d * experts) + linear_layers * linear_parameters
    + indexer_parameters + gate_parameters""",
    "parameters",
    "outside of softmax attention: embeddings, MLPs, experts, routers, linear attention, indexers, gates",
    COUNTED,
)
ROWS.add(
    "rest_parameters",
    "where(published > 0, published - attention_parameters_own, counted_rest)",
    "parameters",
    "outside of softmax attention: the published total less the attention, or counted",
    COUNTED,
)
ROWS.each(
    COLUMNS,
    "parameters_{a}",
    "rest_parameters + attention_parameters_{a}",
    "parameters",
    "of the whole model",
    COUNTED,
)
ROWS.add(
    "resting_parameters",
    "where(experts > 0, routed_parameters * (1 - experts_used / experts), 0)",
    "parameters",
    "of experts a token does not visit",
    COUNTED,
)
ROWS.each(
    COLUMNS,
    "active_parameters_{a}",
    "parameters_{a} - resting_parameters",
    "parameters",
    "one token uses, embeddings included",
    COUNTED,
)
ROWS.add(
    "touched",
    "where(experts > 0, 1 - (1 - experts_used / experts) ** (b * s), 0)",
    "share",
    "of the experts that b * s tokens visit, if every expert is as likely as another",
    "expectation of independent draws",
)
ROWS.add(
    "looked_up",
    "where(tied > 0, 0, vocab * d)",
    "parameters",
    "of an input embedding of its own: looked up, neither multiplied nor read as a whole",
    COUNTED,
)
ROWS.each(
    CLASSIC,
    "attention_device_{a}",
    "total(layers * (d * h * w + h * v * d) / devices + stores * d * ceil(kv_{a} / devices) * (w + v))",
    "parameters",
    "of attention on each device: key-value heads that cannot be split are copied",
    MEGATRON,
)
ROWS.each(
    LATENT,
    "attention_device_{a}",
    """(attention_parameters_{a} - replicated_parameters) / devices + replicated_parameters""",
    "parameters",
    "of attention on each device",
    MEGATRON,
)
ROWS.add(
    "replicated_parameters",
    "total(layers * where(q_rank > 0, d * q_rank, 0) + stores * d * (r + p))",
    "parameters",
    "copied to every device: q_a_proj and kv_a_proj_with_mqa make what all heads share",
    MEGATRON,
)
ROWS.each(
    COLUMNS,
    "weights_device_{a}",
    """weight_bytes * ((rest_parameters - indexer_parameters - routed_parameters) / devices
    + indexer_parameters + attention_device_{a}) + expert_bytes * routed_parameters / devices""",
    "B",
    "weights on each device",
    COUNTED,
)

# --- Tensor parallel --------------------------------------------------------------------------------------
ROWS.each(
    CLASSIC,
    "device_bytes_{a}",
    "ceil(kv_{a} / devices) * head_bytes",
    "B",
    "cached per token and layer on each device",
    MEGATRON,
    layer=True,
)
ROWS.add(
    "device_bytes_mla",
    "layer_bytes_mla",
    "B",
    "cached per token and layer on each device",
    MEGATRON,
    layer=True,
)
ROWS.each(
    SIDE_BY_SIDE,
    "sequence_device_{a}",
    "total(stores * kept * device_bytes_{a}) + t * index_bytes + state_bytes_all / devices",
    "B",
    "cache of one sequence on each device",
    MEGATRON,
)
ROWS.each(
    SIDE_BY_SIDE,
    "cache_device_{a}",
    "b * sequence_device_{a}",
    "B",
    "cache of the batch on each device",
    MEGATRON,
)
ROWS.each(
    SIDE_BY_SIDE,
    "copies_{a}",
    "devices * sequence_device_{a} / sequence_bytes_{a}",
    "copies",
    "of the cache over all devices together: 1 if tensor parallel replicates nothing",
    MEGATRON,
)
ROWS.each(
    SIDE_BY_SIDE,
    "sequences_{a}",
    "where(memory > weights_device_{a}, floor((memory - weights_device_{a}) / sequence_device_{a}), 0)",
    "sequences",
    "of t tokens that fit beside the weights; activations and the runtime are not counted",
    COUNTED,
)
ROWS.each(
    SIDE_BY_SIDE,
    "outweighs_{a}",
    """where(crossing(t, cache_device_{a}, weights_device_{a}) < inf,
    crossing(t, cache_device_{a}, weights_device_{a}),
    where(cache_device_{a} > weights_device_{a}, 1, inf))""",
    "tokens",
    "of context at which this batch's cache weighs as much as the weights",
    "found by bisection",
)
