"""put_on: an adapter on a model, drawn from a seed; rebuild: the same adapter again, from the record of a delta."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from selectune.adapters import peers
from selectune.adapters.injected import Injected, Kept, Wanted
from selectune.adapters.kinds import KINDS, Spec, belongs, make, parse
from selectune.adapters.roles import LINEARS, RoleMap, find, targets
from selectune.delta import AdapterRecord, Delta, adapter_digest, adapter_of, forget_adapter, inventory, record_adapter
from selectune.errors import BaseMismatchError, ConfigError, DeltaFormatError
from selectune.quantised import quantised_weights


@dataclass
class Adapted:
    """A model with an adapter on it: the model to train, the adapter's tensors, and the way back."""

    model: nn.Module  # the model that was given, or peft's around it (virtual tokens)
    base: nn.Module  # the model that was given
    spec: Spec
    seed: int
    _put: Injected = field(repr=False)
    _requires_grad: dict[nn.Parameter, bool] = field(repr=False)
    on: bool = True

    @property
    def names(self) -> list[str]:
        """Names of the adapter's tensors in `model`."""
        return [name for name in self.model.state_dict() if belongs(self.spec.kind, name)]

    @property
    def size(self) -> int:
        """Number of scalars in the adapter's parameters."""
        return sum(p.numel() for name, p in self.model.named_parameters() if belongs(self.spec.kind, name))

    @property
    def after_step(self) -> Callable[[int], None] | None:
        """If not None, call it with the step's number after the optimizer's step and before zero_grad."""
        return self._put.after_step

    @property
    def kept(self) -> Kept | None:
        """What the adapter keeps between steps beside its tensors (state_dict and load_state_dict), or None."""
        return self._put.kept

    def save(self, folder: Path) -> int:
        """Write the trained tensors as one safetensors file, in peft's form if the adapter is peft's; its bytes."""
        path = folder / "module.safetensors"
        save_file(peers.state_of(self.model, self.spec), path)
        return path.stat().st_size

    def remove(self) -> None:
        """Take the adapter off: the base has its modules, hooks, bits and requires_grad as before."""
        self._off(self._put.remove)

    def merge(self) -> None:
        """Fold the adapter into the base's weights, W + (alpha / r) B A, and take it off.

        Raises ConfigError for kinds that are no change of weights (bottlenecks and virtual tokens), and on a quantised
        base, whose numbers do not move.
        """
        if self._put.merge is None:
            raise ConfigError(
                f"{self.spec.kind} computes something of its own, which no change of the base's weights can stand for. "
                f"These can be merged: {', '.join(kind.name for kind in KINDS.values() if kind.merges)}."
            )
        if quantised_weights(self.base):
            raise ConfigError(
                f"The base under the {self.spec.kind} is quantised, and its stored bits stay as they are, so nothing "
                "can be folded into them. Keep the adapter on its base, or export it as peft."
            )
        self._off(self._put.merge)

    def _off(self, how: Callable[[], None]) -> None:
        if not self.on:
            raise ConfigError(f"This {self.spec.kind} was taken off its model already.")
        with torch.no_grad():
            how()
        _restore(self._requires_grad)
        forget_adapter(self.model)
        self.on = False


def put_on(
    model: nn.Module,
    spec: str | Spec,
    seed: int = 0,
    *,
    keep: Collection[str] = (),
    roles: RoleMap | None = None,
    steps: int | None = None,
    names: Sequence[str] | None = None,
    record: bool = True,
    freeze: bool = True,
) -> Adapted:
    """Put an adapter on a model and freeze the rest, so that `attach` finds the adapter only.

    `spec`: such as "lora:r=8,alpha=16" or "pfeiffer:reduction=8"; `KINDS` has the kinds and their options. The
    adapter's tensors are drawn from `seed` on the CPU, so the same call gives the same bits; call it before the model
    moves to a GPU. `keep`: names of parameters that stay trainable, such as a fresh head. `roles`: your own role map,
    see `roles.find`. `steps`: optimizer steps of the run, during which AdaLoRA moves its ranks; None: the ranks stay.
    `names`: linear layers in place of those that the option `targets` selects. It costs the adapter's memory and,
    unless `record` is False, one read of it; without that record a delta does not know its adapter.
    `freeze=False`: what was trainable stays so, for a method that trains entries of the base beside the adapter.

    Raises ConfigError for unknown kinds, options, parameters and architectures, and for a model that carries an
    adapter; ModelError if peft is needed and missing. The model is unchanged then.

    >>> import torch
    >>> layer = torch.nn.ModuleDict({"up": torch.nn.Linear(8, 16), "down": torch.nn.Linear(16, 8)})
    >>> model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
    >>> own = {"layers.#.up": "ffn1", "layers.#.down": "ffn2"}
    >>> adapted = put_on(model, "parallel:reduction=4", roles=own)
    >>> adapted.size == 2 * 8 * 2 + 2 + 8
    True
    >>> adapted.remove()
    """
    chosen = parse(spec) if isinstance(spec, str) else spec
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r}: must be an int from 0 to {2**32 - 1}.")
    carried = adapter_of(model)
    if carried is not None:
        raise ConfigError(f"The model carries {carried.kind} already; take it off first.")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = sorted(set(keep) - parameters.keys() - {name for name, _ in model.named_buffers()})
    if unknown:
        raise ConfigError(f"keep= names '{unknown[0]}', which the model does not have.")
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kind = KINDS[chosen.kind]
    own_names = names is not None or chosen.options.get("targets") == LINEARS
    needs_roles = not (own_names or kind.wraps or kind.name == "ln")
    found = find(model, roles) if needs_roles else ()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if kind.own is None:
                put = peers.put_on(model, chosen, found, seed, steps, names)
            else:
                o = chosen.options
                layers = names or (targets(model, str(o["targets"]), found) if "targets" in o else ())
                put = kind.own(Wanted(model, kind.name, o, found, layers, steps))
    except BaseException:
        _restore(before)
        raise
    trained = [parameters[name] for name in keep if name in parameters]
    if chosen.options.get("norms"):
        trained += [p for name in peers.norms(model) for p in model.get_submodule(name).parameters(recurse=False)]
    for parameter, trainable in before.items():
        parameter.requires_grad_(trainable and not freeze)
    for parameter in trained:
        parameter.requires_grad_(True)
    if record and not next(model.parameters()).is_meta:
        digest = adapter_digest(inventory(put.model), kind.markers)
        record_adapter(put.model, AdapterRecord(kind.name, chosen.options, seed, digest, kind.markers))
    return Adapted(put.model, model, chosen, seed, put, before)


def spec_of(delta: Delta) -> Spec | None:
    """The adapter that a delta was trained with, or None.

    The file format takes any name as a kind; here it has to be a kind of `KINDS`, with options that it allows. Raises
    DeltaFormatError otherwise.
    """
    recorded = delta.info.get("module")
    if recorded is None:
        return None
    try:
        return make(recorded["kind"], recorded["options"])
    except ConfigError as error:
        raise DeltaFormatError(f"info.module cannot be rebuilt: {error}") from error


def rebuild(model: nn.Module, delta: Delta, *, keep: Collection[str] = (), roles: RoleMap | None = None) -> Adapted:
    """Put the adapter of a delta on a plain base: the delta gives its kind, options and seed, and checks its bits.

    `delta.apply(rebuild(model, delta).model)` is the trained model. Raises ConfigError for a delta without an adapter,
    DeltaFormatError for a kind or options that this version does not know, BaseMismatchError (and takes the adapter off
    again) if the tensors have other bits: another version of torch or peft, another base, another device.
    """
    spec, recorded = spec_of(delta), delta.info.get("module")
    if spec is None or recorded is None:
        raise ConfigError(f"{delta.label} was trained on the base itself: there is no adapter to rebuild.")
    adapted = put_on(model, spec, recorded["seed"], keep=keep, roles=roles)
    carried = adapter_of(adapted.model)
    if carried is None or carried.digest != recorded["digest"]:
        versions = ", ".join(f"{name} {version}" for name, version in delta.info["versions"].items())
        adapted.remove()
        raise BaseMismatchError(
            f"{spec} drawn from seed {recorded['seed']} does not have the bits that the delta was trained on, so its "
            f"unselected entries would be wrong. Nothing was changed. The delta was made with {versions}; load the "
            "same base, on the CPU, with the same versions of torch and peft."
        )
    return adapted


def _restore(requires_grad: dict[nn.Parameter, bool]) -> None:
    for parameter, trainable in requires_grad.items():
        parameter.requires_grad_(trainable)
