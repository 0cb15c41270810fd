"""The commonsense sets as multiple choice by likelihood, with the prompts of EleutherAI's lm-evaluation-harness.

The rows of a folder have LLM-Adapters' form (Hu et al. 2023, arXiv 2304.01933): one text with question and choices,
made for generated answers. Question and choices are taken out of it again. `chance` is the commonest label's share.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from selectune.tasks.kinds import Choice
from selectune.tasks.metrics import choice_accuracy
from selectune.tasks.task import Hub, Row, Task

LLM_ADAPTERS = "rows of LLM-Adapters, ODC-By"


def parts_of(row: Row) -> tuple[str, list[str], int]:
    """Question, choices and the right one's number, of a row in LLM-Adapters' form.

    >>> text = "Please choose: Is it?\\n\\nAnswer1: Yes Answer2: No\\n\\nAnswer format: answer1/answer2"
    >>> parts_of({"instruction": text, "answer": "answer2"})
    ('Is it?', ['Yes', 'No'], 1)
    """
    rest, _, names = row["instruction"].partition(": ")[2].rpartition("Answer format: ")
    names, found = names.strip().split("/"), []
    for name in names:
        part, marker, rest = rest.partition(f"{name.capitalize()}:")
        if not marker:
            raise ValueError(f"there is no {name.capitalize()}:")
        found.append(part.strip())
    question, *choices = [*found, rest.strip()]
    return question, choices, names.index(row["answer"])


def _asked(form: str) -> Callable[[Row], Row]:
    """Rows whose prompt is the question in this form."""

    def prepare(row: Row) -> Row:
        question, choices, label = parts_of(row)
        return {"prompt": form.format(question), "choices": choices, "label": label}

    return prepare


def _yes_or_no(row: Row) -> Row:
    question = row["instruction"].partition("question: ")[2].rpartition("Answer format: ")[0].strip()
    label = ("false", "true").index(row["answer"])
    return {"prompt": f"Question: {question}\nAnswer:", "choices": ["no", "yes"], "label": label}


def _hellaswag(row: Row) -> Row:
    first, second = row["ctx_a"], row["ctx_b"]
    texts = [f"{row['activity_label']}: {first} {second[:1].upper() + second[1:]}", *row["endings"]]
    prompt, *choices = [" ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split()) for text in texts]
    return {"prompt": prompt, "choices": choices, "label": int(row["label"])}


def _task(name: str, source: str, chance: float, prepare: Callable[[Row], Row], **more: Any) -> Task:
    settings = {"kind": Choice(), "folders": (f"commonsense/{name}",), "validation": "test"}
    return Task(
        name=f"commonsense/{name}",
        fields=("prompt", "choices"),
        labels=(),
        metric=choice_accuracy,
        metric_name="accuracy",
        chance=chance,
        source=source,
        epochs=3,
        eval_every=80,
        max_length=256,
        prepare=prepare,
        **(settings | more),
    )


QUESTION = _asked("Question: {}\nAnswer:")
COMMONSENSE = (
    _task("boolq", f"Clark et al. 2019, arXiv 1905.10044; CC BY-SA 3.0; {LLM_ADAPTERS}, without the passages",
          2033 / 3270, _yes_or_no),
    _task("piqa", f"Bisk et al. 2020, arXiv 1911.11641; AFL 3.0; {LLM_ADAPTERS}; validation rows only",
          928 / 1838, QUESTION),
    _task("social_i_qa", f"Sap et al. 2019, arXiv 1904.09728; CC BY 4.0; {LLM_ADAPTERS}; validation rows only",
          657 / 1954, _asked("Q: {}\nA:")),
    _task("winogrande", f"Sakaguchi et al. 2020, arXiv 1907.10641; CC BY; {LLM_ADAPTERS}; validation rows only",
          639 / 1267, _asked("{}"), kind=Choice(partial=True)),
    _task("arc_easy", f"Clark et al. 2018, arXiv 1803.05457; CC BY-SA 4.0; {LLM_ADAPTERS}", 633 / 2376, QUESTION),
    _task("arc_challenge", f"Clark et al. 2018, arXiv 1803.05457; CC BY-SA 4.0; {LLM_ADAPTERS}", 311 / 1172, QUESTION),
    _task("openbookqa", f"Mihaylov et al. 2018, arXiv 1809.02789; Apache-2.0; {LLM_ADAPTERS}", 138 / 500, _asked("{}")),
    _task("hellaswag", "Zellers et al. 2019, arXiv 1905.07830; MIT", 0.25, _hellaswag, validation="validation",
          hub=Hub("Rowan/hellaswag", None, "218ec52e09a7e7462a5400043bb9a69a41d06b76")),
)  # fmt: skip
