"""`selectune bench`: rows, ratios, failures as rows, verdicts. No test here looks at a clock."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from selectune.adapters import linears
from selectune.bench import methods, rounds, rows, worker
from selectune.bench.rounds import Samples, Settings
from selectune.bench.workload import CONFIGS, Bench, batches, build, config_of, loss_of, prepare
from selectune.cli.app import app
from selectune.errors import ConfigError, ModelError

TINY = Bench("tiny", 2, 16)
HAS_PEFT = importlib.util.find_spec("peft") is not None


def asked(*commands: dict) -> list[dict]:
    """A worker's answers to these commands, in this process."""
    answers = io.StringIO()
    worker.main(io.StringIO("".join(json.dumps(c) + "\n" for c in [*commands, {"do": "stop"}])), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def load(method: str, budget: float = 0.01, steps: int = 4) -> dict:
    bench = {"model": "tiny", "batch": 2, "length": 16}
    return {"do": "load", "method": method, "bench": bench, "budget": budget, "steps": steps}


def test_the_command_measures_side_by_side_in_processes(tmp_path):
    """The one run with real processes: schema of the JSON, the table, ratios of a method to itself."""
    out = tmp_path / "bench.json"
    names = ["full", "frozen", "id3", *(["lora"] if HAS_PEFT else [])]
    command = [
        "bench", "--model", "tiny", "--batch", "2", "--length", "16", "--methods", ",".join(names), "--budget", "1%",
        "--steps", "2", "--rounds", "1", "--threads", "1", "--no-live", "--json", str(out),
    ]  # fmt: skip
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    report = json.loads(out.read_text("utf-8"))
    assert [r["method"] for r in report["rows"]] == names
    by_name = {r["method"]: r for r in report["rows"]}
    for row in report["rows"]:
        assert list(row)[: len(rows.KEYS)] == list(rows.KEYS)
        assert row["error"] is None
        assert row["step_s"] > 0
        assert row["init_s"] >= 0
        assert row["peak_mib"] is not None
    assert by_name["full"]["step_over_full"] == by_name["frozen"]["step_over_frozen"] == 1
    assert by_name["frozen"]["delta_bytes"] == by_name["frozen"]["selected"] == 0
    assert by_name["full"]["delta_bytes"] == 4 * by_name["full"]["selected"]
    assert by_name["id3"]["selected"] == by_name["full"]["selected"] // 100 == 1124
    assert by_name["id3"]["update_is"].startswith("the median of 2 selecting steps minus that of 5")
    assert report["copy_s"] > 0
    assert report["settings"]["processes"] in ("alive", "fresh")
    assert "tiny, batch 2 x 16, fp32" in run.output
    assert all(name in run.output for name in names)


@pytest.mark.parametrize(
    "method",
    [
        "full",
        "frozen",
        "bitfit",
        "pafi",
        "static-d3",
        "random",
        "id3:every=2",
        "fish",
        "grasp",
        "synflow",
        "fish-dip",
        "sparse-adapter",
    ],
)
def test_a_worker_trains_every_method_of_ours(method, monkeypatch):
    monkeypatch.setattr(worker, "INITS", 2)
    facts, steps, saved = asked(load(method), {"do": "steps", "count": 3}, {"do": "save"})
    assert facts["ok"], facts
    assert steps["ok"], steps
    assert saved["ok"], saved
    assert len(steps["step_s"]) == 3
    expected = {"static-d3": [True, False, False], "id3:every=2": [True, False, True], "fish-dip": [True, False, False]}
    assert steps["selecting"] == expected.get(method, [False] * 3)
    budget = {"full": None, "frozen": 0, "bitfit": None}.get(method, 1124 if method != "fish" else None)
    assert budget is None or steps["selected"] == budget
    assert (saved["delta_bytes"] > 0) == (method != "frozen")


@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
@pytest.mark.parametrize("method", ["lora", "dora", "super", "shira"])
def test_a_worker_trains_pefts_methods(method):
    facts, steps, saved = asked(load(method), {"do": "steps", "count": 1}, {"do": "save"})
    assert facts["ok"], facts
    assert facts["package"].startswith("peft ")
    assert saved["delta_bytes"] > 4 * steps["selected"] > 0
    if method == "super":
        assert abs(steps["selected"] - 1124) < 20
    if method == "lora":
        layers = linears(build(config_of("tiny"), torch.float32, "meta"))
        assert steps["selected"] == 8 * sum(sum(layer.weight.shape) for layer in layers.values())


def test_what_fails_is_an_answer():
    facts, steps = asked(load("id3", budget=10**9), {"do": "steps", "count": 1})
    assert not facts["ok"]
    assert "BudgetError" in facts["error"]
    assert not steps["ok"]


def test_a_missing_peer_names_the_extra(monkeypatch):
    def missing(name):
        raise methods.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(methods.metadata, "version", missing)
    with pytest.raises(ModelError, match=r"selectune\[bench\]"):
        methods.needs("lora")
    assert methods.needs("id3") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("id4",)}, "Known: full, frozen, lora, "),
        ({"methods": ("pafi:every=3",)}, "'pafi' takes no option every"),
        ({"methods": ()}, "is empty"),
        ({"methods": ("id3", "id3")}, "twice"),
        ({"rounds": 9}, "at least one step"),
        ({"processes": "some"}, "alive, fresh"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**{"bench": TINY, "methods": ("id3",), "budget": 0.01, "steps": 4, "rounds": 2, **change})


def test_a_bench_that_makes_no_sense():
    for change in ({"dtype": "fp8"}, {"autocast": "int8"}, {"batch": 0}, {"device": "tpu"}):
        with pytest.raises(ConfigError):
            Bench(**{"model": "tiny", **change})
    with pytest.raises(ConfigError, match="128 tokens"):
        prepare(Bench("tiny", 1, 129))
    with pytest.raises(ModelError, match="bert-6l"):
        config_of("nobody/nothing-of-this-name")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(tmp_path):
    with pytest.raises(ConfigError, match="sees no GPU"):
        Settings(Bench("tiny", device="cuda"), ("id3",), 0.01)
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 3
    assert "There is no GPU here" in run.stderr


@pytest.mark.parametrize("name", CONFIGS)
def test_models_have_the_sizes_of_their_names(name):
    model = build(config_of(name), torch.float32, "meta")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    sizes = {"bert-6l": 67, "minilm": 22.7, "deberta-v3-base": 184, "llama-1b": 1236}
    assert millions == pytest.approx(sizes.get(name, millions), rel=0.01)
    assert linears(model)


@pytest.mark.parametrize("bench", [TINY, Bench("llama-tiny", 1, 8, "bf16"), Bench("tiny", 1, 8, checkpointing=True)])
def test_the_same_seed_gives_the_same_step(bench):
    config = config_of(bench.model)
    losses = []
    for _ in range(2):
        model, batch = prepare(bench, config).eval(), batches(bench, config, 1)[0]
        losses.append(float(loss_of(model, batch, bench).detach()))
    assert losses[0] == losses[1]
    assert all(bool(p.any()) for n, p in model.named_parameters() if n.endswith("bias"))


def seen(step_s: list[list[float]], selecting: list[list[bool]] | None = None, **more) -> Samples:
    facts = {
        "init_s": 0.2, "copy_s": 0.1, "init_peak_mib": 1.0, "exact_memory": True, "package": None, "note": "",
        "weights_mib": 100.0, "largest_mib": 10.0,
    }  # fmt: skip
    flags = selecting or [[False] * len(r) for r in step_s]
    return Samples(facts=facts, step_s=step_s, selecting=flags, **more)


def report_of(**samples: Samples) -> dict:
    names = {name.replace("_", "-").replace("-every-", ":every="): s for name, s in samples.items()}
    settings = Settings(Bench("bert-6l"), tuple(names), 0.0017, 4, 2)
    return rows.report(settings, names, "alive")


def row_of(report: dict, method: str) -> dict | None:
    return next((row for row in report["rows"] if row["method"] == method), None)


def test_ratios_are_taken_within_a_round():
    """The second round is ten times as slow for all: the ratio does not see it."""
    report = report_of(
        full=seen([[1.0, 1.2], [10.0, 12.0]]), frozen=seen([[0.5, 0.5], [5.0, 5.0]]), pafi=seen([[0.55], [5.5]])
    )
    pafi = row_of(report, "pafi")
    assert pafi is not None
    assert pafi["step_over_frozen"] == pytest.approx(1.1)
    assert pafi["step_over_full"] == pytest.approx(0.5)
    assert pafi["step_over_lora"] is None
    assert pafi["update_s"] == 0


def test_selecting_steps_count_in_their_share():
    """A median alone would hide the selecting step of id3:every=10. In id3 every step selects."""
    flags = [[True, False, False, False]] * 2
    every = seen([[2.0, 1.0, 1.0, 1.0]] * 2, flags)
    always = seen([[2.0, 2.2]] * 2, [[True, True]] * 2, other=[(1.5, False), (1.5, False)])
    report = report_of(id3_every_10=every, id3=always)
    tenth, each = row_of(report, "id3:every=10"), row_of(report, "id3")
    assert tenth is not None
    assert each is not None
    assert tenth["update_s"] == pytest.approx(1.0)
    assert tenth["step_s"] == pytest.approx(1.1)
    assert each["update_s"] == pytest.approx(0.6)
    assert each["step_s"] == pytest.approx(2.1)


def test_the_exit_code_says_that_one_of_ours_failed(monkeypatch):
    report = report_of(full=seen([[1.0], [1.0]]), id3=Samples(error="RuntimeError: no"), lora=seen([[1.0], [1.0]]))
    monkeypatch.setattr(rows, "run", lambda settings, say: report)
    run = CliRunner().invoke(app, ["bench", "--methods", "full,id3,lora", "--json", "-"])
    assert run.exit_code == 1
    assert json.loads(run.stdout)["rows"][1]["error"]
    report["rows"][1], report["rows"][2] = report["rows"][2], {**report["rows"][1], "method": "lora"}
    assert CliRunner().invoke(app, ["bench", "--methods", "full,id3,lora", "--json", "-"]).exit_code == 0


def test_a_worker_that_hangs_or_dies_is_stopped(monkeypatch):
    settings = Settings(TINY, ("id3",), 0.01, 2, 1, timeout=0.5)
    hanging = [sys.executable, "-c", "import time; time.sleep(60)"]
    real = subprocess.Popen
    monkeypatch.setattr(rounds.subprocess, "Popen", lambda command, **more: real(hanging, **more))
    with pytest.raises(rounds.SelectuneError, match="no answer in"):
        rounds.Worker("id3", settings)
    dying = [sys.executable, "-c", "import sys; sys.exit('out of luck')"]
    monkeypatch.setattr(rounds.subprocess, "Popen", lambda command, **more: real(dying, **more))
    with pytest.raises(rounds.SelectuneError, match="out of luck"):
        rounds.Worker("id3", Settings(TINY, ("id3",), 0.01, 2, 1))
