"""Generated scenes: textured stuff, and things with shape, colour, pattern and size that overlap and occlude.

A scene is a pure function of ``(seed, index, kind)``: nothing is stored, any worker draws it alike. ``scene_phrases.py`` says
in words what is in it, ``scenes.py`` serves both to training. Sizes are in pixels, images are RGB uint8 (H, W, 3).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

SEEN_SHAPES = ("circle", "square", "triangle", "cross", "ring", "moon")
UNSEEN_SHAPES = ("star", "heart")
SHAPES = SEEN_SHAPES + UNSEEN_SHAPES
SEEN_STUFF = ("grass", "water", "sand", "brick", "sky", "wood")
UNSEEN_STUFF = ("gravel",)
STUFF = SEEN_STUFF + UNSEEN_STUFF
PATTERNS = ("plain", "striped", "dotted")
SIZES = ("small", "large")
COLOURS = {
    "red": (206, 38, 38),
    "green": (30, 172, 60),
    "blue": (38, 72, 212),
    "yellow": (242, 214, 36),
    "purple": (146, 48, 184),
    "white": (242, 242, 242),
}
# One held-out combination for each colour and each seen shape: every word of it is trained on, the pair never is.
UNSEEN_COMBINATIONS = frozenset(
    {("red", "triangle"), ("green", "moon"), ("blue", "cross"), ("yellow", "circle"), ("purple", "square"), ("white", "ring")}
)
KINDS = ("seen", "combination", "word")  # what a scene is about; training only ever sees the first
RADIUS = {"small": (13.0, 15.5), "large": (20.0, 25.0)}  # below 13 px a stride-4 mask cannot show the shape
STRIPE_PERIOD = 10


@dataclass(frozen=True)
class Thing:
    """One object; ``x, y`` is its centre and ``radius`` that of the circle around it, in pixels."""

    shape: str
    colour: str
    pattern: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """``stuff`` (H, W) indexes STUFF below the things, ``owner`` (H, W) is 0 or 1 + the thing on top, ``pattern`` its marks."""

    image: np.ndarray
    stuff: np.ndarray
    owner: np.ndarray
    pattern: np.ndarray
    things: tuple[Thing, ...]
    ground: tuple[str, ...]  # for each thing the stuff that its centre lies on


def group_of(colour: str | None, shape: str | None) -> str:
    """``seen``, ``combination`` or ``word``: which part of the split a named thing belongs to."""
    if shape in UNSEEN_SHAPES:
        return "word"
    return "combination" if (colour, shape) in UNSEEN_COMBINATIONS else "seen"


def draw_scene(
    seed: int,
    index: int,
    kind: str = "seen",
    size: int = 128,
    things: tuple[int, int] = (3, 6),
    colours: tuple[str, ...] = tuple(COLOURS),
    patterns: tuple[str, ...] = PATTERNS,
) -> Scene:
    """The scene number ``index``: ``size`` x ``size`` pixels with about ``things`` objects of these colours and patterns.

    ``kind`` "seen" draws nothing that is held out; "combination" and "word" have at least one held-out pair or noun, beside
    things that share its colour or its shape, so that naming the colour alone does not find it.
    """
    rng = np.random.default_rng([seed, index, KINDS.index(kind)])
    stuff, image = _draw_stuff(rng, size, kind)
    owner = np.zeros((size, size), np.uint8)
    pattern = np.zeros((size, size), bool)
    placed: list[Thing] = []
    wanted = int(rng.integers(things[0], things[1] + 1))
    for look in _choose_looks(rng, wanted, kind, colours, patterns):
        thing = _place(rng, look, size, owner, placed)
        if thing is not None:
            placed.append(thing)
            _draw_thing(rng, thing, len(placed), image, owner, pattern)
    image += _window(rng, _grain(), size)
    ground = tuple(STUFF[stuff[int(t.y), int(t.x)]] for t in placed)
    return Scene(image.clip(0, 255).astype(np.uint8), stuff, owner, pattern, tuple(placed), ground)


# ---- what is in a scene


def _choose_looks(
    rng: np.random.Generator, count: int, kind: str, colours: tuple[str, ...], patterns: tuple[str, ...]
) -> list[tuple[str, str, str, str]]:
    """(shape, colour, pattern, size) of each thing: most differ from an earlier one in exactly one attribute (distractors)."""
    looks = [_random_look(rng, kind, colours, patterns)]
    while len(looks) < count:
        if rng.random() < 0.3:
            look = _random_look(rng, "seen", colours, patterns)
        else:
            base = list(looks[int(rng.integers(len(looks)))])
            which = int(rng.integers(4))
            options = (SEEN_SHAPES, colours, patterns, SIZES)[which]
            base[which] = options[int(rng.integers(len(options)))]
            shape, colour, pattern, size = base
            look = (shape, colour, pattern, size)
        allowed = {"seen": ("seen",), "combination": ("seen", "combination"), "word": ("seen", "word")}[kind]
        if group_of(look[1], look[0]) in allowed:
            looks.append(look)
    return looks[:count]


def _random_look(
    rng: np.random.Generator, kind: str, colours: tuple[str, ...], patterns: tuple[str, ...]
) -> tuple[str, str, str, str]:
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    while True:
        shape, colour = pick(UNSEEN_SHAPES if kind == "word" else SEEN_SHAPES), pick(colours)
        if kind == "combination":
            colour, shape = pick([pair for pair in sorted(UNSEEN_COMBINATIONS) if pair[0] in colours])
        if group_of(colour, shape) == kind:
            return shape, colour, pick(patterns), pick(SIZES)


def _place(rng, look, size: int, owner: np.ndarray, placed: list[Thing]) -> Thing | None:
    """A spot where no earlier thing loses more than 35 % of what is seen of it; None when ten tries find none."""
    shape, colour, pattern, scale = look
    radius = float(rng.uniform(*RADIUS[scale]))
    seen = np.bincount(owner.ravel(), minlength=len(placed) + 1)
    for _ in range(10):
        x, y = rng.uniform(radius * 0.8, size - 1 - radius * 0.8, 2)
        if any(np.hypot(x - t.x, y - t.y) < max(radius, t.radius) * 0.9 for t in placed):
            continue  # centres stay apart, so that "left of" has an answer
        box = _box(x, y, radius * 0.9, size)
        covered = np.bincount(owner[box].ravel(), minlength=len(placed) + 1)
        if (covered[1:] <= 0.35 * seen[1:]).all():
            return Thing(shape, colour, pattern, scale, float(x), float(y), radius)
    return None


# ---- drawing


def _box(x: float, y: float, radius: float, size: int) -> tuple[slice, slice]:
    low, high = (lambda c: max(0, int(c - radius - 1))), (lambda c: min(size, int(c + radius + 2)))
    return slice(low(y), high(y)), slice(low(x), high(x))


def _draw_thing(rng, thing: Thing, number: int, image: np.ndarray, owner: np.ndarray, pattern: np.ndarray) -> None:
    box = _box(thing.x, thing.y, thing.radius, image.shape[0])
    rows, cols = np.arange(box[0].start, box[0].stop), np.arange(box[1].start, box[1].stop)
    sub = np.array([-0.25, 0.25])  # 2 x 2 samples a pixel: smooth edges
    ys = ((rows[:, None] + sub).ravel()[:, None] - thing.y).astype(np.float32)
    xs = ((cols[:, None] + sub).ravel()[None, :] - thing.x).astype(np.float32)
    angle = rng.uniform(-0.3, 0.3)
    cos, sin = np.float32(np.cos(angle) / thing.radius), np.float32(np.sin(angle) / thing.radius)
    u, v = cos * xs + sin * ys, cos * ys - sin * xs
    cover = _shape(thing.shape, u, v).reshape(len(rows), 2, len(cols), 2).mean((1, 3))  # (h, w) in [0, 1]
    inside = cover > 0.5

    colour = np.clip(np.array(COLOURS[thing.colour]) + rng.normal(0, 7, 3), 0, 255)
    u, v = u[::2, ::2] * thing.radius, v[::2, ::2] * thing.radius
    marks = np.zeros_like(inside)
    if thing.pattern == "striped":
        marks = (u + v + rng.uniform(0, STRIPE_PERIOD)) % STRIPE_PERIOD < STRIPE_PERIOD / 2
    elif thing.pattern == "dotted":
        gap = 9.0
        marks = np.hypot((u + gap / 2) % gap - gap / 2, (v + gap / 2) % gap - gap / 2) < 2.7
    marks &= inside
    eroded = inside.copy()
    eroded[1:-1, 1:-1] = inside[1:-1, 1:-1] & inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    colour = colour.astype(np.float32)
    paint = np.where(marks[..., None], colour * 0.3, colour)
    paint = np.where((inside & ~eroded)[..., None], colour * 0.45, paint)  # a thin rim parts it from stuff of its colour
    image[box] += (cover[..., None] * (paint - image[box])).astype(np.float32)
    owner[box][inside] = number
    pattern[box][inside] = marks[inside]


def _shape(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Inside or not, for coordinates in units of the radius; v points down."""
    r = np.sqrt(u * u + v * v)
    if name == "circle":
        return r < 0.95
    if name == "square":
        return np.maximum(abs(u), abs(v)) < 0.78
    if name == "triangle":
        return (v < 0.62) & (abs(u) < (v + 0.95) * 0.58)
    if name == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 0.95)
    if name == "ring":
        return (r < 1.0) & (r > 0.52)
    if name == "moon":
        return (r < 1.0) & (np.hypot(u - 0.55, v) > 0.78)
    if name == "star":
        theta = (np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5
        return r * (np.cos(theta) + 1.35 * abs(np.sin(theta))) < 1.0
    if name == "heart":
        x, y = u * 1.2, 0.2 - v * 1.15
        return (x * x + y * y - 1) ** 3 - x * x * y**3 < 0
    raise ValueError(f"unknown shape {name!r}: want one of {', '.join(SHAPES)}")


def _draw_stuff(rng: np.random.Generator, size: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Two or three wavy bands of stuff in any direction -> (index (H, W), image (H, W, 3) float)."""
    names = list(rng.permutation(SEEN_STUFF)[: int(rng.integers(2, 4))])
    if kind == "word" and rng.random() < 0.7:
        names[int(rng.integers(len(names)))] = UNSEEN_STUFF[0]
    x = np.arange(size, dtype=np.float32) / size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    across = cos * x[:, None] - sin * x
    height = cos * x + sin * x[:, None] + 0.06 * np.sin(across * np.float32(rng.uniform(4, 14)) + np.float32(rng.uniform(0, 6)))
    cuts = rng.uniform(-0.2, 0.2, 1) if len(names) == 2 else [rng.uniform(-0.3, -0.1), rng.uniform(0.1, 0.3)]
    index = np.full((size, size), STUFF.index(names[0]), np.uint8)
    image = _window(rng, _texture(names[0]), size) * np.float32(rng.uniform(0.88, 1.1))
    for name, cut in zip(names[1:], cuts, strict=True):
        here = height > cut
        index[here] = STUFF.index(name)
        image = np.where(here[..., None], _window(rng, _texture(name), size) * np.float32(rng.uniform(0.88, 1.1)), image)
    return index, image


def _window(rng: np.random.Generator, tile: np.ndarray, size: int) -> np.ndarray:
    y, x = rng.integers(0, tile.shape[0] - size, 2)
    return tile[y : y + size, x : x + size]


@cache
def _grain(side: int = 448) -> np.ndarray:
    """A tile of sensor noise, standard deviation 4 of 255."""
    return np.random.default_rng(100).normal(0, 4, (side, side, 3)).astype(np.float32)


@cache
def _texture(name: str, side: int = 448) -> np.ndarray:
    """A large tile of one stuff (side, side, 3) float, drawn once a process; scenes take windows of it."""
    rng = np.random.default_rng(STUFF.index(name))
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    smooth = lambda step: _smooth_noise(rng, side, step)  # noqa: E731
    fine = rng.normal(0, 1, (side, side)).astype(np.float32)
    light: np.ndarray
    if name == "grass":
        base, light = (84, 122, 62), 20 * np.repeat(rng.normal(0, 1, (side // 7, side)), 7, 0)[:side] + 10 * fine
    elif name == "water":
        base, light = (62, 122, 150), 22 * np.sin(y / 2.4 + 3.5 * smooth(24)) + 6 * fine
    elif name == "sand":
        base, light = (204, 180, 136), 14 * fine + 10 * smooth(20)
    elif name == "brick":
        row = (y // 10).astype(int)
        mortar = (y % 10 < 2) | ((x + (row % 2) * 10) % 20 < 2)
        base, light = (150, 84, 66), np.where(mortar, 62, 0) + 7 * fine
    elif name == "sky":
        base, light = (150, 186, 222), 34 * np.clip(smooth(40), 0, 2) + 2 * fine
    elif name == "wood":
        base, light = (148, 108, 68), 20 * np.sin(x / 3.2 + 2.5 * smooth(50)) + 5 * fine
    else:  # gravel
        base, light = (128, 126, 124), 34 * np.kron(rng.normal(0, 1, (side // 4, side // 4)), np.ones((4, 4)))[:side, :side]
    light = np.broadcast_to(light, (side, side)).astype(np.float32)
    return np.array(base, np.float32) + light[..., None] * np.array([1.0, 0.98, 0.9], np.float32)


def _smooth_noise(rng: np.random.Generator, side: int, step: int) -> np.ndarray:
    """Noise that varies over about ``step`` pixels, (side, side), unit scale: bilinear between random knots."""
    knots = rng.normal(0, 1, (side // step + 2, side // step + 2)).astype(np.float32)
    at = np.arange(side) / step
    low, part = at.astype(int), (at % 1).astype(np.float32)
    rows = knots[low] * (1 - part)[:, None] + knots[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part
