"""What leaves the engine: a delta, and the state that a later process goes on from.

to_delta         from the ledger to a delta
base_digests     digests of the base that the delta records
state            a run between two steps, its file, and a fresh tuner that goes on from it
checked          a state is looked at whole before anything is written
checked_choices  the part of a state that says what was selected when
"""
