"""Optimizers over the vector of offsets.

contract  what an optimizer may ask of the engine
holders   which optimizers hold the vector, so that steps need no guess
adamw     AdamW in one pass, with an age per entry if wanted
sm3       SM3: one number for each row and column of the weights
stepping  the step that both share
"""
