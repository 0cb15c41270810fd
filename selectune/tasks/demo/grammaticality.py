"""A generated acceptability task: minimal pairs of English sentences, told apart one sentence at a time.

In the spirit of BLiMP (arXiv 1912.00582) and CoLA, but every sentence is made here, by six small rules. A pair
differs in one word and is acceptable only one way; both ways occur with each word, so no single word gives
the answer. Nouns, verbs, adjectives and names of the validation split are never seen in training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from selectune.tasks.common import Task
from selectune.tasks.demo.words import TRAIN, VALIDATION, Words
from selectune.tasks.metrics import accuracy

SIZES = {"train": 4000, "validation": 1000}
SEED = 0

Pair = tuple[str, str]  # acceptable, not acceptable


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "ch", "sh", "x")) else "s")


def _third(verb: str) -> str:
    return verb + ("es" if verb.endswith(("s", "ch", "sh", "x")) else "s")


def _past(verb: str) -> str:
    return verb + ("d" if verb.endswith("e") else "ed")


def _number(noun: str, plural: bool) -> str:
    return _plural(noun) if plural else noun


def _agreement(words: Words, rng: random.Random) -> Pair:
    """The key to the cabinets is / *are old: the noun next to the verb is not its subject."""
    plural = rng.random() < 0.5
    link = rng.choice(("near", "behind", "next to", "beside"))
    if rng.random() < 0.5:
        head, other = rng.sample(words.things, 2)
        good, bad = rng.choice((("is", "are"), ("was", "were")))
        rest = rng.choice(words.adjectives)
    else:
        head, other = rng.choice(words.people), rng.choice(words.things)
        verb = rng.choice(words.verbs)
        good, bad = _third(verb), verb
        rest = rng.choice(words.names)
    if plural:
        good, bad = bad, good
    opening = f"The {_number(head, plural)} {link} the {_number(other, not plural)}"
    return f"{opening} {good} {rest}.", f"{opening} {bad} {rest}."


def _determiner(words: Words, rng: random.Random) -> Pair:
    """Mary admired these / *this old tables."""
    plural = rng.random() < 0.5
    one, many = rng.choice((("this", "these"), ("that", "those")))
    good, bad = (many, one) if plural else (one, many)
    noun = _number(rng.choice(words.things), plural)
    if rng.random() < 0.5:
        noun = f"{rng.choice(words.adjectives)} {noun}"
    opening = f"{rng.choice(words.names)} {_past(rng.choice(words.verbs))}"
    return f"{opening} {good} {noun}.", f"{opening} {bad} {noun}."


def _reflexive(words: Words, rng: random.Random) -> Pair:
    """The girl near the doctors admired herself / *themselves."""
    hers = rng.random() < 0.5
    plural = rng.random() < 0.4
    verb = _past(rng.choice(words.verbs))
    alone = "herself" if hers else "himself"
    if plural:
        head, good, bad = f"The {_plural(rng.choice(words.women if hers else words.men))}", "themselves", alone
    else:
        nouns, names = (words.women, words.her_names) if hers else (words.men, words.his_names)
        head = rng.choice(names) if rng.random() < 0.4 else f"The {rng.choice(nouns)}"
        good, bad = alone, rng.choice(("themselves", "himself" if hers else "herself"))
    if head.startswith("The ") and rng.random() < 0.6:
        head += f" near the {_number(rng.choice(words.people), not plural)}"
    return f"{head} {verb} {good}.", f"{head} {verb} {bad}."


def _polarity(words: Words, rng: random.Random) -> Pair:
    """No / *The doctor has ever visited it; the doctor has often / *ever; no doctor has / *have ever."""
    noun, thing = rng.choice(words.people), rng.choice(words.things)
    rest = f"{_past(rng.choice(words.verbs))} the {thing}"
    kind = rng.randrange(3)
    if kind == 0:
        bad = rng.choice(("The", "Some", "This"))
        return f"No {noun} has ever {rest}.", f"{bad} {noun} has ever {rest}."
    if kind == 1:
        subject, good = rng.choice(("The", "Some", "This")), rng.choice(("often", "also", "already"))
        return f"{subject} {noun} has {good} {rest}.", f"{subject} {noun} has ever {rest}."
    return f"No {noun} has ever {rest}.", f"No {noun} have ever {rest}."


def _complement(words: Words, rng: random.Random) -> Pair:
    """Mary knows what / *that the doctor visited; Mary knows that / *what the doctor visited the museum."""
    opening = f"{rng.choice(words.names)} {rng.choice(('knows', 'understood', 'forgot', 'said', 'heard'))}"
    clause = f"the {rng.choice(words.people)} {_past(rng.choice(words.verbs))}"
    if rng.random() < 0.5:
        return f"{opening} what {clause}.", f"{opening} that {clause}."
    clause += f" the {rng.choice(words.things)}"
    return f"{opening} that {clause}.", f"{opening} what {clause}."


def _auxiliary(words: Words, rng: random.Random) -> Pair:
    """The doctor has visited / *visit Mary; the doctor can visit / *visited Mary."""
    verb, person = rng.choice(words.verbs), rng.choice(words.people)
    past = _past(verb)
    auxiliary, good, bad = rng.choice(
        (("has", past, verb), ("have", past, verb), ("can", verb, past), ("did not", verb, past))
    )
    opening = f"The {_number(person, auxiliary == 'have')} {auxiliary}"
    rest = f"the {rng.choice(words.adjectives)} {rng.choice(words.things)}"
    return f"{opening} {good} {rest}.", f"{opening} {bad} {rest}."


PHENOMENA: dict[str, Callable[[Words, random.Random], Pair]] = {
    "agreement": _agreement,
    "determiner": _determiner,
    "reflexive": _reflexive,
    "polarity": _polarity,
    "complement": _complement,
    "auxiliary": _auxiliary,
}


def generate(split: str, seed: int = SEED) -> Sequence[Mapping[str, Any]]:
    """The rows of a split: sentence, label (1 acceptable), phenomenon, pair. The same seed gives the same rows.

    >>> sorted(generate("validation")[0])
    ['label', 'pair', 'phenomenon', 'sentence']
    """
    words = {"train": TRAIN, "validation": VALIDATION}[split]
    rng = random.Random(f"{seed}/{split}")
    rows = [
        {"sentence": sentence, "label": label, "phenomenon": name, "pair": number}
        for number, (name, pair) in enumerate(_pairs(words, SIZES[split] // 2, rng))
        for sentence, label in zip(pair, (1, 0), strict=True)
    ]
    rng.shuffle(rows)
    return rows


def _pairs(words: Words, count: int, rng: random.Random) -> Iterator[tuple[str, Pair]]:
    seen: set[str] = set()
    names = list(PHENOMENA)
    made = 0
    while made < count:
        name = names[made % len(names)]
        pair = PHENOMENA[name](words, rng)
        if seen.isdisjoint(pair):
            seen.update(pair)
            made += 1
            yield name, pair


GRAMMATICALITY = Task(
    name="demo/grammaticality",
    fields=("sentence",),
    kind="classification",
    labels=("unacceptable", "acceptable"),
    metric=accuracy,
    metric_name="accuracy",
    chance=0.5,
    source="generated by selectune, Apache-2.0; in the spirit of BLiMP, arXiv 1912.00582",
    epochs=3,
    eval_every=100,
    max_length=64,
    generate=generate,
)
