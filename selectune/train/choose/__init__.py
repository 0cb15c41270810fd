"""Which entries are trained. The tracker says when; a chooser says which.

chooser      the contract of choosers, and what they share
growing      the support grows (`Growing`), or is chosen anew each time (`Afresh`)
dropping     drop and grow: the least moved entries make room for better ones
scan         the scores of a tensor, piece by piece, into a collector
calibrate    scores that are read from data at fixed weights
still        a model held still while such scores are read
dense_phase  steps at which every entry is trained, and the way back to sparse ones
"""
