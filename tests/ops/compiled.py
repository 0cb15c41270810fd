"""Compiles `product_filter` for a GPU of compute capability 9.0, which need not be there; run by test_triton.py."""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from selectune.ops.triton.product_filter import product_filter_kernel

WIDE = {"left": "*fp32", "right": "*fp32", "real": "*fp32", "cutoff": "*fp32", "gradients": "*fp32",
        "positions": "*i64", "count": "*i64"}  # fmt: skip
FIXED = {"KIND": 3, "ROWS": 64, "COLUMNS": 64, "TOKENS": 32, "WIDEN": False}


def main() -> None:
    names = product_filter_kernel.arg_names
    for dtype in ("fp32", "bf16", "fp16"):
        signature = {name: "constexpr" if name in FIXED else WIDE.get(name, "i32") for name in names}
        signature |= dict.fromkeys(("dy", "x", "weight"), f"*{dtype}")
        fixed = {(names.index(name),): value for name, value in FIXED.items()}
        source = ASTSource(fn=product_filter_kernel, signature=signature, constexprs=fixed)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        if made.asm["cubin"]:
            sys.stdout.write(f"{dtype}\n")


if __name__ == "__main__":
    main()
