"""Metrics: (predictions, labels) -> a float, or floats by name of which the first counts. None is ever NaN or infinite.

Higher is better, except for `perplexity`. Shares are 0 to 1; BLEU and chrF are 0 to 100, as their papers print them.
What is not defined for some rows counts as 0 (a perplexity as the largest float), and a log line says why.

simple       accuracy of rows and of tags, correlations, F1 of classes, exact match
entities     precision, recall and F1 of the entities in sequences of tags
ngrams       generated text against references: ROUGE, BLEU, chrF
mathematics  answers within generated text, read leniently as the papers did and strictly
likelihood   perplexity, and multiple choice by log-likelihood
"""

from __future__ import annotations

from selectune.tasks.metrics.entities import entity_f1
from selectune.tasks.metrics.likelihood import choice_accuracy, perplexity
from selectune.tasks.metrics.mathematics import letter_accuracy, number_accuracy
from selectune.tasks.metrics.ngrams import bleu, chrf, rouge
from selectune.tasks.metrics.simple import (
    accuracy,
    exact_match,
    f1,
    f1_macro,
    matthews,
    multilabel_f1,
    pearson_spearman,
    tag_accuracy,
)

__all__ = [
    "accuracy", "exact_match", "f1", "f1_macro", "matthews", "multilabel_f1", "pearson_spearman",
    "tag_accuracy",
    "entity_f1",
    "bleu", "chrf", "rouge",
    "letter_accuracy", "number_accuracy",
    "choice_accuracy", "perplexity",
]  # fmt: skip
