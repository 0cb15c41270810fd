"""The kinds of adapters: their options and defaults, their tensors, and their notation (`lora:r=16,alpha=32`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from selectune import spec
from selectune.adapters.injected import Injected, Wanted
from selectune.adapters.own import adamix, bottleneck, dylora, hadamard, increlora, low_rank, pasta, sora, unipelt
from selectune.adapters.roles import LINEAR, LINEARS
from selectune.delta import is_marked
from selectune.errors import ConfigError, did_you_mean

Value = int | float | bool | str


@dataclass(frozen=True)
class Option:
    """A default, or a function of the other options that gives it; the allowed values in words, and a test of them."""

    default: Value | Callable[[Mapping[str, Any]], Value]
    allowed: str
    test: Callable[[Any], bool]


@dataclass(frozen=True)
class Kind:
    """One kind of adapter, as `selectune methods` lists it."""

    name: str
    summary: str
    source: str
    options: Mapping[str, Option]
    lr: float  # a rate to begin with, when all of it is trained with AdamW
    lr_source: str
    peft: str | None = None  # the class of peft's config; None: the adapter is ours
    own: Callable[[Wanted], Injected] | None = None  # what puts an adapter of ours on
    merges: bool = False  # whether it can be folded into the base's weights
    wraps: bool = False  # whether peft needs a model of its own around the base
    on: bool = True  # whether `--on` takes it; the others are ways to train, not adapters of their own
    markers: tuple[str, ...] = field(kw_only=True)  # a tensor belongs to it if a component of its name is one of these


@dataclass(frozen=True)
class Spec:
    """A kind with a value for each of its options."""

    kind: str
    options: Mapping[str, Value]

    def __str__(self) -> str:
        return spec.join(self.kind, self.options)


def parse(text: str) -> Spec:
    """Read `kind` or `kind:option=value,option=value`; raises ConfigError that lists the allowed ones.

    >>> str(parse("lora:r=16"))
    'lora:r=16,alpha=16.0,dropout=0.0,targets=all,init=zero'
    >>> parse("pfeiffer:reduction=8,init=zero").options["reduction"]
    8
    """
    return make(*spec.split(text))


def make(kind: str, given: Mapping[str, Any]) -> Spec:
    """A Spec with defaults for the options that are not given; raises ConfigError for unknown or forbidden ones."""
    if kind not in KINDS:
        raise ConfigError(f"Unknown adapter '{kind}'. Known: {', '.join(KINDS)}.{did_you_mean(kind.lower(), KINDS)}")
    options = KINDS[kind].options
    for name in given:
        if name not in options:
            raise ConfigError(
                f"{kind} takes no option {name}. It takes: {', '.join(options) or 'none'}.{did_you_mean(name, options)}"
            )
    full: dict[str, Any] = {}
    for name, option in options.items():
        default = option.default(full) if callable(option.default) else option.default
        value = given.get(name, default)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(default, str) and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # ids=7
        if type(value) is not type(default) or not option.test(value):
            raise ConfigError(f"{kind}: {name}={value!r} is not allowed; {name} is {option.allowed}.")
        full[name] = value
    return Spec(kind, full)


def for_tokenizer(spec: Spec, tokenizer: Any, texts: int) -> Spec:
    """The spec with what only a tokenizer knows: the ids of PASTA's special tokens around so many texts of a row.

    Raises ConfigError if the tokenizer puts none into a row.
    """
    if spec.options.get("ids") != pasta.AUTO:
        return spec
    found = pasta.specials(tokenizer, texts)
    ids = "+".join(str(id) for id in dict.fromkeys(found))
    return make(spec.kind, {**spec.options, "ids": ids, "count": spec.options["count"] or len(found)})


def belongs(kind: str, name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter of a known kind.

    >>> belongs("lora", "layer.0.query.lora_A.default.weight"), belongs("lora", "layer.0.query.base_layer.weight")
    (True, False)
    """
    return is_marked(name, KINDS[kind].markers)


def _count(default: int | Callable[[Mapping[str, Any]], Value], high: int = 65_536) -> Option:
    return Option(default, f"an int from 1 to {high:,}", lambda value: 1 <= value <= high)


def _number(default: float | Callable[[Mapping[str, Any]], Value], low: float, high: float, allowed: str) -> Option:
    return Option(default, allowed, lambda value: math.isfinite(value) and low <= value < high)


def _one_of(default: str, *choices: str) -> Option:
    return Option(default, f"one of {', '.join(choices)}", lambda value: value in choices)


def _flag(default: bool) -> Option:
    return Option(default, "true or false", lambda value: True)


def _known_ids(value: str) -> bool:
    return value == pasta.AUTO or all(part.isdecimal() for part in value.split("+"))


def _known_targets(value: str) -> bool:
    return value in ("all", LINEARS) or set(value.split("+")) <= set(LINEAR)


_TARGETS = Option("all", f"all, {LINEARS}, or roles joined by +: {', '.join(LINEAR)}", _known_targets)
_RANK = {
    "r": _count(8),
    "alpha": _number(lambda full: float(full["r"]), 0.0, 1e6, "a number of at least 0"),
    "dropout": _number(0.0, 0.0, 1.0, "a number from 0 to below 1"),
    "targets": _TARGETS,
}
_LOW_RANK = {**_RANK, "init": _one_of("zero", *bottleneck.INITS)}  # of B
_OURS = {name: option for name, option in _LOW_RANK.items() if name != "dropout"}
_GROWING = {
    "begin": _number(0.1, 0.0, 1.0, "a share of the steps"),
    "end": _number(0.3, 0.0, 1.0, "a share of the steps"),
}


def _bottleneck(reduction: int, activation: str, init: str, scale: float, norms: bool) -> dict[str, Option]:
    return {
        "reduction": _count(reduction),
        "activation": _one_of(activation, *bottleneck.ACTIVATIONS),
        "init": _one_of(init, *bottleneck.INITS),
        "scale": _number(scale, -1e6, 1e6, "a finite number"),
        "norms": _flag(norms),
    }


_LORA = "Hu et al. 2021, arXiv 2106.09685"
_MATRICES = ("lora_A", "lora_B")
_SITES, _OWN_MATRICES = (bottleneck.NAME,), (low_rank.NAME,)
_VIRTUAL = ("prompt_encoder",)
_TOKENS = {"tokens": _count(20, 4096)}
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "lora", "W + (alpha / r) B A, A drawn, B = 0", _LORA, _LOW_RANK,
            4e-4, "RoBERTa-base on STS-B in the authors' code", "LoraConfig", merges=True, markers=_MATRICES,
        ),
        Kind(
            "dora", "m (W + B A) / |W + B A|, a magnitude for each output", "Liu et al. 2024, arXiv 2402.09353",
            _LOW_RANK, 4e-4, "as lora", "LoraConfig", merges=True, markers=(*_MATRICES, "lora_magnitude_vector"),
        ),
        Kind(
            "adalora", "W + P diag(E) Q; ranks are moved to where they count", "Zhang et al. 2023, arXiv 2303.10512",
            {
                **_RANK,
                "start": _count(lambda full: full["r"] * 3 // 2),
                "orth": _number(0.5, 0.0, 1e6, "a number of at least 0"),
                **_GROWING,
            },
            2.2e-3, "DeBERTaV3-base on STS-B in the authors' code", "AdaLoraConfig", merges=True,
            markers=(*_MATRICES, "lora_E", "ranknum"),
        ),
        Kind(
            "loraplus", "lora, B learns `ratio` times as fast as A", "Hayou, Ghosh, Yu 2024, arXiv 2402.12354",
            {**_LOW_RANK, "ratio": _number(16.0, 1.0, 1e6, "a number of at least 1")},
            1e-4, "that of A, RoBERTa-base on MNLI in the authors' code; B gets 16 times that, there 20",
            "LoraConfig", merges=True, on=False, markers=_MATRICES,
        ),
        Kind(
            "prefix", "keys and values of virtual tokens in every layer; projection=false is P-tuning v2",
            "Li, Liang 2021, arXiv 2101.00190; Liu et al. 2022, arXiv 2110.07602",
            {**_TOKENS, "projection": _flag(False), "hidden": _count(512)},
            5e-3, "RoBERTa-large on RTE in P-tuning v2's code", "PrefixTuningConfig", wraps=True, markers=_VIRTUAL,
        ),
        Kind(
            "prompt", "virtual tokens before the input", "Lester, Al-Rfou, Constant 2021, arXiv 2104.08691", _TOKENS,
            1e-2, "ours; the paper's 0.3 is for Adafactor", "PromptTuningConfig", wraps=True, markers=_VIRTUAL,
        ),
        Kind(
            "ptuning", "virtual tokens out of a small network (P-tuning v1)", "Liu et al. 2021, arXiv 2103.10385",
            {**_TOKENS, "hidden": _count(128)},
            1e-3, "peft's guide, RoBERTa-large on MRPC", "PromptEncoderConfig", wraps=True, markers=_VIRTUAL,
        ),
        Kind(
            "ia3", "factors, 1 at the start, on keys, values and the FFN's hidden layer",
            "Liu et al. 2022, arXiv 2205.05638", {}, 3e-3, "the authors' code, there for Adafactor", "IA3Config",
            merges=True, markers=("ia3_l",),
        ),
        Kind(
            "ln", "the layer norms", "Zhao et al. 2023, arXiv 2312.11420", {}, 1e-3, "ours",
            "LNTuningConfig", merges=True, markers=("ln_tuning_layers",),
        ),
        Kind(
            "shira", "r (m + n) random entries of each matrix", "Bhardwaj et al. 2024, arXiv 2406.13175",
            {"r": _count(8), "targets": _TARGETS}, 5e-4, "as the selective methods", "ShiraConfig", merges=True,
            markers=("shira_weight",),
        ),
        Kind(
            "super", "the largest entries of each matrix", "arXiv 2607.09287",
            {
                "sparsity": _number(0.99, 0.0, 1.0, "a number from 0 to below 1"),
                "largest": _flag(True),
                "targets": _TARGETS,
            },
            5e-4, "as the selective methods", "SupertuningConfig", merges=True,
            markers=("supertuning_values", "supertuning_indices"),
        ),
        Kind(
            "houlsby", "bottlenecks after attention and after the FFN; layer norms are trained too",
            "Houlsby et al. 2019, arXiv 1902.00751", _bottleneck(16, "swish", "normal", 1.0, True),
            3e-4, "BERT on MRPC in the authors' code", own=bottleneck.houlsby, markers=_SITES,
        ),
        Kind(
            "pfeiffer", "a bottleneck after the FFN", "Pfeiffer et al. 2021, arXiv 2005.00247",
            _bottleneck(16, "relu", "normal", 1.0, False), 5e-4, "within arXiv 2408.14470's grid",
            own=bottleneck.pfeiffer, markers=_SITES,
        ),
        Kind(
            "parallel", "a bottleneck beside the FFN, times 4", "He et al. 2022, arXiv 2110.04366",
            _bottleneck(2, "relu", "zero", 4.0, False), 1e-4, "RoBERTa-base on SST-2 in the authors' code",
            own=bottleneck.parallel, markers=_SITES,
        ),
        Kind(
            "series", "a bottleneck at the end of the FFN, before the residual is added",
            "Hu et al. 2023, arXiv 2304.01933", _bottleneck(16, "relu", "zero", 1.0, False),
            3e-4, "LLaMA-7B in the authors' code", own=bottleneck.series, markers=_SITES,
        ),
        Kind(
            "hadamard", "a factor, 1 at the start, and a shift for each output of self-attention",
            "Chen et al. 2023, arXiv 2407.11033", {"norms": _flag(False)}, 3e-3, "as ia3",
            own=hadamard.put_on, markers=(hadamard.NAME,),
        ),
        Kind(
            "sora", "W + (alpha / r) B diag(g) A; after each step gates move to 0 by xi",
            "Ding et al. 2023, arXiv 2311.11696",
            {**_OURS, "xi": _number(3e-4, 0.0, 1e6, "a number of at least 0")}, 8e-4, "DeBERTaV3 in the authors' code",
            own=sora.put_on, merges=True, markers=_OWN_MATRICES,
        ),
        Kind(
            "dylora", "lora of a rank that is drawn anew for each pass; any rank up to r can be used",
            "Valipour et al. 2023, arXiv 2210.07558", {**_OURS, "frozen": _flag(False)}, 4e-4, "as lora",
            own=dylora.put_on, merges=True, on=False, markers=_OWN_MATRICES,
        ),
        Kind(
            "increlora", "W + B diag(E) A; from 1 rank a matrix to a mean of r, added where they count",
            "Zhang et al. 2023, arXiv 2308.12043",
            {
                "r": _RANK["r"],
                "alpha": _RANK["alpha"],
                "targets": _TARGETS,
                "most": _count(lambda full: max(2, 2 * full["r"])),
                **_GROWING,
            },
            2.2e-3, "as adalora", own=increlora.put_on, merges=True, on=False, markers=_OWN_MATRICES,
        ),
        Kind(
            "adamix", "bottlenecks after the FFN; training draws one of each site's, the mean of them is used",
            "Wang et al. 2022, arXiv 2205.12410",
            {
                **{name: option for name, option in _bottleneck(16, "relu", "normal", 1.0, False).items()
                   if name not in ("scale", "norms")},
                "experts": Option(4, "an int from 2 to 64", lambda value: 2 <= value <= 64),
                "weight": _number(1.0, 0.0, 1e6, "a number of at least 0"),
            },
            5e-4, "as pfeiffer", own=adamix.put_on, markers=(adamix.NAME,),
        ),
        Kind(
            "pasta", "vectors that each layer adds to the special tokens", "Yang et al. 2023, arXiv 2210.04382",
            {
                "ids": Option(pasta.AUTO, "auto (those of the tokenizer), or ids joined by +", _known_ids),
                "count": Option(0, "an int from 0 to 64 (0: as many as the tokenizer puts into a row, or 3)",
                                lambda value: 0 <= value <= 64),
                "init": _one_of("zero", *bottleneck.INITS),
            },
            2.5e-3, "between 2.5e-4 (GLUE) and 3e-3 (NER) in the authors' code", own=pasta.put_on,
            markers=(pasta.NAME,),
        ),
        Kind(
            "unipelt", "lora on query and value, a prefix and a bottleneck, each behind a gate that reads its input",
            "Mao et al. 2022, arXiv 2110.07577",
            {
                "r": _RANK["r"],
                "alpha": _number(2.0, 0.0, 1e6, "a number of at least 0"),
                "prefix": _count(10, 4096),
                "reduction": _count(16),
            },
            5e-4, "as pfeiffer", own=unipelt.put_on, markers=(unipelt.NAME,),
        ),
    )
}  # fmt: skip
"""{name: kind}."""
