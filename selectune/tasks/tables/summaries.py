"""Summaries of news and dialogues, with the papers' metric and settings (arXiv 2408.14470, appendix): ROUGE."""

from __future__ import annotations

from typing import Any

from selectune.tasks.kinds import Seq2Seq
from selectune.tasks.metrics import rouge
from selectune.tasks.task import Hub, Row, Task


def _task(name: str, fields: str, source: str, **more: Any) -> Task:
    return Task(
        name=f"summarization/{name}",
        fields=(fields,),
        kind=Seq2Seq(prefix="summarize: "),
        labels=(),
        metric=rouge,
        metric_name="rougeL",
        chance=0.0,
        source=source,
        epochs=3,
        eval_every=1000,
        max_length=512,
        folders=(f"summarization/{name}",),
        **more,
    )


def _summaries(row: Row) -> Row:
    """The test split has three summaries for a dialogue, the others have one."""
    return {**row, "summaries": row["summaries"] if "summaries" in row else row["summary"]}


CNN_DAILYMAIL = _task(
    "cnn_dailymail", "article",
    "Hermann et al. 2015, arXiv 1506.03340, and See et al. 2017, arXiv 1704.04368; news, research use",
    label="highlights", hub=Hub("abisee/cnn_dailymail", "3.0.0", "96df5e686bee6baa90b8bee7c28b81fa3fa6223d"),
)  # fmt: skip
DIALOGSUM = _task(  # measured on its test split, which alone has three references
    "dialogsum", "dialogue", "Chen et al. 2021, arXiv 2105.06762; CC BY-NC-SA 4.0",
    label="summaries", validation="test", prepare=_summaries,
)  # fmt: skip

SUMMARIES = (CNN_DAILYMAIL, DIALOGSUM)
