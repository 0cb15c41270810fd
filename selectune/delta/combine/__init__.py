"""Several deltas of one base together.

algebra  sum, scale, negate, intersect, TIES and DARE
aligned  deltas aligned tensor by tensor, with the base's values
overlap  scalars that several deltas write, and opposite signs among them
"""
