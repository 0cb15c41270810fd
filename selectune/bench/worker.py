"""The process in which one method is measured. It reads a JSON command from each line and answers with a line.

{"do": "warm", "method": ..., "bench": {...}, "threads": n, "plugin": [...], "peers": path}
{"do": "load", "method": ..., "bench": {...}, "budget": ..., "steps": T, "compare": every how many selections}
{"do": "steps", "count": k}
{"do": "save"}
{"do": "stop"}
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from selectune import plugins
from selectune.bench import methods
from selectune.bench.meter import MIB, Memory, Selections, copy_seconds, wait
from selectune.bench.workload import Bench, batches, config_of, load_real, loss_of, prepare, real_batches
from selectune.errors import SelectuneError
from selectune.runs.config import LEARNING_RATE

INITS = 3  # how often the initialisation is timed, where a method can be taken off again


class Measured:
    """One method on one model."""

    def __init__(self, method: str, bench: Bench, budget: int | float, steps: int, compare: int = 0) -> None:
        self.method, self.bench = method, bench
        self.package = methods.needs(method)
        self.config = config_of(bench.model)
        loaded = None if bench.task() is None else load_real(bench)
        self.model: nn.Module = prepare(bench, self.config) if loaded is None else loaded.model
        self.weights = sum(p.nbytes for p in self.model.parameters())
        self.batches = batches(bench, self.config) if loaded is None else real_batches(bench, loaded.tokenizer, steps)
        self.copy_s = copy_seconds(self.model, bench.device)
        methods.prepare(method, self.model, self.batches[0], bench)
        self.memory = Memory(bench.device)
        self.loaded = self.memory.now()
        self.memory.reset()
        self.init_s: list[float] = []
        self.given = methods.Conditions(budget, steps, bench.seed, self.batches)
        if loaded is not None:  # as `selectune train` trains it
            self.given = replace(self.given, rate=LEARNING_RATE, whole=loaded.initialised)
        self.ready = self._set_up()
        while self.ready.undo is not None and len(self.init_s) < INITS:
            self.ready.undo()
            self.ready = self._set_up()
        self.selections = None if self.ready.tuner is None else Selections(self.ready.tuner, compare)
        self.init_peak = self.memory.peak() - self.loaded
        self.step = 0

    def _set_up(self) -> methods.Ready:
        wait(self.bench.device)
        began = time.perf_counter()
        ready = methods.set_up(self.method, self.model, self.given)
        wait(self.bench.device)
        self.init_s.append(time.perf_counter() - began)
        return ready

    def describe(self) -> dict[str, Any]:
        parameters = list(self.model.parameters())
        return {
            "init_s": sorted(self.init_s)[len(self.init_s) // 2],
            "init_peak_mib": self.init_peak / MIB,
            "copy_s": self.copy_s,
            "loaded_mib": self.loaded / MIB,
            "weights_mib": self.weights / MIB,
            "parameters": sum(p.numel() for p in parameters),
            "largest_mib": max(p.nbytes for p in parameters) / MIB,
            "package": self.package,
            "note": self.ready.note,
            "exact_memory": self.memory.exact,
        }

    def run(self, count: int) -> dict[str, Any]:
        """Runs whole training steps: the seconds of each, whether it selected, and peak memory."""
        self.memory.reset()
        model, optimizer = self.ready.model or self.model, self.ready.optimizer
        took, selecting, selections = [], [], []
        loss = torch.zeros(())
        for _ in range(count):
            selecting.append(self.ready.selecting())
            batch = self.batches[self.step % len(self.batches)]
            wait(self.bench.device)
            began = time.perf_counter()
            loss = loss_of(model, batch, self.bench)
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                if self.ready.after_step is not None:
                    self.ready.after_step(self.step)
                optimizer.zero_grad(set_to_none=True)
            wait(self.bench.device)
            took.append(time.perf_counter() - began)
            if self.selections is not None:
                took[-1] -= self.selections.spent
                selections.append(self.selections.close())
            self.step += 1
        peak, reserved = self.memory.peak() - self.loaded, self.memory.reserved()
        last = float(loss.detach())
        del loss
        self.memory.rest()
        if not math.isfinite(last):
            raise SelectuneError(f"The loss of {self.method} is {last} after {self.step} steps; nothing was measured.")
        select_s, self.ready.select_s[:] = list(self.ready.select_s), []
        return {
            "step_s": took,
            "selecting": selecting,
            "select_s": select_s,
            "selections": [one for one in selections if one is not None],
            "peak_mib": peak / MIB,
            "reserved_mib": None if reserved is None else (reserved - self.loaded) / MIB,
            "selected": self.ready.selected(),
            "loss": last,
        }

    def save(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return {"delta_bytes": self.ready.save(Path(folder)), "selected": self.ready.selected()}


def rehearse(method: str, bench: Bench) -> None:
    """Runs two steps on a small model, which imports libraries and loads kernels before anything is measured."""
    small = Bench("rehearsal", 4, 64, bench.dtype, bench.autocast, bench.checkpointing, bench.device, bench.seed)
    config = config_of("rehearsal")
    model = prepare(small, config)
    found = batches(small, config, 2)
    methods.prepare(method, model, found[0], small)
    ready = methods.set_up(method, model, methods.Conditions(0.002, 2, bench.seed, found))
    for batch in found:
        loss_of(ready.model or model, batch, small).backward()
        if ready.optimizer is not None:
            ready.optimizer.step()
            ready.optimizer.zero_grad()


def answer(state: dict[str, Measured], command: dict[str, Any]) -> dict[str, Any]:
    """Does one command of the parent process."""
    if command["do"] == "warm":
        if command["threads"]:
            torch.set_num_threads(command["threads"])
        plugins.add_files(command.get("plugin", ()))
        methods.join(command.get("peers"))
        methods.check(command["method"])
        methods.needs(command["method"])
        rehearse(command["method"], Bench(**command["bench"]))
        return {}
    if command["do"] == "load":
        state["it"] = Measured(
            command["method"], Bench(**command["bench"]), command["budget"], command["steps"], command.get("compare", 0)
        )
        return state["it"].describe()
    if command["do"] == "steps":
        return state["it"].run(command["count"])
    return state["it"].save()


def main(commands: TextIO, answers: TextIO) -> None:
    """Answers commands until the parent says stop or is gone. An error is an answer too: the method gets its row."""
    state: dict[str, Measured] = {}
    for line in commands:
        command = json.loads(line)
        if command["do"] == "stop":
            return
        try:
            reply = {"ok": True, **answer(state, command)}
        except Exception as error:  # noqa: BLE001 (whatever a peer raises becomes its row)
            text = " ".join(str(error).split())[:400]
            reply = {"ok": False, "error": f"{type(error).__name__}: {text}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)  # whatever a library prints goes to stderr
        main(sys.stdin, channel)
