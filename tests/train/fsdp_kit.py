"""A small model in training: sharded by FSDP2, replicated by DistributedDataParallel, or in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from ranks_kit import exchange
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import selectune as st

STEPS, ROWS, WORDS, WIDTH = 6, 8, 11, 8


def batch(number: int) -> Tensor:
    return torch.randint(0, WORDS, (ROWS, 5), generator=torch.Generator().manual_seed(number))


class Net(nn.Module):
    """Tied embeddings, rows that two ranks cannot share evenly, and tensors of one row, of which rank 1 holds none."""

    def __init__(self, seed: int = 1, drop: float = 0.0, repeats: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        wide = torch.float64
        self.words = nn.Embedding(WORDS, WIDTH, dtype=wide)
        self.into = nn.Linear(WIDTH, 13, dtype=wide)
        self.norm = nn.LayerNorm(13, dtype=wide)
        self.up = nn.Linear(13, WIDTH, dtype=wide)
        self.head = nn.Linear(WIDTH, WORDS, bias=False, dtype=wide)
        self.head.weight = self.words.weight
        self.one = nn.Linear(WORDS, 1, dtype=wide)
        self.drop, self.repeats = nn.Dropout(drop), repeats
        self.config = SimpleNamespace(model_type="net")  # so that a delta names the model's class

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = checkpoint(self.block, x, use_reentrant=False) if self.repeats else self.block(x)
        return self.one(torch.tanh(self.head(x)))

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(self.norm(self.into(self.drop(x)))))


METHODS: dict[str, Callable[[], Any]] = {
    "id3": lambda: st.id3(60, STEPS),
    "id3 every third step": lambda: st.id3(60, STEPS, every=3),
    "chosen again": lambda: st.repeat_d3(30, STEPS),
    "one shot by gradients": lambda: st.static_d3(40),
    "by magnitude": lambda: st.pafi(40),
    "by lifted magnitude": lambda: st.lift(40, STEPS),
    "at random": lambda: st.random(40),
    "SpIEL-AG": lambda: st.spiel_ag(24, STEPS, every=2, window=1),
}


def model_of(setting: str) -> Any:
    model = Net(drop=0.2 if "dropout" in setting else 0.0, repeats="checkpointing" in setting)
    return model.float() if "amp" in setting else model


def shares(number: int, ranks: int, setting: str) -> list[Tensor]:
    """Each rank's rows of a batch."""
    rows = batch(number)
    if "uneven" not in setting:
        return list(rows.chunk(ranks))
    return list(rows.split([ROWS - sum(range(1, ranks)), *range(ranks - 1, 0, -1)]))


def method_of(name: str, setting: str) -> Any:
    method = METHODS[name]()
    return replace(method, scope=st.Scope(train_fully="one.*")) if "whole head" in setting else method


def sharded(model: Any, setting: str = "", **more: Any) -> Any:
    """The norm is a unit of its own, so that its weight is gone when the layer behind it runs backward."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    more["reshard_after_forward"] = "keeps whole weights" not in setting
    if "whole head" in setting:
        more["ignored_params"] = set(model.one.parameters())
    for part in (model.into, model.norm):
        fully_shard(part, mesh=mesh, **more)
    return fully_shard(model, mesh=mesh, **more)


def whole(model: nn.Module) -> dict[str, Any]:
    named = [(name, p.detach()) for name, p in model.named_parameters() if "selectune" not in name]
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).numpy().copy() for name, p in named}


class Run:
    """One model in training, in one of three ways: "fsdp", "ddp" or "one", which takes the rows of all `ranks`."""

    def __init__(
        self, rank: int, way: str, name: str, setting: str = "", optimizer: Any = torch.optim.AdamW, ranks: int = 2
    ) -> None:
        self.rank, self.way, self.setting = rank, way, setting
        self.ranks = ranks if way == "one" else dist.get_world_size()
        self.passes = 2 if "passes" in setting else 1
        exchange(setting)
        self.model = model_of(setting)
        if way == "fsdp":
            sharded(self.model, setting)
        self.around: Any = DistributedDataParallel(self.model) if way == "ddp" and "late" in setting else self.model
        self.tuner = st.attach(self.around, method_of(name, setting), seed=3, accumulation_steps=self.passes)
        if way == "ddp" and "late" not in setting:
            self.around = DistributedDataParallel(self.model)
        self.optimizer = optimizer(self.tuner.parameters(), lr=1e-2, weight_decay=0.0)
        self.supports: list[Any] = []

    def loss(self, number: int, rank: int) -> Tensor:
        torch.manual_seed(1000 * number + rank)
        rows = shares(number, self.ranks, self.setting)[rank]
        with torch.autocast("cpu", torch.bfloat16, enabled="amp" in self.setting):
            squares = self.around(rows).float().square() if "amp" in self.setting else self.around(rows).square()
        share = len(rows) * self.ranks / ROWS if "uneven" in self.setting else 1.0  # of the mean over all rows
        return share * squares.mean() / self.passes

    def take(self, *steps: int) -> Run:
        for step in steps:
            passes = 1 if "short" in self.setting and step + 1 == STEPS else self.passes
            for one in range(passes):
                with self.unsynced() if one + 1 < passes else contextlib.nullcontext():
                    ranks = range(self.ranks) if self.way == "one" else (self.rank,)
                    (sum(self.loss(10 * step + one, rank) for rank in ranks) / len(ranks)).backward()
            if "clip" in self.setting:
                nn.utils.clip_grad_norm_(self.tuner.parameters(), 0.05)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.supports.append({key: flat.tolist() for key, flat in self.tuner.support.items()})
            if "evaluated" in self.setting:
                with torch.no_grad():
                    self.around(batch(7))
                self.tuner.verify()
        return self

    @contextlib.contextmanager
    def unsynced(self) -> Iterator[None]:
        if self.way == "ddp":
            with self.around.no_sync():
                yield
        elif self.way == "fsdp":
            self.model.set_requires_gradient_sync(False)
            yield
            self.model.set_requires_gradient_sync(True)
        else:
            yield

    def answer(self) -> dict[str, Any]:
        verified = self.tuner.verify()
        state = self.tuner.state_dict()
        tensors = {key: tensor.numpy().copy() for key, tensor in state["tensors"].items()}
        return {
            "supports": self.supports,
            "offsets": self.tuner.parameters()[0].detach().numpy().copy(),
            "weights": whole(self.model),
            "state": (state["info"], tensors),
            "verified": str(verified),
            "file": self.tuner.delta().to_bytes(),
        }
