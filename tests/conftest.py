"""The conditions of every test: seeds, one thread, no network, poisoned memory, warnings as errors."""

from __future__ import annotations

import ipaddress
import os
import random
import re
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import numpy as np
import pytest
import torch

# torch remembers, at the first use of a device context, which functions it governs. That must not be while
# `torch.empty` is poisoned below, or models for "meta" would be built in memory.
with torch.device("meta"):
    torch.empty(0)

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, on one thread."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# -- memory: what torch.empty returns to selectune is NaN, so reading before writing shows


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype is torch.bool:
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        if tensor.is_quantized:
            return tensor
        return tensor.fill_(torch.iinfo(tensor.dtype).min + 1)


def _poisoned(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = original(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poison(made) if caller.partition(".")[0] == "selectune" else made

    return empty


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised tensors that selectune itself asks for hold NaN (floats) or a huge negative (ints)."""
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


# -- network: refused, and a test that tried fails even if the refusal was swallowed


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):
        return True  # a path: a Unix socket
    host = str(address[0])
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Refuses connections to other machines. A test that expects such an attempt clears the list that it gets."""
    tried: list[str] = []
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def refuse(where: Any) -> None:
        tried.append(str(where))
        raise ConnectionRefusedError(f"a test tried to reach {where}; tests run offline")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if not _is_local(address):
            refuse(address)
        connect(self, address)

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host is not None and not _is_local((host.decode() if isinstance(host, bytes) else host,)):
            refuse(host)
        return lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_lookup)
    yield tried
    if tried:
        pytest.fail(f"the test tried to use the network: {', '.join(tried)}")


# -- notes: measurements that are reported at the end of the run and never decide it


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """`note("import took 0.1 s")` appears under "notes" at the end of the run."""
    return lambda text: record_property("note", text)


# -- tries: how many cases a test has tried, for RELIABILITY.md


@pytest.fixture
def tries(record_property: Callable[[str, object], None]) -> Callable[[int], None]:
    """`tries(300)`: this test has tried 300 cases. A test that does not say so counts as one."""
    return lambda count: record_property("tries", count)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test of hypothesis tries as many cases as its statistics say."""
    try:
        return (yield)
    finally:
        told = getattr(item, "hypothesis_statistics", "")
        if passed := sum(map(int, re.findall(r"(\d+) passing", told))):
            item.user_properties.append(("tries", passed))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    notes = [
        text
        for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed"))
        if report.when == "call"
        for kind, text in report.user_properties
        if kind == "note"
    ]
    if notes:
        terminalreporter.write_sep("-", "notes")
        for text in notes:
            terminalreporter.write_line(str(text))
