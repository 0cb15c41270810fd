"""Measures what a step costs beside other methods (`selectune bench`) and predicts it (`selectune plan`).

configs    configs of the models, as plain values
workload   the model and batches of a bench, from a config and random numbers
methods    sets up every method on a model: selectune's, adapters, full fine-tuning, peers of a file
meter      meters of time and memory
worker     the process in which one method is measured
rounds     runs all methods in rounds, a process each
rows       makes rows of what was measured: medians, and ratios within a round
table      shows rows as text
trace      one step on shapes alone, whose live memory is counted
estimate   predicts peak memory, the delta's size and update counts from it
"""
