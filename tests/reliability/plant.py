"""Plants one bug at a time, a line of the source, and runs the test that has to see it.

Usage: plant.py NUMBER...    prints a line of JSON for each: {"bug": 1, "passed": 0, "failed": 1, "said": "..."}
       plant.py 0            the same tests without a bug

Each bug has a process of its own, forked from one that has imported everything. A function gets its new code in place,
so whoever has imported it runs the new code too. A child that runs two ranks plants the bug in them as well.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Bug:
    """A line of a function, what it becomes, and the test that has to see it. `ranks`: in two processes."""

    what: str
    where: str  # module:qualified name
    line: str
    becomes: str
    test: str
    ranks: bool = False


# In the order of reliability.md 2.
BUGS = {
    1: Bug(
        "weight decay on all weights",
        "selectune.train.support.ledger:Ledger.write_weights",
        "self.store.write_slots(self.pages, self.values())",
        "self.store.write_slots(self.pages, self.values()); [t.weight.mul_(0.999) for t in self.tensors]",
        "tests/train/test_invariants.py::test_weight_decay_leaves_unselected_weights_at_one",
    ),
    2: Bug(
        "ties at the edge are all taken",
        "selectune.select:GlobalCollector._best",
        "level = level[self._order(scores[level], positions[level])[: self.quota - near.numel()]]",
        "level = level[self._order(scores[level], positions[level])]",
        "tests/test_select.py::test_ties_go_to_the_earlier_tensor_and_the_lower_index",
    ),
    3: Bug(
        "the step is missing from the state",
        "selectune.train.saved.state:load_into",
        'tracker.load_state(info["step"],',
        "tracker.load_state(0,",
        "tests/train/test_rollback.py::test_every_step_can_be_gone_back_to[id3]",
    ),
    4: Bug(
        "a score that is not finite is ranked",
        "selectune.train.choose.scan:_finite",
        "return bool(",
        "return True or bool(",
        "tests/train/test_loops.py::test_non_finite_scores_select_nothing_and_carry_the_quota",
    ),
    5: Bug(
        "files are written in place",
        "selectune.files.durable:_write_in",
        "handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL",
        "temp = name; handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC",
        "tests/files/test_crashes.py::test_a_file_is_the_old_or_the_new[True]",
    ),
    6: Bug(
        "a folder needs no manifest",
        "selectune.files.manifest:read_manifest",
        "if not path.is_file():",
        "if not path.is_file(): return Manifest(folder, {}, {'step': 2})\n    if False:",
        "tests/files/test_crashes.py::test_a_checkpoint_is_whole_or_incomplete_and_the_one_before_is_kept",
    ),
    7: Bug(
        "the shapes of the base are not checked",
        "selectune.delta.live.base_check:check_structure",
        "problems, hints = [], []",
        "return",
        "tests/delta/test_delta_wrong_base.py::test_wrong_base_is_refused[same entries in another shape]",
    ),
    8: Bug(
        "a negative index wraps around",
        "selectune.delta.file.parts:_check_patch",
        "int(patch.indices[0]) < 0 or ",
        "",
        "tests/delta/test_delta_roundtrip.py::test_parts_that_do_not_fit_are_refused[index negative]",
    ),
    9: Bug(
        "an entry inherits the momentum of the one that was dropped",
        "selectune.train.step_hooks:StepHooks._inform",
        "if new is None:",
        "if True:",
        "tests/train/test_loops.py::test_dropped_entries_of_repeat_lose_their_optimizer_state",
    ),
    10: Bug(
        "a rank scores its own gradient",
        "selectune.train.world:World.mean",
        "dist.all_reduce(total, group=self._group)",
        "return total",
        "tests/train/test_ranks.py::test_two_ranks_select_what_one_process_selects[id3]",
        ranks=True,
    ),
    11: Bug(
        "the gradient of a new entry is not unscaled and clipped as the others are",
        "selectune.train.step:Step.select_short",
        "scale = scale_between(then, offsets.grad)",
        "scale = 1.0",
        "tests/train/test_loops.py::test_clipping_reaches_the_entries_of_a_short_window",
    ),
    12: Bug(
        "a strided tensor is written through a copy",
        "selectune.bits:scatter_entries",
        "tensor.index_put_(torch.unravel_index(flat, tensor.shape), values.to(tensor.dtype))",
        "tensor.reshape(-1).index_copy_(0, flat, values.to(tensor.dtype))",
        "tests/delta/test_delta_roundtrip.py::test_diff_turns_one_model_into_the_other",
    ),
    13: Bug(
        "revert subtracts what apply had added",
        "selectune.delta.live.apply:undo",
        "olds[w.name][1], w.old)",
        "(w.old - (w.old - olds[w.name][1])).to(w.old.dtype), w.old)",
        "tests/delta/test_delta_roundtrip.py::test_diff_turns_one_model_into_the_other",
    ),
    14: Bug(
        "moments are given back in another order than their entries",
        "selectune.train.saved.state:load_into",
        "page = Page(flat, slot, base,",
        "page = Page(flat, slot.flip(0), base,",
        "tests/train/test_rollback.py::test_every_step_can_be_gone_back_to[id3]",
    ),
    15: Bug(
        "the old values are not compared with their digest",
        "selectune.delta.live.base_check:check_base",
        "under)) != part.base_digest:",
        "under)) != part.base_digest and False:",
        "tests/delta/test_delta_wrong_base.py::test_wrong_base_is_refused[1 ulp in a selected weight]",
    ),
    16: Bug(
        "only what one rank holds of a sharded weight is saved",
        "selectune.train.support.shards:Part.read",
        "dist.all_reduce(sent, group=self._group)",
        "pass",
        "tests/train/test_fsdp.py::test_a_saved_delta_makes_the_trained_model_of_a_plain_one",
        ranks=True,
    ),
}


def plant(bug: Bug) -> None:
    """Gives the function its new code. Raises if the line is not there once."""
    import importlib

    module, _, name = bug.where.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    function = inspect.unwrap(found)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(bug.line) != 1:
        raise LookupError(f"{bug.where} has {source.count(bug.line)} times: {bug.line}")
    _, _, body = source.replace(bug.line, bug.becomes).partition("def ")  # without its decorators
    made: dict[str, Any] = {}
    future = "from __future__ import annotations\n"
    exec(compile(f"{future}def {body}", bug.where, "exec"), function.__globals__, made)
    function.__code__ = made[function.__name__].__code__


@dataclass
class Seen:
    """A pytest plugin: what became of the tests."""

    passed: int = 0
    failed: int = 0
    said: list[str] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed
        self.failed += report.failed
        if report.failed:
            self.said.append(str(getattr(report.longrepr, "reprcrash", report.longrepr))[-300:])


QUIETLY = ("-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")


def seen(tests: list[str]) -> Seen:
    import pytest

    found = Seen()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        pytest.main([*QUIETLY, *tests], plugins=[found])
    return found


def in_a_child(number: int, tests: list[str]) -> None:
    """Runs the tests in a forked process, with the bug of this number planted; 0 is none."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.environ["PLANTED_BUG"] = str(number)  # for the ranks, which are spawned
        if number:
            plant(BUGS[number])
        found = seen(tests)
        told = {"bug": number, "passed": found.passed, "failed": found.failed, "said": " ".join(found.said)}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
    finally:
        os._exit(0)


def main(*numbers: str) -> None:
    os.chdir(ROOT)
    os.environ["TRIALS"] = "0"  # of drawn runs between ranks
    import hypothesis  # noqa: F401  (imported once, here, for all children)
    import pytest  # noqa: F401
    import torch

    import selectune
    import selectune.train.attach  # noqa: F401

    torch.set_num_threads(1)
    for number in map(int, numbers):
        chosen = [BUGS[number]] if number else [BUGS[n] for n in map(int, numbers) if n]
        in_a_child(number, list(dict.fromkeys(bug.test for bug in chosen)))


if __name__ == "__main__":
    main(*sys.argv[1:])
elif __name__ == "__mp_main__" and os.environ.get("PLANTED_BUG", "0") != "0":
    plant(BUGS[int(os.environ["PLANTED_BUG"])])
