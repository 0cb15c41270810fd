"""Times a shelf's switch against one forward pass of one sentence: `python benchmarks/shelf.py`.

The model has MiniLM's shape (22.7 M parameters in 103 tensors) and random weights. Switches and passes are interleaved
round by round in one process, so that their ratio holds on a busy machine too; the fastest round and the median count.
`care` is a switch that looks at everything anew, as the first one to a name does; `door` is `using` with the delta in
place already.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from itertools import cycle

import torch
from torch import nn
from transformers import BertConfig, BertModel

import selectune as st
from selectune.delta import Delta


def minilm() -> nn.Module:
    """A model of MiniLM-L6's shape."""
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertModel(config).eval().requires_grad_(False)


def delta_of(model: nn.Module, density: float, seed: int) -> Delta:
    """A delta that moves a share of every tensor."""
    tuned, source = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in tuned.parameters():
        count = max(1, int(parameter.numel() * density))
        places = torch.randint(parameter.numel(), (count,), generator=source).unique()
        parameter.view(-1)[places] += 1
    return st.diff(model, tuned)


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way in each round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.0001, 0.001, 0.01])
    parser.add_argument("--tokens", type=int, default=16, help="length of the sentence")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = minilm()
    sentence = torch.randint(1000, 30000, (1, arguments.tokens))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {arguments.tokens} tokens, "
          f"{arguments.threads} thread(s); ms, fastest round (median)")  # fmt: skip
    print(
        f"{'density':>8s} {'scalars':>8s} {'forward':>15s} {'switch':>15s} {'care':>15s} {'door':>15s}  switch/forward"
    )
    for density in arguments.densities:
        shelf = st.Shelf(model, {name: delta_of(model, density, seed) for seed, name in enumerate("abc")})
        names, turns = cycle("abc"), cycle("abc")

        def switch(names=names) -> None:
            st.switch(model, next(names))

        def care(shelf=shelf, turns=turns) -> None:
            shelf._plans.clear()
            st.switch(model, next(turns))

        def read(shelf=shelf) -> None:
            with shelf.using("c"):
                pass

        with torch.no_grad():
            times = measure({"forward": lambda: model(sentence), "switch": switch}, arguments.rounds)
            st.switch(model, "c")
            times |= measure({"door": read}, arguments.rounds) | measure({"care": care}, max(3, arguments.rounds // 5))
        cells = {name: f"{min(each):7.2f} ({statistics.median(each):5.2f})" for name, each in times.items()}
        size = sum(patch.indices.numel() for patch in delta_of(model, density, 0).patches)
        ratio = min(times["switch"]) / min(times["forward"])
        print(f"{density:8.2%} {size:8d} {cells['forward']:>15s} {cells['switch']:>15s} {cells['care']:>15s} "
              f"{cells['door']:>15s}  {ratio:.2f}", flush=True)  # fmt: skip
        st.switch(model, None)
        for name in shelf.names:
            shelf.remove(name)


if __name__ == "__main__":
    main()
