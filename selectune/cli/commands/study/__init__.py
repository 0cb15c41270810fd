"""The commands about many runs, a file for each or for each family.

grids        study run, plan, status, show, export
comparisons  compare
report       report
"""
