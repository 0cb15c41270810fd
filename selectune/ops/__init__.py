"""The tensor work, each op once: declared in `declare`, the plain-torch truth in `reference`.

    sampled_matmul       the weight gradient at the support only
    score_filter         entries whose score reaches a cutoff, in one pass over weight and gradient
    matmul_score_filter  the same out of the operands of the gradient, which never exists whole
    scatter_values       slots of the trained vector into a weight, rounded, in place
    adamw_step           one AdamW step over the vector, in one pass
    sampled_rows         the embedding gradient at the support only
    gather_entries       flat entries of a tensor of any strides
    scatter_entries      write flat entries in place, whatever the strides
    checksum             one integer of all bits, to see that frozen weights stay

The first five are torch.library ops with loops for the CPU (`cpu`) and Triton kernels (`triton`);
`backend` chooses, `explain()` and `describe()` say what and why.
"""

from selectune.ops.backend import describe, explain
from selectune.ops.declare import adamw_step, matmul_score_filter, sampled_matmul, scatter_values, score_filter
from selectune.ops.reference import bits, checksum, gather_entries, row_sums, sampled_rows, scatter_entries

__all__ = [
    "adamw_step", "bits", "checksum", "describe", "explain", "gather_entries", "matmul_score_filter", "row_sums",
    "sampled_matmul", "sampled_rows", "scatter_entries", "scatter_values", "score_filter",
]  # fmt: skip
