"""The tensor work, each op once: the plain-torch truth in `reference`, fast paths beside it.

    sampled_matmul   the weight gradient at the support only
    sampled_rows     the embedding gradient at the support only
    gather_entries   flat entries of a tensor of any strides
    scatter_entries  write flat entries in place, whatever the strides
    checksum         one integer of all bits, to see that frozen weights stay

`backend.explain()` says which backend runs and why.
"""

from selectune.ops.backend import explain, sampled_matmul
from selectune.ops.reference import bits, checksum, gather_entries, row_sums, sampled_rows, scatter_entries

__all__ = [
    "bits", "checksum", "explain", "gather_entries", "row_sums", "sampled_matmul", "sampled_rows", "scatter_entries",
]  # fmt: skip
