"""Two or more processes on gloo, each of which runs one function; what they return, or the error that each raised."""

from __future__ import annotations

import contextlib
import os
import queue
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from selectune.train.choose import shares

SMALL, FEW = shares.SMALL, shares.FEW


class OneDiedError(Exception):
    """A rank ended without an answer; those of the others are in `answers`."""

    def __init__(self, answers: dict[int, Any]) -> None:
        super().__init__(f"only ranks {sorted(answers)} answered")
        self.answers = answers


def in_ranks(world: int, work: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
    """`work(rank, *args)` of every rank of a gloo group; an exception is returned as (class name, message)."""
    context = mp.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "meeting")
        ranks = [context.Process(target=_run, args=(r, world, file, answers, work, args)) for r in range(world)]
        for rank in ranks:
            rank.start()
        found: dict[int, Any] = {}
        try:
            until = time.monotonic() + seconds
            while len(found) < world and time.monotonic() < until:
                with contextlib.suppress(queue.Empty):
                    rank, answer = answers.get(timeout=1)
                    found[rank] = answer
                    continue
                if all(r in found or not process.is_alive() for r, process in enumerate(ranks)):
                    break
        finally:
            for rank in ranks:
                rank.join(5)
                rank.kill()
    if len(found) < world:
        raise OneDiedError(found)
    return [found[rank] for rank in range(world)]


def exchange(setting: str) -> None:
    """How the ranks tell each other of gradients: lists ("listed") and parts ("in parts") even of small tensors."""
    shares.SMALL = 1 if "listed" in setting or "in parts" in setting else SMALL
    shares.FEW = 1 if "listed" in setting else FEW


def _run(rank: int, world: int, file: str, answers: Any, work: Callable[..., Any], args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        answer: Any = work(rank, *args)
    except Exception as error:  # noqa: BLE001  (whatever it is, the test shows it)
        answer = (type(error).__name__, str(error))
    answers.put((rank, answer))
    answers.close()
    answers.join_thread()
    if isinstance(answer, tuple):
        os._exit(1)  # a group whose collectives are broken may wait for each other at its end
    dist.destroy_process_group()
