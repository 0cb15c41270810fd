"""Triton kernels for CUDA, one file per op; also run on the CPU under TRITON_INTERPRET=1, which tests them.

Triton is no dependency: without it, `backend` never gets here. Kernels compute addresses in int64 and
mask every dimension that can overrun.
"""

from selectune.ops.triton.adamw_step import adamw_step
from selectune.ops.triton.matmul_score_filter import matmul_score_filter
from selectune.ops.triton.sampled_matmul import sampled_matmul
from selectune.ops.triton.scatter_values import scatter_values
from selectune.ops.triton.score_filter import score_filter

__all__ = ["adamw_step", "matmul_score_filter", "sampled_matmul", "scatter_values", "score_filter"]
