"""Adapters: small modules that sit on a model and are trained in its place, or selected from.

    adapted = put_on(model, "lora:r=8", seed=6)       # freezes the model, trains the adapter
    tuner = st.attach(adapted.model, st.id3(budget=10_000, steps=1_000))
    ...
    adapted.remove()                                  # the model is what it was, bit for bit

A delta that was trained so records the adapter; `rebuild(model, delta)` puts it on a plain base again.

put_on      put_on and rebuild
kinds       the kinds of adapters, their options, and how people write them (`lora:r=16,alpha=32`)
bottleneck  bottleneck adapters of our own
peers       LoRA and its kin, from peft
roles       which module of a transformer is query, key, value, FFN1, ...
"""

from selectune.adapters.kinds import KINDS, LINEARS, Kind, Spec, make, parse
from selectune.adapters.peers import two_rates
from selectune.adapters.put_on import Adapted, put_on, rebuild
from selectune.adapters.roles import MAPS, ROLES, Role, find, linears

__all__ = [
    "KINDS", "LINEARS", "MAPS", "ROLES", "Adapted", "Kind", "Role", "Spec", "find", "linears", "make", "parse",
    "put_on", "rebuild", "two_rates",
]  # fmt: skip
