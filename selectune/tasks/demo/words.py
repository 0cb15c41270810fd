"""The words of the generated task. The training split never shows a noun of the validation split."""

from __future__ import annotations

from collections.abc import Mapping

Topics = Mapping[str, tuple[str, ...]]


def _topics(**words: str) -> Topics:
    return {name: tuple(text.split()) for name, text in words.items()}


TRAIN = _topics(
    animals="dog horse lion cow mouse wolf goat elephant kitten deer camel squirrel",
    birds="eagle parrot finch owl pigeon swan crow penguin robin heron peacock falcon",
    food="bread soup cheese salad pancake sausage noodle sandwich omelet porridge stew biscuit",
    drinks="coffee wine lemonade beer milk whiskey cocoa cider champagne soda vodka smoothie",
    plants="tree rose grass fern tulip moss oak ivy shrub daisy pine seedling",
    clothes="shirt coat hat glove skirt boot scarf sock sweater belt apron tie",
    furniture="table sofa bed shelf stool cupboard wardrobe bench cradle bookcase nightstand armchair",
    vehicles="car train ship truck airplane tram motorcycle ferry wagon submarine scooter canoe",
    tools="hammer saw drill wrench shovel nail axe screw sandpaper crowbar clamp hoe",
    weather="rain snow storm fog wind thunder sunshine frost monsoon rainbow blizzard breeze",
    music="piano guitar song drum choir melody violin concert harp lullaby rhythm trombone",
    illness="fever flu wound asthma cancer allergy rash toothache diabetes pneumonia migraine infection",
)
VALIDATION = _topics(
    animals="cat pig tiger sheep bear fox donkey giraffe",
    birds="duck sparrow goose hawk seagull ostrich raven stork",
    food="rice pizza cake steak pasta burger pie bacon",
    drinks="tea juice brandy rum cocktail gin espresso milkshake",
    plants="flower bush lily cactus willow orchid birch weed",
    clothes="jacket dress shoe cap trousers blouse mitten vest",
    furniture="chair desk couch drawer cabinet mattress dresser sideboard",
    vehicles="bus bicycle boat van helicopter taxi tractor sled",
    tools="screwdriver pliers chisel rake bolt file spade toolbox",
    weather="hail cloud hurricane drizzle heatwave tornado lightning mist",
    music="trumpet flute symphony opera banjo orchestra tune cello",
    illness="cough headache measles injury stroke nausea malaria burn",
)
PEOPLE = ("My neighbor", "The teacher", "Her brother", "A stranger", "The old man", "Our guest")
VERBS = ("talked about", "dreamed of", "asked about", "kept thinking of", "told us about", "wrote a page about")
