"""The demo of a language model, on a tiny one."""

from __future__ import annotations

import math
import sys

import pytest
from lm_kit import make_llama, make_texts

import selectune as st
from selectune.cli.commands.demo import text_page
from selectune.errors import RunFolderError
from selectune.models.bases import load_model
from selectune.runs.demos import before_after
from selectune.tasks import DATA, TASKS, Head

LOG = TASKS["demo/logbook"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def found(llama, tmp_path, monkeypatch):
    monkeypatch.delenv(DATA, raising=False)
    return before_after.tell(None, str(tmp_path / "out"), str(llama), steps=2, budget=100)


def test_it_shows_before_after_and_reverted(found, llama, tmp_path):
    assert math.isfinite(found.before)
    assert found.after != found.before
    assert [sample.reverted for sample in found.samples] == [sample.before for sample in found.samples]
    assert (found.trained, found.steps, found.tensors) == (100, 2, 12)
    assert found.retention.text == "demo/sentences"
    assert found.retention.before != found.retention.after
    tuned = load_model(str(llama), Head("AutoModelForCausalLM"), 6)
    with st.load(found.delta).applied(tuned.model):
        assert before_after._written(tuned) == [sample.after for sample in found.samples]
    with pytest.raises(RunFolderError):
        before_after.tell(None, str(tmp_path / "out"), str(llama), steps=2, budget=100)


def test_the_page_fits(found, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["selectune"])
    text = text_page(found)
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 80
    assert text.count("reverted:") == len(before_after.PROMPTS)
    assert "Reverted: all 12 tensors have the bits they had before." in text


def test_the_retention_is_that_of_wikitext_if_its_data_is_there(tmp_path, monkeypatch):
    monkeypatch.delenv(DATA, raising=False)
    assert before_after._other(None) == "demo/sentences"
    assert before_after._other(str(make_texts(tmp_path))) == "text/wikitext2"
    monkeypatch.setenv(DATA, str(tmp_path))
    assert before_after._other(None) == "text/wikitext2"


def test_the_log_is_always_the_same():
    train, validation = LOG.generate("train"), LOG.generate("validation")  # pyright: ignore[reportOptionalCall]
    assert (len(train), len(validation)) == (160, 24)
    assert train == LOG.generate("train")  # pyright: ignore[reportOptionalCall]
    assert not {row["text"] for row in train} & {row["text"] for row in validation}
