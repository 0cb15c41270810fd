"""What the command line runs: load a model and a task, train with transformers' Trainer, evaluate, show the demo.

models      names -> a model, a tokenizer and where they came from
config      one run's settings, checked before anything is loaded
evaluate    the metric of a model on a task; the same batches wherever it is asked
train       a run: model + task + method -> delta.safetensors and run.json
restore     a delta on its base again: verify, eval, apply
demo        base, random mask, LoRA, ID3 and full fine-tuning on one small model
"""
