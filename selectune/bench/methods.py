"""How each method is set up on a model: ours through `attach`, peers through their own packages, unchanged."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from selectune.bench.models import trunk_linears
from selectune.errors import ConfigError, ModelError
from selectune.harness.calibration import calibration
from selectune.method import Method
from selectune.recipes import RECIPES
from selectune.schedule import resolve_budget
from selectune.train import attach

LEARNING_RATE = 1e-4
FLOOR, DENSE = "frozen", "full"
EXAMPLES = 16  # single examples, or mini-batches, that a calibrated method gets


@dataclass(frozen=True)
class Plan:
    """What a method is told: how many scalars, over how many steps, and the data it may look at."""

    budget: int | float
    steps: int
    seed: int
    batches: list[dict[str, Tensor]]


@dataclass
class Ready:
    """A method on its model: an optimizer over what it trains, and what can be asked about it."""

    optimizer: torch.optim.Optimizer | None
    selected: Callable[[], int]
    save: Callable[[Path], int]  # writes what would be shipped into a folder: bytes
    selecting: Callable[[], bool] = lambda: False  # whether the coming step selects
    undo: Callable[[], None] | None = None
    model: nn.Module | None = None  # in place of the one that was given
    select_s: list[float] = field(default_factory=list)  # seconds of selections, where a peer's own can be timed
    note: str = ""


def is_ours(name: str) -> bool:
    """Whether a method is trained by selectune; `full` and `frozen` are plain torch."""
    return name.partition("@")[0] in RECIPES and name != DENSE


def check(name: str) -> None:
    """Raises ConfigError for a method that nothing here can set up."""
    base, at, every = name.partition("@")
    if is_ours(name):
        if at and ("every" not in inspect.signature(RECIPES[base].function).parameters or not every.isdigit()):
            raise ConfigError(f"--methods {name}: '@k' selects at every k-th step, which {base} does not take.")
        return
    if name not in PEERS:
        ours = [r for r in RECIPES if r != DENSE]
        raise ConfigError(
            f"--methods {name}: unknown. Known: {', '.join([*PEERS, *ours])}; id3@10 selects at every 10th step."
        )


def needs(name: str) -> str | None:
    """The package and version that a peer comes from; None for ours. ModelError where it is not installed."""
    package = {"lora": "peft", "dora": "peft", "super": "peft", "shira": "peft"}.get(name)
    package = "selective-optimizers" if name.startswith("toolkit-") else package
    if package is None:
        return None
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError as error:
        raise ModelError(
            f"The method {name} is {package}'s, which is not installed: pip install 'selectune[bench]'."
        ) from error


def set_up(name: str, model: nn.Module, plan: Plan) -> Ready:
    """Puts a method on a model: what is timed as its initialisation."""
    check(name)
    return ours(name, model, plan) if is_ours(name) else PEERS[name](model, plan)


def recipe(name: str, budget: int | float, steps: int) -> Method:
    """`id3@10` -> the method, with what its recipe takes of budget and steps."""
    base, _, every = name.partition("@")
    offered: dict[str, Any] = {"budget": budget, "steps": steps, "examples": EXAMPLES, "batches": EXAMPLES}
    if every:
        offered["every"] = int(every)
    takes = inspect.signature(RECIPES[base].function).parameters
    if "temperature" in takes:
        offered["temperature"] = 1.0  # the model's own loss, whatever its outputs are
    return RECIPES[base].function(**{k: v for k, v in offered.items() if k in takes})


def ours(name: str, model: nn.Module, plan: Plan) -> Ready:
    method = recipe(name, plan.budget, plan.steps)
    rows = [{k: v[i] for k, v in b.items()} for b in plan.batches for i in range(len(b["input_ids"]))]
    batch = len(plan.batches[0]["input_ids"])
    rows = [rows[i % len(rows)] for i in range(EXAMPLES * batch)]
    read = calibration(model, method.score, rows, _stacked, batch, plan.seed)
    tuner = attach(model, method, seed=plan.seed, **read)
    return Ready(
        optimizer=_adamw(tuner.parameters()),
        selected=lambda: tuner.selected,
        save=lambda folder: tuner.save(folder / "delta.safetensors").stat().st_size,
        selecting=lambda: tuner.quota > 0,
        undo=tuner.detach,
    )


def _stacked(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def full(model: nn.Module, plan: Plan) -> Ready:
    """Plain full fine-tuning: AdamW over everything."""
    del plan
    total = sum(p.numel() for p in model.parameters())
    return Ready(_adamw(model.parameters()), lambda: total, lambda folder: _bytes_of(model))


def frozen(model: nn.Module, plan: Plan) -> Ready:
    """The floor: nothing is trained, the gradient runs back to the embeddings' output."""
    del plan
    model.requires_grad_(False)
    embeddings: Any = cast(Any, model).get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return Ready(None, lambda: 0, lambda folder: 0, note="forward and input gradients only")


def _peft(make: Callable[[Any, list[str], nn.Module, int], Any]) -> Callable[[nn.Module, Plan], Ready]:
    def start(model: nn.Module, plan: Plan) -> Ready:
        needs("lora")
        peft = importlib.import_module("peft")
        linears = trunk_linears(model)
        budget = resolve_budget(plan.budget, sum(p.numel() for p in model.parameters()))
        adapted = peft.get_peft_model(model, make(peft, list(linears), model, budget))
        trained = [p for p in adapted.parameters() if p.requires_grad]

        def save(folder: Path) -> int:
            adapted.save_pretrained(folder)
            return sum(f.stat().st_size for f in folder.glob("adapter_model*"))

        return Ready(_adamw(trained), lambda: sum(p.numel() for p in trained), save, model=adapted)

    return start


def _lora(peft: Any, names: list[str], model: nn.Module, budget: int, **more: Any) -> Any:
    del model, budget
    return peft.LoraConfig(r=8, lora_alpha=8, target_modules=names, **more)


def _dora(peft: Any, names: list[str], model: nn.Module, budget: int) -> Any:
    return _lora(peft, names, model, budget, use_dora=True)


def _super(peft: Any, names: list[str], model: nn.Module, budget: int) -> Any:
    size = sum(layer.weight.numel() for layer in trunk_linears(model).values())
    return peft.SupertuningConfig(target_modules=names, sparsity=max(0.0, 1 - budget / size))


def _shira(peft: Any, names: list[str], model: nn.Module, budget: int) -> Any:
    one = sum(sum(layer.weight.shape) for layer in trunk_linears(model).values())  # scalars at r = 1
    return peft.ShiraConfig(r=max(1, round(budget / one)), target_modules=names, random_seed=6)


def _toolkit(kind: str) -> Callable[[nn.Module, Plan], Ready]:
    def start(model: nn.Module, plan: Plan) -> Ready:
        needs(f"toolkit-{kind}")
        wrap = importlib.import_module("selective_optimizers.wrap")
        store = importlib.import_module("selective_optimizers.load_store")
        budget = resolve_budget(plan.budget, sum(p.numel() for p in model.parameters()))
        more: dict[str, Any] = {"max_steps": plan.steps, "eps": 1.0, "exp": 2.0} if kind == "id3" else {}
        cls = wrap.get_selective_optimizer(torch.optim.AdamW, kind)
        with contextlib.redirect_stdout(sys.stderr):
            optimizer = cls(_reached(model), lr=LEARNING_RATE, budget=budget, verify=False, **more)
        ready = Ready(optimizer, optimizer.get_budget_used, lambda folder: 0)
        ready.note = "verify=False: its copy of all weights on disk is left out"
        update = optimizer.update_chosen

        def timed() -> None:
            began = time.perf_counter()
            update()
            _wait(model)
            ready.select_s.append(time.perf_counter() - began)

        def save(folder: Path) -> int:
            store.write_summary_to_disk(str(folder / "summary.pt"), optimizer.get_summary(model))
            return (folder / "summary.pt").stat().st_size

        if kind == "id3":
            optimizer.update_chosen = timed
            ready.selecting = lambda: True
        ready.save = save
        return ready

    return start


def _reached(model: nn.Module) -> list[nn.Parameter]:
    """The toolkit asks for a gradient of every parameter it is given; those that never get one are left out."""
    unused = getattr(model, "_bench_unreached", set())
    return [p for name, p in model.named_parameters() if name not in unused]


def note_unreached(model: nn.Module, backward: Callable[[], None]) -> None:
    """Runs one backward pass and remembers which parameters get no gradient in it."""
    backward()
    model._bench_unreached = {n for n, p in model.named_parameters() if p.grad is None}  # pyright: ignore
    model.zero_grad(set_to_none=True)


PEERS: dict[str, Callable[[nn.Module, Plan], Ready]] = {
    DENSE: full,
    FLOOR: frozen,
    "lora": _peft(_lora),
    "dora": _peft(_dora),
    "super": _peft(_super),
    "shira": _peft(_shira),
    "toolkit-id3": _toolkit("id3"),
    "toolkit-pafi": _toolkit("pafi"),
    "toolkit-bitfit": _toolkit("bitfit"),
}


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=LEARNING_RATE, weight_decay=0.0)


def _bytes_of(model: nn.Module) -> int:
    return sum(math.prod(p.shape) * p.element_size() for p in model.parameters())


def _wait(model: nn.Module) -> None:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
