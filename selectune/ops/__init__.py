"""The tensor work, each op once: declared in `declare`, the plain-torch truth in `reference`.

    sampled_matmul       the weight gradient at the support only
    score_filter         entries whose score reaches a cutoff, in one pass over weight and gradient
    small_filter         entries with -|w| above a cutoff, in one pass over the weight
    scatter_values       slots of the trained vector into a weight, rounded, in place
    scatter_many         the same for all weights of a model at once
    adamw_step           one AdamW step over the vector, in one pass
    sampled_rows         the embedding gradient at the support only
    sampled_sum          the gradient of a bias at its support only
    gather_entries       flat entries of a tensor of any strides
    scatter_entries      write flat entries in place, whatever the strides
    weight_gradient      the dense gradient of a linear weight, in memory that is used again
    into_scratch         an elementwise op, in memory that is used again
    uniform              the next numbers of a stream (`seeds`) in the shape of a tensor
    checksum             one integer of all bits and their places, to see that frozen weights stay

The ops from `sampled_matmul` to `adamw_step`, `scatter_many` apart, are torch.library ops. They have loops for the CPU
(`cpu`) and, but for `small_filter`, Triton kernels (`triton`);
`backend` chooses, `explain()` and `describe()` say what and why.

    declare    every op once: schema, shapes without data, gradient, checks
    reference  every op in plain torch
    backend    which implementation runs; cost: what each way of summing costs, as constants
    cpu        the CPU's ops; loops, passes: their compiled loops; vectors: intrinsics; threads: torch's own
    scratch    memory that calls use again
    triton/    the kernels for CUDA
"""

from selectune.bits import flat_view as bits
from selectune.bits import gather_entries, scatter_entries
from selectune.ops.backend import checksum, describe, explain, uniform
from selectune.ops.declare import (
    adamw_step,
    sampled_matmul,
    scatter_many,
    scatter_values,
    score_filter,
    small_filter,
)
from selectune.ops.reference import (
    into_scratch,
    row_sums,
    sampled_rows,
    sampled_sum,
    weight_gradient,
)
from selectune.ops.scratch import release

__all__ = [
    "adamw_step", "bits", "checksum", "describe", "explain", "gather_entries", "into_scratch",
    "release", "row_sums", "sampled_matmul", "sampled_rows", "sampled_sum", "scatter_entries",
    "scatter_many", "scatter_values", "score_filter", "small_filter", "uniform", "weight_gradient",
]  # fmt: skip
