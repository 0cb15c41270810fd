"""Sentences that say what a table or triples say, with the epochs of LoRA's paper (Hu et al., 2021, arXiv 2106.09685).

For training there is a row for each reference; for validation each input stands once, with all its references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selectune.tasks.kinds import Completion, each_reference
from selectune.tasks.metrics import bleu, chrf, rouge
from selectune.tasks.task import Row, Task


def overlaps(predictions: Sequence[str], labels: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """BLEU and chrF, 0 to 100, and ROUGE-L, 0 to 1.

    >>> overlaps(["the cat sat on the mat"], ["the cat sat on the mat"])["rougeL"]
    1.0
    """
    measured = {"BLEU": bleu(predictions, labels), "chrF": chrf(predictions, labels)}
    return measured | {"rougeL": rouge(predictions, labels)["rougeL"]}


def _task(name: str, field: str, label: str, prompt: str, source: str, **more: Any) -> Task:
    return Task(
        name=f"nlg/{name}",
        fields=(field,),
        label=label,
        kind=Completion(prompt=prompt, max_new_tokens=96),
        labels=(),
        metric=overlaps,
        metric_name="BLEU",
        chance=0.0,
        source=source,
        epochs=5,
        eval_every=1000,
        arrange=each_reference,
        **more,
    )


def _lines(row: Row) -> Row:
    return {**row, "triples": "\n".join(row["triples"])}


E2E = _task(
    "e2e", "meaning_representation", "human_reference", "Describe this restaurant in a sentence or two.\n{}",
    "Novikova et al. 2017, arXiv 1706.09254; CC BY-SA 4.0", folders=("nlg/e2e_nlg", "nlg/e2e"),
)  # fmt: skip
WEBNLG = _task(
    "webnlg", "triples", "references", "Say all of this in a sentence or two.\n{}",
    "Gardent et al. 2017, ACL W17-3518; CC BY-NC-SA 4.0", folders=("nlg/webnlg",), prepare=_lines,
)  # fmt: skip

DATA_TO_TEXT = (E2E, WEBNLG)
