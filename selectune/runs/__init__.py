"""One run of one method on one task, by transformers' Trainer.

config       the settings, checked before anything is loaded
training     a run: model + task + method -> delta.safetensors and run.json
result       what a run gives, while it lasts and at its end
trainer      transformers' Trainer as a run uses it, and its optimizer
progress     the callback between steps: measure, log, report, stop
folder       the folder of a run: one owner, nothing overwritten unasked
resume       the checkpoint that a run resumes from, and the settings that must agree
stop         a request to stop a run
trackers     the trackers that get the log
calibration  the data that a calibrated score reads
demos/       the demos
"""
