"""The engine, from loss.backward() to the optimizer and back into the weights.

attach      the door: attach, Tuner
engine      the parts of one attached tuner, and how they are put on a model
step        one optimizer step, from forward to commit: the algorithm
tracker     finds out when forwards, backward passes and steps happen
window      what makes one optimizer step, and what happened to its gradient since backward
step_hooks  torch's step hooks: which optimizer steps, and when
aside       the trained values leave the model for a while, and come back
check       compares the engine's gradients with plain autograd's on one small batch
world       several processes: the mean gradient that they select by, and what they compare

support/    what is trained: entries, offsets, base values; the proof that nothing else moved
graph/      how every use of a weight is seen, and the autograd nodes that it becomes
choose/     which entries are trained: choosers, scores over tensors, calibration, dense phases
optim/      our own optimizers, and what an optimizer may ask of the engine
saved/      what leaves the engine: a delta, and the state from which a later process continues
"""

from selectune.train.attach import Tuner, attach, tuner_of
from selectune.train.check import Check, same_chance
from selectune.train.graph.copies import strip
from selectune.train.optim.adamw import SparseAdamW
from selectune.train.optim.sm3 import SparseSM3
from selectune.train.saved.state import STATE_FILE, read_state, write_state
from selectune.train.support.proof import Verification

__all__ = [
    "STATE_FILE", "Check", "SparseAdamW", "SparseSM3", "Tuner", "Verification", "attach", "read_state", "same_chance",
    "strip", "tuner_of", "write_state",
]  # fmt: skip
