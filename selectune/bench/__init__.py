"""Measuring: what a step costs beside other methods (`run`), what a run will cost (`plan`), what works (`doctor`).

configs   the models' configs
models    models from configs, random weights, and batches for them
methods   how every method is set up: ours by recipe, peers by their own packages
worker    the process in which one method is measured
rounds    all methods, round by round, and the ratios within a round
table     rows as text
bars      what was promised, and whether a run kept it
plan      peak memory, delta size and update counts before a run
doctor    versions, devices, backends and a self-check; checks: its parts; candidate: a model before it is tuned
"""
