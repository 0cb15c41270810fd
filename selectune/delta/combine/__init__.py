"""Several deltas of one base together.

algebra  sum, scale, negate, intersect, TIES and DARE
aligned  deltas side by side, tensor by tensor, and the base under them
overlap  where supports meet, and where signs disagree
"""
