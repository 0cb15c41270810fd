"""A shelf that serves: answers under switches are those of exactly one delta, bit for bit; and the page's server."""

from __future__ import annotations

import random
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_readme import blocks
from threads_kit import Beside
from torch import nn

import selectune as st
from selectune.delta import Delta

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "serve.md"
READERS, SWITCHES = 3, 200


def served() -> tuple[nn.Module, dict[str, Delta], torch.Tensor]:
    """A model of several layers, so that a forward pass takes many operations, and deltas on most of its tensors."""
    model = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(48, 48), nn.Tanh()))).eval()
    x, deltas = torch.randn(4, 48), {}
    for seed in range(3):
        tuner = st.attach(model, st.random(budget=2000), seed=seed)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=5.0)
        model(x).square().sum().backward()
        optimizer.step()
        deltas[f"d{seed}"] = tuner.delta()
        tuner.detach()
    return model, deltas, x


def test_every_answer_under_200_switches_is_that_of_one_delta():
    model, deltas, x = served()
    shelf, known = st.Shelf(model, deltas), {}
    for name in (None, *deltas):
        st.switch(model, name)
        known[name] = model(x).detach()
    assert len({answer.sum().item() for answer in known.values()}) == len(known)
    names, over, torn = list(known), threading.Event(), []
    default: list[str | None] = [None]
    read = [0] * READERS

    def reading(number: int) -> None:
        rng = random.Random(number)
        with torch.no_grad():
            while not over.is_set():
                name = default[0] if rng.random() < 0.5 else rng.choice(names)
                with shelf.using(name, timeout=60) as same:
                    if not torch.equal(same(x), known[name]):
                        torn.append(name)
                read[number] += 1

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # threads change places within a forward pass
    try:
        readers = [Beside(lambda number=number: reading(number)) for number in range(READERS)]
        rng = random.Random(9)
        for _ in range(SWITCHES):
            default[0] = rng.choice(names)
            st.switch(model, default[0], timeout=60)
        over.set()
        assert [reader.raised() for reader in readers] == [[]] * READERS
    finally:
        over.set()
        sys.setswitchinterval(before)
    assert not torn
    assert min(read) > 0
    st.switch(model, None)
    assert torch.equal(model(x), known[None])


def test_the_server_of_the_page_answers_each_request_with_its_delta():
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    client_of = pytest.importorskip("fastapi.testclient", reason="httpx is not installed").TestClient
    text = PAGE.read_text("utf-8")
    space: dict = {"__name__": "__server__"}
    for _, code in [*blocks(text)][:1]:
        exec(code, space)
    code = re.search(r"## Behind FastAPI.*?```python\n(.*?)```", text, re.S)
    assert code is not None
    exec(code[1], space)
    shelf, model, x, known = space["shelf"], space["model"], torch.randn(1, 8), {}
    with torch.no_grad():
        for name in shelf.names:
            st.switch(model, name)
            known[name] = model(x)[0].tolist()
    client, wrong = client_of(space["app"]), []

    def asking(number: int) -> None:
        rng = random.Random(number)
        for _ in range(20):
            name = rng.choice([*known, None])
            told = client.post("/answer", json={"x": x[0].tolist(), "delta": name}).json()
            if told["y"] != known[told["delta"]] or name not in (None, told["delta"]):
                wrong.append(told)

    others = [Beside(lambda number=number: asking(number)) for number in range(3)]
    for name in [*known] * 5:
        assert client.put(f"/default/{name}").json() == {"default": name}
    assert [other.raised() for other in others] == [[]] * 3
    assert not wrong
    assert client.post("/answer", json={"x": x[0].tolist()}).json()["delta"] == name
    assert client.post("/answer", json={"x": x[0].tolist(), "delta": "none"}).status_code == 404
    assert client.put("/default/none").status_code == 404
