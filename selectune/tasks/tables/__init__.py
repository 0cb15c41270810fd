"""The published tasks as tables, a row each: fields, metric, chance, the papers' settings and the source.

glue  the GLUE tasks
ner   named entities
"""
