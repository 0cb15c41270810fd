"""accelerate's save_state and load_state under a tuner: a stopped run goes on bit for bit, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch_kit import TORCHRUN
from safetensors.torch import load_file, save_file

import selectune as st
from selectune.delta import DELTA_FILE
from selectune.errors import BaseMismatchError, CheckpointError, ConfigError, IntegrityError, TunerError
from selectune.files import read_manifest, seal
from selectune.integrations.accelerate import register
from selectune.train import STATE_FILE

accelerate = pytest.importorskip("accelerate")
STEPS = 6
HEAD = st.Scope(train_fully=("4.*",))


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 12), torch.nn.BatchNorm1d(12), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(12, 3)
    )


class Run:
    """A loop over an accelerator, as accelerate's examples have it."""

    def __init__(self, make=lambda: st.id3(30, STEPS), passes=1, seed=0, wrapped=False, known=True, **how):
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=passes)
        attached = net(seed)
        self.tuner = st.attach(attached, make(), accumulation_steps=passes, **how)
        model = torch.nn.Sequential(attached, torch.nn.Linear(3, 3).requires_grad_(False)) if wrapped else attached
        optimizer = torch.optim.AdamW(self.tuner.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        rows = torch.utils.data.TensorDataset(
            torch.randn(8 * STEPS * passes, 6, generator=torch.Generator().manual_seed(1))
        )
        loader = torch.utils.data.DataLoader(rows, batch_size=8)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        self.registration = register(self.accelerator, self.tuner) if known else None
        self.seen = []

    def go(self, first=0, last=STEPS, stop=None):
        passes = self.accelerator.gradient_accumulation_steps
        loader = self.accelerator.skip_first_batches(self.loader, first * passes) if first else self.loader
        for number, (x,) in enumerate(loader, first * passes):
            if number == last * passes:
                return
            torch.manual_seed(number)  # a loader that is opened anew draws a number that the run had not
            with self.accelerator.accumulate(self.model):
                loss = self.model(x).square().mean()
                self.accelerator.backward(loss)
                if number == stop:
                    return
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.seen.append(loss.item())


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        width = {4: torch.int32, 8: torch.int64}[tensor.element_size()]
        assert torch.equal(tensor.view(width), theirs[name].view(width)), name


CASES = {
    "id3": {},
    "accumulation": {"passes": 2},
    "a head": {"make": lambda: st.id3(30, STEPS, scope=HEAD)},
    "repeat-d3": {"make": lambda: st.repeat_d3(30, STEPS)},
    "rigl": {"make": lambda: st.rigl(30, STEPS, every=2)},
    "in a dense phase": {"make": lambda: st.lt_sft(30, STEPS, dense=5)},
    "gates": {"make": lambda: st.diff_pruning(30, STEPS, dense=5)},
    "part of a model": {"wrapped": True},
}


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on(tmp_path, case, safe):
    straight = Run(**CASES[case])
    straight.go()
    first = Run(**CASES[case])
    first.go(0, 3)
    first.accelerator.save_state(tmp_path / "at-3", safe_serialization=safe)
    assert st.load(tmp_path / "at-3").selected == first.tuner.touched
    second = Run(**CASES[case])
    second.accelerator.load_state(tmp_path / "at-3")
    second.go(3)
    same(second.model, straight.model)
    assert first.seen + second.seen == straight.seen
    assert second.tuner.delta().to_bytes() == straight.tuner.delta().to_bytes()
    assert second.tuner.verify() == straight.tuner.verify()
    first.go(3, 5)  # and back again, in the process that saved
    first.accelerator.load_state(tmp_path / "at-3")
    first.go(3)
    same(first.model, straight.model)


@pytest.fixture
def at_3(tmp_path):
    run = Run()
    run.go(0, 3)
    run.accelerator.save_state(tmp_path / "at-3")
    return tmp_path / "at-3"


def refused(run, folder, error, said):
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    step, selected = run.tuner.step, run.tuner.selected
    with pytest.raises(error, match=said):
        run.accelerator.load_state(folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert (run.tuner.step, run.tuner.selected) == (step, selected)
    run.tuner.verify()


def test_another_run_and_another_base(at_3):
    refused(Run(make=lambda: st.id3(31, STEPS)), at_3, ConfigError, "its method is")
    refused(Run(seed=1), at_3, BaseMismatchError, "another base")


def test_a_folder_without_a_state(at_3):
    (at_3 / STATE_FILE).unlink()
    refused(Run(), at_3, ConfigError, rf"has no {STATE_FILE}.*before register")


@pytest.mark.parametrize("begun", [0, 2])
def test_weights_that_were_changed(at_3, begun):
    weights = load_file(at_3 / "model.safetensors")
    weights["0.weight"][1, 1] += 1
    save_file(weights, at_3 / "model.safetensors", {"format": "pt"})
    seal(at_3, {})
    run = Run()
    run.go(0, begun)
    refused(run, at_3, IntegrityError, r"1 of the \d+ tensors in .*at-3 .*: 0\.weight\.")


def test_a_state_of_another_step(at_3, tmp_path):
    run = Run()
    run.go(0, 2)
    run.accelerator.save_state(tmp_path / "at-2")
    shutil.copy(tmp_path / "at-2" / STATE_FILE, at_3 / STATE_FILE)
    seal(at_3, {})
    refused(Run(), at_3, IntegrityError, "the state is of another checkpoint")


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", STATE_FILE, "delta.safetensors"])
@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_a_folder_that_is_not_whole(at_3, name, harm):
    content = (at_3 / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    if harm == "gone":
        (at_3 / name).unlink()
    else:
        (at_3 / name).write_bytes(flipped if harm == "flip" else content[:-1])
    kind = ConfigError if (name, harm) == (STATE_FILE, "gone") else CheckpointError
    refused(Run(), at_3, kind, name.replace(".", r"\."))
    (at_3 / name).write_bytes(content)
    (at_3 / "manifest.json").unlink()
    refused(Run(), at_3, CheckpointError, "at-3 is incomplete")


def test_within_a_window(tmp_path):
    run = Run(passes=2)
    run.go(0, 2, stop=2)
    with pytest.raises(TunerError, match="after 1 of 2 backward passes"):
        run.accelerator.save_state(tmp_path / "no")
    assert not any((tmp_path / "no").iterdir())


def test_without_register_it_is_said_what_is_missing(at_3):
    run = Run(known=False)
    with pytest.raises(IntegrityError, match=r"load the tuner's state before its weights \(selectune\.integrations"):
        run.accelerator.load_state(at_3)


def test_the_optimizer_alone(at_3):
    """Moments without the tuner's state, as a loop that saves by hand forgets it."""
    run = Run()
    run.optimizer.load_state_dict(torch.load(at_3 / "optimizer.bin", weights_only=True))
    with pytest.raises(st.errors.OptimizerError, match=r"3 steps behind it .*tuner is at step 0"):
        run.go()


def test_what_register_refuses():
    run = Run(known=False)
    other = st.attach(net(), st.id3(30, STEPS))
    with pytest.raises(ConfigError, match="not among the 1 that the accelerator prepared"):
        register(run.accelerator, other)
    run = Run(known=False)
    run.accelerator.gradient_accumulation_steps = 3
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps=3 .* accumulation_steps=1"):
        register(run.accelerator, run.tuner)


def test_taken_off(at_3):
    run = Run()
    run.registration.remove()
    with pytest.raises(IntegrityError, match="load the tuner's state before"):
        run.accelerator.load_state(at_3)


@pytest.mark.parametrize("full", [True, False])
def test_the_digest_of_all_weights_is_recorded_unless_asked_not_to(tmp_path, full):
    run = Run()
    run.registration.remove()
    register(run.accelerator, run.tuner, full=full)
    run.accelerator.save_state(tmp_path / "at-0")
    assert (st.load(tmp_path / "at-0").info["base"]["weights"] is not None) is full


def test_deepspeed_is_refused():
    """A plug-in of accelerate's, which cannot be had without the package: the accelerator says what it would say."""

    class Accelerator(accelerate.Accelerator):
        distributed_type = accelerate.DistributedType.DEEPSPEED

    tuner = st.attach(net(), st.id3(30, STEPS))
    with pytest.raises(ConfigError, match=r"accelerator runs DeepSpeed, which is not supported.*without DeepSpeed"):
        register(Accelerator(cpu=True), tuner)


def test_two_processes_resumed_and_sharded(tmp_path):
    """Under DistributedDataParallel a stopped run goes on bit for bit; weights that FSDP2 shards give its bits too."""
    words = [sys.executable, *TORCHRUN, str(Path(__file__).with_name("ranked_accelerate.py")), str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, *others = ((tmp_path / name / DELTA_FILE).read_bytes() for name in ("whole", "resumed", "sharded"))
    assert others == [whole, whole]
    assert st.load(tmp_path / "whole").selected == 30
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= set(read_manifest(tmp_path / "at 2").files)
    assert "Leave register, save_state and load_state out" in (tmp_path / "refused").read_text("utf-8")
