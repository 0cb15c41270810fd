"""Answers within generated text: a number, or a letter from A to E. Nothing in the text is evaluated.

Each is read in two ways. The lenient one is that of LLM-Adapters (Hu et al., 2023, arXiv 2304.01933), with which the
papers' numbers are made: it takes a number or a letter anywhere, so it credits answers that the text does not give. The
strict one asks for an answer that is stated, and for exact equality.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

from selectune.errors import TaskError

DIGITS = 100
"""A number with more characters is no answer for the strict readers, whatever it is."""

_LENIENT = re.compile(r"-?\d+\.?\d*")

_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])"
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_])(?<![0-9]\.)((?<![)\].])-)?"  # sign
    rf"(?:({_GROUPED}|[0-9]++)(\.[0-9]++)?|((?<!\.)\.[0-9]++))"  # digits and decimals, or decimals alone
    r"(?:\s?/\s?([0-9]++))?"  # denominator
)
_LETTER = re.compile(r"(?<![\w'])(?:A(?!\s+(?!is\b)[a-z])|[B-E])(?![\w'])")  # "A train" is no answer, "A is right" is
_HASHES = re.compile(r"####\s*(?=[-.0-9]|\(?[A-E]\b)")  # not a heading
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_ANSWER = re.compile(r"\banswer(?:\s+\w+){0,3}?\s*(?::|=|\bis\b)[\s:=*]*", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?](?=\s|$)|\n")
_LATEX = (
    (re.compile(r"\\[,!]|\\?[$€£¥]"), ""),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}"), r"\1/\2"),
)


def number_accuracy(predictions: Sequence[str], labels: Sequence[str | float]) -> dict[str, float]:
    """Share of texts with the right number: `accuracy_lenient` (to 0.001) and `accuracy_strict` (exactly).

    A label is a number, or a text in which `strict_number` finds one, such as a solution that ends in "#### 18"; any
    other raises TaskError. Text without a number counts as wrong.

    >>> number_accuracy(["He pays $18.00.", "18? No, the answer is 17."], ["#### 18", 18])
    {'accuracy_lenient': 0.5, 'accuracy_strict': 0.5}
    """
    lenient = strict = 0
    for row, (text, label) in enumerate(zip(predictions, labels, strict=True), 1):
        written = label if isinstance(label, str) else format(Decimal(str(label)), "f")
        right = strict_number(written)
        if right is None:
            raise TaskError(f"The label of row {row} must have a number of at most {DIGITS} digits, got {label!r:.80}.")
        found = lenient_number(text)
        lenient += found is not None and abs(float(right) - found) <= 0.001
        strict += strict_number(text) == right
    return {"accuracy_lenient": lenient / len(labels), "accuracy_strict": strict / len(labels)}


def letter_accuracy(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Share of texts with the right letter: `accuracy_lenient` and `accuracy_strict`.

    A label is a letter from A to E; any other raises TaskError. Text without an answer counts as wrong.

    >>> letter_accuracy(["Because x = 2, the answer is (B)."], ["B"])  # the lenient reader takes the B of "Because"
    {'accuracy_lenient': 1.0, 'accuracy_strict': 1.0}
    """
    for row, label in enumerate(labels, 1):
        if label not in ("A", "B", "C", "D", "E"):
            raise TaskError(f"The label of row {row} must be a letter from A to E, got {label!r:.80}.")
    pairs = list(zip(predictions, labels, strict=True))
    return {
        "accuracy_lenient": sum(lenient_letter(text) == label for text, label in pairs) / len(pairs),
        "accuracy_strict": sum(strict_letter(text) == label for text, label in pairs) / len(pairs),
    }


def lenient_number(text: str) -> float | None:
    """The last number in a text without its commas, as LLM-Adapters reads it: no fractions, no Unicode minus.

    >>> lenient_number("so 1,234.50 it is"), lenient_number("3/4"), lenient_number("none")
    (1234.5, 4.0, None)
    """
    found = _LENIENT.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


def lenient_letter(text: str) -> str | None:
    """The first capital letter from A to E in a text, even within a word, as LLM-Adapters reads it.

    >>> lenient_letter("The answer is B"), lenient_letter("Dividing, we get B")
    ('B', 'D')
    """
    found = re.search("[A-E]", text)
    return found[0] if found else None


def strict_number(text: str) -> Fraction | None:
    r"""The number that a text gives as its answer.

    It is the first number after "####" (the first one), in the last \boxed{} or after the last "answer is", and there
    after the last "="; without any of these it is the last number of the last sentence. Thousands separators, currency
    and percent signs and trailing zeros do not matter; a/b is a fraction, and so is a decimal of 12 or more places that
    is one to a float's precision. A number right after a letter (x2) does not count.

    >>> strict_number("It costs -$1,234.50"), strict_number(r"\boxed{\frac{3}{4}}"), strict_number("4? I do not know.")
    (Fraction(-2469, 2), Fraction(3, 4), None)
    """
    phrase, stated = _phrase(text)
    found = list(_NUMBER.finditer(phrase.rpartition("=")[2] if stated else phrase))
    if not found:
        return None
    sign, whole, decimals, bare, below = found[0 if stated else -1].groups()
    digits = (whole or "").replace(",", "") + (decimals or bare or "")
    if len(digits) > DIGITS or len(below or "") > DIGITS or (below and not below.strip("0")):
        return None
    value = Fraction(digits) / Fraction(below or 1)
    near = value.limit_denominator(10_000)
    if len(decimals or bare or "") > 12 and abs(near - value) <= value / 10**14:
        value = near
    return -value if sign else value


def strict_letter(text: str) -> str | None:
    r"""The letter from A to E that a text gives as its answer, where `strict_number` would look for a number.

    It stands alone, and no other letter does so beside it: "B or C" is no answer.

    >>> strict_letter("Dividing, the answer is (B) 42."), strict_letter("A train takes 5 h."), strict_letter("B or C")
    ('B', None, None)
    """
    found = set(_LETTER.findall(_phrase(text)[0]))
    return found.pop() if len(found) == 1 else None


def _phrase(text: str) -> tuple[str, bool]:
    """The part of a text that gives its answer, and whether it says so; otherwise it is the last sentence."""
    text = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    for pattern, by in _LATEX:
        text = pattern.sub(by, text)
    if hashes := _HASHES.search(text):
        return text[hashes.end() :].partition("\n")[0], True
    if boxed := _BOXED.findall(text):
        return boxed[-1], True
    answers = list(_ANSWER.finditer(text))
    if answers:
        return _SENTENCE.split(text[answers[-1].end() :], 1)[0], True
    sentences = [part for part in _SENTENCE.split(text) if part.strip()]
    return (sentences[-1] if sentences else ""), False
