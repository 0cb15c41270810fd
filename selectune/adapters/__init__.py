"""Adapters: small modules on a frozen model. One trains all of an adapter, or selects entries of it.

    adapted = put_on(model, "lora:r=8", seed=6)       # freezes the model, trains the adapter
    tuner = st.attach(adapted.model, st.id3(budget=10_000, steps=1_000))
    ...
    adapted.remove()                                  # the model is as before, bit for bit

The delta of such a run records the adapter; `rebuild(model, delta)` puts it on a plain base again.

put_on      put_on and rebuild
together    deltas on adapters of different seeds, on one model
kinds       the kinds of adapters, their options and tensors, and how people write them (`lora:r=16,alpha=32`)
own         adapters of our own: bottlenecks and others
peers       LoRA and its kin, from peft
injected    what an adapter is put on with, and what putting it on gives
roles       the role of each module in a transformer: query, key, value, FFN1, ...
"""

from selectune.adapters.kinds import KINDS, Kind, Spec, belongs, for_tokenizer, make, parse
from selectune.adapters.own.dylora import at_rank
from selectune.adapters.peers import two_rates
from selectune.adapters.put_on import Adapted, put_on, rebuild, spec_of
from selectune.adapters.roles import LINEARS, MAPS, ROLES, Role, find, linears
from selectune.adapters.together import together

__all__ = [
    "KINDS", "LINEARS", "MAPS", "ROLES", "Adapted", "Kind", "Role", "Spec", "at_rank", "belongs", "find",
    "for_tokenizer", "linears", "make", "parse", "put_on", "rebuild", "spec_of", "together",
    "two_rates",
]  # fmt: skip
