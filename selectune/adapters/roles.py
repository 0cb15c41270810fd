"""The roles of modules in a transformer: query, key, value, attention output, FFN1, FFN2, and the end of an FFN.

A role map is {pattern: role}. `#` in a pattern means the layer's number, and a pattern matches the end of a module's
name, so one map serves every head on a trunk. Roles of attention to an encoder begin with `cross.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from selectune.errors import ConfigError

LINEAR = ("query", "key", "value", "qkv", "attention_output", "gate", "ffn1", "ffn2")
"""Roles of linear layers; `qkv` is a fused query, key and value, `gate` is the gate of a gated FFN."""

LINEARS = "linears"
"""`targets=`: every linear layer outside the head; it needs no role map."""

ENDS = ("ffn_norm", "ffn_end")
"""The norm behind the FFN's residual (post-LN models); the module that returns the sum of FFN and residual (pre-LN)."""

ROLES = (*LINEAR, *(f"cross.{role}" for role in LINEAR[:5]), *ENDS)
RoleMap = Mapping[str, str]


@dataclass(frozen=True)
class Role:
    """One module with its role, its layer, and its stack ("" if the model has only one)."""

    name: str
    kind: str  # one of LINEAR or ENDS
    layer: int
    stack: str = ""  # "encoder" or "decoder" in a model that has both
    cross: bool = False  # attends to the encoder
    block: str = field(default="", repr=False)  # the name of the layer's own module

    @property
    def place(self) -> tuple[str, int]:
        """Stack and layer."""
        return self.stack, self.layer


def _block(prefix: str, **names: str) -> RoleMap:
    return {f"{prefix}.{name}" if name else prefix: role for role, name in names.items()}


def _bert(query: str = "query", key: str = "key", value: str = "value") -> RoleMap:
    return _block(
        "encoder.layer.#",
        **{role: f"attention.self.{name}" for role, name in {"query": query, "key": key, "value": value}.items()},
        attention_output="attention.output.dense", ffn1="intermediate.dense", ffn2="output.dense",
        ffn_norm="output.LayerNorm",
    )  # fmt: skip


def _t5(stack: str) -> dict[str, str]:
    block, ffn = f"{stack}.block.#", 1 if stack == "encoder" else 2
    names = {"query": "q", "key": "k", "value": "v", "attention_output": "o"}
    found = {f"{block}.layer.0.SelfAttention.{name}": role for role, name in names.items()}
    if stack == "decoder":
        found |= {f"{block}.layer.1.EncDecAttention.{name}": f"cross.{role}" for role, name in names.items()}
    dense = {"wi": "ffn1", "wi_0": "gate", "wi_1": "ffn1", "wo": "ffn2"}
    found |= {f"{block}.layer.{ffn}.DenseReluDense.{name}": role for name, role in dense.items()}
    return {**found, f"{block}.layer.{ffn}": "ffn_end"}


def _bart(**end: str) -> RoleMap:
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "attention_output"}
    found: dict[str, str] = {}
    for stack in ("encoder", "decoder"):
        found |= {f"{stack}.layers.#.self_attn.{name}": role for name, role in names.items()}
        if stack == "decoder":
            found |= {f"decoder.layers.#.encoder_attn.{name}": f"cross.{role}" for name, role in names.items()}
        found |= _block(f"{stack}.layers.#", ffn1="fc1", ffn2="fc2", **end)
    return found


_BERT = _bert()
_T5 = _t5("encoder") | _t5("decoder")
_LLAMA = _block(
    "layers.#", query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj",
    attention_output="self_attn.o_proj", gate="mlp.gate_proj", ffn1="mlp.up_proj", ffn2="mlp.down_proj", ffn_end="",
)  # fmt: skip

MAPS: dict[str, RoleMap] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "deberta": {
        **_block("encoder.layer.#", qkv="attention.self.in_proj"),
        **{name: role for name, role in _BERT.items() if ".self." not in name},
    },
    "deberta-v2": _bert("query_proj", "key_proj", "value_proj"),
    "distilbert": _block(
        "transformer.layer.#", query="attention.q_lin", key="attention.k_lin", value="attention.v_lin",
        attention_output="attention.out_lin", ffn1="ffn.lin1", ffn2="ffn.lin2", ffn_norm="output_layer_norm",
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gpt2": _block(
        "h.#", qkv="attn.c_attn", attention_output="attn.c_proj", ffn1="mlp.c_fc", ffn2="mlp.c_proj", ffn_end=""
    ),
    **dict.fromkeys(("t5", "mt5"), _T5),
    "bart": _bart(ffn_norm="final_layer_norm"),
    "mbart": _bart(ffn_end=""),
}  # fmt: skip
"""{model_type of a config: its role map}."""


def find(model: nn.Module, roles: RoleMap | None = None) -> tuple[Role, ...]:
    """The modules of a transformer that have a role, in the model's order.

    `roles`: your own map, for an architecture that `MAPS` lacks. Raises ConfigError for an architecture without a map,
    for a map that matches nothing, and for unknown roles.

    >>> import torch
    >>> block = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4), "up": torch.nn.Linear(4, 8)})
    >>> model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([block])})
    >>> find(model, {"blocks.#.q": "query", "blocks.#.up": "ffn1"})[0]
    Role(name='blocks.0.q', kind='query', layer=0, stack='', cross=False)
    """
    chosen = _map_of(model) if roles is None else _checked(roles)
    both = {"encoder", "decoder"} <= {pattern.split(".")[0] for pattern in chosen}
    compiled = [(_regex(pattern), pattern.split(".")[0], role) for pattern, role in chosen.items()]
    found = [
        Role(
            name, role.removeprefix("cross."), int(hit[1]), first if both else "", role.startswith("cross."),
            name[: hit.end(1)],
        )
        for name, _ in model.named_modules()
        for regex, first, role in compiled
        if (hit := regex.search(name))
    ]  # fmt: skip
    if not found:
        raise ConfigError(
            f"The role map matches no module of {type(model).__name__}. Its patterns: {', '.join(list(chosen)[:4])}; "
            f"the model's modules: {', '.join(_some(model))}. # means the layer's number."
        )
    return tuple(found)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """{name: layer} of every linear layer outside the head. It needs no role map."""
    heads = head_names(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in heads and not any(name.startswith(f"{h}.") for h in heads)
    }


def targets_of(text: str) -> tuple[str, ...]:
    """The roles in `targets=`: `all`, or some of them joined by +."""
    return LINEAR if text == "all" else tuple(text.split("+"))


def targets(model: nn.Module, text: str, found: Sequence[Role]) -> list[str]:
    """Names of the layers that `targets=` selects; raises ConfigError where there are none."""
    if text == LINEARS:
        return list(linears(model))
    names = [role.name for role in of_kind(found, *targets_of(text))]
    if not names:
        raise ConfigError(
            f"targets={text} names no module of {type(model).__name__}, which has: "
            f"{', '.join(sorted({role.kind for role in found}))}."
        )
    return names


def head_names(model: nn.Module) -> set[str]:
    """Module names of the task head: the classifier, or the layer that computes the logits of words."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {name for name, module in model.named_modules() if output is not None and module is output}
    return heads | {name for name, _ in model.named_modules() if name.split(".")[-1] in ("classifier", "score")}


def width(module: nn.Module) -> int:
    """The output width of a linear layer: of nn.Linear, or of GPT-2's Conv1D, whose weight is transposed."""
    if isinstance(module, nn.Linear):
        return module.out_features  # a quantised weight may have another shape
    weight: Any = module.weight
    return int(getattr(module, "nf", weight.shape[0]))


def input_width(module: nn.Module) -> int:
    """The input width of such a layer."""
    weight: Any = module.weight
    return module.in_features if isinstance(module, nn.Linear) else weight.numel() // width(module)


def of_kind(found: Sequence[Role], *kinds: str) -> Iterator[Role]:
    """The roles of these kinds."""
    return (role for role in found if role.kind in kinds)


def _map_of(model: nn.Module) -> RoleMap:
    config: Any = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    if kind not in MAPS:
        raise ConfigError(
            f"No role map is known for {type(model).__name__} (model_type '{kind or 'none'}'), which would say which "
            "modules are query, key, value, attention output and FFN. Give one as roles={'layers.#.attn.q': 'query', "
            f"...}}, with # for the layer's number and the roles {', '.join(ROLES)}. Its modules: "
            f"{', '.join(_some(model))}. "
            f"Known: {', '.join(MAPS)}."
        )
    return MAPS[kind]


def _checked(roles: RoleMap) -> RoleMap:
    for pattern, role in roles.items():
        if role not in ROLES:
            raise ConfigError(f"roles= gives '{pattern}' the role {role!r}. Roles: {', '.join(ROLES)}.")
        if pattern.count("#") != 1:
            raise ConfigError(f"The pattern '{pattern}' in roles= needs one #, which means the layer's number.")
    return roles


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(r"(?:^|\.)" + re.escape(pattern).replace(r"\#", r"(\d+)") + "$")


def _some(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if not list(module.children())][:6]
