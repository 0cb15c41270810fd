"""Statistics on numbers alone: no files, no runs. `selectune compare` puts them together.

given        what is taken for a sample, and what every other file refuses
effects      mean and spread, and how large a difference is
wilcoxon     the signed-rank test of paired differences
permutation  tests by exchange: signs of pairs, labels of runs
intervals    intervals of a mean difference: Student, Welch, and the bootstrap over seeds and items
holm         p-values of several comparisons at once
anova        do several groups differ at all
mcnemar      two models on the same rows
power        what a number of runs could have seen
papers       what the papers do: n x n pairs, the best baseline of a column, the mean of nine columns
"""
