"""The engine, from loss.backward() to the optimizer and back into the weights.

attach      the door: attach, Tuner
engine      the parts of one attached tuner, and how they are put on a model
step        one optimizer step, from forward to commit: the algorithm
tracker     finds out when forwards, backward passes and steps happen
window      what makes one optimizer step, and what has become of its gradient since
ledger      which entry is trained in which slot, and what stood there before
step_hooks  torch's step hooks: which optimizer steps, and when
proof       what the base was, and that nothing outside the support moved
check       the engine's gradients held against plain autograd's on one small batch
ranks       more than one process is refused

graph/      how every use of a weight is seen, and the autograd nodes it becomes
choose/     which entries are trained: choosers, scores over tensors, calibration, dense phases
optim/      the optimizers of our own, and what an optimizer may ask of the engine
saved/      what leaves the engine: a delta, and the state that a later process goes on from
"""

from selectune.train.attach import Tuner, attach, tuner_of
from selectune.train.check import Check, same_chance
from selectune.train.graph.copies import strip
from selectune.train.optim.adamw import SparseAdamW
from selectune.train.optim.sm3 import SparseSM3
from selectune.train.proof import Verification
from selectune.train.saved.state import STATE_FILE, read_state, write_state

__all__ = [
    "STATE_FILE", "Check", "SparseAdamW", "SparseSM3", "Tuner", "Verification", "attach", "read_state", "same_chance",
    "strip", "tuner_of", "write_state",
]  # fmt: skip
