"""Deltas on a live model: put on, taken off, switched, proven.

apply    what lies on a model, what it must look like, writing all or nothing
quick    a delta made ready once, so that a switch is a few operations a tensor
shelf    several named deltas on one model, one of them in place
door     which thread may read and which may write a model's weights
verify   the proof that a delta changes what it says and no more
writing  writing into a model, all or nothing
"""
