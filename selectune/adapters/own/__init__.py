"""Adapters of our own: modules inside a frozen transformer, run by hooks, taken off without a trace.

bottleneck  U f(D h + b1) + b2 after a sub-layer or beside it: houlsby, pfeiffer, parallel, series
adamix      several bottlenecks at each site, one drawn at random in training
hadamard    a factor and a shift for each output of self-attention
low_rank    W + scale B A, which the next three share
sora        a gate on each rank, which proximal steps close
dylora      one run gives every lower rank
increlora   ranks are added where they count
pasta       vectors at special tokens
unipelt     LoRA, a bottleneck and a prefix, each behind a gate
"""
