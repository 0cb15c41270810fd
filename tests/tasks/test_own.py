"""Rows of one's own: which kind of task they are, every format, and a sentence with file and line for each fault."""

from __future__ import annotations

import csv
import gzip
import io
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as some
from tiny_kit import write_rows

from selectune import tasks
from selectune.errors import ConfigError, TaskError
from selectune.tasks import Example, OwnRows
from selectune.tasks.splits import Split, first_rows, nested

pytest_plugins = ("tiny_fixtures",)

GOOD = [{"q": "the dog", "a": "yes"}, {"q": "a cat", "a": "no"}, {"q": "big tree", "a": "yes"}]


def own(folder, rows=GOOD, more=None, **changed):
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "more.jsonl", rows if more is None else more)
    told = {
        "train": str(folder / "train.jsonl"),
        "validation": str(folder / "more.jsonl"),
        "text": ("q",),
        "label": "a",
    }
    return OwnRows(**(told | changed))


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        (["yes", "no", "yes"], "classification", ("no", "yes")),
        ([True, False, True], "classification", ("false", "true")),
        ([10, 9, 9], "classification", ("9", "10")),
        ([0.5, 2, 3], "regression", ()),
        ([1.0, 2.0, 2.0], "regression", ()),
        (list(range(30)), "regression", ()),
        ([["x", "y"], [], ["x"]], "multilabel", ("x", "y")),
    ],
)
def test_labels_tell_the_kind(tmp_path, labels, kind, names):
    task = own(tmp_path, [{"q": "the dog", "a": label} for label in labels]).task()
    assert (task.kind.name, task.labels) == (kind, names)
    loaded = tasks.load(task, "validation")
    assert len(loaded) == len(labels)
    assert loaded.digest == tasks.load(task, "train").digest


TAGS = [
    ([["B-PET", "O"], ["U-PET"]], "f1"),
    ([["B", "O"], ["I", "O"]], "f1"),
    ([["NOUN", "VERB"], ["NOUN"]], "accuracy"),
    ([[3, 10], [10]], "accuracy"),
    ([["B", "O"], ["X"]], "accuracy"),
]


@pytest.mark.parametrize(("tags", "metric"), TAGS, ids=str)
def test_tags_that_name_no_entity_are_measured_by_accuracy(tmp_path, tags, metric):
    task = own(tmp_path, [{"q": ["dog"] * len(each), "a": each} for each in tags]).task()
    assert (task.kind.name, task.metric_name) == ("tagging", metric)
    answers = [e.label for e in tasks.load(task, "validation").examples]
    assert task.scores(answers, answers)[metric] == 1
    assert tasks.bare_task("tagging", task.labels, ("q",)).metric_name == metric
    if metric == "accuracy":
        flat = [tag for row in answers for tag in row]
        assert task.chance == max(Counter(flat).values()) / len(flat)
        wrong = next(tag for tag in task.labels if tag != flat[0])
        one_off = [(wrong, *answers[0][1:]), *answers[1:]]
        assert task.scores(one_off, answers) == pytest.approx({"accuracy": 1 - 1 / len(flat)})


def test_a_tag_that_is_not_in_the_training_rows_is_a_fault(tmp_path):
    rows = [{"q": ["the", "dog"], "a": ["DET", "NOUN"]}]
    with pytest.raises(TaskError, match=r"more\.jsonl, line 2: the label in 'a' is 'VERB', which does not occur"):
        own(tmp_path, rows, [*rows, {"q": ["runs"], "a": ["VERB"]}]).task()


def test_a_kind_can_be_named(tmp_path):
    scores = own(tmp_path, [{"q": "a", "a": n} for n in (1, 2, 2)], kind="regression").task()
    assert [e.label for e in tasks.load(scores, "train").examples] == [1.0, 2.0, 2.0]
    classes = own(tmp_path, [{"q": "a", "a": n} for n in (1.0, 2.0, 2)], kind="classification").task()
    assert classes.labels == ("1", "2")
    with pytest.raises(ConfigError, match=r"Unknown kind 'clasification'\. Known: .* Did you mean classification\?"):
        own(tmp_path, kind="clasification").task()


def test_the_chance_level_is_that_of_the_best_constant_answer(tmp_path):
    assert own(tmp_path).task().chance == pytest.approx(2 / 3)
    assert own(tmp_path, [{"q": "a", "a": x} for x in (0.5, 1, 2)]).task().chance == 0
    sets = [["x"], ["x", "y"], ["z"], ["x"]]
    rows = [{"q": "a", "a": each} for each in sets]
    task = own(tmp_path, rows).task()
    answers = [e.label for e in tasks.load(task, "validation").examples]
    constants = [task.scores([list(flags)] * 4, answers)["f1_micro"] for flags in product((0, 1), repeat=3)]
    assert task.chance == pytest.approx(max(constants))


def test_the_same_rows_in_every_format(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"q": 'the "big", dog\nruns', "a": "yes"}, {"q": "ein Bär", "a": "no"}]
    expected = tasks.load(own(tmp_path, rows).task(), "train").examples
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name, mark in (("t.csv", ","), ("t.tsv", "\t")):
        text = io.StringIO()
        writer = csv.DictWriter(text, ["q", "a"], delimiter=mark)
        writer.writeheader()
        writer.writerows(rows)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.getvalue().encode()))
    write_rows(tmp_path / "t.jsonl", rows, packed=True)
    for name in ("t.parquet", "t.csv", "t.tsv", "t.csv.gz", "t.tsv.gz", "t.jsonl.gz"):
        task = OwnRows(str(tmp_path / name), str(tmp_path / name), ("q",), "a").task()
        assert tasks.load(task, "train").examples == expected, name


def test_numbers_of_a_csv_file(tmp_path):
    (tmp_path / "t.csv").write_text("q,a,b\nthe dog,3,0.5\na cat,10,2\n")
    place = str(tmp_path / "t.csv")
    assert OwnRows(place, place, ("q",), "a").task().labels == ("3", "10")
    scores = OwnRows(place, place, ("q",), "b").task()
    assert [e.label for e in tasks.load(scores, "train").examples] == [0.5, 2.0]


def test_a_text_that_looks_like_a_number(tmp_path):
    texts = [f"{100 + i % 25}" for i in range(60)]
    task = own(tmp_path, [{"q": "a", "a": text} for text in texts]).task()
    assert (task.kind.name, len(task.labels)) == ("classification", 25)
    with pytest.raises(ConfigError, match=r"60 different texts in 60 rows, so they hardly name classes.*--kind"):
        own(tmp_path, [{"q": "a", "a": str(i)} for i in range(60)]).task()
    scores = own(tmp_path, [{"q": "a", "a": str(i)} for i in range(60)], kind="regression").task()
    assert tasks.load(scores, "train").examples[7].label == 7.0
    for name, cells, kind in (
        ("t.csv", texts, "regression"),
        ("t.tsv", texts, "regression"),
        ("u.csv", [f"2024_{text}" for text in texts], "classification"),
    ):
        mark = "\t" if name == "t.tsv" else ","
        (tmp_path / name).write_text(
            "\n".join(f"{cell}{mark}the dog" for cell in ["a", *cells]).replace("the dog", "q", 1)
        )
        found = OwnRows(str(tmp_path / name), str(tmp_path / name), ("q",), "a").task()
        assert found.kind.name == kind, name
    with pytest.raises(TaskError, match=r"u\.csv, line \d+: the label in 'a' must be a finite number, got '2024_1"):
        OwnRows(str(tmp_path / "u.csv"), None, ("q",), "a", "regression", 0.5).task()


def test_pairs_of_texts(tmp_path):
    rows = [{"p": "the dog", "h": "a dog", "a": 0}, {"p": "the cat", "h": "", "a": 1}]
    task = own(tmp_path, rows, text=("p", "h")).task()
    assert tasks.load(task, "train").examples == (Example(("the dog", "a dog"), 0), Example(("the cat", ""), 1))


FAULTS = [
    ([*GOOD, {"a": "no"}], r"train\.jsonl, line 4 has no column 'q'\. It has 'a'\."),
    ([*GOOD, {"q": "x", "aa": "no"}], r"line 4 has no column 'a'\. It has 'q', 'aa'\. Did you mean aa\?"),
    ([*GOOD, {"q": "  ", "a": "no"}], r"line 4 is empty: there is no text in 'q'"),
    ([*GOOD, {"q": None, "a": "no"}], r"line 4 is empty"),
    ([*GOOD, {"q": 3, "a": "no"}], r"line 4: the texts of own must be strings"),
    ([*GOOD, {"q": "x", "a": 3}], r"line 4: the label in 'a' is a number, 3, and in line 1 it is a text"),
    ([*GOOD, {"q": "x", "a": None}], r"line 4: the label in 'a' is missing"),
    ([*GOOD, {"q": "x", "a": {}}], r"line 4: the label in 'a' must be a text, a number or a list, got \{\}"),
    (GOOD[:1], r"train\.jsonl: every row has the same label, 'yes', so there is nothing to learn"),
    ([], r"train\.jsonl has no rows"),
    ([{"q": "x", "a": f"text {i}"} for i in range(50)], r"50 different texts in 50 rows, so they hardly name classes"),
]


@pytest.mark.parametrize(("rows", "message"), FAULTS)
def test_faults_of_training_rows(tmp_path, rows, message):
    with pytest.raises((TaskError, ConfigError), match=message):
        tasks.load(own(tmp_path, rows, GOOD).task(), "train")


VALIDATION = [
    (
        {"q": "x", "a": "nno"},
        r"more\.jsonl, line 2: the label in 'a' is 'nno', which does not occur in training; .*no, yes",
    ),
    ({"q": "x", "a": ["no"]}, r"line 2: the label in 'a' must be the name of a class"),
]


@pytest.mark.parametrize(("row", "message"), VALIDATION)
def test_faults_of_validation_rows(tmp_path, row, message):
    with pytest.raises(TaskError, match=message):
        own(tmp_path, GOOD, [GOOD[0], row]).task()


RAW = {
    "t.jsonl": [
        (b'{"q": "x", "a": "\xff"}\n', r"t\.jsonl, line 1 is not UTF-8"),
        (b'{"q": "x"\n', r"t\.jsonl, line 1 is not valid JSON"),
    ],
    "t.csv": [
        (b"q,a\nx,yes\nx,no,more\n", r"t\.csv, line 3 has 3 cells, and the table has 2 columns"),
        (b"q,a\nx,yes\nx\n", r"t\.csv, line 3 has 1 cells"),
        (b"q,a\nx,y\xffs\n", r"t\.csv, line 2 is not UTF-8: invalid start byte at byte 3"),
        (b'q,a\n"x,yes\n', r"t\.csv, line 2 is no row of a table: unexpected end of data"),
        (b"q,q\nx,yes\n", r"t\.csv, line 1: each column needs a name of its own"),
        (b"q,a\nx,\ny,z\n", r"t\.csv, line 2: the label in 'a' is missing"),
        (b"", r"t\.csv has no rows"),
    ],
    "t.parquet": [(b"PAR1 this is none", r"t\.parquet, after row 0: this is no parquet that can be read")],
    "t.txt": [(b"x", r"t\.txt ends in none of \.jsonl, \.csv, \.tsv, \.parquet")],
}


@pytest.mark.parametrize(("name", "data", "message"), [(n, d, m) for n, rows in RAW.items() for d, m in rows])
def test_faults_of_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TaskError, match=message):
        OwnRows(str(tmp_path / name), None, ("q",), "a", hold_out=0.5).task()


def test_a_gzip_bomb_of_csv(tmp_path):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"q,a\n" + (b"a" * 130_000 + b",yes\n") * 40))
    with pytest.raises(TaskError, match=r"t\.csv\.gz, line \d+: [\d,]+ bytes of gzip became"):
        OwnRows(str(tmp_path / "t.csv.gz"), None, ("q",), "a", hold_out=0.5).task()


def test_places_that_are_none(tmp_path, offline):
    write_rows(tmp_path / "train.jsonl", GOOD)
    for place, message in (
        (str(tmp_path / "trian.jsonl"), r"trian\.jsonl does not exist\. Did you mean train\.jsonl\?"),
        (str(tmp_path), "is a folder, which holds train.jsonl"),
        ("nobody/nothing:plain@abc", r"no file here.*hub nobody/nothing/plain@abc cannot be reached"),
    ):
        with pytest.raises(TaskError, match=message):
            OwnRows(place, None, ("q",), "a", hold_out=0.5).task()
    offline.clear()


def test_a_held_out_share_keeps_the_shares_of_the_labels(tmp_path):
    rows = [{"q": f"the dog {i}", "a": "yes" if i % 4 else "no"} for i in range(80)]
    task = own(tmp_path, rows, validation=None, hold_out=0.25).task()
    train, held = tasks.load(task, "train"), tasks.load(task, "validation")
    assert Counter(e.label for e in held.examples) == {0: 5, 1: 15}
    assert {e.texts for e in train.examples} | {e.texts for e in held.examples} == {(row["q"],) for row in rows}
    assert len(train) + len(held) == 80
    assert "held-out share of 0.25" in held.origin
    again = own(tmp_path, rows, validation=None, hold_out=0.25).task()
    assert tasks.load(again, "validation").digest == held.digest
    with pytest.raises(TaskError, match="too few to hold out"):
        own(tmp_path, rows[:1] + rows[:1], validation=None, hold_out=0.9).task()


def test_names_that_look_alike_and_few_held_out_rows_are_told(tmp_path, caplog):
    rows = [{"q": f"the dog {i}", "a": ["yes", "Yes", "no", "yes "][i % 4]} for i in range(40)]
    task = own(tmp_path, rows, validation=None, hold_out=0.25).task()
    assert len(task.labels) == 4
    few, differ = caplog.messages
    assert "'Yes' and 'yes' and 'yes ' differ in blanks or in the case of letters only" in differ
    assert "is 10 rows, of which a metric says little" in few


@given(some.lists(some.sampled_from("abcd"), min_size=1, max_size=60), some.integers(0, 9))
def test_every_beginning_has_the_shares_of_the_classes(classes, seed):
    order = nested(classes, str(seed))
    assert sorted(order) == list(range(len(classes)))
    shares, kinds = Counter(classes), len(set(classes))
    for size in range(1, len(order) + 1):
        found = Counter(classes[i] for i in order[:size])
        for name, count in shares.items():
            assert abs(found[name] - size * count / len(classes)) <= 1 + kinds / 2


def test_the_first_rows_are_nested_and_the_same_for_whoever_asks():
    task = tasks.get("demo/topic")
    whole = tasks.load(task, "train")
    sizes = [first_rows(task, whole, size) for size in (10, 50, 100, len(whole))]
    sets = [set(split.examples) for split in sizes]
    assert [len(split) for split in sizes] == [10, 50, 100, 2400]
    assert sets[0] < sets[1] < sets[2] < sets[3]
    assert set(Counter(e.label for e in sizes[2].examples).values()) <= {8, 9}
    assert first_rows(task, whole, 50) == sizes[1]
    assert first_rows(task, whole, 50, seed=1) != sizes[1]
    scores = Split(tuple(Example(("a",), float(i)) for i in range(9)), "here")
    assert len(first_rows(tasks.get("glue/stsb"), scores, 4)) == 4
    with pytest.raises(
        TaskError, match=r"10 training rows are wanted \(train_size or shots\), and those of glue/stsb are 9"
    ):
        first_rows(tasks.get("glue/stsb"), scores, 10)


def test_rows_that_are_cut_are_counted(tmp_path, tiny, caplog):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [{"q": "the dog " * n, "a": n % 2} for n in (2, 3, 4, 5)]
    task = own(tmp_path, rows).task()
    encoded = task.encode(tokenizer, tasks.load(task, "train").examples, 8)
    assert [len(row["input_ids"]) for row in encoded] == [6, 8, 8, 8]
    assert caplog.messages == ["2 of 4 rows of own were cut to max_length=8 tokens."]


def test_numbers_that_are_equal_as_floats_are_classes_in_one_order(tmp_path):
    """Sets of texts have another order in each process."""
    for labels in (["1", "01", " 1", "+1", "2"], [10**17 + n % 6 for n in range(12)]):
        rows = [{"q": "the dog", "a": label} for label in labels]
        names = {str(label) for label in labels}
        assert own(tmp_path, rows, kind="classification").task().labels == tuple(
            sorted(names, key=lambda name: (float(name), name))
        )


@pytest.mark.parametrize("label", ["oui\u00a0!", "a\nb", "x" * 4097])
def test_a_class_that_no_delta_can_name_is_refused(tmp_path, label):
    with pytest.raises(TaskError, match=r"train\.jsonl, line 2: the label in 'a' must have at most 4,096 characters"):
        own(tmp_path, [GOOD[0], {"q": "a cat", "a": label}]).task()


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("choice", ("q",), "A choice takes a prompt and a list of choices"),
        ("classification", ("q", "b", "c"), r"A classification takes one text or two .* 3 columns are named: q, b, c"),
        (None, ("q", "a"), "The column 'a' is named as a text and as the label"),
    ],
)
def test_columns_that_a_kind_does_not_take(tmp_path, kind, text, message):
    rows = [{"q": "x", "b": "y", "c": "z", "a": n} for n in (0, 1)]
    with pytest.raises(ConfigError, match=message):
        own(tmp_path, rows, kind=kind, text=text).task()
