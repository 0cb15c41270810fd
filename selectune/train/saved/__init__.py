"""What leaves the engine: a delta, and the state from which a later process continues.

to_delta         makes the delta of a run
base_digests     digests of the base that the delta records
state            the state of a run between two steps, and its file
checked          checks all of a state before anything is written
checked_choices  checks the part of a state that says what was selected when
forms            values with tensors in them: packed, unpacked, held against a form
"""
