"""Word problems with the papers' settings (arXiv 2408.14470, appendix), whose answers are written out and then read.

An answer is read in two ways. `accuracy_lenient` is how LLM-Adapters reads it (Hu et al., 2023, arXiv 2304.01933), and
how the papers' numbers are made: the last number of the text, or the first capital letter from A to E.
`accuracy_strict` asks for an answer that is stated. Where a tokenizer has no chat template, the prompt has the headings
of Alpaca, as there, without its opening sentences.

An answer is the likeliest token at each step. LLM-Adapters searches with 4 beams and draws with temperature 0.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from selectune.tasks.kinds import Completion, CompletionLoss
from selectune.tasks.metrics import letter_accuracy, number_accuracy, perplexity
from selectune.tasks.task import Example, Hub, Row, Task

PLAIN = "### Instruction:\n{}\n\n### Response:\n"
SOLVING = Completion(plain=PLAIN, max_new_tokens=256)
CONTAMINATED = "CONTAMINATED: its problems are part of MAWPS, which Math10K trains on"


def _task(name: str, source: str, **more: Any) -> Task:
    read = {"kind": SOLVING, "metric": number_accuracy, "metric_name": "accuracy_lenient"}
    place = {"validation": "test", "chance": 0.0, "folders": (f"math/{name}",)}
    return Task(
        name=f"math/{name}",
        fields=("question",),
        label="answer",
        labels=(),
        source=source,
        epochs=3,
        eval_every=80,
        **(read | place | more),
    )


def _solution(row: Row) -> Row:
    """A solution without the calculator's notes: "2+2=<<2+2=4>>4" becomes "2+2=4"."""
    return {**row, "answer": re.sub(r"<<[^<>]*>>", "", row["answer"])}


def _equation(row: Row) -> Row:
    """The equation and the number, written as GSM8K writes its solutions."""
    return {**row, "answer": f"{row['equation']}\n#### {_number(row['answer'])}"}


def _svamp(row: Row) -> Row:
    text = f"{row['Body'].strip()} {row['Question'].strip()}"
    return {"question": text, "answer": f"{row['Equation']}\n#### {_number(row['Answer'])}"}


def _number(value: float | str) -> str:
    """A number without needless zeros.

    >>> _number("15.0"), _number(0.5)
    ('15', '0.5')
    """
    return np.format_float_positional(float(value), trim="-")


def _tenth(examples: Sequence[Example], split: str) -> list[Example]:
    """Every tenth example is for validation, and the others are for training."""
    return [example for i, example in enumerate(examples) if (i % 10 == 9) == (split == "validation")]


GSM8K = _task(
    "gsm8k", "Cobbe et al. 2021, arXiv 2110.14168; MIT", prepare=_solution,
    hub=Hub("openai/gsm8k", "main", "e53f048856ff4f594e959d75785d2c2d37b678ee"),
)  # fmt: skip
GSM8K_LOSS = _task(  # the same rows, without generation
    "gsm8k-loss", GSM8K.source, prepare=_solution, hub=GSM8K.hub, folders=GSM8K.folders,
    kind=CompletionLoss(plain=PLAIN), metric=perplexity, metric_name="perplexity", lower_is_better=True,
    chance=None,
)  # fmt: skip
MAWPS = _task(
    "mawps", "Koncel-Kedziorski et al. 2016, ACL N16-1136, as in LLM-Adapters; its test rows overlap with those of "
    "AddSub, MultiArith and SingleEq", prepare=_equation,
)  # fmt: skip
SVAMP = _task(
    "svamp", "Patel et al. 2021, arXiv 2103.07191; MIT; the hub's test split has 300 of the 1,000 rows", prepare=_svamp,
    hub=Hub("ChilleD/SVAMP", None, "5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef"),
)  # fmt: skip
ADDSUB = _task("addsub", f"Hosseini et al. 2014, ACL D14-1058; test only; {CONTAMINATED}")
MULTIARITH = _task("multiarith", f"Roy, Roth 2015, arXiv 1608.01413; test only; {CONTAMINATED}")
SINGLEEQ = _task("singleeq", f"Koncel-Kedziorski et al. 2015, ACL Q15-1042; test only; {CONTAMINATED}")
AQUA = _task(
    "aqua", "Ling et al. 2017, arXiv 1705.04146; Apache-2.0; test only", metric=letter_accuracy, chance=63 / 254
)
MATH10K_STYLE = _task(  # Math10K itself has AQuA's training rows too, and solutions that a model wrote
    "math10k-style", "the training rows of GSM8K and of MAWPS without those of its test sets, a tenth held out; as "
    "Math10K of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933), without AQuA", folders=(),
    parts=(GSM8K, MAWPS), arrange=_tenth,
)  # fmt: skip

PROBLEMS = (GSM8K, GSM8K_LOSS, MAWPS, SVAMP, ADDSUB, MULTIARITH, SINGLEEQ, AQUA, MATH10K_STYLE)
