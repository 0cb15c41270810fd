"""The declarations: torch's own op checks, fake shapes, torch.compile, autocast."""

from __future__ import annotations

import warnings

import pytest
import torch

from selectune import ops
from selectune.ops.declare import SCHEMAS


def arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple:
    dy, x, weight = torch.randn(9, 4).to(dtype), torch.randn(9, 5).to(dtype), torch.randn(4, 5).to(dtype)
    flat = torch.tensor([0, 3, 7, 19])
    n = [torch.rand(6) for _ in range(4)]
    return {
        "sampled_matmul": (dy, x, flat // 5, flat % 5),
        "score_filter": (weight.view(-1), torch.randn(20), 2.0, 1.0, 0.2),
        "small_filter": (weight.view(-1), -0.5),
        "scatter_values": (weight, flat, torch.randn(6), torch.tensor([5, 0, 2, 1])),
        "adamw_step": (*n, torch.zeros(6, dtype=torch.int32), 3, 0.1, 0.9, 0.999, 1e-8, 0.01),
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMAS)
def test_torch_accepts_every_declaration(name, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(getattr(torch.ops.selectune, name).default, arguments(name, dtype))


def test_torch_accepts_the_gradient():
    dy, x, rows, cols = arguments("sampled_matmul")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(
            torch.ops.selectune.sampled_matmul.default, (dy.requires_grad_(), x.requires_grad_(), rows, cols)
        )


def everything(dy, x, weight, gradient, flat, values, slots):
    """A function over the ops that write and read."""
    piece = ops.sampled_matmul(dy * 2, x, flat // 5, flat % 5)
    ops.scatter_values(weight, flat, values, slots)
    positions, scores, finite = ops.score_filter(weight.view(-1), gradient, 2.0, 1.0, 0.2)
    return piece + 1, weight * 2, positions, scores, finite


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_functions_give_the_same(compiler):
    dy, x, _, _ = arguments("sampled_matmul")
    weight, flat, values, slots = arguments("scatter_values")
    gradient = torch.randn(20)
    wanted = everything(dy, x, weight.clone(), gradient, flat, values, slots)
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        warnings.simplefilter("ignore")
        compiled = torch.compile(everything, fullgraph=True, backend=compiler)
        got = compiled(dy, x, weight, gradient, flat, values, slots)
    torch._dynamo.reset()
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_gradients(compiler):
    dy, x, rows, cols = arguments("sampled_matmul")
    dy.requires_grad_()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(
            lambda a, b: ops.sampled_matmul(a, b, rows, cols).sum(), fullgraph=True, backend=compiler
        )
        (got,) = torch.autograd.grad(compiled(dy, x), dy)
    torch._dynamo.reset()
    (wanted,) = torch.autograd.grad(ops.sampled_matmul(dy, x, rows, cols).sum(), dy)
    assert torch.allclose(got, wanted)


def test_autocast_leaves_dtypes_alone():
    dy, x, rows, cols = arguments("sampled_matmul")
    wanted = ops.sampled_matmul(dy, x, rows, cols)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.sampled_matmul(dy, x, rows, cols)
        half = ops.sampled_matmul(dy.bfloat16(), x.bfloat16(), rows, cols)
    assert torch.equal(got, wanted)
    assert half.dtype == torch.float32
    assert torch.allclose(half, wanted, atol=0.2)
