"""The engine, from loss.backward() to the optimizer and back into the weights.

attach      the door: attach, Tuner
tracker     follows the run from backward pass to step
chooser     which entries are trained, decided in between; exchange: by dropping and growing
weights     how every use of a weight is seen; sparse, autograd: the nodes it becomes; taps: the graph these are in
functions   calls that ask no __torch_function__; check: the engine's gradients held against plain autograd's
scan        scores of a tensor into a collector; calibrate: scores over single examples
ledger      which entry is trained in which slot, and what stood there before
adamw       AdamW over the offsets in one pass, with an age per entry if wanted; sm3: a number per row and column
optimizers  torch's step hooks; package: from the ledger to a delta; base: what the delta says of its base
window      what makes one step; dense: steps that train everything; ranks: more than one process is refused
copies      what a copied model has of a tuner; calls: hooks and the calls they tell of; stepping: a parameter's step
rebuild     inputs made again instead of saved; still: a model held while scores are read from it
state       a run between two steps, its file, and going on from it; checked, checked_choices: what is looked at first
"""

from selectune.train.adamw import SparseAdamW
from selectune.train.attach import Tuner, attach
from selectune.train.check import Check, same_chance
from selectune.train.copies import strip, tuner_of
from selectune.train.package import Verification
from selectune.train.sm3 import SparseSM3
from selectune.train.state import STATE_FILE, read_state, write_state

__all__ = [
    "STATE_FILE", "Check", "SparseAdamW", "SparseSM3", "Tuner", "Verification", "attach", "read_state", "same_chance",
    "strip", "tuner_of", "write_state",
]  # fmt: skip
