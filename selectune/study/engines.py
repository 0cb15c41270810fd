"""Where cells run: processes of this machine, or a Ray cluster. An engine starts cells and says which have ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from selectune.errors import ConfigError, StudyError
from selectune.study.workspace import LOG

_COMMAND = (sys.executable, "-m", "selectune.study.attempt")
_PATIENCE = 120.0
"""Seconds that a cell has to end its step and write its checkpoint, once it is asked to stop."""


class Executor(Protocol):
    """`slots`: cells at a time. A cell is known by its folder."""

    slots: int

    def start(self, folder: Path) -> None: ...

    def ended(self, seconds: float) -> dict[Path, int]:
        """The cells that have ended, with their exit codes; waits for at most that long for one."""
        ...

    def stop(self) -> None:
        """Asks all cells to end after their step, with a checkpoint, and waits for them."""
        ...


class Local:
    """Processes of this machine. Each has `threads` threads, by default an equal share of the processors."""

    def __init__(self, slots: int, threads: int | None = None) -> None:
        self.slots = slots
        self.threads = threads or max(1, _processors() // slots)
        self._running: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, folder: Path) -> None:
        self._running[folder] = _process(folder, self.threads)

    def ended(self, seconds: float) -> dict[Path, int]:
        until = time.monotonic() + seconds
        while True:
            codes = {folder: process.poll() for folder, process in self._running.items()}
            found = {folder: code for folder, code in codes.items() if code is not None}
            if found or time.monotonic() >= until:
                break
            time.sleep(0.05)
        for folder in found:
            _close(self._running.pop(folder))
        return found

    def stop(self) -> None:
        for process in self._running.values():
            process.terminate()
        until = time.monotonic() + _PATIENCE
        for process in self._running.values():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _close(process)
        self._running.clear()


class Ray:
    """A Ray cluster; `address` as `ray.init` takes it. The study's folder must be the same on all of its machines.

    Each cell reserves `threads` processors and `gpus`; Ray decides where it runs, and when.
    """

    def __init__(self, address: str | None, slots: int, threads: int = 1, gpus: float = 0.0) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError("--engine ray needs the package ray: pip install 'selectune[ray]'.") from error
        self.slots, self._ray = slots, ray
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise StudyError(f"There is no Ray cluster at {address}: {error}") from error
        work = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(_attempt)
        self._start = lambda folder: work.remote(os.path.abspath(folder), threads, dict(_environment()))
        self._running: dict[Any, Path] = {}

    def start(self, folder: Path) -> None:
        self._running[self._start(folder)] = folder

    def ended(self, seconds: float) -> dict[Path, int]:
        if not self._running:
            time.sleep(min(seconds, 0.05))
            return {}
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        found: dict[Path, int] = {}
        for one in done:
            try:
                code = self._ray.get(one)
            except self._ray.exceptions.RayError:
                code = -9  # its machine or its worker has gone
            found[self._running.pop(one)] = code
        return found

    def stop(self) -> None:
        for one in self._running:
            self._ray.cancel(one, force=False)
        self._ray.wait(list(self._running), num_returns=len(self._running), timeout=_PATIENCE)
        self._running.clear()


def _attempt(folder: str, threads: int, environment: Mapping[str, str]) -> int:
    """Runs a cell where Ray puts it. If the task is cancelled, the cell ends with it."""
    process = _process(Path(folder), threads, environment)
    try:
        return process.wait()
    except KeyboardInterrupt:  # what `ray.cancel` raises
        process.terminate()
        return process.wait()
    finally:
        _close(process)


def _environment() -> Mapping[str, str]:
    """What a cell must find as it is here: where rows and caches lie, and whether the hub is asked."""
    return {name: os.environ[name] for name in os.environ if name.startswith(("SELECTUNE_", "HF_", "PYTHONPATH"))}


def _process(folder: Path, threads: int, more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A cell's process, in a session of its own, so that Ctrl-C in a terminal reaches the runner only."""
    environment = {**os.environ, **(more or {}), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    with open(folder / LOG, "ab") as log:
        return subprocess.Popen(
            [*_COMMAND, str(folder)], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment,
            start_new_session=True,
        )  # fmt: skip


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
