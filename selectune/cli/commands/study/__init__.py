"""The commands about many runs, a file for each.

analyze   what runs selected, when, and how far it moved
checking  `selectune check`: claims of the theory
"""
