"""The bundled world: pictures, captions and judges that need no download.

    draw   shapes(index, size)      one shaded shape on a gradient, with its class         ShapesSource
           scenes(index, size)      one to four shapes on a muted colour, with a caption   ScenesSource
    write  caption(scene)           "a large red ring above a small blue square on green"
           encode_words(prompts)    the text encoder of the bundled models, who know known_words()
    judge  detect_objects(images)   pixels -> shapes, colours, sizes and places
           scene_scores(images, captions), accuracy(judge, images, y)

A picture is a function of its number: picture i is the same on every machine, in any order and at any
resolution. The shipped weights were trained on exactly these pictures, so no number in here may change.
The method itself needs nothing of this file.
"""

import difflib
import hashlib
import math
import re
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Text
from checkpoints import find_weights, read_config, read_tensors


# ---- random numbers, colours, outlines -----------------------------------------------------------

def uniform(index: Tensor, column: int, seed: int) -> Tensor:
    """Random number `column` of pictures index (B,) -> (B,) in [0,1). It is a hash (splitmix64), so that a
    picture can be drawn by itself."""
    start = np.uint64((column * 0xD1B54A32D192ED03 + seed * 0x94D049BB133111EB) % 2**64)
    x = index.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = (x ^ (x >> np.uint64(31))) >> np.uint64(40)               # the upper 24: all that a float32 holds
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-24))


def hsv_to_rgb(h, s, v):
    """HSV, each (B,) in [0,1] -> RGB (B,3) in [0,1]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * h[:, None]) % 6
    depth = torch.minimum(k, 4 - k).clamp(0, 1)
    return v[:, None] * (1 - s[:, None] * depth)


def triangle(x, y):
    y = y - 0.15
    side = 2 * math.pi / 3
    a = (torch.atan2(x, -y) % side) - side / 2
    return (torch.hypot(x, y) * a.cos() - math.cos(math.pi / 3)) * 0.9


def cross(x, y):
    across = torch.maximum(x.abs() - 0.98, y.abs() - 0.32)
    down = torch.maximum(y.abs() - 0.98, x.abs() - 0.32)
    return torch.minimum(across, down)


def star(x, y):
    side = 2 * math.pi / 5
    a = ((torch.atan2(x, -y) + side / 2) % side - side / 2).abs()
    r = torch.hypot(x, y)
    # one tooth: its tip lies on the first axis, the valley beside it at the angle pi / 5
    tip = 1.1
    valley = 0.5
    ex = valley * math.cos(side / 2) - tip
    ey = valley * math.sin(side / 2)
    along = r * a.cos() - tip
    return (along * ey - r * a.sin() * ex) / math.hypot(ex, ey)


def bars(x, y):
    to_left = (x + 0.55).abs()
    to_right = (x - 0.55).abs()
    return torch.maximum(y.abs() - 0.9, torch.minimum(to_right, to_left) - 0.3)


def crescent(x, y):
    bite = 0.80 - torch.hypot(x - 0.45, y)
    return torch.maximum(torch.hypot(x, y) - 1.0, bite)


# signed distance of a point to the outline, < 0 inside; x and y (downwards) in radii
OUTLINES = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.95,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.82,
    "triangle": triangle,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.72).abs() - 0.24,
    "cross": cross,
    "star": star,
    "crescent": crescent,
    "bars": bars,
}
SHAPES = tuple(OUTLINES)


# ---- painting ------------------------------------------------------------------------------------

# Facts are a dict of tensors (B,), one shape a picture:
# label; x, y, radius in picture sides; turn in radians.

def per_picture(v):
    return v.view(-1, 1, 1)                                          # (B,) beside (B,H,W)


def pixel_centres(size):
    """x (1,1,size) and y (1,size,1) of the pixels' centres."""
    axis = (torch.arange(size) + 0.5) / size
    return axis.view(1, 1, -1), axis.view(1, -1, 1)


def gradient(angle, size):
    """Positions of the pixels along a direction, angle (B,) -> (B,size,size), 0 at the centre."""
    px, py = pixel_centres(size)
    return (px - 0.5) * per_picture(angle.cos()) + (py - 0.5) * per_picture(angle.sin())


def signed_distance(facts: dict[str, Tensor], size: int, dx: float = 0.0, dy: float = 0.0) -> Tensor:
    """Signed distance of pixels to one shape a picture, moved by (dx, dy) -> (B,size,size), < 0 inside."""
    px, py = pixel_centres(size)
    radius = per_picture(facts["radius"])
    x = (px - per_picture(facts["x"]) - dx) / radius
    y = (py - per_picture(facts["y"]) - dy) / radius
    c = per_picture(facts["turn"].cos())
    s = per_picture(facts["turn"].sin())
    x, y = c * x + s * y, c * y - s * x
    d = torch.empty_like(x)
    for k, outline in enumerate(OUTLINES.values()):
        rows = facts["label"] == k
        if rows.any():
            d[rows] = outline(x[rows], y[rows])
    return d * radius


def coverage(facts: dict[str, Tensor], size: int) -> Tensor:
    """The share of every pixel that a shape covers, (B,size,size) in [0,1]: one pixel of antialiasing."""
    return (0.5 - signed_distance(facts, size) * size).clamp(0, 1)


def paint(img: Tensor, facts: dict[str, Tensor], colour: Tensor) -> Tensor:
    """img (B,3,H,W) in [0,1] with one shape a picture painted on it in a colour (B,3)."""
    size = img.shape[-1]
    # a soft shadow below and to the right
    shadow = torch.sigmoid(-signed_distance(facts, size, 0.02, 0.03) / 0.012)
    img = img * (1 - 0.45 * shadow[:, None])
    # the shape, lit from above left
    px, py = pixel_centres(size)
    towards_light = (per_picture(facts["x"]) - px) + (per_picture(facts["y"]) - py)
    light = 0.78 + 0.30 * towards_light / (2 * per_picture(facts["radius"]))
    colour = (colour[..., None, None] * light[:, None]).clamp(0, 1)
    alpha = coverage(facts, size)[:, None]
    return img * (1 - alpha) + colour * alpha


# ---- pictures with classes -----------------------------------------------------------------------

def shape_facts(index: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Facts of pictures index (B,): label, centre and radius, turn (radians), hue in [0,1]."""
    radius = 0.20 + 0.12 * uniform(index, 1, seed)
    margin = 1.12 * radius                                           # the whole shape lies in the picture
    return {
        "label": index.long() % len(SHAPES),
        "radius": radius,
        "x": margin + (1 - 2 * margin) * uniform(index, 2, seed),
        "y": margin + (1 - 2 * margin) * uniform(index, 3, seed),
        "turn": (uniform(index, 4, seed) - 0.5) * 0.5,
        "hue": uniform(index, 5, seed),
    }


def shapes(index: Tensor, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures index (B,) -> (B,3,size,size) in [-1,1] and classes (B,): a shaded shape of class i mod 8 with
    a soft shadow on a gradient of two muted colours."""
    def u(column):
        return uniform(index, column, seed)

    facts = shape_facts(index, seed)
    # background: from one muted colour to another along a random direction
    ramp = (gradient(2 * math.pi * u(6), size) + 0.7).clamp(0, 1.4) / 1.4
    start = hsv_to_rgb(u(7), 0.15 + 0.25 * u(8), 0.35 + 0.5 * u(9))
    end = hsv_to_rgb(u(10), 0.15 + 0.25 * u(11), 0.35 + 0.5 * u(12))
    img = start[..., None, None] * (1 - ramp[:, None]) + end[..., None, None] * ramp[:, None]
    img = paint(img, facts, hsv_to_rgb(facts["hue"], 0.75 + 0.2 * u(13), 0.85 + 0.1 * u(14)))
    return img.clamp(0, 1) * 2 - 1, facts["label"]


class ShapesSource:
    """A source of endless pictures with classes. split: "train" or "val", which share no picture."""

    classes = SHAPES
    captioned = False

    def __init__(self, size: int, length: int = 32768, split: str = "train"):
        self.size = size
        self.length = length
        self.seed = {"train": 0, "val": 1}[split]
        self.identity = f"shapes-v1 size={size} seed={self.seed}"

    def __len__(self):
        return self.length

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return shapes(indices, self.size, self.seed)


# ---- pictures with captions ----------------------------------------------------------------------

# Shapes and hues that no autoencoder here confuses. A background has the muted tone of a colour that no
# object on it has.
FORMS = ("circle", "square", "triangle", "ring", "cross")
COLOURS = ("red", "yellow", "green", "blue", "pink")
HUES = torch.tensor([0.0, 0.16, 0.38, 0.62, 0.84])
SIZES = ("small", "large")
RADII = (0.15, 0.21)                                                 # in picture sides, give or take 4 %
NUMBERS = ("a", "two", "three", "four")
RELATIONS = ("above", "below", "left of", "right of")                # of the first object to the second
DIRECTIONS = torch.tensor([(0.0, -1), (0, 1), (-1, 0), (1, 0)])      # (x, y) of the relations
CORNERS = torch.tensor([(-1.0, -1), (1, -1), (1, 1), (-1, 1)])


class Group(NamedTuple):
    """One object, or several alike."""
    number: int
    size: str
    colour: str
    form: str


class Scene(NamedTuple):
    """The content of a caption: one group, or two single objects and the relation between them."""
    groups: tuple[Group, ...]
    relation: str | None
    background: str


def caption(scene: Scene) -> str:
    """The scene in words, as "a large red ring above a small blue square on green" or "three small pink
    crosses on yellow"."""
    phrases = []
    for group in scene.groups:
        form = group.form
        if group.number > 1:
            form = plural(form)
        phrases.append(f"{NUMBERS[group.number - 1]} {group.size} {group.colour} {form}")
    return f" {scene.relation} ".join(phrases) + f" on {scene.background}"


def plural(form: str) -> str:
    return form + ("es" if form == "cross" else "s")


def known_words() -> list[str]:
    """The words of all captions, which are those that the bundled text models were trained on."""
    related = " ".join(RELATIONS).split()
    return list(dict.fromkeys([*NUMBERS, *SIZES, *COLOURS, *FORMS, *map(plural, FORMS), *related, "on"]))


def one_of(words: tuple[str, ...]) -> str:
    return f"({'|'.join(words)})"


GROUP_PATTERN = f"{one_of(NUMBERS)} {one_of(SIZES)} {one_of(COLOURS)} {one_of(FORMS)}(?:es|s)?"
CAPTION_PATTERN = f"{GROUP_PATTERN}(?: {one_of(RELATIONS)} {GROUP_PATTERN})? on {one_of(COLOURS)}"


def read_caption(text: str) -> Scene | None:
    """The scene of a caption, None if the text is not a caption of this world."""
    match = re.fullmatch(CAPTION_PATTERN, text.strip().lower())
    if match is None:
        return None
    words = match.groups()
    phrases = [words[:4], words[5:9]] if words[4] else [words[:4]]
    groups = tuple(Group(NUMBERS.index(number) + 1, *rest) for number, *rest in phrases)
    return Scene(groups, relation=words[4], background=words[9])


def scene_facts(index: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Facts of captioned pictures index (B,).
    (B,): number of objects, relation (-1 = none), background
    (B,4), of which the first `number` are drawn: label (of SHAPES), colour, size, x, y, radius, turn"""
    def u(column):
        return uniform(index, 100 + column, seed)

    def pick(column, n):                                             # a whole number below n
        return (n * u(column)).long().clamp(max=n - 1)

    def of_each(column):                                             # B 4   one random number an object
        return torch.stack([u(column + k) for k in range(4)], dim=1)

    # a quarter shows one object, a quarter several alike, half a pair
    kind = u(0)
    pair = kind >= 0.5
    alike = (kind >= 0.25) & (kind < 0.5)
    number = torch.where(pair, 2, torch.where(alike, 2 + pick(1, 3), 1))
    background = pick(2, len(COLOURS))
    relation = torch.where(pair, pick(3, 4), -1)

    # the two of a pair differ in form and in colour, so that either tells them apart; colours are counted
    # from the background's, which no object has
    form = pick(4, len(FORMS))
    colour = pick(5, len(COLOURS) - 1)
    size = pick(6, 2)
    second_form = (form + 1 + pick(7, len(FORMS) - 1)) % len(FORMS)
    second_colour = (colour + 1 + pick(8, len(COLOURS) - 2)) % (len(COLOURS) - 1)
    second_size = pick(9, 2)
    is_second = pair[:, None] & (torch.arange(4) == 1)               # B 4
    form = torch.where(is_second, second_form[:, None], form[:, None])
    colour = torch.where(is_second, second_colour[:, None], colour[:, None])
    size = torch.where(is_second, second_size[:, None], size[:, None])
    radius = torch.tensor(RADII)[size] * (0.96 + 0.08 * of_each(10))

    # the centre of each object's room: opposite sides for a pair, corners for alike ones, else the middle
    pair = pair[:, None, None]                                       # B 1 1
    alike = alike[:, None, None]
    side = DIRECTIONS[relation]                                      # B 2    of a pair's first object
    sides = torch.stack([side, -side, 0 * side, 0 * side], dim=1)
    corners = CORNERS[(pick(14, 4)[:, None] + torch.arange(4)) % 4]
    centre = torch.where(pair, sides, torch.where(alike, corners, 0.0))                  # B 4 2, in quarters
    # how far from there it may be: it stays whole and touches no other, and the two of a pair are furthest
    # apart along their relation
    room = torch.where((centre != 0) | alike, 0.25, 0.5) - 1.1 * radius[..., None]
    room = torch.where(pair & (centre == 0), 0.1, room)
    jitter = torch.stack([2 * of_each(15) - 1, 2 * of_each(19) - 1], dim=-1)
    place = 0.5 + 0.25 * centre + room.clamp(min=0) * jitter         # B 4 2
    return {
        "number": number,
        "relation": relation,
        "background": background,
        "label": torch.tensor([SHAPES.index(name) for name in FORMS])[form],
        "colour": (background[:, None] + 1 + colour) % len(COLOURS),
        "size": size,
        "radius": radius,
        "x": place[..., 0],
        "y": place[..., 1],
        "turn": 0.24 * (of_each(23) - 0.5),
    }


def scene_of(facts: dict[str, Tensor], i: int) -> Scene:
    """Row i of scene_facts in words."""
    row = {name: values[i].tolist() for name, values in facts.items()}
    background = COLOURS[row["background"]]

    def group(k, number):
        size = SIZES[row["size"][k]]
        colour = COLOURS[row["colour"][k]]
        return Group(number, size, colour, form=SHAPES[row["label"][k]])

    if row["relation"] < 0:
        return Scene((group(0, row["number"]),), None, background)
    return Scene((group(0, 1), group(1, 1)), RELATIONS[row["relation"]], background)


def scenes(index: Tensor, size: int, seed: int = 0) -> Tensor:
    """Captioned pictures index (B,) -> (B,3,size,size) in [-1,1]."""
    def u(column):
        return uniform(index, 100 + column, seed)

    facts = scene_facts(index, seed)
    # background: one colour, a little lighter towards a random side
    light = 0.5 + 0.15 * gradient(2 * math.pi * u(27), size)
    ground = hsv_to_rgb(HUES[facts["background"]], 0.25 + 0.15 * u(28), torch.ones(len(index)))
    img = ground[..., None, None] * light[:, None]
    for k in range(4):
        rows = facts["number"] > k
        if rows.any():
            own = {name: facts[name][rows, k] for name in ("label", "x", "y", "radius", "turn")}
            hue = HUES[facts["colour"][rows, k]]
            colour = hsv_to_rgb(hue, 0.85 + 0.1 * u(29 + k)[rows], 0.88 + 0.1 * u(33 + k)[rows])
            img[rows] = paint(img[rows], own, colour)
    return img.clamp(0, 1) * 2 - 1


@lru_cache(maxsize=64)
def captions_from(start: int, seed: int) -> list[str]:
    """The captions of 1024 pictures from `start` on: much faster than one by one."""
    facts = scene_facts(start + torch.arange(1024), seed)
    return [caption(scene_of(facts, i)) for i in range(1024)]


class ScenesSource(ShapesSource):
    """A source of endless pictures with captions. A picture's label is its number."""

    classes = ()
    captioned = True

    def __init__(self, size: int, length: int = 32768, split: str = "train"):
        super().__init__(size, length, split)
        self.identity = f"scenes-v1 size={size} seed={self.seed}"

    def caption(self, index: int) -> str:
        return captions_from(index - index % 1024, self.seed)[index % 1024]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return scenes(indices, self.size, self.seed), indices


# ---- the text encoder of the bundled models -----------------------------------------------------

WORD = 64                                                        # numbers of a word
CONTEXT = 3                                                      # words in a token


@lru_cache(maxsize=2**16)
def word_vector(word: str) -> Tensor:
    """64 bits of a word's hash as +1 and -1, (64,): the same on every machine, no two words much alike."""
    digest = hashlib.sha256(word.encode()).digest()[: WORD // 8]
    bits = np.unpackbits(np.frombuffer(digest, np.uint8))
    return torch.from_numpy(bits.astype(np.float32)) * 2 - 1


@lru_cache(maxsize=8)
def word_positions(length: int) -> Tensor:
    """Sinusoids of a token's position, about as large as the words, (length,64)."""
    angles = torch.arange(length)[:, None] * 50.0 ** (-torch.arange(WORD // 2) / (WORD // 2 - 1))
    return 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)


@lru_cache(maxsize=2**16)
def print_once(text: str):
    print(text)


def split_words(prompt: str) -> list[str]:
    return re.findall(r"[^\W_]+", prompt.lower())


def note_unknown_words(prompts: list[str]):
    """Print the words of prompts that the bundled text models were not trained on, with the nearest known
    ones."""
    known = known_words()
    unknown = {word for prompt in set(prompts) for word in split_words(prompt)} - set(known)
    if not unknown:
        return
    said = []
    for word in sorted(unknown)[:8]:
        nearest = difflib.get_close_matches(word, known, 1)
        said.append(f"{word} ({nearest[0]}?)" if nearest else word)
    more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    print_once(f"note: the bundled text models were not trained on: {', '.join(said)}{more}; they know: "
               f"{' '.join(known)}")


def encode_words(prompts: list[str], length: int) -> Text:
    """Prompts -> a Text of `length` tokens a prompt; no file, nothing trained.

    A token is a word, the two words before it and its position, 256 numbers, so that the token of "ring" in
    "a large red ring" describes the whole object. A full stop ends every prompt, the empty one too. The
    pooled text is the mean over tokens, scaled to their size."""
    tokens = torch.zeros(len(prompts), length, (CONTEXT + 1) * WORD)
    mask = torch.zeros(len(prompts), length, dtype=torch.bool)
    before = [torch.zeros(WORD)] * (CONTEXT - 1)
    for row, prompt in enumerate(prompts):
        words = [*split_words(prompt), "."]
        if len(words) > length:
            print_once(f"note: a prompt of {len(words)} words is cut to {length}; "
                       f"its end is lost: ... {prompt[-40:]!r}")
            words = words[:length]
        n = len(words)
        vectors = torch.stack(before + [word_vector(word) for word in words])        # n+2 64
        # the word of every token, the one before it, and the one before that
        shifted = [vectors[CONTEXT - 1 - k :][:n] for k in range(CONTEXT)]
        tokens[row, :n] = torch.cat([*shifted, word_positions(length)[:n]], dim=1)
        mask[row, :n] = True
    pooled = tokens.sum(dim=1) / mask.sum(dim=1, keepdim=True).sqrt()
    return Text(tokens, mask, pooled)


# ---- the judge of pictures with captions: pixels in, words out -----------------------------------

class DetectedObject(NamedTuple):
    form: str
    colour: str
    size: str
    x: float                                                         # the centre, in picture sides
    y: float


def nearest_colour(rgb: Tensor) -> str:
    """The name of the hue that is nearest to that of a colour (3,)."""
    r, g, b = rgb.tolist()
    hue = math.atan2(3**0.5 * (g - b), 2 * r - g - b) / (2 * math.pi)
    distance = ((hue - HUES + 0.5) % 1 - 0.5).abs()
    return COLOURS[int(distance.argmin())]


def crop_outline(mask: Tensor) -> tuple[Tensor, float, float]:
    """One object's pixels (H,W) -> its outline stretched to (24,24), and its centre x, y in pixels."""
    rows = mask.any(dim=1).nonzero().flatten()
    cols = mask.any(dim=0).nonzero().flatten()
    top, bottom = rows[0].item(), rows[-1].item() + 1
    left, right = cols[0].item(), cols[-1].item() + 1
    box = mask[top:bottom, left:right].float()[None, None]
    outline = F.interpolate(box, (24, 24), mode="bilinear", antialias=True)[0, 0]
    return outline, (left + right) / 2, (top + bottom) / 2


@lru_cache(maxsize=1)
def outline_templates() -> tuple[list[str], Tensor, list[float]]:
    """Every form in three turns: names, outlines (15,24,24), areas in squared radii."""
    forms = [form for form in FORMS for _ in range(3)]
    n = len(forms)
    centre = torch.full((n,), 0.5)
    label = torch.tensor([SHAPES.index(form) for form in forms])
    turn = torch.tensor([-0.1, 0.0, 0.1]).repeat(len(FORMS))
    radius = torch.full((n,), 0.35)
    masks = coverage(dict(label=label, x=centre, y=centre, radius=radius, turn=turn), 96) > 0.5
    outlines = torch.stack([crop_outline(mask)[0] for mask in masks])
    areas = [float(mask.float().mean()) / 0.35**2 for mask in masks]
    return forms, outlines, areas


def components(mask: Tensor) -> Tensor:
    """The connected patches (also by corners) of masks (B,H,W) bool -> (B,H,W): 0 outside, and inside of a
    patch the number of its last pixel."""
    numbers = torch.arange(1, mask[0].numel() + 1, device=mask.device, dtype=torch.float32)
    label = mask * numbers.view(mask.shape[1:])
    while True:
        spread = F.max_pool2d(label[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, label):
            return label.long()
        label = spread


def detect_objects(images: Tensor) -> list[tuple[list[DetectedObject], str]]:
    """The objects in every picture (B,3,H,W) in [-1,1], and the colour of its background.

    An object is a patch of strong colour (backgrounds are muted) of at least 0.6 % of the picture; its form
    is that of the most similar outline."""
    rgb = F.interpolate(images.float().cpu(), (128, 128), mode="bilinear", antialias=True)
    rgb = rgb.add(1).div(2).clamp(0, 1)
    strong = rgb.amax(dim=1) - rgb.amin(dim=1) > 0.31                # B 128 128
    # patches are found at half the resolution, so that a gap of one pixel does not split an object
    coarse = components(F.max_pool2d(strong[:, None].float(), 2)[:, 0] > 0)
    labels = coarse.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) * strong
    # background: far enough from every object for its soft edge
    background = F.max_pool2d(strong[:, None].float(), 13, 1, 6)[:, 0] == 0
    forms, outlines, areas = outline_templates()
    # name every patch by its outline, its mean hue and its area
    out = []
    for picture, rest, label in zip(rgb, background, labels):
        found = []
        for number, pixels in zip(*label.unique(return_counts=True)):
            if number == 0 or pixels < 0.006 * label.numel():
                continue
            mask = label == number
            outline, x, y = crop_outline(mask)
            best = int((outlines - outline).square().mean(dim=(1, 2)).argmin())
            radius_squared = float(pixels) / 128**2 / areas[best]
            size = SIZES[radius_squared > RADII[0] * RADII[1]]
            colour = nearest_colour(picture[:, mask].mean(dim=1))
            found.append(DetectedObject(forms[best], colour, size, x / 128, y / 128))
        out.append((found, nearest_colour(picture[:, rest].mean(dim=1))))
    return out


ANSWERS = ("object", "count", "colour", "position", "binding", "all")


def relation_of(a: DetectedObject, b: DetectedObject) -> str:
    """The relation of a to b, along the axis in which they are further apart."""
    dx = a.x - b.x
    dy = a.y - b.y
    if abs(dy) > abs(dx):
        return "below" if dy > 0 else "above"
    return "right of" if dx > 0 else "left of"


def judge_scene(found: list[DetectedObject], background: str, scene: Scene) -> dict[str, bool]:
    """Whether a picture passes each question of ANSWERS about its caption, as in GenEval (arXiv 2310.11513).

    object    every form is there               position  the two are in their relation, where there is one
    count     the number of objects is right    binding   each form has its own colour and size
    colour    every colour is there             all       all of it, and the background"""
    forms = Counter(o.form for o in found)
    colours = {o.colour for o in found}
    alike = Counter((o.form, o.colour, o.size) for o in found)
    answers = {
        "object": all(forms[g.form] > 0 for g in scene.groups),
        "count": len(found) == sum(g.number for g in scene.groups),
        "colour": all(g.colour in colours for g in scene.groups),
    }
    if scene.relation:
        first, second = ([o for o in found if o.form == g.form] for g in scene.groups)
        answers["position"] = bool(first and second) and relation_of(first[0], second[0]) == scene.relation
    answers["binding"] = all(alike[g.form, g.colour, g.size] == g.number for g in scene.groups)
    answers["all"] = all(answers.values()) and background == scene.background
    return answers


def scene_scores(images: Tensor, captions: list[str]) -> dict[str, float]:
    """The share of pictures (B,3,H,W) that pass each question of judge_scene, among those that have it.
    ValueError for a caption that is not of this world."""
    wanted = [read_caption(text) for text in captions]
    if None in wanted:
        text = captions[wanted.index(None)]
        raise ValueError(f"{text!r} is not a caption of the procedural pictures, so nothing can score it")
    judged = [judge_scene(*found, scene) for found, scene in zip(detect_objects(images), wanted)]
    scores = {}
    for question in ANSWERS:
        answers = [answer[question] for answer in judged if question in answer]
        if answers:
            scores[question] = sum(answers) / len(answers)
    return scores


# ---- the judge of pictures with classes ----------------------------------------------------------

class Classifier(nn.Module):
    """A small convolutional network on 64-pixel pictures: features (B,128), and classes."""

    def __init__(self, classes: int = 8, width: int = 32):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        self.blocks = nn.Sequential(*map(self.block, widths, widths[1:]))
        self.out = nn.Linear(widths[-1], classes)

    @staticmethod
    def block(width_in: int, width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride=2, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU())

    def features(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 64:
            x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
        return self.blocks(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


CLASSIFIER = "weights/tiny-classifier.safetensors"


def load_classifier(file=None) -> Classifier:
    """The classifier in this file (default: the shipped one), its class names in .classes. ValueError if the
    file holds none."""
    file = find_weights("the classifier", CLASSIFIER, file)
    tensors = read_tensors(file)
    names = read_config(file).get("classes")
    if names is None or "out.bias" not in tensors:
        raise ValueError(f"{file} is not a classifier of experiments/make_weights.py --only classifier")
    judge = Classifier(len(names))
    judge.load_state_dict({key: value.float() for key, value in tensors.items()})
    judge.classes = tuple(names)
    return judge.requires_grad_(False).eval()


@torch.no_grad()
def classifier_features(judge: Classifier, images: Tensor, batch: int = 256) -> Tensor:
    """Features (B,D) of pictures (B,3,H,W) in [-1,1]."""
    return torch.cat([judge.features(x) for x in images.split(batch)])


@torch.no_grad()
def share_right(judge: Classifier, features: Tensor, y: Tensor) -> float:
    """The share of features (B,D) that are classified as y (B,)."""
    right = judge.out(features).argmax(dim=1) == y
    return float(right.float().mean())


def accuracy(judge: Classifier, images: Tensor, y: Tensor) -> float:
    """The share of pictures (B,3,H,W) that show the class y (B,) they were drawn for."""
    return share_right(judge, classifier_features(judge, images), y)


def pick_scorer(source):
    """The scorer of pictures of this procedural source: scorer(images, y, titles) -> {name: share}."""
    if not source.classes:
        def score_captions(images, y, titles):
            return scene_scores(images, titles)
        return score_captions

    judge = load_classifier()

    def score_classes(images, y, titles):
        return {"accuracy": accuracy(judge, images, y)}
    return score_classes
