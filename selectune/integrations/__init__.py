"""Bridges to other libraries; a file that is named after one needs it.

transformers  the callback for transformers.Trainer; checkpoints, first_rows, reference: its parts
lightning     the callback for Lightning's Trainer
accelerate    save_state and load_state of an Accelerator
loading       weights that a loader brings are compared with the model's, and not written
"""
