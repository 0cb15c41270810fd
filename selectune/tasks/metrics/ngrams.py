"""Generated text against one or several references a row: ROUGE, BLEU and chrF, as their own packages count them.

METEOR is left out: it matches synonyms in WordNet, which the kept implementation (nltk) would have to download.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selectune.errors import TaskError
from selectune.tasks.metrics.simple import references

References = Sequence[str | Sequence[str]]


def rouge(predictions: Sequence[str], labels: References, stemmer: bool = True) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1, each the mean over rows of the best reference.

    `stemmer`: words are compared by their Porter stems, as in the papers on summarisation. Only the letters a to z and
    digits count. A missing package raises TaskError. Source: Lin (2004), by the package rouge-score.

    >>> {name: round(value, 4) for name, value in rouge(["the cat sat on the mat"], ["the cat is on the mat"]).items()}
    {'rouge1': 0.8333, 'rouge2': 0.6, 'rougeL': 0.8333}
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("ROUGE", "rouge-score") from error
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=stemmer)
    rows = [scorer.score_multi(known, text) for text, known in zip(predictions, references(labels), strict=True)]
    return {name: sum(float(row[name].fmeasure) for row in rows) / len(rows) for name in names}


def bleu(predictions: Sequence[str], labels: References) -> float:
    """Corpus BLEU-4, 0 to 100, on text that is not tokenised.

    A missing package raises TaskError. Source: Papineni et al. (2002), by the package sacrebleu with its default
    settings (Post, 2018, arXiv 1804.08771).

    >>> round(bleu(["the cat sat on the mat today"], ["the cat sat on the mat"]), 2)
    80.91
    """
    return _corpus("BLEU", predictions, labels)


def chrf(predictions: Sequence[str], labels: References) -> float:
    """Corpus chrF2, 0 to 100: the F-score of character n-grams up to 6, recall counted twice.

    A missing package raises TaskError. Source: Popović (2015), by the package sacrebleu with its default settings.

    >>> round(chrf(["the cat sat on the mat today"], ["the cat sat on the mat"]), 2)
    93.49
    """
    return _corpus("CHRF", predictions, labels)


def _corpus(name: str, predictions: Sequence[str], labels: References) -> float:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise _missing({"CHRF": "chrF"}.get(name, name), "sacrebleu") from error
    known = references(labels)
    most = max(map(len, known))
    streams = [[row[i] if i < len(row) else None for row in known] for i in range(most)]
    metric: Any = getattr(metrics, name)()
    return float(metric.corpus_score(list(predictions), streams).score)


def _missing(metric: str, package: str) -> TaskError:
    return TaskError(
        f"{metric} needs the package {package}, which is not installed: pip install 'selectune[generation]'."
    )
