"""What is trained: the support, its offsets and base values, and the proof that nothing else moved.

pages       the entries of one tensor: flat indices, slots, base values
rectangles  whole rows, columns and blocks, whose gradient is a few small dense products
shards      weights that FSDP2 shards: a rank's part, and whole numbers
store       where offsets live: in the weights themselves
ledger      all pages, and the one trainable vector that they share
positions   rows and columns of the entries, for optimizers that ask
proof       checksums and copies of the base: nothing outside the support moved
"""
