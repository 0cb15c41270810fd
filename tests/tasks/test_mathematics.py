"""Answers read out of generated text: a table of texts, and numbers written in every way."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as some

from selectune.errors import TaskError
from selectune.tasks.metrics.mathematics import (
    DIGITS,
    lenient_letter,
    lenient_number,
    letter_accuracy,
    number_accuracy,
    strict_letter,
    strict_number,
)

# (text, what the lenient reader takes, what the strict one takes)
NUMBERS = [
    ("18", 18, 18),
    ("She makes $18 every day.", 18, 18),
    ("16 - 3 - 4 = 9. So 9 * 2 = 18.\n#### 18", 18, 18),
    ("#### 18\n\nQuestion: Tom has 7 pens.\n#### 7", 7, 18),
    ("####18", 18, 18),
    ("#### Step 1\nHe has 4.\n#### Step 2\nThe answer is 6.", 6, 6),
    ("#### 1,200 dollars", 1200, 1200),
    ("The answer is 12.", 12, 12),
    ("The answer is: 12", 12, 12),
    ("The final answer is\n\n12", 12, 12),
    ("The answer is 12, as 3 * 4 says.", 4, 12),
    ("The answer is 3 * 4 = 12 apples.", 12, 12),
    ("The answer is x = 12.", 12, 12),
    ("the ANSWER IS 12", 12, 12),
    ("Answer: 12. Check: 12 / 4 is 3.", 3, 12),
    ("The correct answer choice is 12 of 5.", 5, 12),
    ("The answer is 1,2345", 12345, 1),
    ("First I thought the answer is 3. No, the answer is 5.", 5, 5),
    ("The answer isn't 3", 3, 3),
    ("The answer is unclear. I tried 5 ways.", 5, None),
    (r"So \boxed{42}.", 42, 42),
    (r"\boxed{41} is wrong, so \boxed{42} with 3 steps", 3, 42),
    (r"\boxed{\frac{3}{4}}", 4, Fraction(3, 4)),
    (r"\boxed{-\dfrac{3}{4}}", 4, Fraction(-3, 4)),
    (r"\boxed{\text{12 km}}", 12, 12),
    (r"$\boxed{1{,}250}$", 250, 1250),
    (r"It is \$1\,250", 250, 1250),
    ("so 1,234.50 it is", 1234.5, Fraction(2469, 2)),
    ("1,000", 1000, 1000),
    ("1,234,567", 1234567, 1234567),
    ("$5.00", 5, 5),
    ("$5.00.", 5, 5),
    ("-$5.00", 5, -5),
    ("$-5", -5, -5),
    ("5 €", 5, 5),
    ("£1,000.10", 1000.1, Fraction(10001, 10)),
    ("50%", 50, 50),
    (r"50\%", 50, 50),
    ("3/4", 4, Fraction(3, 4)),
    ("3 / 4 of it", 4, Fraction(3, 4)),
    ("It is -3/4.", 4, Fraction(-3, 4)),
    ("6/8", 8, Fraction(3, 4)),
    ("3/0", 0, None),
    ("-7", -7, -7),
    ("\N{MINUS SIGN}7", 7, -7),
    ("It fell to \N{MINUS SIGN}7.5 degrees.", 7.5, Fraction(-15, 2)),
    ("10-7", -7, 7),
    ("f(2)-7", -7, 7),
    ("0.50", 0.5, Fraction(1, 2)),
    (".5", 5, Fraction(1, 2)),
    ("Well...5", 5, 5),
    ("007", 7, 7),
    ("-0", 0, 0),
    ("0.333", 0.333, Fraction(333, 1000)),
    ("0.3333333333333333", 0.3333333333333333, Fraction(1, 3)),
    ("3.6666666666666665", 3.6666666666666665, Fraction(11, 3)),
    ("0.4166666666666667", 0.4166666666666667, Fraction(5, 12)),
    ("12345678901234567.12345", 12345678901234568, Fraction(1234567890123456712345, 10**5)),
    ("0.000000000001", 1e-12, Fraction(1, 10**12)),
    ("She has 3 cats. She is happy.", 3, None),
    ("She has 3 cats.\nSo 3 + 4 = 7 pets", 7, 7),
    ("Mr. Smith has 3.5 kg", 3.5, Fraction(7, 2)),
    ("It is 9 m2", 2, 9),
    ("x1", 1, None),
    ("1.2.3", 3, Fraction(6, 5)),
    ("twelve", None, None),
    ("", None, None),
    (".", None, None),
    ("-", None, None),
    ("####", None, None),
    ("\N{ARABIC-INDIC DIGIT THREE}", 3, None),
    ("9" * 300, 1e300, None),
    ("9" * 400, math.inf, None),
    ("1" + "0" * (DIGITS - 1), 1e99, 10 ** (DIGITS - 1)),
    ("1/" + "9" * 400, math.inf, None),
]

LETTERS = [
    ("B", "B", "B"),
    ("(B)", "B", "B"),
    ("The answer is B", "B", "B"),
    ("The answer is (B) 42.", "B", "B"),
    ("The answer is B.", "B", "B"),
    ("The answer is B) 42", "B", "B"),
    ("The answer is: **B**", "B", "B"),
    ("#### B", "B", "B"),
    ("####(E)", "E", "E"),
    (r"So \boxed{D}", "D", "D"),
    (r"So $\boxed{\text{(D)}}$", "D", "D"),
    ("Because x = 2, the answer is C", "B", "C"),
    ("Dividing, we get 5. The answer is A.", "D", "A"),
    ("The answer is A, since 4 > 3.", "A", "A"),
    ("The answer is A", "A", "A"),
    ("A train takes 5 hours", "A", None),
    ("So A is right", "A", "A"),
    ("So option E", "E", "E"),
    ("B is wrong.\nIt must be C.", "B", "C"),
    ("B or C", "B", None),
    ("The answer is B or C", "B", None),
    ("The answer is B, yes B", "B", "B"),
    ("The answer is 5", None, None),
    ("the answer is b", None, None),
    ("The answer is BC", "B", None),
    ("The answer is F", None, None),
    ("DEAD", "D", None),
    ("It's E's turn", "E", None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "lenient", "strict"), NUMBERS, ids=lambda value: str(value)[:30])
def test_numbers(text, lenient, strict):
    assert lenient_number(text) == lenient
    assert strict_number(text) == strict


@pytest.mark.parametrize(("text", "lenient", "strict"), LETTERS)
def test_letters(text, lenient, strict):
    assert lenient_letter(text) == lenient
    assert strict_letter(text) == strict


@given(
    thousandths=some.integers(-(10**15), 10**15),
    write=some.sampled_from(
        [
            "{}",
            "#### {}",
            "I had 5.\n\nThe answer is {}.",
            r"2 \boxed{{{}}}",
            "Answer: {} euros",
            "So it is {}!",
            "= {}",
        ]
    ),
    form=some.sampled_from(["{:,.3f}", "{:.3f}", "${:,.3f}", "{:.3f}000", "{:.3f}%"]),
)
def test_a_number_is_read_however_it_is_written(thousandths, write, form):
    value = Fraction(thousandths, 1000)
    whole, rest = divmod(abs(thousandths), 1000)
    digits = form.replace(":,.3f", "0:,").replace(":.3f", "0").replace("}", "}.{1:03}", 1).format(whole, rest)
    text = write.format(("-" if thousandths < 0 else "") + digits)
    assert strict_number(text) == value
    assert lenient_number(text) == pytest.approx(float(abs(value) if "-$" in text else value))
    assert number_accuracy([text], [float(value)])["accuracy_lenient"] == ("-$" not in text)


@given(some.text(some.sampled_from("0123456789.,-/$% #=\\{}()AB\nanswer is\u2212\u0663"), max_size=60))
def test_no_text_is_too_odd(text):
    assert lenient_number(text) is None or isinstance(lenient_number(text), float)
    assert strict_number(text) is None or isinstance(strict_number(text), Fraction)
    assert lenient_letter(text) in (None, "A", "B")
    assert strict_letter(text) in (None, "A", "B")


@pytest.mark.parametrize(
    "piece", ["9", "-", ".", "1,", "1,000", "#", "answer ", "a", "\n", "1.", "1/", r"\boxed{", "A "]
)
def test_long_texts_take_linear_time(piece):
    """A reader that went back over a text of this length would not return within the tests' timeout."""
    for text in (piece * 200_000, "answer" + piece * 200_000):
        numbers, letters = (lenient_number(text), strict_number(text)), (lenient_letter(text), strict_letter(text))
        assert any(map(str.isdigit, piece)) or numbers == (None, None)
        assert set(letters) <= {None, "A"}


def test_the_accuracies():
    texts = ["It is 5.0004.", "#### 5", "5? The answer is six.", "none"]
    assert number_accuracy(texts, ["5", 5, "3 + 2 = 5\n#### 5", 5.0]) == {
        "accuracy_lenient": 0.75,
        "accuracy_strict": 0.25,
    }
    assert number_accuracy(["2/3", "0.667", "0.66666666666667"], ["0.6666666666666666"] * 3) == {
        "accuracy_lenient": 2 / 3,
        "accuracy_strict": 2 / 3,
    }
    assert number_accuracy(["0.00001", "1e-05"], [1e-05] * 2) == {"accuracy_lenient": 0.5, "accuracy_strict": 0.5}
    assert number_accuracy(["9" * 400], [5]) == {"accuracy_lenient": 0.0, "accuracy_strict": 0.0}
    assert letter_accuracy(["Because: A", "B"], ["A", "B"]) == {"accuracy_lenient": 0.5, "accuracy_strict": 1.0}


@pytest.mark.parametrize("label", ["", "none", math.nan, math.inf, "9" * (DIGITS + 1)])
def test_a_label_has_a_number(label):
    with pytest.raises(TaskError, match="label of row 2 must have a number of at most 100 digits, got"):
        number_accuracy(["5", "5"], ["5", label])


@pytest.mark.parametrize("label", ["", "F", "b", "AB", 1])
def test_a_label_is_a_letter(label):
    with pytest.raises(TaskError, match="label of row 2 must be a letter from A to E, got"):
        letter_accuracy(["A", "A"], ["A", label])
