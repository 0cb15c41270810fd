"""A tag for each word: which piece stands for it, words that no piece shows, and a run that gives its F1 again."""

from __future__ import annotations

import dataclasses
import logging

import pytest
from tiny_kit import WORDS, write_rows

from selectune import tasks
from selectune.errors import TaskError
from selectune.models.restore import Source, evaluate_delta, verify_delta
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.tasks import Example
from selectune.tasks.metrics import entity_f1

pytest_plugins = ("tiny_fixtures",)

NER = tasks.get("ner/conll2003")
SENTENCE = ("Marie", "Curie", "was", "born", "in", "Warszawa", ",", "\u200b", "not", "Zürich", "-", "U.S.A.")
TAGS = ("B-PER", "I-PER", "O", "O", "O", "B-LOC", "O", "O", "O", "B-LOC", "O", "B-LOC")


def byte_level(**options):
    """As the tokenizers of GPT-2, RoBERTa and LLaMA 3: a space belongs to the piece after it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        ["Marie was born in Paris, not in the U.S."] * 3,
        trainers.BpeTrainer(vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                            special_tokens=["<s>", "</s>"]),
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def metaspace():
    """As the tokenizers of T5 and DeBERTa-v3."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = sorted(set("".join(SENTENCE)) - {"\u200b"})
    made.train_from_iterator(
        ["Marie was born in Paris, not in the U.S.", *letters] * 5,
        trainers.UnigramTrainer(
            vocab_size=60, unk_token="<unk>", special_tokens=["<pad>", "<unk>"], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def word_piece():
    """As BERT's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("".join(SENTENCE)) - {"\u200b"})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "Mar", "born", "was", "War", *letters, *(f"##{c}" for c in letters)]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


TOKENIZERS = {
    "word pieces": word_piece,
    "byte level": byte_level,
    "byte level, spaces kept": lambda: byte_level(trim_offsets=False),
    "metaspace": metaspace,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_first_piece_of_a_word_stands_for_it(name):
    """The reference tokenizes the sentence up to each word: there its first piece comes next."""
    tokenizer = TOKENIZERS[name]()
    (row,) = NER.encode(tokenizer, [Example(SENTENCE, TAGS)], 512)
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    offsets = tokenizer(" ".join(SENTENCE), return_offsets_mapping=True)["offset_mapping"]
    for i, (word, at) in enumerate(zip(SENTENCE, row["words"], strict=True)):
        if at is None:
            assert word == "\u200b"
            continue
        start = len(" ".join(SENTENCE[:i])) + (i > 0)
        over = [k for k, (a, b) in enumerate(offsets) if b > start and a < start + len(word) and a < b]
        assert at == over[0], (word, pieces[at])
        assert row["pieces"][at] == NER.labels.index(TAGS[i])
    said = {at for at in row["words"] if at is not None}
    assert len(said) >= 11
    assert all(label == -100 for at, label in enumerate(row["pieces"]) if at not in said)


def test_it_is_what_a_tokenizer_does_with_split_words():
    tokenizer = word_piece()
    (row,) = NER.encode(tokenizer, [Example(SENTENCE, TAGS)], 512)
    split = tokenizer([list(SENTENCE)], is_split_into_words=True)
    of = split.word_ids(0)
    assert row["input_ids"] == split["input_ids"][0]
    assert row["words"] == [of.index(i) if i in of else None for i in range(len(SENTENCE))]


def test_words_beyond_the_length_are_outside_and_counted(tiny, caplog):
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForTokenClassification.from_pretrained(tiny, num_labels=9).eval()
    model.classifier.bias.data[2] += 100  # I-PER, always
    long, short = ("the", "dog", "sees", "a", "cat"), ("a", "fish")
    with caplog.at_level(logging.WARNING, logger="selectune"):
        rows = NER.encode(tokenizer, [Example(long, ("O",) * 5), Example(short, ("O", "O"))], 5)
    assert [record.message for record in caplog.records if record.name == "selectune"] == [
        "2 words in 1 of 2 sentences of ner/conll2003 have no piece within max_length=5; they count as predicted O."
    ]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        found = NER.kind.predict(NER, model, tokenizer, rows)
        assert found == [["I-PER"] * 3 + ["O"] * 2, ["I-PER"] * 2]
        batch = NER.kind.collate(tokenizer, rows)
        assert ((batch["labels"] == -100) | (batch["attention_mask"] == 1)).all()
        assert (batch["labels"] == 0).sum(-1).tolist() == [3, 2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, r"line 1: ner/conll2003 needs a list with a tag for each of 2"),
        ({"tokens": ["a"], "ner_tags": "O"}, "tag for each of 1 words, got 'O'"),
        ({"tokens": ["a"], "ner_tags": ["B-DOG"]}, r"line 1: a tag of ner/conll2003 must be one of O, .*got 'B-DOG'"),
        ({"tokens": ["a"], "ner_tags": [9]}, "got 9"),
        ({"tokens": ["a"], "ner_tags": [True]}, "got True"),
        ({"tokens": ["a"], "ner_tags": [["O"]]}, "got .'O'."),
        ({"tokens": [], "ner_tags": []}, "must be a list of strings, got ...$"),
        ({"tokens": ["a", 1], "ner_tags": ["O", "O"]}, "must be a list of strings"),
        ({"tokens": "a", "ner_tags": ["O"]}, "must be a list of strings"),
        ({"tokens": ["a"]}, r"needs tokens, ner_tags; missing: ner_tags"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    write_rows(tmp_path / "ner/conll2003/train.jsonl", [row])
    with pytest.raises(TaskError, match=message) as caught:
        tasks.load(NER, "train", tmp_path)
    assert "train.jsonl, line 1: " in str(caught.value)


def test_tags_may_be_numbers(tmp_path):
    write_rows(tmp_path / "ner/conll2003/train.jsonl", [{"tokens": ["a", "b"], "ner_tags": [1, 0]}])
    assert tasks.load(NER, "train", tmp_path).examples == (Example(("a", "b"), ("B-PER", "O")),)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(TaskError, match=r"needs a fast tokenizer.*Slow is a slow one"):
        NER.encode(Slow(), [], 8)


def test_a_run_learns_saves_and_reproduces(tiny, tmp_path):
    """The tag hangs on the word; two epochs of `full` find most of it."""
    of = {"cat": "B-LOC", "man": "B-PER", "house": "B-ORG"}
    rows = [[WORDS[(7 * i + 3 * j) % 33] for j in range(6)] for i in range(48)]
    rows = [{"tokens": words, "ner_tags": [of.get(word, "O") for word in words]} for words in rows]
    for split in ("train", "validation"):
        write_rows(tmp_path / f"ner/conll2003/{split}.jsonl", rows)
    config = RunConfig(model=str(tiny), task=NER.name, method="full", lr=1e-2, max_steps=60, data=str(tmp_path),
                       out=str(tmp_path / "out"), batch_size=16)  # fmt: skip
    result = run(config)
    assert result.value > 0.9
    assert set(result.evaluation.others) == {"precision", "recall"}
    assert evaluate_delta(Source(str(tiny)), result.delta, NER, str(tmp_path)) == result.evaluation
    assert verify_delta(Source(str(tiny)), result.delta).ok
    sparse = dataclasses.replace(config, method="id3", budget=500, max_steps=5, out=str(tmp_path / "id3"))
    found = run(sparse)
    assert evaluate_delta(Source(str(tiny)), found.delta, NER, str(tmp_path)) == found.evaluation


def test_the_metric_is_of_entities():
    gold, said = ("B-PER", "I-PER", "O", "B-LOC"), ("B-PER", "O", "O", "B-LOC")
    assert NER.scores([said], [gold]) == entity_f1([said], [gold]) == {"f1": 0.5, "precision": 0.5, "recall": 0.5}


def test_the_benchmark_data_has_the_published_rows(real_data):
    for split, count in (("train", 14041), ("validation", 3250)):
        assert len(tasks.load(NER, split, real_data)) == count
    assert len(tasks.load(tasks.get("ner/wikiann"), "validation", real_data)) == 10000
