"""benchmarks/bars.py and benchmarks/peers.py: verdicts on literal rows, and the toolkit's methods in a worker."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from test_bench import asked, load, report_of, seen

from selectune.bench import methods, table
from selectune.bench.rounds import Samples, Settings
from selectune.bench.workload import Bench
from selectune.errors import ConfigError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PEERS = str(BENCHMARKS / "peers.py")
HAS_TOOLKIT = importlib.util.find_spec("selective_optimizers") is not None


def script(name: str):
    """A file of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bars = script("bars")


@pytest.fixture(autouse=True)
def own_peers(monkeypatch):
    monkeypatch.setattr(methods, "PEERS", dict(methods.PEERS))


@pytest.mark.skipif(not HAS_TOOLKIT, reason="selective-optimizers is not installed")
@pytest.mark.parametrize("method", ["toolkit-id3", "toolkit-pafi", "toolkit-bitfit"])
@pytest.mark.filterwarnings("ignore")
def test_a_worker_trains_the_toolkits_methods(method):
    methods.join(PEERS)
    facts, steps, saved = asked(load(method, 0.02), {"do": "steps", "count": 2}, {"do": "save"})
    assert facts["ok"], facts
    assert facts["package"].startswith("selective-optimizers ")
    assert len(steps["select_s"]) == (2 if method == "toolkit-id3" else 0)
    assert steps["selected"] > 0
    assert saved["delta_bytes"] > 12 * steps["selected"]


def test_a_worker_trains_a_mask_in_the_upper_third():
    methods.join(PEERS)
    facts, steps, saved = asked(load("top-third", 0.02), {"do": "steps", "count": 2}, {"do": "save"})
    assert facts["ok"], facts
    assert steps["selected"] > 0
    assert saved["delta_bytes"] > 4 * steps["selected"]


def verdict(report: dict, what: str, method: str) -> bars.Verdict:
    return next(v for v in bars.judge(report) if v.what == what and v.method == method)


def test_bars_on_literal_rows():
    full = seen([[1.0], [1.0]], peak_mib=1500.0, selected=67_000_000, delta_bytes=268_000_000)
    frozen = seen([[0.6], [0.6]], peak_mib=680.0, selected=0, delta_bytes=0)
    pafi = seen([[0.63], [0.63]], peak_mib=700.0, selected=1000, delta_bytes=6400)
    id3 = seen([[0.81], [0.81]], [[True], [True]], peak_mib=800.0, selected=1000, delta_bytes=6600)
    report = report_of(full=full, frozen=frozen, pafi=pafi, id3=id3)
    assert verdict(report, "static masks, step / frozen", "pafi").value == pytest.approx(1.05)
    assert verdict(report, "static masks, step / frozen", "pafi").kept
    assert verdict(report, "static masks, step / lora", "pafi").kept is None
    assert verdict(report, "id3 every step, step / full", "id3").kept is False
    assert verdict(report, "id3, peak memory / full", "id3").kept
    assert verdict(report, "pafi, initialisation / one copy of the weights", "pafi").value == pytest.approx(2.0)
    assert verdict(report, "delta file, bytes a scalar, fp32", "pafi").kept
    assert verdict(report, "delta file, bytes a scalar, fp32", "id3").kept is False
    floor = verdict(report, "id3, (peak - frozen) / (1.5 x largest tensor + 32 B + 64 MiB)", "id3")
    assert floor.value == pytest.approx(120 / (15 + 32_000 / (1 << 20) + 64))
    assert not bars.all_kept(bars.judge(report))
    assert not any("real gradients" in v.what for v in bars.judge(report))
    report["settings"]["data"] = "real"
    assert verdict(report, "id3 every step on real gradients, step / frozen", "id3").value == pytest.approx(1.35)
    assert not any(v.what.startswith(("GPU", "static masks at 5")) for v in bars.judge(report))


def test_bars_are_about_a_density_and_a_device():
    report = report_of(full=seen([[1.0], [1.0]]), random=seen([[0.8], [0.8]], peak_mib=1.0))
    report["settings"]["budget"] = 0.05
    assert next(v.what for v in bars.judge(report)) == "static masks at 5 %, step / full"
    report["settings"]["budget"] = round(0.05 * 100 * (1 << 20) / 4)  # the same as a count
    assert bars.density(report) == pytest.approx(0.05)
    report["settings"].update(budget=0.0017, device="cuda", dtype="bf16")
    assert {v.what.partition(":")[0] for v in bars.judge(report)} == {"GPU", "delta file, bytes a scalar, 16 bits"}


def test_a_failed_method_breaks_its_bars_and_has_a_row():
    report = report_of(full=seen([[1.0], [1.0]]), id3=Samples(error="RuntimeError: no"))
    failed = report["rows"][1]
    assert failed["error"] == "RuntimeError: no"
    assert failed["step_s"] is None
    assert verdict(report, "id3 every step, step / full", "id3").kept is False
    text = table.plain(table.COLUMNS, [table.cells(r) for r in report["rows"]])
    assert "failed: RuntimeError: no" in text
    json.dumps(report, allow_nan=False)


def test_nothing_measured_is_no_success():
    assert not bars.all_kept([])
    assert not bars.all_kept([bars.Verdict("a", "id3", None, 1.0, 0.9)])
    assert bars.all_kept([bars.Verdict("a", "id3", 0.9, 1.0, 0.9), bars.Verdict("b", "id3", None, 1.0, 0.9)])


def test_workers_find_the_peers_of_a_file(tmp_path):
    """The path goes to the worker, whose process reads the file itself."""
    own = tmp_path / "own.py"
    own.write_text("from selectune.bench.methods import Peer, full\nPEERS = {'mine': Peer(full)}\n", encoding="utf-8")
    bench = {"model": "tiny", "batch": 2, "length": 16}
    warm = {"do": "warm", "method": "mine", "bench": bench, "threads": None, "peers": str(own)}
    first, facts, steps = asked(warm, load("mine"), {"do": "steps", "count": 1})
    assert first["ok"], first
    assert facts["ok"], facts
    assert len(steps["step_s"]) == 1
    assert Settings(Bench("tiny"), ("toolkit-pafi", "full"), 0.01, 2, 1, peers=PEERS).methods[0] == "toolkit-pafi"


def test_a_file_without_peers_is_refused(tmp_path):
    (tmp_path / "none.py").write_text("", encoding="utf-8")
    for name in ("none.py", "absent.py"):
        with pytest.raises(ConfigError, match="defines PEERS"):
            methods.join(str(tmp_path / name))
