"""Models by name, what is put on them, and deltas on them again.

bases     a local folder, a hub id or `demo` becomes a model; heads follow from a seed
adapted   what a run puts on its model: LoRA, adapters, virtual tokens
restore   a saved delta on its base again
load      selectune.load_model: base and delta in one call
evaluate  the metric of a model on a task
"""
