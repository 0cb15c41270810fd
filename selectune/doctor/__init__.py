"""Examines this installation and proves that training works here (`selectune doctor`).

examine    runs the checks in child processes and shows what they found
checks     each check looks at one thing and imports what it needs
candidate  looks at a model before it is tuned: what is in scope, tied or left out, whether attach works
"""
