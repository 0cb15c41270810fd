"""The words of the generated task: what the validation split uses, the training split never shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """The open-class words of one split. Nouns take -s, verbs -s and -ed (or -d after e)."""

    people: tuple[str, ...]
    men: tuple[str, ...]
    women: tuple[str, ...]
    things: tuple[str, ...]
    verbs: tuple[str, ...]  # transitive: they need an object
    adjectives: tuple[str, ...]
    her_names: tuple[str, ...]
    his_names: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.her_names + self.his_names

    def all(self) -> frozenset[str]:
        """Every word of the split, as it is listed."""
        groups = (self.people, self.men, self.women, self.things, self.verbs, self.adjectives, self.names)
        return frozenset(word for group in groups for word in group)


TRAIN = Words(
    people=tuple(
        "doctor teacher student lawyer pilot farmer baker singer painter writer driver banker dancer soldier "
        "sailor tailor clerk guard judge nurse engineer gardener plumber senator customer visitor neighbor "
        "officer manager scientist".split()
    ),
    men=tuple("boy king uncle brother grandfather duke waiter son".split()),
    women=tuple("girl queen aunt sister grandmother princess waitress daughter".split()),
    things=tuple(
        "key cabinet book table letter picture window door lamp car truck boat garden river mountain bridge "
        "house school hospital museum painting report movie song story chair basket bottle blanket coat".split()
    ),
    verbs=tuple(
        "admire visit help follow watch clean repair discover describe remember notice mention paint "
        "defend criticize question inspect push pull remove".split()
    ),
    adjectives=tuple(
        "old new famous expensive strange beautiful heavy small large red green quiet popular dangerous "
        "wonderful boring".split()
    ),
    her_names=tuple("Mary Susan Linda Karen Nancy Helen Sandra Carol Ruth Laura".split()),
    his_names=tuple("John Robert Michael David Richard Thomas Charles Daniel Mark Paul".split()),
)

VALIDATION = Words(
    people=tuple(
        "actor author butcher carpenter chef coach dentist editor janitor journalist librarian mechanic "
        "musician surgeon tourist".split()
    ),
    men=tuple("prince nephew stepfather monk".split()),
    women=tuple("actress niece stepmother nun".split()),
    things=tuple(
        "mirror carpet ladder candle pencil camera train tower market garage statue poem novel guitar jacket".split()
    ),
    verbs=tuple("praise ignore contact observe examine restore destroy purchase select avoid".split()),
    adjectives=tuple("ancient modern cheap ugly bright narrow yellow rare".split()),
    her_names=tuple("Alice Diane Julia Martha Rachel".split()),
    his_names=tuple("Arthur Brian Eric George Victor".split()),
)
