"""Which entries are trained. The tracker says when; a chooser says which.

chooser      the contract of choosers, and what they share
growing      the support only grows (`Growing`), or is chosen again each time (`Afresh`)
dropping     drop and grow: the least moved entries make room for better ones
scan         offers the scores of a tensor to a collector, piece by piece
units        whole rows, columns, blocks, heads or subnets in place of entries
products     a linear weight's gradient as its factors: bounds, then canonical scores
shares       a gradient that is a mean over ranks: only entries that may be selected travel
calibrate    reads scores from data at fixed weights
still        keeps a model unchanged while such scores are read
dense_phase  steps at which every entry is trained, and the way back to sparse ones
"""
