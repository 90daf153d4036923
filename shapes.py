"""The embedded world: pictures, captions and judges that need no download. Nobody who reads the method needs this file.

    draw   shapes(index, size)      one shaded shape on a gradient, with its class         ShapesSource
           scenes(index, size)      one to four shapes on a muted ground, with a caption   ScenesSource
    write  caption(scene)           "a large red ring above a small blue square on green"
           encode_words(prompts)    the text encoder of the embedded models
    judge  detect_objects(images)   pixels -> shapes, colours, sizes and places
           scene_scores(images, captions), accuracy(judge, images, y)

A picture is a function of its number: picture i is the same on every machine, in any order and at any resolution. The
shipped weights were trained on exactly these pictures, so no number in here may change.
"""

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


# ---- random numbers, colours, outlines -----------------------------------------------------------------------------

def uniform(index: Tensor, column: int, seed: int) -> Tensor:
    """Random number `column` of every picture, index (B,) -> (B,) in [0,1). It is a hash (splitmix64), so that a picture
    can be drawn by itself."""
    start = np.uint64((column * 0xD1B54A32D192ED03 + seed * 0x94D049BB133111EB) % 2**64)
    x = index.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = (x ^ (x >> np.uint64(31))) >> np.uint64(40)               # the upper 24: all that a float32 holds
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-24))


def hsv_to_rgb(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """HSV, each (B,) in [0,1] -> RGB (B,3) in [0,1]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * h[:, None]) % 6
    return v[:, None] * (1 - s[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y - 0.15
    side = 2 * math.pi / 3
    a = (torch.atan2(x, -y) % side) - side / 2
    return (torch.hypot(x, y) * a.cos() - math.cos(math.pi / 3)) * 0.9


def cross(x: Tensor, y: Tensor) -> Tensor:
    across = torch.maximum(x.abs() - 0.98, y.abs() - 0.32)
    down = torch.maximum(y.abs() - 0.98, x.abs() - 0.32)
    return torch.minimum(across, down)


def star(x: Tensor, y: Tensor) -> Tensor:
    side = 2 * math.pi / 5
    a = ((torch.atan2(x, -y) + side / 2) % side - side / 2).abs()
    r = torch.hypot(x, y)
    # one tooth: its tip lies on the first axis, the valley beside it at the angle pi / 5
    tip = 1.1
    valley = 0.5
    ex = valley * math.cos(side / 2) - tip
    ey = valley * math.sin(side / 2)
    return ((r * a.cos() - tip) * ey - r * a.sin() * ex) / math.hypot(ex, ey)


def bars(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y.abs() - 0.9, torch.minimum((x - 0.55).abs(), (x + 0.55).abs()) - 0.3)


# (x, y) in radii, y downwards -> signed distance to the outline, < 0 inside
OUTLINES = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.95,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.82,
    "triangle": triangle,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.72).abs() - 0.24,
    "cross": cross,
    "star": star,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 1.0, 0.80 - torch.hypot(x - 0.45, y)),
    "bars": bars,
}
SHAPES = tuple(OUTLINES)


# ---- painting. Facts are {label, x, y, radius, turn: (B,)}, one shape a picture; lengths are in picture sides ------

def per_picture(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1)                                          # (B,) beside (B,H,W)


def pixel_centres(size: int) -> tuple[Tensor, Tensor]:
    """x (1,1,size) and y (1,size,1) of the pixels' centres."""
    axis = (torch.arange(size) + 0.5) / size
    return axis.view(1, 1, -1), axis.view(1, -1, 1)


def signed_distance(facts: dict[str, Tensor], px: Tensor, py: Tensor) -> Tensor:
    """Signed distance of the points (px, py) to one shape a picture -> (B,H,W), < 0 inside."""
    x = (px - per_picture(facts["x"])) / per_picture(facts["radius"])
    y = (py - per_picture(facts["y"])) / per_picture(facts["radius"])
    c = per_picture(facts["turn"].cos())
    s = per_picture(facts["turn"].sin())
    x, y = c * x + s * y, c * y - s * x
    d = torch.empty_like(x)
    for k, outline in enumerate(OUTLINES.values()):
        rows = facts["label"] == k
        if rows.any():
            d[rows] = outline(x[rows], y[rows])
    return d * per_picture(facts["radius"])


def coverage(facts: dict[str, Tensor], size: int) -> Tensor:
    """The share of every pixel that a shape covers, (B,size,size) in [0,1]: one pixel of antialiasing."""
    return (0.5 - signed_distance(facts, *pixel_centres(size)) * size).clamp(0, 1)


def paint(img: Tensor, facts: dict[str, Tensor], colour: Tensor) -> Tensor:
    """Paint one shape a picture, colour (B,3), on img (B,3,H,W) in [0,1]: first a soft shadow below and to the right,
    then the shape, lit from above left."""
    size = img.shape[-1]
    px, py = pixel_centres(size)
    moved = {**facts, "x": facts["x"], "y": facts["y"]}
    shadow = torch.sigmoid(-signed_distance(moved, px - 0.02, py - 0.03) / 0.012)
    img = img * (1 - 0.45 * shadow[:, None])
    towards_light = (per_picture(facts["x"]) - px) + (per_picture(facts["y"]) - py)
    light = 0.78 + 0.30 * towards_light / (2 * per_picture(facts["radius"]))
    colour = (colour[..., None, None] * light[:, None]).clamp(0, 1)
    alpha = coverage(facts, size)[:, None]
    return img * (1 - alpha) + colour * alpha
