"""The commands about many runs, a file for each.

comparisons  compare
"""
