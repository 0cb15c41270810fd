"""Tasks that are generated here, so that a demo needs neither data nor network.

topic  what is a sentence about?
words  the words of that task
"""
