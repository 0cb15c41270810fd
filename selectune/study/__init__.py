"""Many runs as one question: a grid of cells, each a run of its own, and what their results say.

cells      a cell: the settings of one run in a study, and the key that follows from them
records    results: one line for each evaluation of a cell, appended and never changed
grid       what is asked for, as cells
asked/     the types of what a grid's file has
workspace  the folder of a study: what was asked, what is done, what failed
attempt    the process of a cell
engines    where cells run: processes of this machine, or a Ray cluster
summary    what is done, the table, the results as a file, a forecast
ensemble   runs of several patterns, which label rows that one more run learns from
runner     starts cells as there is room, and takes their results
report/    the page of a study or of one run, and its tables for a text
compare    methods beside a reference, with tests and warnings
comparing/ the parts of that
stats/     statistics on numbers alone: tests, intervals, effect sizes, power
analysis/  what runs selected, when, and how far it moved
"""
