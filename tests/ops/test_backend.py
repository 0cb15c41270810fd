"""The choice of a backend, and of a way to form a sampled gradient."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
from op_kit import check_sampled

from selectune import ops
from selectune.errors import ConfigError
from selectune.ops import backend, cost, reference
from selectune.ops.cpu import compiled


def example():
    dy, x, flat = torch.randn(70, 50), torch.randn(70, 30), torch.arange(0, 1500, 11)
    return dy, x, flat


@pytest.mark.parametrize(
    ("name", "function"),
    [("reference", reference.sampled_matmul), ("dense", backend.dense), ("numba", backend.tuned)],
)
def test_a_forced_backend_runs(monkeypatch, caplog, name, function):
    monkeypatch.setenv("SELECTUNE_BACKEND", name)
    backend._say.cache_clear()
    dy, x, flat = example()
    with caplog.at_level(logging.INFO, logger="selectune"):
        assert backend.find("sampled_matmul", "cpu") is function
        check_sampled(ops.sampled_matmul(dy, x, flat // 30, flat % 30), dy, x, flat)
    assert f"SELECTUNE_BACKEND={name}" in caplog.text
    assert ops.explain().startswith(name)
    assert ops.describe()["forced"] == name


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("SELECTUNE_BACKEND", "fast")
    with pytest.raises(ConfigError, match="Known: reference, numba, triton, dense"):
        ops.score_filter(torch.zeros(1), torch.zeros(1), 2.0, 1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_numba_the_dense_product_answers(monkeypatch, dtype):
    monkeypatch.setattr(backend, "_numba", lambda: False)
    dy, x, flat = example()
    dy, x = dy.to(dtype), x.to(dtype)
    check_sampled(ops.sampled_matmul(dy, x, flat // 30, flat % 30), dy, x, flat)
    assert ops.score_filter(torch.zeros(2), torch.ones(2), 2.0, 1.0, 0.5)[0].tolist() == [0, 1]
    assert "numba is not installed" in ops.explain()


def test_numba_is_only_imported_for_work():
    import subprocess

    code = "import sys, selectune; selectune.ops.explain(); print('numba' in sys.modules, 'triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.split()[0] == "False"


def test_the_choice_follows_the_density():
    ways = [cost.choose(int(d * 3072 * 768), 1024, 3072, 768, torch.float32) for d in (1e-5, 0.0017, 0.02, 0.9)]
    assert ways == ["gather", "tiles", "tiles", "dense"]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert cost.choose(4000, 1024, 3072, 768, dtype) == "tiles"
        assert cost.choose(2_300_000, 1024, 3072, 768, dtype) == "dense"
    assert cost.choose(4000, 4096, 3072, 768, torch.bfloat16, "cuda") == "dense"


@pytest.mark.parametrize("way", ["gather", "tiles", "dense"])
def test_whatever_is_chosen_the_answer_agrees(monkeypatch, way):
    monkeypatch.setattr(cost, "choose", lambda *a, **k: way)
    dy, x, flat = example()
    check_sampled(ops.sampled_matmul(dy, x, flat // 30, flat % 30), dy, x, flat)


def test_the_way_depends_on_shapes_alone(monkeypatch, tmp_path):
    """No file of the user, no variable and no earlier run has an influence on the choice, because it decides bits."""
    shapes = [(k, t, o, i) for k in (40, 500, 4000, 10**5) for t in (16, 1024) for o, i in ((30, 30), (3072, 768))]

    def ways():
        return [cost.choose(*shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]

    before = ways()
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "HOME" / ".cache" / "selectune").mkdir(parents=True)
    (tmp_path / "HOME" / ".cache" / "selectune" / "cost-2.json").write_text('{"float32": {"dense": 1e-9}}')
    dy, x, flat = example()
    ops.sampled_matmul(dy, x, flat // 30, flat % 30)
    assert ways() == before
    assert set(before) == {"gather", "tiles", "dense"}


def test_loops_are_compiled_even_where_nothing_can_be_cached():
    def decorator(cache):
        if cache:
            raise RuntimeError("no locator available")
        return lambda function: function

    assert compiled.cached(decorator, len) is len


def test_the_description_is_plain_data():
    told = ops.describe()
    json.dumps(told)
    assert {"reference", "numba", "triton"} == set(told["backends"])
    assert {choice["way"] for choice in told["choices"]} <= {"gather", "tiles", "dense"}
