"""Models by name, adapters on them, and saved deltas applied to them again.

bases     a local folder, a hub id or a wheel becomes a model; heads follow from a seed
wheels    the models that wheels hold: `demo` and `smollm`
adapted   the adapter of a run on its model
restore   a saved delta on its base again
load      selectune.load_model: base and delta in one call
predictions  what a model answers to a file of rows
recorded  the task of a delta, on its rows or on others
evaluate  the metric of a model on a task
"""
