"""A model that FSDP2 shards trains as under DistributedDataParallel, bit for bit, and as one process on all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fsdp_kit import METHODS, STEPS, Net, Run
from ranks_kit import in_ranks

import selectune as st
from selectune.errors import DeltaError
from selectune.train import read_state, write_state

CASES = [(name, "") for name in METHODS] + [
    ("id3", "dropout"),
    ("id3", "passes, short at the end"),
    ("id3", "keeps whole weights"),
    ("id3", "checkpointing, whole head"),
    ("chosen again", "passes, clip, dropout"),
    ("SpIEL-AG", "passes, evaluated"),
    ("id3", "listed, dropout"),
    ("chosen again", "in parts, checkpointing"),
]


def both_ways(rank: int) -> list[dict[str, Any]]:
    return [
        {way: Run(rank, way, name, setting).take(*range(STEPS)).answer() for way in ("ddp", "fsdp")}
        for name, setting in CASES
    ]


def resumed(rank: int, folder: Path) -> list[Any]:
    """Goes on from the states of two ranks and of one process, sharded and replicated; what it is given is saved."""
    sgd = torch.optim.SGD
    run = Run(rank, "fsdp", "id3", optimizer=sgd).take(0, 1, 2)
    state = run.tuner.state_dict()
    if rank == 0:
        write_state(folder / "state of two", state)
    paths: list[Any] = [run.take(3, 4, 5).tuner.save(folder / "never stopped")]
    for way, start in (("fsdp", "state of two"), ("ddp", "state of two"), ("fsdp", "state of one")):
        dist.barrier()
        again = Run(rank, way, "id3", optimizer=sgd)
        again.tuner.load_state_dict(read_state(folder / start))
        again.take(3, 4, 5).tuner.verify()
        if way == "fsdp" or rank == 0:
            again.tuner.save(folder / f"{way} from {start}")
    try:
        run.tuner.save(folder / "a file" / "below")
    except DeltaError as error:
        paths.append(str(error))
    return paths


def all_of_it(rank: int, folder: Path) -> list[Any]:
    return [resumed(rank, folder), both_ways(rank)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("states")
    (found / "a file").touch()
    write_state(found / "state of one", one(0, 1, 2).tuner.state_dict())
    return found


@pytest.fixture(scope="module")
def ranks(folder) -> list[list[Any]]:
    found = in_ranks(2, all_of_it, folder, seconds=900)
    for answers in found:
        assert isinstance(answers, list), answers
    return found


def one(*steps: int) -> Run:
    return Run(0, "one", "id3", optimizer=torch.optim.SGD).take(*steps)


def equal(mine: Any, theirs: Any) -> bool:
    return mine.keys() == theirs.keys() and all(np.array_equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{name}, {setting}".strip(", ") for name, setting in CASES])
def test_sharded_training_has_the_bits_of_replicated_training_and_the_support_of_one_process(ranks, case):
    (ddp, fsdp), other = ranks[0][1][case].values(), ranks[1][1][case]["fsdp"]
    alone = Run(0, "one", *CASES[case]).take(*range(STEPS)).answer()
    assert fsdp["supports"] == other["supports"] == ddp["supports"] == alone["supports"]
    for theirs in (other, ddp):
        assert np.array_equal(fsdp["offsets"], theirs["offsets"])
        assert equal(fsdp["weights"], theirs["weights"])
        assert fsdp["state"][0] == theirs["state"][0]
        assert equal(fsdp["state"][1], theirs["state"][1])
        assert fsdp["file"] == theirs["file"]
        assert fsdp["verified"] == theirs["verified"]
    for name, weight in fsdp["weights"].items():
        np.testing.assert_allclose(weight, alone["weights"][name], rtol=1e-9, atol=1e-12)
    assert fsdp["verified"] == alone["verified"]


def test_a_saved_delta_makes_the_trained_model_of_a_plain_one(ranks):
    found, plain = ranks[0][1][0]["fsdp"], Net()
    delta = st.Delta.from_bytes(found["file"])
    delta.apply(plain)
    for name, weight in plain.named_parameters():
        assert np.array_equal(weight.detach().numpy(), found["weights"][name])
    assert delta.verify(Net(), full=True).ok


def test_a_state_goes_on_under_other_numbers_of_processes(ranks, folder):
    whole = (folder / "never stopped" / "delta.safetensors").read_bytes()
    for way in ("fsdp", "ddp"):
        assert (folder / f"{way} from state of two" / "delta.safetensors").read_bytes() == whole
    alone = one()
    alone.tuner.load_state_dict(read_state(folder / "state of two"))
    for mine, saved in (
        (alone.take(3, 4, 5), "never stopped"),
        (one(*range(STEPS)), "fsdp from state of one"),
    ):
        theirs = st.load(folder / saved)
        assert {name: flat.tolist() for name, flat in theirs.support.items()} == mine.supports[-1]
        for patch, other in zip(theirs.patches, mine.tuner.delta().patches, strict=True):
            torch.testing.assert_close(patch.values, other.values, rtol=1e-9, atol=1e-12)


def test_the_first_rank_writes_and_a_failure_is_that_of_all(ranks, folder):
    for path, failure in (answers[0] for answers in ranks):
        assert path == folder / "never stopped" / "delta.safetensors"
        assert "a file" in failure
