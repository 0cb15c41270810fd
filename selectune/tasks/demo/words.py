"""The words of the generated task: what the validation split uses, the training split never shows."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("who", "did", "what", "where")
Meaning = tuple[str, ...]  # words that may stand for each other


@dataclass(frozen=True)
class Words:
    """The open-class words of one split, by the part of a sentence that they fill. Each meaning has two words."""

    who: tuple[Meaning, ...]
    did: tuple[Meaning, ...]
    what: tuple[Meaning, ...]
    where: tuple[Meaning, ...]

    def of(self, part: str) -> tuple[Meaning, ...]:
        """The meanings that a part of a sentence can have."""
        return {"who": self.who, "did": self.did, "what": self.what, "where": self.where}[part]

    def all(self) -> tuple[str, ...]:
        """Every word, as it is listed."""
        return tuple(word for part in PARTS for meaning in self.of(part) for word in meaning)


def _meanings(text: str) -> tuple[Meaning, ...]:
    return tuple(tuple(pair.split("/")) for pair in text.split())


TRAIN = Words(
    who=_meanings(
        "doctor/physician lawyer/attorney author/writer boy/lad teacher/instructor soldier/trooper thief/robber "
        "singer/vocalist king/monarch pilot/aviator guest/visitor sailor/mariner baby/infant worker/laborer"
    ),
    did=_meanings(
        "bought/purchased fixed/repaired hid/concealed found/discovered washed/cleaned wanted/desired "
        "admired/adored broke/smashed carried/transported threw/tossed watched/observed"
    ),
    what=_meanings(
        "car/automobile sofa/couch stone/rock cup/mug hat/cap coat/jacket boat/ship rug/carpet gift/present "
        "bag/sack novel/book dog/hound cash/money axe/hatchet"
    ),
    where=_meanings(
        "shop/store forest/woods street/road garden/yard prison/jail attic/loft town/city church/chapel "
        "office/workplace swamp/marsh"
    ),
)

VALIDATION = Words(
    who=_meanings(
        "woman/lady cook/chef policeman/cop child/kid manager/boss priest/clergyman clown/jester student/pupil"
    ),
    did=_meanings(
        "built/constructed stole/swiped ruined/wrecked lifted/raised obtained/acquired sketched/drew "
        "pulled/dragged inspected/examined"
    ),
    what=_meanings(
        "bicycle/bike picture/photograph letter/note bottle/flask lamp/lantern trousers/pants hammer/mallet "
        "pig/hog rabbit/bunny computer/laptop"
    ),
    where=_meanings(
        "house/home harbor/port station/depot cellar/basement hospital/clinic hotel/inn field/meadow hallway/corridor"
    ),
)
