"""How a row of a transformers architecture is made: from a config class, offline, tiny, without dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from zoo_kit import Call, DoesNotApplyError, Expected, Row, run_plainly, score

VOCABULARY = 64
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZE, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
TEXT |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}

Batch = Callable[[torch.Generator], dict[str, Tensor]]


def hf(
    name: str,
    config: str,
    model: str,
    options: Mapping[str, Any],
    batch: Batch,
    *,
    output: str = "loss",
    expects: Mapping[str, Expected] | None = None,
    **more: Any,
) -> Row:
    """A row: `config(**options)` makes `model`; `output` names what the loss is computed from."""
    made: dict[str, nn.Module] = {}

    def make() -> nn.Module:
        if not made:
            made["model"] = _build(config, model, options)
        return copy.deepcopy(made["model"])

    def loss(model: nn.Module, batch: Any, run: Call) -> Tensor:
        answer = run(model, batch)
        return answer.loss if output == "loss" else score(answer[output])

    return Row(name, make, batch, loss, expects or {}, enter=enter, **more)


def _build(config: str, model: str, options: Mapping[str, Any]) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, config)(**_configs(options))
    _without_dropout(made)
    built = getattr(transformers, model)(made)
    for module in built.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if built._can_set_experts_implementation():
        built.set_experts_implementation("eager")  # the grouped product knows no float64
    return built.double()


def _configs(options: Any) -> dict[str, Any]:
    """Options with (config class, options) pairs made into configs."""
    import transformers

    return {
        key: getattr(transformers, value[0])(**_configs(value[1]))
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict)
        else value
        for key, value in options.items()
    }


def _without_dropout(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _without_dropout(value)
        elif isinstance(value, float) and any(word in name for word in ("drop", "pdrop", "mask_time", "mask_feature")):
            setattr(config, name, 0.0)
    if hasattr(config, "use_cache"):
        config.use_cache = False


def enter(model: Any, setting: str) -> Call:
    """Puts a setting on a model of transformers; what the model says it cannot do does not apply."""
    if setting in ("reentrant", "nonreentrant"):
        if not model.supports_gradient_checkpointing:
            try:
                model.gradient_checkpointing_enable()
            except ValueError as no:
                raise DoesNotApplyError(str(no)) from no
            raise AssertionError("transformers checkpoints a model that says it cannot be")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": setting == "reentrant"})
        assert model.is_gradient_checkpointing
    elif setting == "attention":
        now = model.config._attn_implementation
        if now != "sdpa":
            raise DoesNotApplyError(f"the model has one kind of attention here, {now}")
        model.set_attn_implementation("eager")
        if model.config._attn_implementation != "eager":
            raise DoesNotApplyError(f"the model stays with {model.config._attn_implementation} once it is made")
    elif setting == "bf16" and model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")
    return _call


def _call(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return run_plainly(lambda: model(**batch))


# -- batches


def tokens(draw: torch.Generator, *shape: int, below: int = VOCABULARY) -> Tensor:
    return torch.randint(5, below, shape, generator=draw)


def masked(draw: torch.Generator) -> dict[str, Tensor]:
    """Tokens with a padded end, and labels for all."""
    ids, mask = tokens(draw, 2, 8), torch.ones(2, 8, dtype=torch.int64)
    ids[1, 6:], mask[1, 6:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": tokens(draw, 2, 8)}


def causal(draw: torch.Generator) -> dict[str, Tensor]:
    ids = tokens(draw, 2, 8)
    return {"input_ids": ids, "labels": ids}


def unlabelled(draw: torch.Generator) -> dict[str, Tensor]:
    batch = masked(draw)
    del batch["labels"]
    return batch


def plain_ids(draw: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": tokens(draw, 2, 8)}


def classes(draw: torch.Generator) -> dict[str, Tensor]:
    return {**unlabelled(draw), "labels": torch.randint(0, 2, (2,), generator=draw)}


def pairs(draw: torch.Generator) -> dict[str, Tensor]:
    """A source and a target."""
    return {**unlabelled(draw), "labels": tokens(draw, 2, 6)}


def images(size: int = 16, labelled: bool = True, channels: int = 3) -> Batch:
    def batch(draw: torch.Generator) -> dict[str, Tensor]:
        pixels = torch.randn(2, channels, size, size, generator=draw, dtype=torch.float64)
        labels = {"labels": torch.randint(0, 2, (2,), generator=draw)} if labelled else {}
        return {"pixel_values": pixels, **labels}

    return batch


def together(*parts: Batch) -> Batch:
    return lambda draw: {name: tensor for part in parts for name, tensor in part(draw).items()}


def waves(length: int = 400) -> Batch:
    return lambda draw: {"input_values": torch.randn(2, length, generator=draw, dtype=torch.float64)}
