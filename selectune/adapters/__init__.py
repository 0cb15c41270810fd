"""What may sit on a model: bottleneck adapters of our own, LoRA and its kin through peft, all by one call.

    adapted = put_on(model, "lora:r=8", seed=6)       # freezes the model, trains the module
    tuner = st.attach(adapted.model, st.id3(budget=10_000, steps=1_000))
    ...
    adapted.remove()                                  # the model is what it was, bit for bit

A delta that was trained so records the module; `rebuild(model, delta)` puts it on a plain base again.
"""

from selectune.adapters.on import Adapted, put_on, rebuild
from selectune.adapters.peers import two_rates
from selectune.adapters.roles import MAPS, ROLES, Role, find, linears
from selectune.adapters.spec import KINDS, LINEARS, Kind, Spec, make, parse

__all__ = [
    "KINDS", "LINEARS", "MAPS", "ROLES", "Adapted", "Kind", "Role", "Spec", "find", "linears", "make", "parse",
    "put_on", "rebuild", "two_rates",
]  # fmt: skip
