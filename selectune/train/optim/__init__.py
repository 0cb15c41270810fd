"""Our own optimizers over the vector of offsets, and their contract with the engine.

contract  what an optimizer may ask of the engine
holders   finds the optimizers that hold the vector, so that no step has to be guessed
adamw     AdamW in one pass, with an age per entry on request
sm3       SM3: one number for each row and column of the weights
stepping  the step() that both share
"""
