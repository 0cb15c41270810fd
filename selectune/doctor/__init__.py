"""What this installation is, and whether training works here.

examine    `selectune doctor`: its parts, each in a child process
checks     the parts that import something
candidate  a model before it is tuned: what is in scope, tied, left out; does attach work?
"""
