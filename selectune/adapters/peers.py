"""Adapters from peft, unchanged: their config, how they are put on and taken off, and AdaLoRA's work at each step."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from selectune.adapters.injected import Injected
from selectune.adapters.kinds import KINDS, Spec
from selectune.adapters.roles import Role, of_kind, targets
from selectune.errors import ConfigError, ModelError
from selectune.quantised import quantised_weights

ADAPTER = "default"  # the name that peft gives an adapter
LAST_WITHOUT_CACHE = (0, 21, 2)  # peft up to here asks transformers for `past_key_values` only
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip


class Ranks:
    """AdaLoRA's state between two steps, for checkpoints: the ranks, and the averages by which they move."""

    _AVERAGES = ("exp_avg_ipt", "exp_avg_unc")

    def __init__(self, tuner: Any) -> None:
        self._tuner = tuner

    def state_dict(self) -> dict[str, Any]:
        """{"info": JSON values, "tensors": {key: tensor}}: two floats for each of the adapter's scalars."""
        kept = {part: getattr(self._tuner.rankallocator, part) for part in self._AVERAGES}
        tensors = {f"{part}.{name}": t.detach().clone() for part, found in kept.items() for name, t in found.items()}
        return {"info": {"rank_pattern": self._tuner.peft_config[ADAPTER].rank_pattern}, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, on the same adapter."""
        allocator, device = self._tuner.rankallocator, next(self._tuner.model.parameters()).device
        self._tuner.peft_config[ADAPTER].rank_pattern = state["info"]["rank_pattern"]
        for key, tensor in state["tensors"].items():
            part, _, name = key.partition(".")
            if part not in self._AVERAGES:
                raise ConfigError(f'AdaLoRA keeps {", ".join(self._AVERAGES)}; the state has "{key}".')
            getattr(allocator, part)[name] = tensor.to(device, copy=True)
            allocator.ipt[name] = torch.zeros_like(tensor, device=device)  # it is written before it is read


def put_on(
    model: nn.Module,
    spec: Spec,
    found: Sequence[Role],
    seed: int,
    steps: int | None,
    names: Sequence[str] | None = None,
) -> Injected:
    """Put an adapter of peft on a model. `names`: the linear layers to adapt, in place of those of `targets`."""
    peft = package()
    _check_quantised(spec, model)
    config = config_of(peft, spec, model, found, seed, steps, names)
    if KINDS[spec.kind].wraps:
        return _wrapped(peft, model, config)
    before = set(vars(model))

    def take_off(fold: bool) -> None:
        for parent, name, layer in list(_tuner_layers(model)):
            if fold:
                layer.merge()
            parent._modules[name] = layer.get_base_layer()
        for name in set(vars(model)) - before:
            delattr(model, name)
        if penalty is not None:
            penalty.remove()

    penalty = None
    try:
        with _quietly():
            tuner = peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, ADAPTER)
            tuner._cast_adapter_dtype(adapter_name=ADAPTER, autocast_adapter_dtype=True)  # fp32 on a half model
    except (TypeError, ValueError) as error:
        take_off(False)
        raise ConfigError(f"peft cannot put {spec} on {type(model).__name__}: {error}") from error
    if spec.options.get("init") == "normal":
        _draw_b(model)
    if spec.kind == "adalora":
        for name, parameter in model.named_parameters():
            if ".ranknum." in name:  # a counter, which peft leaves trainable on the device "meta"
                parameter.requires_grad_(False)
        penalty = _with_orthogonality(model, config)
    moves = steps is not None and spec.kind == "adalora"
    after, ranks = (tuner.update_and_allocate, Ranks(tuner)) if moves else (None, None)
    return Injected(model, lambda: take_off(False), lambda: take_off(True), after, ranks)


def package() -> Any:
    """peft, or a ModelError that says how to install it."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ModelError("LoRA and its kin come from the package `peft`: pip install 'selectune[peft]'.") from error


def config_of(
    peft: Any, spec: Spec, model: nn.Module, found: Sequence[Role], seed: int, steps: int | None,
    names: Sequence[str] | None = None,
) -> Any:  # fmt: skip
    """The config of peft for a spec."""
    o = spec.options
    more: dict[str, Any] = {}
    if "targets" in o:
        more["target_modules"] = list(names) if names is not None else targets(model, str(o["targets"]), found)
    if spec.kind in ("lora", "dora", "loraplus", "adalora"):
        more |= {"lora_alpha": o["alpha"], "lora_dropout": o["dropout"]}
        more |= _adalora(o, steps) if spec.kind == "adalora" else {"r": o["r"], "use_dora": spec.kind == "dora"}
    if spec.kind == "shira":
        more |= {"r": o["r"], "random_seed": seed}
    if spec.kind == "super":
        more |= {"sparsity": o["sparsity"], "select_top": o["largest"]}
    if spec.kind == "ia3":
        last = [role.name for role in of_kind(found, "ffn2")]
        keys = [role.name for role in of_kind(found, "key", "value", "qkv")]
        more |= {"target_modules": [*keys, *last], "feedforward_modules": last}
    if spec.kind in ("lora", "dora", "loraplus", "adalora", "ia3"):
        more["fan_in_fan_out"] = _transposed(model, more["target_modules"])
    if spec.kind == "ln":
        more["target_modules"] = norms(model)
    if KINDS[spec.kind].wraps:
        more |= {"num_virtual_tokens": o["tokens"], "task_type": _task_type(model)}
        _check_virtual(spec, model)
    if spec.kind in ("prompt", "ptuning"):
        own: Any = model
        more |= {"token_dim": own.get_input_embeddings().embedding_dim, "num_layers": own.config.num_hidden_layers}
        more["num_attention_heads"] = own.config.num_attention_heads
    if spec.kind == "prefix" and o["projection"]:
        more |= {"prefix_projection": True, "encoder_hidden_size": o["hidden"]}
    if spec.kind == "ptuning":
        more["encoder_hidden_size"] = o["hidden"]
    return getattr(peft, str(KINDS[spec.kind].peft))(**more)


def norms(model: nn.Module) -> list[str]:
    """Names of the layer norms: modules with a weight whose class has `Norm` in its name."""
    return [n for n, m in model.named_modules() if "Norm" in type(m).__name__ and hasattr(m, "weight")]


def two_rates(model: nn.Module, lr: float, ratio: float, weight_decay: float) -> torch.optim.Optimizer:
    """LoRA+'s AdamW: B at `ratio` times the rate of A, through peft."""
    package()
    create = importlib.import_module("peft.optimizers").create_loraplus_optimizer
    return create(model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio, loraplus_weight_decay=weight_decay)


def state_of(model: nn.Module, spec: Spec) -> dict[str, Tensor]:
    """The trained tensors by name; for sparse adapters peft's own state, which has their positions too."""
    found = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    if spec.kind in ("shira", "super"):
        found = package().get_peft_model_state_dict(model, adapter_name=ADAPTER)
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in found.items()}


def _transposed(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether one of the layers is GPT-2's Conv1D, whose weight is (in, out)."""
    modules = dict(model.named_modules())
    return any(type(modules[name]).__name__ == "Conv1D" for name in names)


def _adalora(o: Mapping[str, Any], steps: int | None) -> dict[str, Any]:
    """Ranks move between the steps `tinit` and `steps - tfinal`; without steps they stay."""
    total = steps or 4
    begin, end = int(o["begin"] * total), max(1, math.ceil(o["end"] * total))
    if steps is not None and begin >= total - end:
        raise ConfigError(
            f"adalora: begin={o['begin']} and end={o['end']} leave none of {total} steps in which ranks could move. "
            "Lower one of them, or train longer."
        )
    if o["start"] < o["r"]:
        raise ConfigError(f"adalora: start={o['start']} is below r={o['r']}; ranks begin at start and end at r.")
    return {
        "init_r": o["start"],
        "target_r": o["r"],
        "tinit": begin if steps else 0,
        "tfinal": end if steps else 1,
        "deltaT": max(1, total // 100),
        "orth_reg_weight": o["orth"],
        "total_step": total,
    }


@torch.no_grad()
def _draw_b(model: nn.Module) -> None:
    """Draw B from N(0, 0.02^2), so that scores of weight times gradient do not tie at 0."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name.split("."):
            parameter.normal_(std=0.02)


def _with_orthogonality(model: nn.Module, config: Any) -> Any:
    """Add AdaLoRA's penalty on P and Q to the loss. peft's own model does that, but we inject only its layers."""

    def add(module: nn.Module, args: Any, output: Any) -> None:
        del args
        if isinstance(getattr(output, "loss", None), Tensor):
            output.loss = output.loss + config.orth_reg_weight * _orthogonality(module)

    return model.register_forward_hook(add)


def _orthogonality(model: nn.Module) -> Tensor:
    """The mean of |A A^T - I| and |B^T B - I| (Frobenius) over all matrices: arXiv 2303.10512, equation 4."""
    found = []
    for module in model.modules():
        a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if isinstance(a, nn.ParameterDict) and isinstance(b, nn.ParameterDict):
            a, b = a[ADAPTER], b[ADAPTER]
            found += [a @ a.T, b.T @ b]
    return torch.stack([torch.linalg.norm(m - torch.eye(len(m), device=m.device, dtype=m.dtype)) for m in found]).mean()


def _tuner_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    layer_of = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    for path, module in model.named_modules():
        if isinstance(module, layer_of):
            parent, _, name = path.rpartition(".")
            yield model.get_submodule(parent), name, module


def _wrapped(peft: Any, model: nn.Module, config: Any) -> Injected:
    """Virtual tokens: peft wraps its model around ours. It also copies the head; we put the original head back."""
    trainable = {p: p.requires_grad for p in model.parameters()}
    try:
        with _quietly():
            around = peft.get_peft_model(model, config, adapter_name=ADAPTER)
    except RuntimeError as error:  # such as a quantised head, which peft would train
        raise ConfigError(f"peft cannot put virtual tokens on {type(model).__name__}: {error}") from error
    saved = importlib.import_module("peft.utils.other").ModulesToSaveWrapper
    for path, module in list(model.named_modules()):
        if isinstance(module, saved):
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent)._modules[name] = cast(Any, module).original_module
    for parameter, was in trainable.items():
        parameter.requires_grad_(was)
    return Injected(around, lambda: None)


def _check_quantised(spec: Spec, model: nn.Module) -> None:
    """Refuses what peft computes from numbers that a quantised weight does not hand out."""
    kinds = {q.stored.kind for q in quantised_weights(model).values()}
    without = {"super": ("",), "dora": ("bitsandbytes", "gguf"), "adalora": ("bitsandbytes",)}.get(spec.kind, ())
    if odd := sorted(kind for kind in kinds if kind.startswith(without)):
        raise ConfigError(
            f"peft's {spec.kind} does not work on weights that are quantised as {odd[0]}. Take lora, an adapter of "
            "another kind, or a base in full precision."
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _check_virtual(spec: Spec, model: nn.Module) -> None:
    """Refuse a prefix on a trunk that takes no keys and values; peft would notice in the first forward pass only."""
    trunk = getattr(model, "base_model", model)
    takes = inspect.signature(trunk.forward).parameters
    renamed = "cache" in takes and "past_key_values" not in takes  # transformers 5.24
    if spec.kind == "prefix" and renamed and _numbers(version := str(package().__version__)) <= LAST_WITHOUT_CACHE:
        raise ConfigError(
            f"peft {version} hands a prefix over as past_key_values, which transformers 5.24 renamed to cache. Install "
            "transformers<5.24 or a newer peft; prompt and ptuning put virtual tokens before the input instead."
        )
    if spec.kind == "prefix" and not renamed and "past_key_values" not in takes:
        raise ConfigError(
            f"prefix gives every layer keys and values from outside, which {type(trunk).__name__} does not take. "
            "prompt and ptuning put virtual tokens before the input instead."
        )


def _task_type(model: nn.Module) -> str:
    name = type(model).__name__
    for ending, task in _TASKS.items():
        if name.endswith(ending):
            return task
    raise ConfigError(f"Virtual tokens need a model with a head; {name} is none of *{', *'.join(_TASKS)}.")


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide two warnings of peft that our users cannot act on: an old property's name, and the class of norms."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*Unsupported layer type.*Norm.*", category=UserWarning)
        yield
