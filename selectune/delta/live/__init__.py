"""Deltas on a live model: put on, taken off, switched, proven.

apply       apply, revert, merge, and the writes that they make
layers      the deltas that are applied to a model, and the values that they cover
base_check  whether a model is the base of a delta
writing     writing into a model, all or nothing
door        the turns of threads that read or write a model's weights
shelf       several named deltas on one model, one of them in place
quick       a shelf's delta made ready once, so that a switch is a few operations a tensor
verify      the proof that a delta changes its own scalars and no others
"""
