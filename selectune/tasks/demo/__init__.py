"""Generated tasks, so that a demo needs neither data nor network.

topic  the topic of a sentence
words  the words of that task
logbook  the log of a ship, and plain sentences, for language models
"""
