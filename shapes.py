"""The embedded world: draws pictures, says them in words, reads them back."""

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

# ---- procedural pictures: one shaded shape on a gradient, everything about it known exactly ----------------------------

SHAPES = ("circle", "square", "triangle", "ring", "cross", "star", "crescent", "bars")


def _uniform(index: Tensor, column: int, seed: int) -> Tensor:
    """The column-th random number of picture `index`, in [0,1): a hash (splitmix64), so any picture can be drawn
    alone, in any order, and is the same on every machine."""
    start = np.uint64((column * 0xD1B54A32D192ED03 + seed * 0x94D049BB133111EB) % 2**64)
    x = index.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))


def _hue(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """HSV, each (B,) in [0,1] -> RGB (B,3) in [0,1]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * h[:, None]) % 6
    return v[:, None] * (1 - s[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def _polygon(x: Tensor, y: Tensor, n: int) -> Tensor:
    """Signed distance to a regular n-gon of circumradius 1 with a corner on top."""
    a = torch.atan2(x, -y)
    side = 2 * math.pi / n
    a = (a % side) - side / 2
    return torch.hypot(x, y) * a.cos() - math.cos(math.pi / n)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (near the edge) to a five-pointed star of circumradius 1.1."""
    side = 2 * math.pi / 5
    a = ((torch.atan2(x, -y) + side / 2) % side - side / 2).abs()
    r = torch.hypot(x, y)
    px, py = r * a.cos(), r * a.sin()                                # one tooth: tip on the first axis, valley at pi/5
    tip, valley = 1.1, 0.5
    vx, vy = valley * math.cos(side / 2), valley * math.sin(side / 2)
    ex, ey = vx - tip, vy
    return ((px - tip) * ey - py * ex) / math.hypot(ex, ey)


_SDF = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.95,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.82,
    "triangle": lambda x, y: _polygon(x, y - 0.15, 3) * 0.9,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.72).abs() - 0.24,
    "cross": lambda x, y: torch.minimum(torch.maximum(x.abs() - 0.98, y.abs() - 0.32), torch.maximum(y.abs() - 0.98, x.abs() - 0.32)),
    "star": _star,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 1.0, 0.80 - torch.hypot(x - 0.45, y)),
    "bars": lambda x, y: torch.maximum(y.abs() - 0.9, torch.minimum((x - 0.55).abs(), (x + 0.55).abs()) - 0.3),
}


def shape_facts(index: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """What is in picture `index`: label, centre and radius (in picture sides), turn (radians), hue in [0,1]."""
    u = lambda c: _uniform(index, c, seed)
    radius = 0.20 + 0.12 * u(1)
    reach = 1.12 * radius
    return dict(label=index.long() % len(SHAPES), radius=radius, x=reach + (1 - 2 * reach) * u(2), y=reach + (1 - 2 * reach) * u(3),
                turn=(u(4) - 0.5) * 0.5, hue=u(5))


def _column(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1)


def _places(size: int) -> tuple[Tensor, Tensor]:
    """Columns and rows of the pixels' middles, in picture sides: (1,1,size), (1,size,1)."""
    axis = (torch.arange(size) + 0.5) / size
    return axis.view(1, 1, -1), axis.view(1, -1, 1)


def _distance(f: dict[str, Tensor], px: Tensor, py: Tensor, dx: float = 0.0, dy: float = 0.0) -> Tensor:
    """Signed distance to the shapes of these facts (label, x, y, radius, turn), moved by (dx,dy) -> (B,H,W), in picture
    sides, < 0 inside."""
    x, y = (px - _column(f["x"]) - dx) / _column(f["radius"]), (py - _column(f["y"]) - dy) / _column(f["radius"])
    c, s = _column(f["turn"].cos()), _column(f["turn"].sin())
    x, y = c * x + s * y, c * y - s * x
    d = torch.empty_like(x)
    for k, name in enumerate(SHAPES):
        if (mine := f["label"] == k).any():
            d[mine] = _SDF[name](x[mine], y[mine])
    return d * _column(f["radius"])


def cover(f: dict[str, Tensor], size: int) -> Tensor:
    """How much of every pixel a shape of these facts covers, (B,size,size) in [0,1]: one pixel of antialiasing."""
    return (0.5 - _distance(f, *_places(size)) * size).clamp(0, 1)


def _paint(img: Tensor, f: dict[str, Tensor], colour: Tensor) -> Tensor:
    """A shape on every picture (B,3,H,W) in [0,1]: a soft shadow below and to the right, then the shape in its colour
    (B,3), lit from above left."""
    px, py = _places(size := img.shape[-1])
    shadow = torch.sigmoid(-_distance(f, px, py, 0.02, 0.03) / 0.012)
    img = img * (1 - 0.45 * shadow[:, None])
    light = 0.78 + 0.30 * ((_column(f["x"]) - px) + (_column(f["y"]) - py)) / (2 * _column(f["radius"]))
    colour = colour[..., None, None] * light[:, None]
    own = cover(f, size)[:, None]
    return img * (1 - own) + colour.clamp(0, 1) * own


def shapes(index: Tensor, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures by number: index (B,) -> (B,3,size,size) in [-1,1] and class (B,), picture i always the same one.
    A picture shows a shaded shape of class i mod 8 with a soft shadow on a gradient of two muted colours."""
    f, u = shape_facts(index, seed), lambda c: _uniform(index, c, seed)
    px, py = _places(size)
    angle = 2 * math.pi * u(6)                                        # two muted colours along a random direction
    ramp = ((px - 0.5) * _column(angle.cos()) + (py - 0.5) * _column(angle.sin()) + 0.7).clamp(0, 1.4) / 1.4
    sky = [_hue(u(7 + 3 * i), 0.15 + 0.25 * u(8 + 3 * i), 0.35 + 0.5 * u(9 + 3 * i)) for i in (0, 1)]
    img = sky[0][..., None, None] * (1 - ramp[:, None]) + sky[1][..., None, None] * ramp[:, None]
    img = _paint(img, f, _hue(f["hue"], 0.75 + 0.2 * u(13), 0.85 + 0.1 * u(14)))
    return img.clamp(0, 1) * 2 - 1, f["label"]


class ShapesSource:
    """Endless procedural pictures behind the interface of a picture source. split: "train" or "val", never the same."""

    classes = SHAPES

    def __init__(self, size: int, length: int = 32768, split: str = "train"):
        self.size, self.length, self.seed = size, length, {"train": 0, "val": 1}[split]
        self.identity = f"shapes-v1 size={size} seed={self.seed}"

    def __len__(self):
        return self.length

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return shapes(indices, self.size, self.seed)


# ---- procedural pictures with captions: several shapes, their colours, sizes, number and places ------------------------------

# Shapes and hues that no autoencoder here confuses. A background has the muted tone of a colour that no object has.
FORMS = ("circle", "square", "triangle", "ring", "cross")


COLOURS, HUES = ("red", "yellow", "green", "blue", "pink"), torch.tensor([0.0, 0.16, 0.38, 0.62, 0.84])


SIZES, RADII = ("small", "large"), (0.15, 0.21)                       # radius in picture sides, give or take 4 %


NUMBERS = ("a", "two", "three", "four")


RELATIONS = ("above", "below", "left of", "right of")                 # of the first object to the second


_TOWARDS = torch.tensor([[0.0, -1.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])             # (x, y) of the relations


_QUARTERS = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])


class Thing(NamedTuple):
    """One object, or several alike."""
    number: int
    size: str
    colour: str
    form: str


class Scene(NamedTuple):
    """What a caption says: one thing (one object, or several alike), or two single ones and how they stand."""
    things: tuple[Thing, ...]
    relation: str | None
    background: str


def caption(scene: Scene) -> str:
    """"a large red ring above a small blue square on green", "three small pink crosses on yellow"."""
    things = [f"{NUMBERS[t.number - 1]} {t.size} {t.colour} {t.form}{'es' * (t.form == 'cross') or 's' if t.number > 1 else ''}" for t in scene.things]
    return f" {scene.relation} ".join(things) + f" on {scene.background}"


def read_caption(text: str) -> Scene | None:
    """What a caption says, None if it is not one of ours."""
    either = lambda words: f"({'|'.join(words)})"
    thing = f"{either(NUMBERS)} {either(SIZES)} {either(COLOURS)} {either(FORMS)}(?:es|s)?"
    m = re.fullmatch(f"{thing}(?: {either(RELATIONS)} {thing})? on {either(COLOURS)}", text.strip().lower())
    if m is None:
        return None
    words = m.groups()
    things = [Thing(NUMBERS.index(w[0]) + 1, *w[1:]) for w in (words[:4], words[5:9]) if w[0]]
    return Scene(tuple(things), words[4], words[9])


def scene_facts(index: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """What is in captioned picture `index`. Of every picture (B,): number of objects, relation (-1 = none), background. Of
    its four places (B,4), of which the first `number` are taken: label (of SHAPES), colour, size, and x, y, radius, turn."""
    u = lambda column: _uniform(index, 100 + column, seed)
    pick = lambda column, n: (n * u(column)).long().clamp(max=n - 1)
    four = lambda f: torch.stack([f(k) for k in range(4)], dim=1)
    kind = u(0)                                                       # a quarter one object, a quarter several alike, half two
    pair, alike = kind >= 0.5, (kind >= 0.25) & (kind < 0.5)
    number = torch.where(pair, 2, torch.where(alike, 2 + pick(1, 3), 1))
    background, relation = pick(2, len(COLOURS)), torch.where(pair, pick(3, 4), -1)
    first = dict(form=pick(4, len(FORMS)), colour=pick(5, len(COLOURS) - 1), size=pick(6, 2))
    # the two of a pair differ in form and in colour: which is which can be told by either
    second = dict(form=(first["form"] + 1 + pick(7, len(FORMS) - 1)) % len(FORMS), size=pick(9, 2),
                  colour=(first["colour"] + 1 + pick(8, len(COLOURS) - 2)) % (len(COLOURS) - 1))
    own = {k: torch.where((torch.arange(4) == 1) & pair[:, None], second[k][:, None], first[k][:, None]) for k in first}
    radius = torch.tensor(RADII)[own["size"]] * four(lambda k: 0.96 + 0.08 * u(10 + k))
    # the middle of every object's room, and how far it may be from there in x and y
    side = torch.tensor([1.0, -1.0, 0.0, 0.0])[None, :, None] * _TOWARDS[relation.clamp(min=0)][:, None]                # B 4 2
    corner = _QUARTERS[(pick(14, 4)[:, None] + torch.arange(4)) % 4]
    at = torch.where(pair[:, None, None], side, torch.where(alike[:, None, None], corner, 0.0))
    room = torch.where((at != 0) | alike[:, None, None], 0.25, 0.5) - 1.1 * radius[..., None]
    room = torch.where(pair[:, None, None] & (at == 0), 0.1, room)    # across: the relation stays the larger distance
    place = 0.5 + 0.25 * at + room.clamp(min=0) * torch.stack([four(lambda k: 2 * u(15 + k) - 1), four(lambda k: 2 * u(19 + k) - 1)], dim=-1)
    return dict(number=number, relation=relation, background=background, label=torch.tensor([SHAPES.index(f) for f in FORMS])[own["form"]],
                colour=(background[:, None] + 1 + own["colour"]) % len(COLOURS), size=own["size"], radius=radius, x=place[..., 0], y=place[..., 1],
                turn=four(lambda k: 0.24 * (u(23 + k) - 0.5)))


def scene_of(facts: dict[str, Tensor], i: int) -> Scene:
    """Row i of scene_facts in words."""
    f = {k: v[i].tolist() for k, v in facts.items()}
    pair = f["relation"] >= 0
    things = [Thing(1 if pair else f["number"], SIZES[f["size"][k]], COLOURS[f["colour"][k]], SHAPES[f["label"][k]]) for k in range(1 + pair)]
    return Scene(tuple(things), RELATIONS[f["relation"]] if pair else None, COLOURS[f["background"]])


def scenes(index: Tensor, size: int, seed: int = 0) -> Tensor:
    """Captioned pictures by number: index (B,) -> (B,3,size,size) in [-1,1], picture i always the same one."""
    f, u = scene_facts(index, seed), lambda column: _uniform(index, 100 + column, seed)
    px, py = _places(size)
    angle = 2 * math.pi * u(27)
    light = 0.5 + 0.15 * ((px - 0.5) * _column(angle.cos()) + (py - 0.5) * _column(angle.sin()))
    img = _hue(HUES[f["background"]], 0.25 + 0.15 * u(28), torch.ones(len(index)))[..., None, None] * light[:, None]
    for k in range(4):
        rows = f["number"] > k
        if rows.any():
            own = {name: f[name][rows, k] for name in ("label", "x", "y", "radius", "turn")}
            img[rows] = _paint(img[rows], own, _hue(HUES[f["colour"][rows, k]], 0.85 + 0.1 * u(29 + k)[rows], 0.88 + 0.1 * u(33 + k)[rows]))
    return img.clamp(0, 1) * 2 - 1


@lru_cache(maxsize=64)
def _captions(seed: int, thousand: int) -> list[str]:
    """Of the pictures from 1024 thousand on."""
    facts = scene_facts(1024 * thousand + torch.arange(1024), seed)
    return [caption(scene_of(facts, i)) for i in range(1024)]


class ScenesSource(ShapesSource):
    """Endless procedural pictures with captions. A picture's label is its number."""

    classes = ()

    def __init__(self, size: int, length: int = 32768, split: str = "train"):
        super().__init__(size, length, split)
        self.identity = f"scenes-v1 size={size} seed={self.seed}"

    def caption(self, index: int) -> str:
        return _captions(self.seed, index // 1024)[index % 1024]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return scenes(indices, self.size, self.seed), indices


WORD, CONTEXT = 64, 3                                                 # numbers of a word; words that a token tells of


@lru_cache(maxsize=2**16)
def _word(word: str) -> Tensor:
    """A word is 64 bits of its hash, as +1 and -1: the same on every machine, and no two words are much alike."""
    bits = np.unpackbits(np.frombuffer(hashlib.sha256(word.encode()).digest()[: WORD // 8], np.uint8))
    return torch.from_numpy(bits.astype(np.float32)) * 2 - 1


@lru_cache(maxsize=8)
def _word_places(length: int) -> Tensor:
    """Sinusoids of a token's place, of about the size of the words, (length,64)."""
    angles = torch.arange(length)[:, None] * 50.0 ** (-torch.arange(WORD // 2) / (WORD // 2 - 1))
    return 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)


@lru_cache(maxsize=2**16)
def _say_once(text: str):
    print(text)


def encode_words(prompts: list[str], length: int) -> Text:
    """The text encoder of the embedded models: no file, nothing trained. A token is a word, the two words before it and its
    place, 256 numbers, so that "ring" of "a large red ring" tells the whole object; after the last one comes an end, also in
    the empty prompt; the pooled text is the mean over tokens, made as large. -> a Text of `length` tokens a prompt"""
    tokens, mask = torch.zeros(len(prompts), length, (CONTEXT + 1) * WORD), torch.zeros(len(prompts), length, dtype=torch.bool)
    none = torch.zeros(WORD)
    for row, prompt in enumerate(prompts):
        words = [*re.findall(r"[^\W_]+", prompt.lower()), "."]
        if len(words) > length:
            _say_once(f"note: a prompt of {len(words)} words is cut to {length}; its end is lost: ... {prompt[-40:]!r}")
            words = words[:length]
        vectors, n = [none] * (CONTEXT - 1) + [_word(w) for w in words], len(words)
        tokens[row, :n] = torch.cat([*(torch.stack(vectors[CONTEXT - 1 - k :][:n]) for k in range(CONTEXT)), _word_places(length)[:n]], dim=1)
        mask[row, :n] = True
    return Text(tokens, mask, tokens.sum(dim=1) / mask.sum(dim=1, keepdim=True).sqrt())


# ---- the judge of the embedded pictures --------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """A small convolutional network on 64-pixel pictures: features (B,128), and classes."""

    def __init__(self, classes: int = 8, width: int = 32):
        super().__init__()
        w = [3, width, 2 * width, 4 * width, 4 * width]
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
                                                    nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU()) for a, b in zip(w, w[1:])])
        self.out = nn.Linear(w[-1], classes)

    def features(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True) if x.shape[-1] != 64 else x
        return self.blocks(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


CLASSIFIER = "weights/tiny-classifier.safetensors"


def load_classifier(file=None) -> Classifier:
    """The judge in this file (default: the shipped one), its class names in .classes. ValueError if it is none."""
    file = find_weights("the classifier", CLASSIFIER, file)
    tensors, names = read_tensors(file), read_config(file).get("classes")
    if names is None or "out.bias" not in tensors:
        raise ValueError(f"{file} is not a classifier of --train-classifier")
    judge = Classifier(len(names))
    judge.load_state_dict({k: v.float() for k, v in tensors.items()})
    judge.classes = tuple(names)
    return judge.requires_grad_(False).eval()


@torch.no_grad()
def classifier_features(judge: Classifier, images: Tensor, batch: int = 256) -> Tensor:
    """Features (B,D) of pictures (B,3,H,W) in [-1,1]."""
    return torch.cat([judge.features(x) for x in images.split(batch)])


@torch.no_grad()
def share_right(judge: Classifier, features: Tensor, y: Tensor) -> float:
    return float((judge.out(features).argmax(dim=1) == y).float().mean())


def accuracy(judge: Classifier, images: Tensor, y: Tensor) -> float:
    """Share of the pictures that show the class they were asked to show."""
    return share_right(judge, classifier_features(judge, images), y)


# ---- the judge of captioned pictures: pixels in, words out --------------------------------------------------------------------------

class DetectedObject(NamedTuple):
    form: str
    colour: str
    size: str
    x: float                                                         # the middle, in picture sides
    y: float


def _nearest_hue(rgb: Tensor) -> str:
    """The name of the hue of a colour (3,)."""
    r, g, b = rgb.tolist()
    hue = math.atan2(3**0.5 * (g - b), 2 * r - g - b) / (2 * math.pi)
    return COLOURS[int(((hue - HUES + 0.5) % 1 - 0.5).abs().argmin())]


def _outline(mask: Tensor) -> tuple[Tensor, float, float]:
    """One object's pixels (H,W) -> its outline stretched to 24x24, and its middle x, y in pixels."""
    rows, cols = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    (top, bottom), (left, right) = ((v[0].item(), v[-1].item() + 1) for v in (rows, cols))
    box = mask[top:bottom, left:right].float()[None, None]
    return F.interpolate(box, (24, 24), mode="bilinear", antialias=True)[0, 0], (left + right) / 2, (top + bottom) / 2


@lru_cache(maxsize=1)
def _templates() -> list[tuple[str, Tensor, float]]:
    """Every form in a few turns: its name, its outline, and its area in squared radii."""
    one, found = torch.ones(1), []
    for form in FORMS:
        for turn in (-0.1, 0.0, 0.1):
            facts = dict(label=torch.tensor([SHAPES.index(form)]), x=0.5 * one, y=0.5 * one, radius=0.35 * one, turn=turn * one)
            mask = cover(facts, 96)[0] > 0.5
            found.append((form, _outline(mask)[0], float(mask.float().mean()) / 0.35**2))
    return found


def components(mask: Tensor) -> Tensor:
    """Connected pixels (also by corners) of masks (B,H,W) bool share a number > 0, that of their last pixel -> (B,H,W)."""
    label = mask * torch.arange(1, mask[0].numel() + 1, device=mask.device, dtype=torch.float32).view(mask.shape[1:])
    while True:
        spread = F.max_pool2d(label[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, label):
            return label.long()
        label = spread


def detect_objects(images: Tensor) -> list[tuple[list[DetectedObject], str]]:
    """The objects in pictures (B,3,H,W) in [-1,1], and their background's colour. An object is a patch of strong colour
    (backgrounds are muted) of at least 0.6 % of the picture; its form is that of the most similar outline."""
    rgb = F.interpolate(images.float().cpu(), (128, 128), mode="bilinear", antialias=True).add(1).div(2).clamp(0, 1)
    strong = rgb.amax(dim=1) - rgb.amin(dim=1) > 0.31
    coarse = components(F.max_pool2d(strong[:, None].float(), 2)[:, 0] > 0)
    labels = coarse.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) * strong
    rest, out = F.max_pool2d(strong[:, None].float(), 13, 1, 6)[:, 0] == 0, []   # far enough from an object for its shine
    for picture, away, label in zip(rgb, rest, labels):
        seen = []
        for number, pixels in zip(*label.unique(return_counts=True)):
            if number and pixels >= 0.006 * label.numel():
                outline, x, y = _outline(mine := label == number)
                form, _, area = min(_templates(), key=lambda t: (t[1] - outline).square().mean())
                large = float(pixels) / 128**2 / area > RADII[0] * RADII[1]
                seen.append(DetectedObject(form, _nearest_hue(picture[:, mine].mean(dim=1)), SIZES[large], x / 128, y / 128))
        out.append((seen, _nearest_hue(picture[:, away].mean(dim=1))))
    return out


ANSWERS = ("object", "count", "colour", "position", "binding", "all")


def judge_scene(seen: list[DetectedObject], background: str, scene: Scene) -> dict[str, bool]:
    """A picture against its caption, as GenEval asks (arXiv 2310.11513): is every form there; as many objects as asked;
    every colour; the two in their relation (left out if none is asked); each form with its own colour and size; all of it."""
    forms, colours = Counter(s.form for s in seen), {s.colour for s in seen}
    whole = Counter((s.form, s.colour, s.size) for s in seen)
    out = dict(object=all(forms[t.form] > 0 for t in scene.things), count=len(seen) == sum(t.number for t in scene.things),
               colour=all(t.colour in colours for t in scene.things))
    if scene.relation:
        a, b = ([s for s in seen if s.form == t.form] for t in scene.things)
        out["position"] = bool(a and b) and relation_of(a[0], b[0]) == scene.relation
    out["binding"] = all(whole[t.form, t.colour, t.size] == t.number for t in scene.things)
    return out | {"all": all(out.values()) and background == scene.background}


def relation_of(a: DetectedObject, b: DetectedObject) -> str:
    dx, dy = a.x - b.x, a.y - b.y
    return RELATIONS[(dy > 0) if abs(dy) > abs(dx) else 2 + (dx > 0)]


def scene_scores(images: Tensor, captions: list[str]) -> dict[str, float]:
    """The share of pictures that pass each of judge_scene's questions, among those that it is asked of. ValueError for a
    caption that is not one of the procedural pictures'."""
    asked = [read_caption(c) for c in captions]
    if None in asked:
        raise ValueError(f"{captions[asked.index(None)]!r} is not a caption of the procedural pictures, so nothing can score it")
    answers = [judge_scene(seen, background, scene) for (seen, background), scene in zip(detect_objects(images), asked)]
    of = lambda key: [a[key] for a in answers if key in a]
    return {key: sum(of(key)) / len(of(key)) for key in ANSWERS if of(key)}


def pick_scorer(source):
    """What scores pictures of the procedural kind of this source: judge(images, conditions, titles) -> {name: share}."""
    if source.classes:
        classifier = load_classifier()
        return lambda images, y, titles: {"accuracy": accuracy(classifier, images, y)}
    return lambda images, y, titles: scene_scores(images, titles)
