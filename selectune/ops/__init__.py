"""The tensor operations: `declare` declares each op once, `reference` defines it in plain torch.

    sampled_matmul       the weight gradient at the support only
    score_filter         entries whose score reaches a cutoff, in one pass over weight and gradient
    small_filter         entries with -|w| above a cutoff, in one pass over the weight
    scatter_values       write slots of the trained vector into a weight, rounded, in place
    scatter_many         the same for all weights of a model at once
    adamw_step           one AdamW step over the vector, in one pass
    sampled_rows         the embedding gradient at the support only
    sparse_product       the product with a sparse matrix, beside a quantised weight
    sampled_sum          the gradient of a bias at its support only
    gather_entries       read flat entries of a tensor of any strides
    scatter_entries      write flat entries in place, whatever the strides
    weight_gradient      the dense gradient of a linear weight, in reusable memory
    product              the same in float32 or float64, for operands in half precision too
    into_scratch         an elementwise op, in reusable memory
    uniform              the next numbers of a stream (`seeds`) in the shape of a tensor
    checksum             one integer over all bits and their places, to check that frozen weights do not change

The ops from `sampled_matmul` to `adamw_step`, except `scatter_many`, are torch.library ops. Each has loops for the CPU
(`cpu`), and each but `small_filter` has a Triton kernel (`triton`). `backend` chooses among them; `explain()` and
`describe()` report the choice and its reason.

    declare    every op once: schema, shapes without data, gradient, checks
    reference  every op in plain torch
    backend    the choice of an implementation; cost: the cost of each way of summing, as constants
    cpu/       the ops on the CPU
    bounds     the entries of a gradient that may score above a cutoff, found without forming it
    scratch    memory that calls reuse
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
    product,
    row_sums,
    sampled_rows,
    sampled_sum,
    sparse_product,
    weight_gradient,
)
from selectune.ops.scratch import release

__all__ = [
    "adamw_step", "bits", "checksum", "describe", "explain", "gather_entries", "into_scratch",
    "product", "release", "row_sums", "sampled_matmul", "sampled_rows", "sampled_sum", "scatter_entries",
    "scatter_many", "scatter_values", "score_filter", "small_filter", "sparse_product", "uniform", "weight_gradient",
]  # fmt: skip
