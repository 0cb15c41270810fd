"""A loop over an accelerator, for a test that launches it in two processes: replicated, resumed, and sharded.

Usage: ranked_accelerate.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp2_prepare_model
from torch import nn

import selectune as st
from selectune.errors import ConfigError
from selectune.integrations.accelerate import register

STEPS, PASSES = 4, 2


class Run:
    """One model in training, in as many processes as were launched."""

    def __init__(self, sharded: bool = False) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 3)).double()
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PASSES)
        if sharded:  # accelerate has no FSDP on the CPU: it is told that the CPU is a GPU
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="size_based_wrap", min_num_params=50
            )
            fsdp2_prepare_model(self.accelerator, model)
        self.tuner = st.attach(model, st.id3(30, STEPS), accumulation_steps=PASSES)
        optimizer = torch.optim.AdamW(self.tuner.parameters(), lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def go(self, *steps: int) -> Run:
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        for step in steps:
            for number in (PASSES * step, PASSES * step + 1):
                rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
                torch.manual_seed(10 * number + rank)
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(rows.chunk(size)[rank]).square().mean())
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.tuner.parameters(), 0.05)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        return self

    def save(self, path: Path) -> None:
        if self.tuner.sharded or self.accelerator.is_main_process:
            self.tuner.save(path)
        self.accelerator.wait_for_everyone()


def main(told: str) -> None:
    folder = Path(told)
    first: Any = Run()
    register(first.accelerator, first.tuner)
    first.go(0, 1).accelerator.save_state(folder / "at 2")
    first.go(2, 3).save(folder / "whole")
    again = Run()
    register(again.accelerator, again.tuner)
    again.accelerator.load_state(str(folder / "at 2"))
    again.go(2, 3).save(folder / "resumed")
    sharded = Run(sharded=True).go(*range(STEPS))
    sharded.save(folder / "sharded")
    try:
        register(sharded.accelerator, sharded.tuner)
    except ConfigError as error:
        if sharded.accelerator.is_main_process:
            (folder / "refused").write_text(str(error), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
