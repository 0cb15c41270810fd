"""The parts of `selectune.study.compare`.

counted    which runs count, and that they can be compared
standing   what is found of a method on a task, and of a whole study
contrast   the difference of two methods, with its tests
caveats    what the numbers cannot say
layouts    a comparison as text: Markdown, LaTeX, CSV
"""
