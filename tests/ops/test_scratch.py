"""Memory that calls use again."""

from __future__ import annotations

import threading

import torch

from selectune import ops
from selectune.ops.scratch import release, scratch


def test_one_purpose_has_one_block_until_it_is_released():
    first = scratch("here", (4, 5), torch.float32)
    assert scratch("here", (2, 2), torch.float64).data_ptr() == first.data_ptr()
    assert scratch("there", (4, 5), torch.float32).data_ptr() != first.data_ptr()
    first.fill_(3)
    larger = scratch("here", (1000, 1000), torch.float32)
    assert larger.shape == (1000, 1000)
    assert first.eq(3).all()  # still in use, so still there
    release()
    larger.fill_(1)
    assert larger.sum() == 1e6
    assert scratch("here", (0, 5), torch.float32).shape == (0, 5)


def test_threads_have_blocks_of_their_own():
    mine = scratch("here", (8,), torch.float32)
    found = []
    thread = threading.Thread(target=lambda: found.append(scratch("here", (8,), torch.float32).data_ptr()))
    thread.start()
    thread.join()
    assert found != [mine.data_ptr()]


def test_a_dense_gradient_is_formed_where_the_last_one_was():
    dy, x = torch.randn(7, 5), torch.randn(7, 6)
    first = ops.weight_gradient(dy, x)
    assert torch.equal(first, dy.mT @ x)
    assert ops.weight_gradient(x, dy).data_ptr() == first.data_ptr()
