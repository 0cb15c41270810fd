"""Bridges to other libraries; a file that is named after one needs it.

transformers  the callback for transformers.Trainer
checkpoints   the Trainer's checkpoints that are whole, and which one a run goes on from
first_rows    the first rows of a run, on which `Tuner.check` looks
ref_model     TRL's reference models beside a tuner
lightning     the callback for Lightning's Trainer
accelerate    save_state and load_state of an Accelerator
loading       weights that a loader brings are compared with the model's, and not written
"""
