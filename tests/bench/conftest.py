"""Everything here runs on one thread, offline, on models of a few thousand weights."""

from __future__ import annotations

import pytest
import torch

# torch remembers, at the first use of a device context, which functions it governs. That must not be while
# tests have `torch.empty` poisoned, or models for "meta" would be built in memory.
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
