"""Triton kernels for CUDA, one file per op; also run on the CPU under TRITON_INTERPRET=1, which tests them.

Triton is no dependency: without it, `backend` never gets here. Kernels compute addresses in int64 and
mask every dimension that can overrun.

sampled_matmul, score_filter, scatter_values, adamw_step: the ops of these names
language: triton where it is installed, a stand-in where it is not
"""

from selectune.ops.triton.adamw_step import adamw_step
from selectune.ops.triton.sampled_matmul import sampled_matmul
from selectune.ops.triton.scatter_values import scatter_values
from selectune.ops.triton.score_filter import score_filter

__all__ = ["adamw_step", "sampled_matmul", "scatter_values", "score_filter"]
