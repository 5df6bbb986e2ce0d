"""What one decoding step costs: operations, bytes moved, time at the roofline, who overtakes whom.

A step takes b sequences forward by s query tokens each. Names: see :mod:`mla.plan.storage`.
"""

from __future__ import annotations

from mla.plan.formulas import Sheet
from mla.plan.rows import CLASSIC, COLUMNS, COUNTED, LATENT, MEGATRON, NOTATION, ROOFLINE, Rows
from mla.plan.storage import ROWS as STORAGE

ROWS = Rows()

# --- Operations of one step: b sequences, s query tokens each ---------------------------------------------
ROWS.each(
    CLASSIC,
    "attend_ops_{a}",
    "2 * h * (w + v) * s * attended",
    "op",
    "scores and weighted values of one sequence in one layer",
    NOTATION,
    layer=True,
)
ROWS.add(
    "attend_ops_mla",
    "h * s * (2 * (2 * r + p) * attended + 2 * r * (n + v))",
    "op",
    "absorbed, one sequence, one layer: scores and values on latents, W_UK and W_UV once per query",
    NOTATION,
    layer=True,
)
ROWS.add(
    "attend_ops_expanded",
    "h * (2 * (n + p + v) * s * attended + 2 * r * (n + v) * seen)",
    "op",
    "expanded, one sequence, one layer: every visible latent becomes a key and a value per head",
    NOTATION,
    layer=True,
)
ROWS.add(
    "index_ops",
    "s * t * total(indexers * 2 * index_heads * index_dim / index_pool)",
    "op",
    "scores of the sparse indexer, one sequence: it looks at every token, or every pool of them",
    "DeepSeek-V3.2 technical report, equation 1",
)
ROWS.add(
    "linear_ops",
    "s * linear_layers * 6 * state_numbers",
    "op",
    "linear attention, one sequence: read by key, correct, read by query, 2 each per number of state",
    "Kimi Linear, arXiv:2510.26692, equation 1",
)
ROWS.each(
    COLUMNS,
    "attention_ops_{a}",
    "total(layers * attend_ops_{a}) + index_ops + linear_ops",
    "op",
    "attention of one sequence, all layers, without its projections",
    COUNTED,
)
ROWS.each(
    COLUMNS,
    "weight_ops_{a}",
    "2 * s * (active_parameters_{a} - looked_up - applied_{a})",
    "op",
    "matrix products with weights, one sequence",
    "two operations per weight and token",
)
for _column in COLUMNS:
    ROWS.add(
        f"applied_{_column}",
        "up_parameters" if _column in LATENT else "0",
        "parameters",
        "already counted with attention: kv_b_proj",
        COUNTED,
    )
ROWS.each(
    COLUMNS,
    "model_ops_{a}",
    "weight_ops_{a} + attention_ops_{a}",
    "op",
    "whole model, one step of one sequence",
    COUNTED,
)
ROWS.each(
    LATENT,
    "ratio_ops_{a}",
    "attention_ops_{a} / attention_ops_mha",
    "times",
    "operations of attention against MHA",
    COUNTED,
)

# --- Bytes moved in one step ------------------------------------------------------------------------------
ROWS.each(
    COLUMNS,
    "cache_moved_{a}",
    """b * (total(layers * attended * layer_bytes_{c}) + t * index_bytes + 2 * state_bytes_all
    + rebuilt_{a})""",
    "B",
    "read of the cache in one step of the batch; states are read and written",
    COUNTED,
)
for _column in COLUMNS:
    ROWS.add(
        f"rebuilt_{_column}",
        "2 * activation_bytes * total(layers * seen * h * (n + p + v))" if _column == "expanded" else "0",
        "B",
        "keys and values of one sequence, written and read again",
        "expand_kv of Transformers 5.23, then attention over its result",
    )
ROWS.each(
    COLUMNS,
    "weights_moved_{a}",
    """weight_bytes * (parameters_{a} - looked_up - routed_parameters)
    + expert_bytes * routed_parameters * touched""",
    "B",
    "weights read in one step, once for the whole batch",
    COUNTED,
)
ROWS.each(
    COLUMNS,
    "moved_per_token_{a}",
    "(cache_moved_{a} + weights_moved_{a}) / (b * s)",
    "B",
    "moved per decoded token",
    COUNTED,
)

# --- Roofline, on each device -----------------------------------------------------------------------------
ROWS.each(
    COLUMNS,
    "cache_moved_device_{a}",
    """b * (total(layers * attended * device_bytes_{c}) + t * index_bytes
    + (2 * state_bytes_all + rebuilt_{a}) / devices)""",
    "B",
    "read of the cache by each device in one step",
    MEGATRON,
)
ROWS.each(
    COLUMNS,
    "weights_moved_device_{a}",
    """weight_bytes * ((rest_parameters - indexer_parameters - looked_up - routed_parameters) / devices
    + indexer_parameters + attention_device_{a}) + expert_bytes * routed_parameters * touched / devices""",
    "B",
    "weights read by each device in one step",
    MEGATRON,
)
ROWS.each(
    COLUMNS,
    "attention_ops_device_{a}",
    "b * ((attention_ops_{a} - index_ops) / devices + index_ops)",
    "op",
    "attention on each device: heads are split, the indexer is not",
    MEGATRON,
)
ROWS.each(
    COLUMNS,
    "weight_ops_device_{a}",
    """2 * b * s * ((rest_parameters - indexer_parameters - resting_parameters - looked_up - applied_{a})
    / devices + indexer_parameters + attention_device_{a})""",
    "op",
    "matrix products with weights on each device",
    MEGATRON,
)
for _part, _bytes, _ops, _peak, _words in (
    ("attention", "cache_moved_device", "attention_ops_device", "peak_attention", "the cache"),
    ("weights", "weights_moved_device", "weight_ops_device", "peak_weights", "the weights"),
):
    ROWS.each(
        COLUMNS,
        f"{_part}_memory_time_{{a}}",
        f"{_bytes}_{{a}} / bandwidth",
        "s",
        f"reading {_words}",
        ROOFLINE,
    )
    ROWS.each(
        COLUMNS,
        f"{_part}_arithmetic_time_{{a}}",
        f"{_ops}_{{a}} / {_peak}",
        "s",
        f"arithmetic with {_words}",
        ROOFLINE,
    )
    ROWS.each(
        COLUMNS,
        f"{_part}_time_{{a}}",
        f"max({_part}_memory_time_{{a}}, {_part}_arithmetic_time_{{a}})",
        "s",
        f"at the roofline, for {_words}: the longer of moving and computing",
        ROOFLINE,
    )
ROWS.each(
    COLUMNS,
    "step_time_{a}",
    "weights_time_{a} + attention_time_{a}",
    "s",
    "one step at the roofline, weights then attention without overlap; communication is not counted",
    ROOFLINE,
)
ROWS.each(COLUMNS, "tokens_per_second_{a}", "b * s / step_time_{a}", "1/s", "of the whole batch", ROOFLINE)
ROWS.each(
    COLUMNS,
    "intensity_{a}",
    "attention_ops_device_{a} / cache_moved_device_{a}",
    "op/B",
    "operations of attention per byte of cache",
    ROOFLINE,
)
ROWS.add(
    "ridge", "peak_attention / bandwidth", "op/B", "above it arithmetic bounds, below it memory", ROOFLINE
)
ROWS.each(
    COLUMNS,
    "attainable_{a}",
    "min(peak_attention, intensity_{a} * bandwidth)",
    "op/s",
    "of attention at the roofline",
    ROOFLINE,
)

# --- Where one overtakes another --------------------------------------------------------------------------
ROWS.add(
    "queries_crossing",
    """where(total(layers * h * ((2 * r - n - v) * attended + r * (n + v))) > 0,
    total(layers * h * r * (n + v) * seen)
    / total(layers * h * ((2 * r - n - v) * attended + r * (n + v))), inf)""",
    "query tokens",
    "above it expanded takes fewer operations than absorbed, at this context",
    NOTATION,
)
ROWS.add(
    "context_crossing",
    "crossing(t, attention_ops_mla, attention_ops_expanded)",
    "tokens",
    "of context at which absorbed and expanded take equally many operations, for these query tokens",
    "found by bisection",
)
for _column in (*CLASSIC, "expanded"):
    for _variable, _name, _unit in (("t", "context", "tokens"), ("b", "batch", "sequences")):
        ROWS.add(
            f"{_name}_mla_{_column}",
            f"crossing({_variable}, step_time_mla, step_time_{_column})",
            _unit,
            f"{_name} at which a step with mla and one with {_column} take equally long",
            "found by bisection of the two step times",
        )


#: Every formula of the planner.
SHEET = Sheet([*STORAGE, *ROWS])
