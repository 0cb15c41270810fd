"""ROUGE, BLEU and chrF against their packages' own numbers and against some worked out by hand."""

from __future__ import annotations

import sys

import pytest

from selectune.errors import TaskError
from selectune.tasks.metrics.ngrams import bleu, chrf, rouge

PREDICTIONS = [
    "The meeting was moved to Friday because two people were ill.",
    "Anna plays chess, and she plays it well!",
    "",
    "The Eagle is a cheap coffee shop near the river.",
]
REFERENCES = [
    ["They moved the meeting to Friday since two of them were ill.", "The meeting is on Friday now."],
    "Anna plays chess well.",
    "Nothing was said.",
    ["The Eagle, near the river, is a coffee shop. It is cheap.", "A cheap coffee shop: The Eagle.", "A shop."],
]
AS_LISTS = [[each] if isinstance(each, str) else each for each in REFERENCES]


@pytest.mark.parametrize("stemmer", [True, False])
def test_rouge_is_the_mean_over_rows_of_the_best_reference(stemmer):
    from rouge_score.rouge_scorer import RougeScorer

    for name, value in rouge(PREDICTIONS, REFERENCES, stemmer).items():
        scorer = RougeScorer([name], use_stemmer=stemmer)
        best = [
            max(scorer.score(each, text)[name].fmeasure for each in known)
            for text, known in zip(PREDICTIONS, AS_LISTS, strict=True)
        ]
        assert value == sum(best) / 4


def test_rouge_by_hand():
    # 5 of 6 words and 3 of 5 pairs in both; the longest common subsequence has 5 words
    found = rouge(["the cat sat on the mat"], ["the cat is on the mat"])
    assert found == pytest.approx({"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6}, abs=1e-12)
    assert rouge(["cats running"], ["cat runs"], stemmer=True)["rouge1"] == 1.0  # cat and run
    assert rouge(["cats running"], ["cat runs"], stemmer=False)["rouge1"] == 0.0
    assert rouge([""], ["a text"]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_bleu_and_chrf_equal_sacrebleus():
    import sacrebleu

    streams = [[row[i] if i < len(row) else None for row in AS_LISTS] for i in range(3)]
    assert bleu(PREDICTIONS, REFERENCES) == sacrebleu.corpus_bleu(PREDICTIONS, streams).score
    assert chrf(PREDICTIONS, REFERENCES) == sacrebleu.corpus_chrf(PREDICTIONS, streams).score
    one = [row[0] for row in AS_LISTS]
    assert bleu(PREDICTIONS, one) == sacrebleu.corpus_bleu(PREDICTIONS, [one]).score
    assert bleu(PREDICTIONS, one) < bleu(PREDICTIONS, REFERENCES)


def test_bleu_by_hand():
    # 6 of 7 words, 5 of 6 pairs, 4 of 5 triples, 3 of 4 quadruples
    assert bleu(["the cat sat on the mat today"], ["the cat sat on the mat"]) == pytest.approx(100 * (3 / 7) ** 0.25)
    # all that is there is right, but it is 6 of 7 words long
    short = bleu(["the cat sat on the mat"], ["the cat sat on the mat today"])
    assert short == pytest.approx(100 * 2.718281828459045 ** (1 - 7 / 6))
    assert bleu(["", ""], ["a", ["b", "c"]]) == chrf(["", ""], ["a", ["b", "c"]]) == 0.0


@pytest.mark.parametrize(
    ("metric", "module", "package"),
    [
        (rouge, "rouge_score.rouge_scorer", "rouge-score"),
        (bleu, "sacrebleu", "sacrebleu"),
        (chrf, "sacrebleu", "sacrebleu"),
    ],
)
def test_a_missing_package_names_the_extra(metric, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        TaskError, match=rf"package {package}, which is not installed: pip install 'selectune\[generation\]'"
    ):
        metric(["a"], ["a"])


@pytest.mark.parametrize("metric", [rouge, bleu, chrf])
def test_a_row_needs_a_reference(metric):
    with pytest.raises(TaskError, match="Row 2 has no reference"):
        metric(["a", "b"], ["a", []])
