"""Deltas on adapters of one kind that were drawn from different seeds, made to fit one adapter on the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from selectune.adapters.kinds import belongs
from selectune.adapters.put_on import Adapted, rebuild, spec_of
from selectune.adapters.roles import RoleMap
from selectune.delta import Delta, Dense, inventory
from selectune.errors import ConfigError


def together(
    model: nn.Module, deltas: Mapping[str, Delta], *, keep: Collection[str] = (), roles: RoleMap | None = None
) -> tuple[Adapted, dict[str, Delta]]:
    """Puts the first delta's adapter on a plain base, and makes deltas of the same names that all fit it.

    One delta for each pair of languages, say: `st.Shelf(adapted.model, deltas)` then switches by name in O(B), with
    the bits of each run. A new delta holds its adapter whole, drawn entries too, because the others were drawn from
    another seed; what it holds outside of the adapter is unchanged. `keep` and `roles` as for `rebuild`.

    Raises ConfigError if there is no delta, one without an adapter, or one whose kind or options differ from the
    first's; what `rebuild` and `Delta.apply` raise for a wrong base. The model is then as before.
    Source: Bapna, Firat (2019), adapters for pairs of languages, arXiv 1909.08478.
    """
    specs = {name: spec_of(delta) for name, delta in deltas.items()}
    first = next(iter(specs), None)
    if first is None:
        raise ConfigError("together: there is no delta. Give {name: delta}, as selectune.load returns them.")
    for name, spec in specs.items():
        if spec is None or spec != specs[first]:
            raise ConfigError(
                f"together: {name!r} was trained on {spec or 'the base itself'} and {first!r} on "
                f"{specs[first] or 'the base itself'}. One adapter on the model can hold deltas of one kind with equal "
                "options only."
            )
    wholes: dict[str, dict[str, Tensor]] = {}
    for name, delta in deltas.items():
        adapted = rebuild(model, delta, keep=keep, roles=roles)
        try:
            with delta.applied(adapted.model):
                wholes[name] = {n: t.detach().cpu().clone() for n, (_, t) in _own(adapted).items()}
        finally:
            adapted.remove()
    adapted = rebuild(model, deltas[first], keep=keep, roles=roles)
    own, module = _own(adapted), deltas[first].info["module"]
    made: dict[str, Delta] = {}
    for name, delta in deltas.items():
        kind = adapted.spec.kind
        patches = [replace(patch, order=None) for patch in delta.patches if not belongs(kind, patch.name)]
        whole = [Dense.make(n, which, wholes[name][n], drawn.cpu()) for n, (which, drawn) in own.items()]
        rest = [dense for dense in delta.dense if not belongs(kind, dense.name)]
        info = {key: value for key, value in delta.info.items() if key != "selected"}
        base = {**info["base"], "weights": None}  # which is over the adapter as it was drawn, too
        made[name] = Delta(patches, [*whole, *rest], {**info, "base": base, "module": module})
    return adapted, made


def _own(adapted: Adapted) -> dict[str, tuple[str, Tensor]]:
    """{name: parameter or buffer, and the tensor} of the adapter."""
    found = inventory(adapted.model).find
    return {name: (found[name].kind, found[name].tensor) for name in found if belongs(adapted.spec.kind, name)}
