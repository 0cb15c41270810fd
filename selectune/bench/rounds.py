"""Runs all methods, each in a process of its own, in rounds with a shuffled order.

A machine's speed drifts over minutes by more than the methods differ, so seconds are compared within a round only.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import IO, Any

import torch

from selectune.bench import methods
from selectune.bench.meter import MIB, available
from selectune.bench.workload import DTYPES, Bench, build, config_of
from selectune.errors import ConfigError, SelectuneError

WARMUP = 2
TAIL = 5  # steps after the schedule's end, to see what selecting adds where every step selects
_RUNTIME = 600 * MIB  # python, torch and transformers in one process
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """One run of the bench."""

    bench: Bench
    methods: tuple[str, ...]
    budget: int | float
    steps: int = 30  # measured steps of each method, in all rounds together
    rounds: int = 3
    processes: str = "auto"  # "alive" between rounds, "fresh" in each, or what fits into memory
    timeout: float = 900.0  # seconds for one answer of a worker
    threads: int | None = None
    live: bool = True  # also measure memory without the C library's free lists (CPU, Linux)
    plugin: tuple[str, ...] = ()  # Python files with methods, which workers read too
    compare: int = 0  # every how many selections are compared with float64; 0: none
    peers: str | None = None  # a Python file with further peers (`methods.join`), which workers read too

    def __post_init__(self) -> None:
        methods.join(self.peers)
        if self.bench.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch sees no GPU here. Use --device cpu.")
        if not self.methods:
            raise ConfigError("--methods is empty; give at least one method.")
        for name in self.methods:
            methods.check(name)
        if len(set(self.methods)) != len(self.methods):
            raise ConfigError("--methods has a method twice; each is measured once.")
        if self.rounds < 1 or self.steps < self.rounds:
            raise ConfigError(f"--steps {self.steps} --rounds {self.rounds}: each round needs at least one step.")
        if self.processes not in ("auto", "alive", "fresh"):
            raise ConfigError(f"--processes {self.processes}: unknown. Known: auto, alive, fresh.")


@dataclass
class Samples:
    """Everything that was measured of one method."""

    facts: dict[str, Any] = field(default_factory=dict)
    step_s: list[list[float]] = field(default_factory=list)  # a list for every round
    selecting: list[list[bool]] = field(default_factory=list)
    select_s: list[float] = field(default_factory=list)
    selections: list[dict[str, Any]] = field(default_factory=list)  # of all steps (`meter.Selections`)
    other: list[tuple[float, bool]] = field(default_factory=list)  # warm-up and tail
    peak_mib: float = 0.0
    reserved_mib: float | None = None
    selected: int | None = None
    delta_bytes: int | None = None
    error: str | None = None
    live_mib: float | None = None


# With these the C library returns freed tensors to the system at once, so the resident set is what is alive.
_LIVE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


class Worker:
    """The process in which one method is measured, and the answers that it gives."""

    def __init__(self, method: str, settings: Settings, env: dict[str, str] | None = None) -> None:
        self.method, self.settings, self.timeout = method, settings, settings.timeout
        self.facts: dict[str, Any] = {}
        self.errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "selectune.bench.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, encoding="utf-8",
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        self.ask(
            do="warm", method=method, bench=asdict(settings.bench), threads=settings.threads, plugin=settings.plugin,
            peers=settings.peers,
        )  # fmt: skip

    def load(self, planned: int) -> Worker:
        """Builds the model and sets up the method on it, for `planned` steps."""
        bench, budget = asdict(self.settings.bench), self.settings.budget
        self.facts = self.ask(
            do="load", method=self.method, bench=bench, budget=budget, steps=planned, compare=self.settings.compare
        )
        return self

    def ask(self, **command: Any) -> dict[str, Any]:
        """Sends a command and returns the answer; raises SelectuneError for what goes wrong in the worker."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(self.timeout, stop)
        timer.start()
        try:
            line = self._exchange(json.dumps(command))
        finally:
            timer.cancel()
        if not line:
            what = f"gave no answer in {self.timeout:.0f} s" if late.is_set() else self._died()
            self.stop()
            raise SelectuneError(f"The worker {what}.")
        try:
            reply = json.loads(line)
        except ValueError as error:
            self.stop()
            raise SelectuneError(f"The worker's answer is not JSON: {line[:80]!r}.") from error
        if not reply.pop("ok"):
            self.stop()
            raise SelectuneError(reply["error"])
        return reply

    def _exchange(self, command: str) -> str:
        if self.process.stdin is None or self.process.stdout is None:
            return ""
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
            return self.process.stdout.readline()
        except OSError:
            return ""

    def _died(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        said = " ".join(self.errors.read().split())[-300:]
        return f"ended with code {code}{' (killed: out of memory, perhaps)' if code == -9 else ''}: {said or 'silent'}"

    def stop(self) -> None:
        """Ends the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def measure(settings: Settings, say: Say = lambda text: None) -> tuple[dict[str, Samples], str]:
    """Runs all rounds. Returns what was measured of each method, and how processes were kept: "alive" or "fresh"."""
    how = settings.processes if settings.processes != "auto" else _fits(settings)
    counts = [
        settings.steps // settings.rounds + (r < settings.steps % settings.rounds) for r in range(settings.rounds)
    ]
    found = {name: Samples() for name in settings.methods}
    workers = _started(settings, found) if how == "alive" else {}
    try:
        for number, count in enumerate(counts):
            order = list(settings.methods)
            random.Random(settings.bench.seed + number).shuffle(order)
            for place, name in enumerate(order):
                samples = found[name]
                if samples.error is not None:
                    continue
                say(f"round {number + 1}/{settings.rounds}, {place + 1}/{len(order)}: {name}, {count} steps")
                planned = WARMUP + (settings.steps if how == "alive" else count)
                try:
                    _round(name, settings, samples, workers, count, planned, number == settings.rounds - 1)
                except SelectuneError as error:
                    samples.error = str(error)
                    say(f"{name} failed: {error}")
                if (how == "fresh" or samples.error is not None) and name in workers:
                    workers.pop(name).stop()
    finally:
        for worker in workers.values():
            worker.stop()
    if settings.live and settings.bench.device == "cpu" and sys.platform == "linux":
        _live(settings, found, say)
    return found, how


def _started(settings: Settings, found: dict[str, Samples]) -> dict[str, Worker]:
    """Starts all workers before anything is measured, several at once where there are cores for it."""

    def start(name: str) -> Worker | None:
        try:
            return Worker(name, settings)
        except SelectuneError as error:
            found[name].error = str(error)
            return None

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
        workers = dict(zip(settings.methods, pool.map(start, settings.methods), strict=True))
    return {name: worker for name, worker in workers.items() if worker is not None}


def _live(settings: Settings, found: dict[str, Samples], say: Say) -> None:
    for name, samples in found.items():
        if samples.error is not None:
            continue
        say(f"memory that is alive: {name}")
        try:
            worker = Worker(name, settings, _LIVE).load(WARMUP + settings.steps)
            samples.live_mib = worker.ask(do="steps", count=WARMUP + 1)["peak_mib"]
            worker.stop()
        except SelectuneError as error:
            say(f"{name}: {error}")


def _round(
    name: str, settings: Settings, samples: Samples, workers: dict[str, Worker], count: int, planned: int, last: bool
) -> None:
    if name not in workers:
        workers[name] = Worker(name, settings)
    if not workers[name].facts:
        workers[name].load(planned)
        samples.facts = samples.facts or workers[name].facts
        _note(samples, workers[name].ask(do="steps", count=WARMUP), None)
    worker = workers[name]
    seen = worker.ask(do="steps", count=count)
    _note(samples, seen, count)
    if last:
        if methods.is_ours(name) and all(all(r) for r in samples.selecting):
            _note(samples, worker.ask(do="steps", count=TAIL), None)
        samples.delta_bytes = worker.ask(do="save")["delta_bytes"]
        samples.selected = seen["selected"]


def _note(samples: Samples, seen: dict[str, Any], count: int | None) -> None:
    samples.peak_mib = max(samples.peak_mib, seen["peak_mib"])
    if seen["reserved_mib"] is not None:
        samples.reserved_mib = max(samples.reserved_mib or 0.0, seen["reserved_mib"])
    samples.selections += seen["selections"]
    if count is None:
        samples.other += zip(seen["step_s"], seen["selecting"], strict=True)
    else:
        samples.step_s.append(seen["step_s"])
        samples.selecting.append(seen["selecting"])
        samples.select_s += seen["select_s"]


def _fits(settings: Settings) -> str:
    """Whether all workers fit into memory between rounds: an idle one holds weights and optimizer state."""
    model = build(config_of(settings.bench.model), DTYPES[settings.bench.dtype], "meta")
    weights = sum(p.nbytes for p in model.parameters())
    dense = {name for name, peer in methods.PEERS.items() if peer.dense}
    idle = sum(weights * (4 if name in dense else 2) for name in settings.methods)
    free = available()
    idle += len(settings.methods) * _RUNTIME
    if settings.bench.device == "cuda":
        return "alive" if idle < torch.cuda.mem_get_info()[0] // 2 else "fresh"
    working = 8 * weights + _RUNTIME  # what the worker that runs may need in addition
    return "alive" if free is not None and idle + working < free else "fresh"


def middle(values: Sequence[float]) -> float | None:
    """The median; None if there are no values."""
    return statistics.median(values) if values else None
