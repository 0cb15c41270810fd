"""Many runs as one question: a grid of cells, each a run of its own, and what their results say.

cells      a cell: the settings of one run in a study, and the key that follows from them
records    results: one line for each evaluation of a cell, appended and never changed
analysis/  what runs selected, when, and how far it moved
"""
