"""`selectune plan` against numbers counted by hand."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import selectune as st
from selectune.bench import estimate, methods, trace
from selectune.bench.estimate import plan, updates_of
from selectune.bench.workload import Bench, batches, config_of, prepare
from selectune.cli.app import app
from selectune.errors import BudgetError, ConfigError, ModelError, ScopeError
from selectune.ops import bounds
from selectune.ops.cpu import loops
from selectune.schedule import Increment, OneShot, Repeat
from selectune.scope import Found, Scope

TINY = Bench("tiny", 2, 16)


class Two(nn.Module):
    """Two linear layers whose bytes fit on a page: 10 rows, 4 -> 8 -> 2 wide."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)

    def forward(self, x):
        return Answer(self.b(self.a(x)).sum())

    def get_input_embeddings(self):
        return self.a


class Answer:
    def __init__(self, loss):
        self.loss = loss


X, HIDDEN, OUT, LOSS = 10 * 4 * 4, 10 * 8 * 4, 10 * 2 * 4, 4
A, B = 8 * 4 * 4, 2 * 8 * 4
SGD = functools.partial(torch.optim.SGD, lr=0.1)


def traced(train: str = "", **more) -> trace.Traced:
    """A step of `Two`: 24 selected scalars, 16 in a and 8 in b; or all of it trained, or nothing."""
    model = Two()
    with trace.faked(model):
        batch = {"x": torch.empty(10, 4)}
        if train == "nothing":
            return trace.trace(model, batch, TINY, Found((), ()), 0, SGD)
        scope = Scope(include=(), train_fully="*") if train == "all" else Scope()
        found = scope.find(model, loaded=False)
        return trace.trace(model, batch, TINY, found, 24 if found.tensors else 0, SGD, **more)


def test_a_step_counted_by_hand():
    """x is in memory already. The hidden layer is saved, and the output is not, but its gradient is formed."""
    static, selecting, kept, floor = traced(), traced(selects=True), traced("all"), traced("nothing")
    pieces = 4 * 24  # of the offsets, one a tensor
    assert static.saved == HIDDEN + LOSS + pieces
    assert kept.saved == HIDDEN + LOSS
    assert selecting.saved == static.saved
    coordinates = 24 * 2 * 4  # int32, which only a step that samples makes
    assert static.peak <= selecting.peak + coordinates
    assert selecting.peak - static.peak <= max(A, B)
    assert kept.peak >= kept.saved + A
    assert floor.saved <= kept.saved
    assert static.values == 4 * 24
    # offsets, starts and what was written: float32; a base value each; flat index, slot, and the list of free slots
    assert static.kept == 24 * (3 * 4 + 4 + 3 * 8)
    assert traced(copies=True).kept == static.kept + A + B
    assert static.state == kept.kept == floor.kept == 0


def test_a_known_storage_that_is_dropped_hides_no_other():
    """Its address is free then, and the next storage takes it."""
    many = [torch.empty(64, device="meta") for _ in range(50)]
    storages = trace.Storages({t.untyped_storage()._cdata: t.untyped_storage() for t in many})
    many.clear()
    with storages:
        made = [torch.empty(64, device="meta") for _ in range(50)]
    assert storages.peak == len(made) * 64 * 4


def test_what_is_dropped_is_not_counted():
    storages = trace.Storages({})
    with storages:
        first = torch.empty(100, device="meta")
        view = first[10:]
        assert storages.now == 400
        del first
        assert storages.now == 400  # the view holds it
        del view
        assert storages.now == 0
    assert storages.peak == 400


def test_the_items_come_to_the_peak():
    found = plan(TINY, "id3", 0.01, 100)
    parts = (
        found.weights, found.adapter, found.saved, found.backward, found.gradient, found.values, found.optimizer,
        found.ledger, found.workspace,
    )  # fmt: skip
    assert sum(parts) == found.peak
    assert found.peak - found.weights == found.above_model
    assert found.parameters == 112_450
    assert found.trained == round(0.01 * (112_450 - 64))  # the padding row cannot be selected
    assert found.values == 4 * found.trained
    assert found.optimizer == 8 * found.trained


def test_what_several_processes_need_and_send():
    """What is averaged, times 2 (n - 1)/n is sent, and half of that for a large tensor, of which each ranks a part.

    A bucket is held, and the mean of one dense gradient, or of one part, at a time.
    """
    one, four = plan(TINY, "id3", 1000, 10), plan(TINY, "id3", 1000, 10, ranks=4)
    assert (one.ranks, one.exchange, one.sent, one.sent_selecting) == (1, 0, 0, 0)
    assert four.sent == 2 * 3 * 4 * 1000 // 4
    assert four.sent_selecting == 2 * 3 * 4 * (1000 + 112_450 - 512 * 64 // 2) // 4  # the embedding has parts
    assert four.exchange == 4 * 1000 + 4 * 128 * 64  # the offsets' bucket, and a mean or a fourth of the embedding's
    whole = plan(TINY, "id3", 10_000, 10, ranks=4)  # 1,000 entries a step are too many to tell of
    assert whole.sent_selecting == 2 * 3 * 4 * (10_000 + 112_450) // 4
    assert whole.exchange == 4 * 10_000 + 4 * 512 * 64
    assert four.peak == one.peak - one.workspace + four.workspace + four.exchange
    once = plan(TINY, "pafi", 1000, 10, ranks=2)
    assert once.sent == once.sent_selecting == 4 * 1000
    assert once.exchange == 4 * 1000
    assert plan(TINY, "full", 0.01, 10, ranks=2).sent == 4 * 112_450
    with pytest.raises(ConfigError, match="--ranks 2: lt-sft trains every entry for a while"):
        plan(TINY, "lt-sft", 1000, 10, ranks=2)
    with pytest.raises(ConfigError, match="--ranks 0"):
        plan(TINY, "id3", 1000, ranks=0)


def test_methods_and_optimizers_differ_as_they_should():
    full, floor = plan(TINY, "full", 0.01, 10), plan(TINY, "frozen", 0.01, 10)
    static, momentum = plan(TINY, "pafi", 0.01, 10), plan(TINY, "pafi", 0.01, 10, "momentum")
    assert floor.above_model < static.above_model < full.above_model
    assert full.optimizer == 2 * full.weights
    assert full.updates == 10 * full.parameters
    assert floor.updates is None
    assert static.gradient == 0
    assert static.workspace == torch.get_num_threads() * (128 + loops.BAND) * loops.PITCH * 4  # tiles of both operands
    assert static.updates == 10 * static.trained
    assert momentum.optimizer == static.optimizer // 2
    assert plan(TINY, "bitfit", 0.01).trained == 1282
    assert plan(TINY, "id3", 500, None).updates is None


def test_bf16_and_checkpointing_need_less():
    plain = plan(Bench("llama-tiny", 2, 64), "id3", 1000, 10)
    half = plan(Bench("llama-tiny", 2, 64, "bf16"), "id3", 1000, 10)
    again = plan(Bench("llama-tiny", 2, 64, checkpointing=True), "id3", 1000, 10)
    assert 2 * half.weights == plain.weights
    assert half.saved < plain.saved
    assert again.saved < plain.saved
    assert half.values == plain.values  # fp32 masters
    mixed = plan(Bench("llama-tiny", 2, 64, autocast="bf16"), "id3", 1000, 10)
    assert mixed.saved < plain.saved
    plan(Bench("llama-tiny", 2, 64, device="cuda"), "id3", 1000, 10)


def test_update_counts_of_the_papers_theorem():
    assert updates_of(Increment(12, 4), 4) == 30
    assert updates_of(OneShot(12), 4) == 48
    assert updates_of(Increment(10, 4), 4) == 24
    assert updates_of(Repeat(12, 4), 4) == 48


def test_the_delta_is_as_large_as_predicted(tmp_path):
    model = prepare(TINY)
    tuner = st.attach(model, st.random(budget=3000))
    with torch.no_grad():
        tuner.parameters()[0].add_(1)
    size = tuner.save(tmp_path).stat().st_size
    assert plan(TINY, "random", 3000).delta_bytes == pytest.approx(size, rel=0.1)


def test_a_plan_that_makes_no_sense():
    with pytest.raises(ConfigError, match="adamw"):
        plan(TINY, "id3", 100, 10, "lion")
    with pytest.raises(ConfigError, match=r"is unknown\. Known"):
        plan(TINY, "id4", 100, 10)
    with pytest.raises(BudgetError):
        plan(TINY, "id3", 10**9, 10)


def test_the_command_plans():
    command = ["plan", "--model", "tiny", "--budget", "1%", "--batch", "2", "--length", "16", "--steps", "10"]
    run = CliRunner().invoke(app, [*command, "--json"])
    assert run.exit_code == 0, run.output
    value = json.loads(run.stdout)
    assert value["trained"] == 1124
    assert value["peak"] > value["weights"]
    text = CliRunner().invoke(app, command)
    assert "1,124 of 112,450" in text.stdout
    assert "sent by each process" not in text.stdout
    assert "sent by each process" in CliRunner().invoke(app, [*command, "--ranks", "8"]).stdout
    assert CliRunner().invoke(app, ["plan", "--model", "tiny", "--method", "id4"]).exit_code == 2


def test_a_folder_with_a_config_can_be_planned(tmp_path):
    config_of("tiny").save_pretrained(tmp_path)
    assert plan(Bench(str(tmp_path), 2, 16), "id3", 0.01, 10).parameters == 112_450


def test_the_scope_is_the_methods_own(tmp_path):
    """Roles, ties, padding: what `Scope.find` finds on a model with weights is what is planned."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    config.save_pretrained(tmp_path)
    found = st.xattn().scope.find(prepare(Bench(str(tmp_path), 2, 8)))
    size = sum(t.parameter.numel() for t in found.whole)
    assert plan(Bench(str(tmp_path), 2, 8), "xattn", 0.01, 10).trained == size == 2 * (4 * 32 * 32 + 32)
    assert plan(Bench(str(tmp_path), 2, 8), "id3", 0.01, 10).trained > 0


def test_what_cannot_run_on_shapes_is_one_line(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    config.save_pretrained(tmp_path)  # without decoder_start_token_id no example can be shifted
    with pytest.raises(ModelError, match="cannot be run on shapes alone"):
        plan(Bench(str(tmp_path), 2, 8), "id3", 0.01, 10)
    run = CliRunner().invoke(app, ["plan", "--model", str(tmp_path), "--length", "8"])
    assert run.exit_code == 1
    assert len(run.stderr.strip().splitlines()) == 1
    assert "decoder_start_token_id" in run.stderr


def test_every_way_of_choosing_has_its_price():
    """Pruned weights are kept, and watched candidates have positions. Everything else is the same."""
    static, pruned = plan(TINY, "random", 500, 10), plan(TINY, "sparse-adapter", 500, 10)
    assert pruned.ledger - static.ledger == 4 * (112_450 - 64) + 64 * 4
    assert plan(TINY, "spiel-ag", 500, 10).ledger == static.ledger + 500 * 8
    assert plan(TINY, "gallop", 500, 10).trained == 500


def counted(bench: Bench) -> tuple[nn.Module, list[dict[str, torch.Tensor]], trace.Storages]:
    """A model, its batches, and a count of the bytes that are made beside them."""
    model, found = prepare(bench), batches(bench, config_of(bench.model))
    held = {key: storage for batch in found for key, storage in trace.known(model, batch).items()}
    return model, found, trace.Storages(held)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lt-sft", "diff-pruning", "child-tuning-f"])
def test_a_dense_phase_is_as_large_as_predicted(method, dtype):
    bench, dense = Bench("tiny", 2, 16, dtype), {"lt-sft": 2, "diff-pruning": 5, "child-tuning-f": 10}[method]
    model, (batch, *_), storages = counted(bench)
    with storages:
        tuner = st.attach(model, methods.recipe(method, 0.01, 10))
        optimizer = torch.optim.AdamW(tuner.parameters(), foreach=False)
        for _ in range(min(dense, 5)):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    found = plan(bench, method, 0.01, 10)
    assert found.above_model == pytest.approx(storages.peak, rel=0.15)
    assert (found.latents > 0) is (method == "diff-pruning" or dtype == "bf16")
    assert found.trained == (112_450 if method == "child-tuning-f" else 1124)
    assert found.updates == dense * 112_450 + (10 - dense) * 1124


@pytest.mark.parametrize("method", ["fish", "grasp"])
def test_calibration_is_as_large_as_predicted(method):
    model, found, storages = counted(TINY)
    with storages:
        methods.ours(method, model, methods.Conditions(0.01, 10, 6, found))
    planned = plan(TINY, method, 0.01, 10)
    assert planned.calibration == pytest.approx(storages.peak, rel=0.15)
    assert planned.peak == max(planned.calibration, planned.above_model) + planned.weights
    assert plan(TINY, "pafi", 0.01, 10).calibration == 0


def test_exact_selection_holds_its_operands_as_int8(monkeypatch):
    monkeypatch.setattr(bounds, "pays", lambda t, o, i, unknown: False)
    without = plan(TINY, "id3", 500, 10).workspace
    monkeypatch.setattr(bounds, "pays", lambda t, o, i, unknown: o == i == 64)
    assert plan(TINY, "id3", 500, 10).workspace - without == 32 * (64 + 64) + 16 * int(bounds.SHARE * 64 * 64)
    monkeypatch.setattr(estimate, "largest", lambda entries: 49)  # a step selects 50
    assert plan(TINY, "id3", 500, 10).workspace == without


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "momentum"])
def test_every_optimizer_takes_its_step(optimizer):
    state = {"adamw": 8, "adam": 8, "sgd": 0, "momentum": 4}[optimizer]
    assert plan(TINY, "id3:every=10", 500, 10, optimizer).optimizer == 500 * state
    assert plan(TINY, "full", 500, 10, optimizer).optimizer == 112_450 * state


def test_a_scope_of_what_is_not_loaded():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert Scope(exclude="*.bias").find(model, loaded=False).eligible == 24
    with pytest.raises(ScopeError, match="meta device"):
        Scope().find(model)


def test_a_quantised_base_is_smaller_and_a_step_reads_one_weight_in_full():
    full, eight, four = (plan(TINY, "id3", 100, 10, quantise=kind) for kind in (None, "int8", "nf4"))
    assert full.weights > eight.weights > four.weights
    assert eight.above_model - full.above_model == four.above_model - full.above_model > 0
    assert full.peak - full.above_model == full.weights
    assert four.peak - four.above_model == four.weights
    with pytest.raises(ConfigError, match="--quantise int3"):
        plan(TINY, "id3", 100, 10, quantise="int3")
