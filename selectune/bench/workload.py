"""Makes models with random weights from configs, and batches of random tokens, for which nothing is downloaded.

With `data=` the model is a trained one, and the batches are a task's training rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from selectune import tasks
from selectune.bench.configs import CONFIGS
from selectune.errors import ConfigError, ModelError
from selectune.models.bases import LoadedModel, load_model, quiet, resolve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REAL = "glue/stsb"


@dataclass(frozen=True)
class Bench:
    """A model and the shape of a step that is measured on it."""

    model: str
    batch: int = 8
    length: int = 128
    dtype: str = "fp32"
    autocast: str | None = None
    checkpointing: bool = False
    device: str = "cpu"
    seed: int = 6
    data: str = "random"  # or a task, whose rows and trained model are used; "real" is REAL

    def __post_init__(self) -> None:
        for name, value in (("--dtype", self.dtype), ("--autocast", self.autocast)):
            if value is not None and value not in DTYPES:
                raise ConfigError(f"{name} {value}: unknown. Known: {', '.join(DTYPES)}.")
        for name, value in (("--batch", self.batch), ("--length", self.length)):
            if value < 1:
                raise ConfigError(f"{name} {value}: must be at least 1.")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"--device {self.device}: unknown. Known: cpu, cuda.")
        if self.data != "random" and self.model in CONFIGS:
            raise ConfigError(
                f"--data {self.data}: {self.model} has random weights. Real rows need a trained model: --model demo, "
                "or a folder."
            )
        self.task()

    def task(self) -> tasks.Task | None:
        """The task whose rows are used; None for random tokens."""
        return None if self.data == "random" else tasks.get(REAL if self.data == "real" else self.data)


def config_of(name: str) -> Any:
    """The config of a bench model, a local folder, `demo` or a hub id. No weights are read.

    Raises ModelError if it cannot be found.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError("Models need the package `transformers`: pip install 'selectune[hf]'.") from error
    if name in CONFIGS:
        return transformers.AutoConfig.for_model(**CONFIGS[name])
    place = resolve(name)
    where: dict[str, Any] = {} if place.local else {"revision": place.revision or "main"}
    where |= {} if place.gguf is None else {"gguf_file": place.gguf}
    with quiet():
        try:
            return transformers.AutoConfig.from_pretrained(place.location, **where)
        except Exception as error:
            raise ModelError(
                f"No config was found for '{name}': {' '.join(str(error).split())[:200]} Known without a hub: "
                f"{', '.join(CONFIGS)}. A folder with config.json works too."
            ) from error


def file_of(name: str) -> Path | None:
    """The GGUF file that is the whole model, if it is one."""
    return None if name in CONFIGS else resolve(name).file


def is_causal(config: Any) -> bool:
    """Whether the model predicts the next token; all other models get a classification head."""
    named = (getattr(config, "architectures", None) or [""])[0]
    return "CausalLM" in named or (not named and config.model_type in ("llama", "gpt2", "qwen2", "qwen3", "mistral"))


def build(config: Any, dtype: torch.dtype, device: str | torch.device, seed: int = 6) -> nn.Module:
    """A model with random weights in train mode. On the device "meta" it has shapes and no memory."""
    import transformers

    auto = transformers.AutoModelForCausalLM if is_causal(config) else transformers.AutoModelForSequenceClassification
    with quiet(), torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=dtype)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.train()


def prepare(bench: Bench, config: Any | None = None, device: str | None = None) -> nn.Module:
    """The model of a bench as a training step runs it."""
    config = config_of(bench.model) if config is None else config
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < bench.length:
        raise ConfigError(f"--length {bench.length}: {bench.model} takes at most {limit} tokens.")
    model = build(config, DTYPES[bench.dtype], device or bench.device, bench.seed)
    _fill_zeros(model, bench.seed)
    if bench.checkpointing:
        _checkpoint(model)
    return model


def _checkpoint(model: nn.Module) -> None:
    """Switches recomputation of activations on; newer versions of transformers gave the switch another name."""
    for prefix in ("activation", "gradient"):
        switch: Callable[..., Any] | None = getattr(model, f"{prefix}_checkpointing_enable", None)
        if switch is not None:
            switch(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}})
            return
    raise ConfigError(f"--checkpointing: {type(model).__name__} cannot recompute its activations.")


@torch.no_grad()
def _fill_zeros(model: nn.Module, seed: int) -> None:
    """Fills zero vectors with small numbers: biases of trained models are not 0, and PaFi would select all zeros."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1 and not parameter.is_meta and not bool(parameter.any()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def batches(bench: Bench, config: Any, count: int = 4) -> list[dict[str, Tensor]]:
    """Random tokens and labels, the same for every method."""
    generator = torch.Generator().manual_seed(bench.seed)
    shape = (bench.batch, bench.length)
    found = []
    for _ in range(count):
        ids = torch.randint(3, int(config.vocab_size), shape, generator=generator)
        labels = ids if is_causal(config) else torch.randint(0, 2, shape[:1], generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        found.append({name: tensor.to(bench.device) for name, tensor in batch.items()})
    return found


def load_real(bench: Bench) -> LoadedModel:
    """The trained model of a bench in train mode, with the head that its task needs."""
    loaded = load_model(bench.model, cast(tasks.Task, bench.task()).head, bench.seed, dtype=DTYPES[bench.dtype])
    loaded.model.train().to(bench.device)
    if bench.checkpointing:
        _checkpoint(loaded.model)
    return loaded


def real_batches(bench: Bench, tokenizer: Any, count: int) -> list[dict[str, Tensor]]:
    """At most `count` whole batches of the task's training rows, in a seeded order; raises ConfigError if none."""
    task = cast(tasks.Task, bench.task())
    rows = task.encode(tokenizer, tasks.load(task, "train").examples, bench.length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(bench.seed)).tolist()
    count = min(count, len(rows) // bench.batch)
    if count < 1:
        raise ConfigError(f"--batch {bench.batch}: {bench.data} has only {len(rows)} training rows.")
    parts = [order[k * bench.batch : (k + 1) * bench.batch] for k in range(count)]
    found = [task.kind.collate(tokenizer, [rows[i] for i in part]) for part in parts]
    return [{name: tensor.to(bench.device) for name, tensor in batch.items()} for batch in found]


def input_gradients(model: nn.Module) -> None:
    """Nothing is trained, and the gradient runs back to the embeddings' output: the least that a step can cost."""
    model.requires_grad_(False)
    embeddings: Any = cast(Any, model).get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))


@contextlib.contextmanager
def mixed(bench: Bench) -> Iterator[None]:
    """Runs the forward pass under autocast if the bench asks for it."""
    if bench.autocast is None:
        yield
        return
    with torch.autocast(bench.device, dtype=DTYPES[bench.autocast]):
        yield


def loss_of(model: nn.Module, batch: dict[str, Tensor], bench: Bench) -> Tensor:
    """The loss of one forward pass."""
    with mixed(bench):
        return model(**batch).loss
