"""Scope: which tensors may be selected, which are trained whole, and which stay out.

Patterns are shell patterns on parameter names (`*` crosses dots): "*.bias", "encoder.layer.11.*". A pattern that begins
with @ is a role: it stands for a block's names in different model families (`ROLES`).
"""

from __future__ import annotations

import fnmatch
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from selectune.errors import ScopeError
from selectune.internals import is_sharded, without_dispatch
from selectune.quantised import Quantised, quantised_weights

log = logging.getLogger("selectune")
OWN = "selectune_"  # prefix of all parameters that a tuner puts on a model
VALUES = OWN + "values"  # the name of the trainable vector on an attached model
BIASES = "*bias"  # names whose last component is `bias` or ends in `_bias`
CROSS_ATTENTION = "@cross_attention"  # a decoder's attention to the encoder, and the layer norm of that block
LINEAR = "@linear"  # the weights of linear layers, whatever their names
LORA = "*lora_*"  # the tensors of peft's LoRA and its kin
VALUE, OUTPUT, UP, DOWN = "@value", "@attention_output", "@ffn_up", "@ffn_down"
COUPLED = "@coupled"  # all four: what makes and what reads the heads of attention and the channels of an FFN

ROLES = {
    CROSS_ATTENTION: (
        "*.EncDecAttention.*", "*decoder.block.*.layer.1.layer_norm.*",  # T5 and relatives: sublayer 1 of a block
        "*.encoder_attn.*", "*.encoder_attn_layer_norm.*",  # BART, Marian, mBART, Pegasus, M2M100, Whisper
        "*.cross_attn.*", "*.cross_attn_layer_norm.*",  # ProphetNet
        "*.crossattention.*", "*.ln_cross_attn.*",  # BERT and GPT-2 as decoders
    ),
    LINEAR: (),  # found by the kind of module
    VALUE: (  # Llama and BART; DistilBERT; BERT; DeBERTa-v2; T5
        "*.v_proj.weight", "*.v_lin.weight", "*.self.value.weight", "*.value_proj.weight", "*Attention.v.weight",
    ),
    OUTPUT: (
        "*.o_proj.weight", "*attn.out_proj.weight", "*.out_lin.weight", "*.attention.output.dense.weight",
        "*Attention.o.weight", "*.attn.c_proj.weight",  # GPT-2
    ),
    UP: (
        "*.up_proj.weight", "*.fc1.weight", "*.lin1.weight", "*.intermediate.dense.weight",
        "*.DenseReluDense.wi.weight", "*.DenseReluDense.wi_1.weight", "*.c_fc.weight",
    ),
    DOWN: (
        "*.down_proj.weight", "*.fc2.weight", "*.lin2.weight", "*[0-9].output.dense.weight",
        "*.DenseReluDense.wo.weight", "*.mlp.c_proj.weight",
    ),
}  # fmt: skip
ROLES[COUPLED] = tuple(itertools.chain(*(ROLES[role] for role in (VALUE, OUTPUT, UP, DOWN))))


def is_own(name: str) -> bool:
    """Whether a tuner gave a parameter this name."""
    return name.rpartition(".")[2].startswith(OWN)


def patterns(value: str | Iterable[str]) -> tuple[str, ...]:
    """One pattern or many, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


@dataclass(frozen=True)
class Scope:
    """Patterns of tensors that entries are selected from, and of tensors trained whole, outside the budget.

    Only floating tensors with requires_grad=True are eligible, so frozen tensors stay out (to train LoRA
    or adapter tensors, freeze the rest, as peft does). A quantised weight of linear layers has no such mark: it is
    eligible unless the model has a frozen floating tensor, since then its base is frozen. Tied tensors count once,
    under their first name; a pattern may match any of their names.

    >>> import torch, selectune as st
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> [t.name for t in st.Scope(exclude="*.bias").find(model).tensors]
    ['0.weight', '1.weight']
    """

    include: Sequence[str] | str = ("*",)
    exclude: Sequence[str] | str = ()
    train_fully: Sequence[str] | str = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "train_fully"):
            object.__setattr__(self, name, patterns(getattr(self, name)))
            for pattern in getattr(self, name):
                if not isinstance(pattern, str) or not pattern:
                    raise ScopeError(f"{name}= takes patterns on parameter names, got {pattern!r}.")
                if pattern.startswith("@") and pattern not in ROLES:
                    raise ScopeError(f"{name}= names an unknown role '{pattern}'. Known: {', '.join(ROLES)}.")

    def find(self, model: nn.Module, *, loaded: bool = True) -> Found:
        """The tensors of a model that this scope selects from and those it trains whole, checked.

        `loaded=False`: the model has shapes and no weights yet, so nothing is asked about its memory.
        """
        names, packed = _names(model), quantised_weights(model)
        linear = _linear(model)
        frozen = any(p.is_floating_point() and not p.requires_grad for p, _ in names if id(p) not in packed)
        whole: list[ScopedTensor] = []
        scoped: list[ScopedTensor] = []
        matched: set[str] = set()
        for parameter, aliases in names:
            matched |= {p for p in (*self.include, *self.exclude, *self.train_fully) if _matches(aliases, (p,), linear)}
            quantised = packed.get(id(parameter))
            if quantised is not None and (frozen or not quantised.linear):
                continue
            if parameter.is_complex() and _matches(aliases, self.train_fully, linear):
                raise ScopeError(
                    f'The parameter "{aliases[0]}" is complex, and only real floating tensors are trained. Take it out '
                    "of train_fully=."
                )
            if quantised is None and not (parameter.requires_grad and parameter.is_floating_point()):
                continue
            if not self.include and _matches(aliases, self.exclude, linear):
                continue
            if _matches(aliases, self.train_fully, linear):
                if quantised is not None:
                    raise ScopeError(
                        f'The weight "{aliases[0]}" is quantised, so it cannot be trained whole: offsets of single '
                        "entries lie beside it. Take it out of train_fully=."
                    )
                whole.append(ScopedTensor(len(whole), aliases, parameter))
            elif _matches(aliases, self.include, linear) and not _matches(aliases, self.exclude, linear):
                padding, turned = _padding(model, parameter, aliases), _turned(model, aliases)
                scoped.append(ScopedTensor(len(scoped), aliases, parameter, padding, turned, quantised))
        for pattern in (*self.include, *self.train_fully):
            if pattern not in matched:
                hint = _HINTS.get(pattern, "")
                raise ScopeError(
                    f"The pattern '{pattern}' matches no parameter of {type(model).__name__}. {hint}"
                    f"Its parameters are named like: {_some(names)}."
                )
        for pattern in self.exclude:
            if pattern not in matched:
                log.warning("exclude: '%s' matches no parameter, so it excludes nothing.", pattern)
        _warn_of_left_out(model, names, packed, frozen)
        if not scoped and not whole:
            raise ScopeError(
                f"The scope include={list(self.include)}, exclude={list(self.exclude)} leaves no trainable floating "
                f"tensor of {type(model).__name__}; parameters with requires_grad=False do not count. "
                f"Its parameters are named like: {_some(names)}."
            )
        plain = [tensor for tensor in (*scoped, *whole) if tensor.quantised is None]
        for tensor in plain if loaded else ():
            _check(tensor)
        for tensor in scoped:
            _check_owners(model, tensor)
        if loaded:
            _check_overlap(plain)
        return Found(tuple(scoped), tuple(whole))


@dataclass(frozen=True)
class ScopedTensor:
    """One tensor in scope: its number in the total order, all its names, and entries that get no gradient."""

    index: int
    names: tuple[str, ...]
    parameter: nn.Parameter
    padding: range = range(0)  # flat entries of an embedding's padding row: never selected
    transposed: bool = False  # it is stored as (inputs, outputs)
    quantised: Quantised | None = None  # how its numbers are stored, if offsets lie beside it

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def used(self) -> nn.Parameter:
        """The parameter that modules hold while they compute."""
        return self.parameter

    @property
    def weight(self) -> Tensor:
        """The parameter's numbers, as a plain tensor over the same memory, whose use is not seen by a tuner.

        Those of a quantised weight are made anew every time.
        """
        return plain(self.used) if self.quantised is None else self.quantised.now()

    @property
    def form(self) -> nn.Parameter | Quantised:
        """Shape, size, device, and the dtype of what is trained, without reading a number."""
        return self.parameter if self.quantised is None else self.quantised

    @property
    def eligible(self) -> int:
        return self.form.numel() - len(self.padding)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the tensor as a matrix: outputs and inputs of a linear layer."""
        size, first = self.form.numel(), self.form.shape[0] if self.form.ndim else 1
        rows, columns = first, size // max(1, first)
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self, stored: Tensor) -> Tensor:
        """Numbers in the tensor's shape, as its matrix of rows and columns."""
        rows, columns = self.shape
        return stored.reshape(columns, rows).T if self.transposed else stored.reshape(rows, columns)

    def stored(self, matrix: Tensor) -> Tensor:
        """Numbers of a matrix of rows and columns, in the tensor's shape."""
        return (matrix.T if self.transposed else matrix).reshape(self.form.shape)

    def matches(self, wanted: Sequence[str]) -> bool:
        """Whether one of its names fits one of the patterns."""
        return _matches(self.names, wanted)


@dataclass(frozen=True)
class Found:
    """The tensors that a scope matches, in the model's order: those selected from, and those trained whole."""

    tensors: tuple[ScopedTensor, ...]
    whole: tuple[ScopedTensor, ...]

    @property
    def eligible(self) -> int:
        return sum(t.eligible for t in self.tensors)


def plain(parameter: nn.Parameter) -> Tensor:
    """A plain tensor over a parameter's memory."""
    with without_dispatch():
        return parameter.detach()


_HINTS = {
    BIASES: "This model has no bias vectors, so BitFit has nothing to train. ",
    CROSS_ATTENTION: "This model has no decoder that attends to an encoder, as T5, BART and Marian have. ",
    LORA: "Put LoRA on the model first: put_on(model, 'lora:r=8', freeze=False), on the command line --on lora:r=8. ",
    COUPLED: 'Its blocks are of no family that is known here; give the names of their linear layers, or "@linear". ',
}


def _names(model: nn.Module) -> list[tuple[nn.Parameter, tuple[str, ...]]]:
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameters[id(parameter)] = parameter
        names.setdefault(id(parameter), []).append(name)
    return [(parameters[key], tuple(aliases)) for key, aliases in names.items()]


def _matches(names: Sequence[str], wanted: Sequence[str], linear: Set[str] = frozenset()) -> bool:
    plain = [one for pattern in wanted for one in ROLES.get(pattern, (pattern,))]
    if LINEAR in wanted and not linear.isdisjoint(names):
        return True
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in plain)


def _linear(model: nn.Module) -> set[str]:
    """Names of the weights of linear layers."""
    found = model.named_modules(remove_duplicate=False)
    return {f"{name}.weight".lstrip(".") for name, module in found if isinstance(module, nn.Linear) or _conv1d(module)}


def _conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer that stores the transpose."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _turned(model: nn.Module, names: Sequence[str]) -> bool:
    owner, _, last = names[0].rpartition(".")
    return last == "weight" and _conv1d(model.get_submodule(owner))


def _some(names: Sequence[tuple[nn.Parameter, tuple[str, ...]]]) -> str:
    shown = [aliases[0] for _, aliases in names[:6]]
    return ", ".join(shown) + (f" ... ({len(names)} in all)" if len(names) > 6 else "") or "(none)"


def _warn_of_left_out(
    model: nn.Module,
    names: Sequence[tuple[nn.Parameter, tuple[str, ...]]],
    packed: Mapping[int, Quantised],
    frozen: bool,
) -> None:
    """Warns of complex parameters and quantised layers, which cannot be selected from."""
    odd = [aliases[0] for parameter, aliases in names if parameter.requires_grad and parameter.is_complex()]
    if odd:
        log.warning(
            "%d complex parameters are left out of the selection and frozen (%s): only real floating tensors are "
            "selected from.", len(odd), ", ".join(odd[:3]),
        )  # fmt: skip
    scopable = {id(p) for p, _ in names if (q := packed.get(id(p))) is not None and q.linear}
    left = [
        name for name, module in model.named_modules()
        if (type(module).__module__.startswith(_QUANTISED) or any(id(p) in packed for p in module._parameters.values()))
        and not any(id(p) in scopable for p in module._parameters.values())
    ]  # fmt: skip
    if left:
        log.warning(
            "%d quantised layers are left out of the selection and frozen (%s): their weights are no floating "
            "tensors.", len(left), ", ".join(left[:3]),
        )  # fmt: skip
    if frozen and scopable:
        log.warning(
            "%d quantised weights are left out of the selection, since floating parameters of the model are frozen: "
            "take those out of the scope by name instead (Scope(exclude=...)).", len(scopable),
        )  # fmt: skip


_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torchao.quantization", "bitsandbytes.nn")


def _padding(model: nn.Module, parameter: nn.Parameter, names: Sequence[str]) -> range:
    if len(names) != 1 or not names[0].endswith("weight"):
        return range(0)
    owner = model.get_submodule(names[0].rpartition(".")[0])
    row = getattr(owner, "padding_idx", None)
    if not isinstance(owner, nn.Embedding | nn.EmbeddingBag) or row is None:
        return range(0)
    width = parameter.shape[1]
    return range(row * width, (row + 1) * width)


def _check(tensor: ScopedTensor) -> None:
    parameter = tensor.parameter
    why = None
    if isinstance(parameter, UninitializedParameter):
        why = "it has no shape before the model's first forward; run one batch through the model first"
    elif parameter.is_meta:
        why = "it is on the meta device; load its weights first"
    elif parameter.layout.__str__() != "torch.strided":
        why = f"its layout is {parameter.layout}; only strided tensors can be written in place"
    elif type(parameter) is not nn.Parameter and type(parameter.data) is not Tensor and not is_sharded(parameter):
        why = f"it is a {type(parameter.data).__name__}; attach before quantising"
    elif not parameter.is_leaf:
        why = "it is not a leaf tensor"
    elif parameter.numel() and 0 in [s for s, d in zip(parameter.stride(), parameter.shape, strict=True) if d > 1]:
        why = "it is expanded: several entries share one memory cell"
    elif getattr(parameter, "_backward_hooks", None) or getattr(parameter, "_post_accumulate_grad_hooks", None):
        why = (
            "a hook is registered on it, which would wait for a dense gradient that is never formed; "
            "remove the hook (a score of your own can exclude entries)"
        )
    if why:
        raise ScopeError(f'The parameter "{tensor.name}" cannot be trained in place: {why}. Exclude it.')


def _check_owners(model: nn.Module, tensor: ScopedTensor) -> None:
    for name in tensor.names:
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, torch.jit.ScriptModule):
            raise ScopeError(
                f'"{name}" belongs to a scripted or traced module, whose code runs outside of Python, so uses of the '
                "weight cannot be seen. Exclude it, or attach before torch.jit.script or torch.jit.trace."
            )
        if getattr(owner, "max_norm", None) is not None and isinstance(owner, nn.Embedding | nn.EmbeddingBag):
            raise ScopeError(
                f'"{name}" belongs to an {type(owner).__name__} with max_norm={owner.max_norm}, which rewrites rows of '
                "the table in forward, so entries outside the support would move. Exclude it, or set max_norm=None."
            )


def _check_overlap(tensors: Sequence[ScopedTensor]) -> None:
    spans = []
    for tensor in tensors:
        p = tensor.parameter
        if p.numel() and not is_sharded(p):
            extent = 1 + sum((d - 1) * s for d, s in zip(p.shape, p.stride(), strict=True))
            spans.append((str(p.device), p.data_ptr(), p.data_ptr() + extent * p.element_size(), tensor.name))
    spans.sort()
    for (device, _, end, name), (other, start, _, second) in itertools.pairwise(spans):
        if device == other and start < end:
            raise ScopeError(
                f'The parameters "{name}" and "{second}" share memory without being one Parameter. '
                "Tie them as one Parameter, or exclude one of them."
            )
