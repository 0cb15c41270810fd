"""One run of one method on one task, by transformers' Trainer.

config       the settings, checked before anything is loaded
training     a run: model + task + method -> delta.safetensors and run.json
trainer      transformers' Trainer as a run uses it, and its optimizer
progress     what a run does between its steps: measure, log, tell, stop
folder       the folder of a run: one owner, nothing overwritten without a word
resume       which checkpoint a run goes on from, and what must be as it was
stop         a wish to stop a run
trackers     where the log is sent
calibration  the data that a calibrated score reads
comparison   base, random mask, LoRA, ID3 and full fine-tuning side by side: the demo
"""
