"""The commands, a file for each or for each family.

runs        train, eval
predict     predict, generate
deltas      verify, delta show, diff, apply
export      export, delta import, push
arithmetic  delta add, scale, cut, ties, dare, overlap
lists       tasks, methods
demo        demo
plan        plan
bench       bench
doctor      doctor
study/      many runs: grids, comparisons, analysis, reports
"""
