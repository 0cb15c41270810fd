"""Bridges to other libraries. A file with a library's name needs that library.

transformers  the callback for transformers.Trainer
checkpoints   the Trainer's whole checkpoints, and the newest of them
first_rows    `Tuner.check` on the first rows of a run
ref_model     TRL's reference models beside a tuner
lightning     the callback for Lightning's Trainer
accelerate    save_state and load_state of an Accelerator
quantise      a model's weights in 8 or 4 bits, by torchao or bitsandbytes, or as its GGUF file has them
gguf          layers that read the blocks of a GGUF file
loading       weights from a loader are compared with the model's, and not written
"""
