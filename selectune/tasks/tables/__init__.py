"""The published tasks as tables, a row each: fields, metric, chance, the papers' settings and the source.

glue          the GLUE tasks
ner           named entities
problems      word problems, and the answers in generated text
summaries     summaries of news and dialogues
data_to_text  sentences that say what a table or triples say
commonsense   multiple choice
topics        what a question or news is about
texts         plain texts
"""
