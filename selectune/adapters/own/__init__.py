"""Adapters of our own: modules inside a frozen transformer, run by forward hooks, taken off without a trace.

bottleneck   U f(D h + b1) + b2 after a sub-layer or beside it: houlsby, pfeiffer, parallel, series
"""
