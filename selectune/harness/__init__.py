"""What the command line runs: load a model and a task, train with transformers' Trainer, evaluate, show the demo.

models       names -> a model, a tokenizer and where they came from
modules      what is put on a model for a run: LoRA, adapters
config       one run's settings, checked before anything is loaded
calibration  the data that a score reads before training
optimizers   optimizers by name
trackers     where the log is sent
evaluate     the metric of a model on a task; the same batches wherever it is asked
train        a run: model + task + method -> delta.safetensors and run.json
trainer      transformers' Trainer as a run uses it
callback     what a run does between its steps
folder       the folder of a run: one owner, nothing overwritten without a word
resume       which checkpoint a run goes on from, and what must be as it was
stop         a wish to stop a run
load         selectune.load_model: base and delta in one call
restore      a delta on its base again: verify, eval, apply
demo         base, random mask, LoRA, ID3 and full fine-tuning on one small model
"""
