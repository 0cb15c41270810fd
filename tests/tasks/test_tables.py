"""The tables of tasks that write text: their rows as published, what is held out, and what is said where none are."""

from __future__ import annotations

import pytest
from text_kit import make_llama
from tiny_kit import write_rows

from selectune import tasks
from selectune.errors import TaskError
from selectune.models.restore import Source, evaluate_delta
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.tasks import DATA, Example

pytest_plugins = ("tiny_fixtures",)

SIZES = {  # training and validation rows of the published files; None: no training split
    "math/gsm8k": (7473, 1319),
    "math/mawps": (678, 238),
    "math/addsub": (None, 395),
    "math/multiarith": (None, 600),
    "math/singleeq": (None, 508),
    "math/aqua": (None, 254),
    "summarization/dialogsum": (None, 500),
    "nlg/e2e": (None, 547),  # 4,672 references
    "nlg/webnlg": (18102, 869),  # 6,940 sets of triples, each reference a row; one set stands twice in validation
}


@pytest.mark.parametrize("name", SIZES)
def test_the_benchmark_data_has_the_published_rows(real_data, name):
    task, (train, validation) = tasks.get(name), SIZES[name]
    assert len(tasks.load(task, "validation", real_data)) == validation
    if train is not None:
        assert len(tasks.load(task, "train", real_data)) == train
        return
    with pytest.raises(TaskError, match=rf"has no train split of {name}; looked for .*There is .*test\.jsonl"):
        tasks.load(task, "train", real_data)


def test_the_right_solution_is_right(real_data):
    """The metric reads the labels of all six test sets, and finds their own numbers and letters in them."""
    for name in ("gsm8k", "mawps", "addsub", "multiarith", "singleeq", "aqua"):
        task = tasks.get(f"math/{name}")
        labels = [example.label for example in tasks.load(task, "validation", real_data).examples]
        assert task.scores(labels, labels) == {"accuracy_lenient": 1.0, "accuracy_strict": 1.0}
        assert task.metric_name == "accuracy_lenient"


def test_contaminated_sets_say_so():
    for name in ("addsub", "multiarith", "singleeq"):
        assert "CONTAMINATED" in tasks.get(f"math/{name}").source


def test_solutions_have_no_notes_and_equations_end_like_them(tmp_path):
    write_rows(tmp_path / "math/gsm8k/train.jsonl", [{"question": "q", "answer": "2+2=<<2+2=4>>4.\n#### 4"}])
    write_rows(tmp_path / "math/mawps/train.jsonl", [{"question": "q", "equation": "X=(2.0+2.0)", "answer": 4.0}])
    svamp = {"Body": "B. ", "Question": "Q?", "Equation": "2 / 4", "Answer": "0.50"}
    write_rows(tmp_path / "math/svamp/test.jsonl", [svamp])
    found = [tasks.load(tasks.get(f"math/{name}"), "train", tmp_path).examples[0].label for name in ("gsm8k", "mawps")]
    assert found == ["2+2=4.\n#### 4", "X=(2.0+2.0)\n#### 4"]
    test = tasks.load(tasks.get("math/svamp"), "validation", tmp_path)
    assert test.examples == (Example(("B. Q?",), "2 / 4\n#### 0.5"),)


def test_the_mixture_holds_out_a_tenth(tmp_path):
    for name, count in (("gsm8k", 25), ("mawps", 10)):
        answer = "#### 1" if name == "gsm8k" else 1.0
        rows = [{"question": f"{name} {i}", "equation": "X=1", "answer": answer} for i in range(count)]
        write_rows(tmp_path / f"math/{name}/train.jsonl", rows)
    task = tasks.get("math/math10k-style")
    splits = {name: tasks.load(task, name, tmp_path) for name in ("train", "validation")}
    texts = {name: [example.texts[0] for example in split.examples] for name, split in splits.items()}
    assert texts["validation"] == ["gsm8k 9", "gsm8k 19", "mawps 4"]
    assert (len(texts["train"]), set(texts["train"]) & set(texts["validation"])) == (32, set())
    assert splits["train"].origin.count("train.jsonl") == 2
    assert len(tasks.load(task, "train", tmp_path, limit=3)) == 3
    (tmp_path / "math/mawps/train.jsonl").unlink()
    with pytest.raises(TaskError, match="has no train split of math/mawps"):
        tasks.load(task, "train", tmp_path)


def test_references_are_rows_in_training_and_stand_together_in_validation(tmp_path):
    rows = [{"meaning_representation": m, "human_reference": r} for m, r in (("a", "x"), ("b", "y"), ("a", "z"))]
    for split in ("train", "validation"):
        write_rows(tmp_path / f"nlg/e2e/{split}.jsonl", rows)
        write_rows(tmp_path / f"nlg/webnlg/{split}.jsonl", [{"triples": ["a | b | c", "d"], "references": ["x", "y"]}])
    e2e, web = tasks.get("nlg/e2e"), tasks.get("nlg/webnlg")
    assert [e.label for e in tasks.load(e2e, "train", tmp_path).examples] == ["x", "y", "z"]
    assert tasks.load(e2e, "validation", tmp_path).examples == (Example(("a",), ("x", "z")), Example(("b",), "y"))
    assert tasks.load(web, "validation", tmp_path).examples == (Example(("a | b | c\nd",), ("x", "y")),)
    assert [e.label for e in tasks.load(web, "train", tmp_path).examples] == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "math/gsm8k",
            {"question": "q"},
            "line 1: not a row of math/gsm8k as Cobbe et al. 2021, arXiv 2110.14168 gives",
        ),
        ("math/gsm8k", {"question": "q", "answer": 4}, "line 1: not a row of math/gsm8k"),
        ("math/mawps", {"question": "q", "equation": "X=1", "answer": "four"}, "line 1: not a row of math/mawps"),
        ("nlg/webnlg", {"triples": 3, "references": ["a"]}, "line 1: not a row of nlg/webnlg"),
        ("nlg/webnlg", {"triples": "abc", "references": ["a"]}, "line 1: not a row of nlg/webnlg"),
        ("nlg/e2e", {"meaning_representation": "a", "human_reference": None}, "line 1: the label of nlg/e2e must be"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, row, message):
    write_rows(tmp_path / f"{tasks.get(name).folders[0]}/train.jsonl", [row])
    with pytest.raises(TaskError, match=r"train\.jsonl, " + message):
        tasks.load(tasks.get(name), "train", tmp_path)


def test_what_is_on_the_hub_is_pinned(monkeypatch, tmp_path):
    monkeypatch.delenv(DATA, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("math/gsm8k", "math/svamp", "summarization/cnn_dailymail"):
        hub = tasks.get(name).hub
        assert hub is not None
        assert len(str(hub.revision)) == 40
    with pytest.raises(TaskError, match=r"hub abisee/cnn_dailymail/3\.0\.0@\w{40} cannot be reached"):
        tasks.load(tasks.get("summarization/cnn_dailymail"), "train")


def test_a_run_on_triples_gives_its_metrics_again(tmp_path):
    rows = [{"triples": [f"{a} | likes | {b}"], "references": [f"{a} likes {b} .", f"{b} is liked by {a} ."]}
            for a, b in (("Ann", "tea"), ("Ben", "figs"), ("Cleo", "nuts"), ("Dan", "rice"))]  # fmt: skip
    task = tasks.get("nlg/webnlg")
    for split in ("train", "validation"):
        write_rows(tmp_path / f"nlg/webnlg/{split}.jsonl", rows)
    known = [text for e in tasks.load(task, "train", tmp_path).examples for text in (*e.texts, e.label)]
    llama = make_llama(tmp_path / "llama", ["Say all of this in a sentence or two.", *known])
    config = RunConfig(model=str(llama), task=task.name, method="full", lr=1e-2, max_steps=40, batch_size=8,
                       data=str(tmp_path), out=str(tmp_path / "out"))  # fmt: skip
    result = run(config)
    assert result.evaluation.metric == "BLEU"
    assert result.value > 40
    assert set(result.evaluation.others) == {"chrF", "rougeL"}
    assert evaluate_delta(Source(str(llama)), result.delta, task, str(tmp_path)) == result.evaluation
