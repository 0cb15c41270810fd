"""Triton kernels for CUDA, one file per op. Under TRITON_INTERPRET=1 they run on the CPU, where they are tested.

Triton is an optional dependency; without it, `backend` never imports this room. Kernels compute addresses in int64 and
mask every dimension that can overrun.

sampled_matmul, score_filter, scatter_values, adamw_step: the ops of these names
product_filter: entries of a product that may score above a cutoff, tile by tile; the engine does not use it yet
language: triton if it is installed, or else a stand-in
"""

from selectune.ops.triton.adamw_step import adamw_step
from selectune.ops.triton.product_filter import product_filter
from selectune.ops.triton.sampled_matmul import sampled_matmul
from selectune.ops.triton.scatter_values import scatter_values
from selectune.ops.triton.score_filter import score_filter

__all__ = ["adamw_step", "product_filter", "sampled_matmul", "scatter_values", "score_filter"]
