"""The commands about many runs, a file for each or for each family.

grids        study run, plan, status, show, export
comparisons  compare
analyze      what runs selected, when, and how far it moved
checking     `selectune check`: claims of the theory
report       report
"""
