"""What can be asked of a scene, and the truth of it: one pixel belongs to several right answers.

A ``Phrase`` is a small structure with a ``text`` and a ``mask(scene)``, so that present and absent phrases are judged by the
same rule. Kinds (granularities), with what keeps a lazy answer from scoring:

- ``thing``       "circle"                                   every circle
- ``attributes``  "the small striped red circle"             another thing shares all but one of the attributes
- ``group``       "everything red", "the two squares"        things of other kinds stand beside
- ``part``        "the stripes of the square", "stripes"     the marks only; other marks stand beside
- ``stuff``       "grass"
- ``relation``    "the circle left of the square", "... on the grass"   some circles satisfy it and some do not
- ``absent``      any of these, with nothing to find         one attribute away from something that is there
"""

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from .scene_drawing import COLOURS, PATTERNS, SEEN_SHAPES, SEEN_STUFF, SHAPES, SIZES, STUFF, UNSEEN_STUFF, Scene, Thing, group_of

PHRASE_KINDS = ("thing", "attributes", "group", "part", "stuff", "relation")
GROUPS = ("seen", "combination", "word")
MARKS = {"stripes": "striped", "dots": "dotted"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
# (dx, dy) that points from the reference towards the target; y points down.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
ATTRIBUTES = ("size", "pattern", "colour", "shape")  # in the order in which they are said
SMALLEST = 12  # pixels that a present phrase shows at least
CLEAR, UNCLEAR = 8.0, 2.0  # pixels between centres: beyond CLEAR a side is plain, below UNCLEAR it is plainly not so


@dataclass(frozen=True)
class Description:
    """Things with these attributes; None leaves an attribute open."""

    size: str | None = None
    pattern: str | None = None
    colour: str | None = None
    shape: str | None = None

    def fits(self, thing: Thing) -> bool:
        return (
            (self.shape is None or self.shape == thing.shape)
            and (self.colour is None or self.colour == thing.colour)
            and (self.pattern is None or self.pattern == thing.pattern)
            and (self.size is None or self.size == thing.size)
        )

    @property
    def text(self) -> str:
        return " ".join(word for a in ATTRIBUTES if (word := getattr(self, a)))

    @property
    def group(self) -> str:
        return group_of(self.colour, self.shape)


@dataclass(frozen=True)
class Phrase:
    """One question. ``target`` are the things meant; the other fields narrow it, each used by its own kind.

    A relation is to a ``reference``, or without one to the ``stuff`` below.
    """

    kind: str
    target: Description = Description()
    definite: bool = False  # "the ..."
    count: int = 0
    marks: str = ""
    relation: str = ""
    reference: Description | None = None
    stuff: str = ""

    @property
    def text(self) -> str:
        name = self.target.text
        if self.kind == "stuff":
            return self.stuff
        if self.kind == "part":
            return f"the {self.marks} of the {name}" if name else self.marks
        if self.kind == "group":
            return f"the {NUMBERS[self.count]} {_plural(name)}" if self.count else f"everything {name}"
        if self.kind == "relation":
            where = f"{self.relation} the {self.reference.text}" if self.reference else f"on the {self.stuff}"
            return f"the {name} {where}"
        return f"the {name}" if self.definite else name

    @property
    def group(self) -> str:
        """``word`` if it names an unseen noun, ``combination`` if it names a held-out pair, else ``seen``."""
        found = {self.target.group} | ({self.reference.group} if self.reference else set())
        if self.stuff in UNSEEN_STUFF or "word" in found:
            return "word"
        return "combination" if "combination" in found else "seen"

    def things(self, scene: Scene) -> list[int] | None:
        """Indices of the things meant; None where the question has no clear answer in this scene."""
        fits = [i for i, t in enumerate(scene.things) if self.target.fits(t)]
        if self.kind == "group" and self.count:
            return fits if len(fits) == self.count else []
        if self.kind == "part":
            return [i for i in fits if scene.things[i].pattern == MARKS[self.marks]]
        if self.kind == "relation" and self.reference is None:
            return [i for i in fits if scene.ground[i] == self.stuff]
        if self.kind == "relation" and self.reference is not None:
            anchors = [i for i, t in enumerate(scene.things) if self.reference.fits(t)]
            if len(anchors) != 1:
                return None
            sides = [(i, _side(scene.things[i], scene.things[anchors[0]], self.relation)) for i in fits if i != anchors[0]]
            return None if any(s is None for _, s in sides) else [i for i, s in sides if s]
        return fits

    def mask(self, scene: Scene) -> np.ndarray | None:
        """(H, W) bool of the visible pixels meant, empty if there are none; None where the answer is unclear."""
        if self.kind == "stuff":
            return (scene.stuff == STUFF.index(self.stuff)) & (scene.owner == 0)
        found = self.things(scene)
        if found is None:
            return None
        mask = _pixels(scene, found)
        return mask & scene.pattern if self.kind == "part" else mask

    def ignoring_relation(self, scene: Scene) -> np.ndarray:
        """The mask of a reader who skips the relation ("all circles"): an oracle table's row."""
        return _pixels(scene, [i for i, t in enumerate(scene.things) if self.target.fits(t)])


def _pixels(scene: Scene, things: list[int]) -> np.ndarray:
    """(H, W) bool: where any of these things is to be seen."""
    chosen = np.zeros(256, bool)
    chosen[[i + 1 for i in things]] = True
    return chosen[scene.owner]


def _side(thing: Thing, anchor: Thing, relation: str) -> bool | None:
    dx, dy = RELATIONS[relation]
    along = (thing.x - anchor.x) * dx + (thing.y - anchor.y) * dy
    across = abs((thing.x - anchor.x) * dy) + abs((thing.y - anchor.y) * dx)
    if along < UNCLEAR:
        return False
    return True if along > CLEAR and along > 0.5 * across else None


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")  # crosses


# ---- which phrases a scene is asked


def present_phrase(scene: Scene, kind: str, rng: np.random.Generator, seen_only: bool = True) -> Phrase | None:
    """A phrase of this kind with something to find and the distractor that its kind asks for; None if the scene has none.

    Phrases about what is held out come first, unless only seen ones are wanted.
    """
    found = [p for p in _candidates(scene, kind, rng) if not seen_only or p.group == "seen"]
    for i in sorted(rng.permutation(len(found)), key=lambda i: found[i].group == "seen"):
        mask = found[i].mask(scene)
        if mask is not None and mask.sum() >= SMALLEST:
            return found[i]
    return None


def absent_phrase(scene: Scene, rng: np.random.Generator, seen_only: bool = True) -> Phrase | None:
    """A phrase with nothing to find, mostly one change away from one that has."""
    for _ in range(20):
        kind = PHRASE_KINDS[int(rng.integers(len(PHRASE_KINDS)))]
        near = _candidates(scene, kind, rng) if rng.random() < 0.75 else []
        phrase = near[int(rng.integers(len(near)))] if near else _any_phrase(kind, rng)
        phrase = _change(phrase, rng, seen_only)
        if seen_only and phrase.group != "seen":
            continue
        mask = phrase.mask(scene)
        if mask is not None and not mask.any():
            return phrase
    return None


def _candidates(scene: Scene, kind: str, rng: np.random.Generator) -> list[Phrase]:
    things = scene.things
    if kind == "stuff":
        names = {STUFF[i] for i in np.unique(scene.stuff[scene.owner == 0])}
        found = [Phrase("stuff", stuff=name) for name in sorted(names)]
    elif kind == "thing":
        shapes = sorted({t.shape for t in things})
        found = [Phrase("thing", Description(shape=s), definite=bool(rng.random() < 0.3)) for s in shapes]
    elif kind == "attributes":
        found = [
            Phrase("attributes", d, definite=bool(rng.random() < 0.5))
            for d in _described(_one_of(things, rng), 1)
            if any(sum(not _agrees(d, a, o) for a in ATTRIBUTES) == 1 for o in things)
        ]
    elif kind == "group":
        found = [Phrase("group", Description(**{a: v})) for a, v in _shared(things, ("size", "pattern", "colour"))]
        named = [Description(shape=shape) for _, shape in _shared(things, ("shape",))]
        named += [Description(colour=t.colour, shape=t.shape) for t in things]
        found += [Phrase("group", d, count=n) for d in named if (n := sum(map(d.fits, things))) in NUMBERS]
        found = [p for p in found if len(p.things(scene) or ()) < len(things)]
    elif kind == "part":
        marked = [t for t in things if t.pattern != "plain"]
        found = [Phrase("part", marks=m) for m, p in MARKS.items() if any(t.pattern == p for t in marked)]
        for t in marked:
            name = next(m for m, p in MARKS.items() if p == t.pattern)
            owner = Description(shape=t.shape)
            owners = [owner, replace(owner, colour=t.colour), replace(owner, size=t.size)]
            found += [Phrase("part", d, marks=name) for d in owners if any(not d.fits(o) for o in marked)]
    elif kind == "relation":
        found = _relations(scene, rng)
    else:
        raise ValueError(f"unknown kind of phrase {kind!r}: want one of {', '.join(PHRASE_KINDS)}")
    return found


def _relations(scene: Scene, rng: np.random.Generator) -> list[Phrase]:
    """Only those that part the things they speak of: some satisfy the relation and some do not."""
    things = scene.things
    described = {d for t in things for d in (Description(shape=t.shape), Description(colour=t.colour, shape=t.shape))}
    names = sorted(described, key=str)
    count = {d: sum(map(d.fits, things)) for d in names}
    phrases = [
        Phrase("relation", target, relation=relation, reference=anchor)
        for target in names
        for anchor in names
        if count[target] >= 2 and count[anchor] == 1
        for relation in RELATIONS
    ]
    phrases += [Phrase("relation", d, stuff=s) for d in names if count[d] >= 2 for s in sorted(set(scene.ground))]
    for i in rng.permutation(len(phrases)):
        phrase = phrases[i]
        chosen = phrase.things(scene)
        anchors = sum(phrase.target.fits(t) and phrase.reference.fits(t) for t in things) if phrase.reference else 0
        if chosen and len(chosen) < count[phrase.target] - anchors:
            return [phrase]
    return []


def _one_of(things: tuple[Thing, ...], rng: np.random.Generator) -> Thing:
    """Any thing, a held-out one if there is one."""
    held_out = [t for t in things if group_of(t.colour, t.shape) != "seen"]
    choice = held_out or things
    return choice[int(rng.integers(len(choice)))]


def _described(thing: Thing, extra: int) -> list[Description]:
    """The thing named by its shape and at least ``extra`` more of its attributes."""
    return [
        Description(**{a: getattr(thing, a) for a in chosen}, shape=thing.shape)
        for n in range(extra, 4)
        for chosen in combinations(ATTRIBUTES[:3], n)
    ]


def _agrees(description: Description, attribute: str, thing: Thing) -> bool:
    return getattr(description, attribute) in (None, getattr(thing, attribute))


def _shared(things: tuple[Thing, ...], attributes: tuple[str, ...]) -> list[tuple[str, str]]:
    """(attribute, value) that at least two things have."""
    values = [(a, getattr(t, a)) for t in things for a in attributes]
    return sorted({v for v in values if values.count(v) >= 2})


_VALUES = {"size": SIZES, "pattern": PATTERNS, "colour": tuple(COLOURS), "shape": SHAPES}


def _change(phrase: Phrase, rng: np.random.Generator, seen_only: bool) -> Phrase:
    """The phrase with one of its words exchanged."""
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    shapes, stuffs = (SEEN_SHAPES, SEEN_STUFF) if seen_only else (SHAPES, STUFF)
    places = [("target", a) for a in ATTRIBUTES if getattr(phrase.target, a)]
    places += [(f, "") for f in ("stuff", "relation", "marks", "count") if getattr(phrase, f)]
    field, attribute = pick(places)
    if attribute:
        words = shapes if attribute == "shape" else _VALUES[attribute]
        return replace(phrase, target=replace(phrase.target, **{attribute: pick(words)}))
    options = {"stuff": stuffs, "relation": tuple(RELATIONS), "marks": tuple(MARKS), "count": tuple(NUMBERS)}[field]
    return replace(phrase, **{field: pick(options)})


def _any_phrase(kind: str, rng: np.random.Generator) -> Phrase:
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    pair = Description(colour=pick(_VALUES["colour"]), shape=pick(SEEN_SHAPES))
    if kind == "stuff":
        return Phrase("stuff", stuff=pick(SEEN_STUFF))
    if kind == "thing":
        return Phrase("thing", Description(shape=pick(SEEN_SHAPES)))
    if kind == "group":
        return Phrase("group", Description(colour=pair.colour))
    if kind == "part":
        return Phrase("part", pair, marks=pick(tuple(MARKS)))
    if kind == "relation":
        return Phrase("relation", pair, stuff=pick(SEEN_STUFF))
    return Phrase("attributes", pair, definite=bool(rng.random() < 0.5))


# ---- captions, for the tiny CLIP


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One true sentence about the scene, held-out words and pairs included, as a CLIP's captions have them."""
    if rng.random() < 0.2:
        kind = PHRASE_KINDS[int(rng.integers(len(PHRASE_KINDS)))]
        phrase = present_phrase(scene, kind, rng, seen_only=False)
        if phrase is not None:
            return phrase.text
    told = []
    for i in rng.permutation(len(scene.things))[:3]:
        described = _described(scene.things[i], 0)
        words = described[-1 if rng.random() < 0.5 else int(rng.integers(len(described)))].text
        told.append(f"a {words}" + (f" on {scene.ground[i]}" if rng.random() < 0.4 else ""))
    if rng.random() < 0.2 or not told:
        told.append(STUFF[int(scene.stuff[tuple(rng.integers(0, scene.stuff.shape[0], 2))])])
    prefix = ("", "", "a picture of ", "a photo of ", "there is ")[int(rng.integers(5))]
    return prefix + " and ".join(told)
