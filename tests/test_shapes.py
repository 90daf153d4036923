import math

import pytest
import torch
import torch.nn.functional as F

from helpers import relative_error
from shapes import (
    COLOURS, FORMS, RELATIONS, SHAPES, DetectedObject, Group, ScenesSource, ShapesSource, caption,
    encode_words, judge_scene, pick_scorer, read_caption, scene_facts, scene_of, scene_scores, shape_facts,
    shapes)


# ---- pictures with classes -----------------------------------------------------------------------

def test_a_picture_depends_on_its_number_alone():
    index = torch.tensor([5, 12345, 7, 5])
    images, labels = shapes(index, 32)
    assert images.shape == (4, 3, 32, 32)
    assert images.abs().max() <= 1
    assert torch.equal(labels, index % 8)
    assert torch.equal(images[0], images[3])
    assert not torch.equal(images[0], images[2])
    for i in range(4):
        torch.testing.assert_close(shapes(index[i : i + 1], 32)[0][0], images[i])


def test_a_picture_is_the_same_on_every_machine():
    """Caches and shipped weights rely on it."""
    hues = torch.tensor([7800825, 5673155, 14137248]) / 2**24
    assert torch.equal(shape_facts(torch.arange(3))["hue"], hues)


@pytest.mark.parametrize("source, allowed", [(ShapesSource, 0.01), (ScenesSource, 0.03)])
def test_a_picture_is_the_same_at_every_resolution(source, allowed):
    rows = torch.arange(16)
    small = source(32).batch(rows)[0]
    large = source(128).batch(rows)[0]
    assert (F.avg_pool2d(large, 4) - small).abs().mean() < allowed


def test_training_and_validation_share_no_picture():
    train = ShapesSource(32)
    val = ShapesSource(32, split="val")
    assert train.identity != val.identity
    places = []
    for seed in (train.seed, val.seed):
        facts = shape_facts(torch.arange(32768), seed)
        places.append(set(zip(facts["x"].tolist(), facts["y"].tolist())))
    assert len(places[0] | places[1]) == 2 * 32768
    rows = torch.arange(8)
    assert (train.batch(rows)[0] - val.batch(rows)[0]).abs().mean() > 0.1


def test_a_picture_shows_its_facts():
    """The shape is the only saturated thing; the mean of its pixels is its centre if it is symmetric."""
    index = torch.arange(256)
    facts = shape_facts(index)
    images = (shapes(index, 96)[0] + 1) / 2
    saturation = (images.amax(1) - images.amin(1)) / images.amax(1).clamp(min=1e-3)
    shape = saturation > 0.6                                         # B H W
    axis = (torch.arange(96) + 0.5) / 96
    lopsided = [SHAPES.index(name) for name in ("triangle", "star", "crescent")]
    symmetric = ~torch.isin(facts["label"], torch.tensor(lopsided))
    for name, positions in (("x", axis), ("y", axis[:, None])):
        centre = (shape * positions).sum(dim=(1, 2)) / shape.sum(dim=(1, 2))
        off = (centre - facts[name]).abs()
        assert off[symmetric].max() < 0.01
        assert off.max() < 0.14

    disc = facts["label"] == SHAPES.index("circle")
    area = shape.float().mean(dim=(1, 2))[disc]
    torch.testing.assert_close(area, math.pi * (0.95 * facts["radius"][disc]) ** 2, rtol=0.03, atol=0)

    # a channel that must be strong in red, yellow, green, cyan, blue, magenta
    x, y = ((facts[name] * 96).long() for name in "xy")
    middle = images[index, :, y, x][disc]
    sixth = (6 * facts["hue"][disc]).round().long() % 6
    strong = torch.tensor([0, 0, 1, 1, 2, 2])[sixth]
    assert (middle.gather(1, strong[:, None])[:, 0] > middle.amin(dim=1) + 0.2).all()


# ---- pictures with captions ----------------------------------------------------------------------

def test_every_caption_reads_back_as_its_scene():
    facts = scene_facts(torch.arange(600))
    scenes = [scene_of(facts, i) for i in range(600)]
    assert all(read_caption(caption(scene)) == scene for scene in scenes)
    groups = [group for scene in scenes for group in scene.groups]
    assert {len(scene.groups) for scene in scenes} == {1, 2}
    assert {scene.relation for scene in scenes} == {None, *RELATIONS}
    assert {scene.background for scene in scenes} == set(COLOURS)
    assert {group.number for group in groups} == {1, 2, 3, 4}
    assert {group.form for group in groups} == set(FORMS)
    assert {group.colour for group in groups} == set(COLOURS)
    sizes = {tuple(group.size for group in scene.groups) for scene in scenes if scene.relation}
    assert len(sizes) == 4                                           # each of a pair has its own


def test_objects_of_a_scene_differ_in_form_and_colour_and_from_the_background():
    facts = scene_facts(torch.arange(600))
    for i in range(600):
        scene = scene_of(facts, i)
        colours = {scene.background, *(group.colour for group in scene.groups)}
        assert len(colours) == 1 + len(scene.groups)
        assert len({group.form for group in scene.groups}) == len(scene.groups)


def test_captions_are_read_whatever_their_case_and_spaces():
    scene = read_caption(" A large RED ring above a small blue square on green\n")
    assert scene.groups[1] == Group(1, "small", "blue", "square")


@pytest.mark.parametrize("text", [
    "a dog", "a large red ring", "a large red ring near a small blue square on green"])
def test_other_texts_are_no_captions(text):
    assert read_caption(text) is None


def test_a_captioned_picture_depends_on_its_number_alone():
    source = ScenesSource(64)
    rows = torch.tensor([7, 3, 30000])
    images, labels = source.batch(rows)
    assert torch.equal(images[1:2], source.batch(rows[1:2])[0])
    assert torch.equal(labels, rows)
    facts = scene_facts(rows)
    assert [source.caption(int(i)) for i in rows] == [caption(scene_of(facts, k)) for k in range(3)]
    assert source.caption(3) != ScenesSource(64, split="val").caption(3)


def test_objects_of_a_scene_lie_in_the_picture_and_do_not_touch():
    facts = scene_facts(torch.arange(2000))
    drawn = torch.arange(4) < facts["number"][:, None]
    for name in "xy":
        inside = (facts[name] - facts["radius"] > 0) & (facts[name] + facts["radius"] < 1)
        assert inside[drawn].all()
    dx, dy = (facts[name][:, 0] - facts[name][:, 1] for name in "xy")
    gap = torch.hypot(dx, dy) - facts["radius"][:, :2].sum(dim=1)
    assert gap[facts["number"] > 1].min() > 0


# ---- judges --------------------------------------------------------------------------------------

def test_the_judge_of_captions_passes_real_pictures_and_neither_swapped_captions_nor_noise():
    source = ScenesSource(128, split="val")
    images = source.batch(torch.arange(200))[0]
    captions = [source.caption(i) for i in range(200)]
    assert set(scene_scores(images, captions).values()) == {1.0}
    swapped = scene_scores(images, captions[1:] + captions[:1])
    assert swapped["all"] == 0
    assert swapped["binding"] < 0.1
    assert swapped["colour"] < 0.6
    noise = scene_scores(torch.rand(20, 3, 128, 128) * 2 - 1, captions[:20])
    assert noise["all"] == 0
    assert noise["position"] < 0.3


def test_a_caption_of_another_world_is_refused():
    with pytest.raises(ValueError, match="'a dog' is not a caption"):
        scene_scores(torch.zeros(1, 3, 64, 64), ["a dog"])


RING = DetectedObject("ring", "red", "large", 0.5, 0.25)
SQUARE = DetectedObject("square", "blue", "small", 0.55, 0.75)


@pytest.mark.parametrize("found, background, wrong", [
    ([RING, SQUARE], "green", ""),
    ([SQUARE, RING], "green", ""),
    ([RING, SQUARE], "pink", "all"),
    ([RING], "green", "object count colour position binding all"),
    ([RING, SQUARE, RING], "green", "count binding all"),
    ([RING, SQUARE._replace(colour="pink")], "green", "colour binding all"),
    ([RING._replace(colour="blue"), SQUARE._replace(colour="red")], "green", "binding all"),
    ([RING, SQUARE._replace(size="large")], "green", "binding all"),
    ([RING, SQUARE._replace(y=0.1)], "green", "position all"),
    ([RING, SQUARE._replace(x=0.1, y=0.3)], "green", "position all"),
    ([RING._replace(form="cross"), SQUARE], "green", "object position binding all"),
])
def test_every_question_of_the_judge_is_about_one_thing(found, background, wrong):
    scene = read_caption("a large red ring above a small blue square on green")
    answers = judge_scene(found, background, scene)
    assert {question for question, passed in answers.items() if not passed} == set(wrong.split())


@pytest.mark.parametrize("count, wrong", [(3, ""), (2, "count binding all"), (4, "count binding all")])
def test_the_judge_counts_objects_that_are_alike(count, wrong):
    cross = DetectedObject("cross", "pink", "small", 0.5, 0.5)
    answers = judge_scene([cross] * count, "yellow", read_caption("three small pink crosses on yellow"))
    assert "position" not in answers
    assert {question for question, passed in answers.items() if not passed} == set(wrong.split())


def test_every_source_has_the_scorer_of_its_kind():
    classes = ShapesSource(64, split="val")
    images, labels = classes.batch(torch.arange(64))
    assert pick_scorer(classes)(images, labels, None)["accuracy"] > 0.95
    assert pick_scorer(classes)(images, (labels + 1) % 8, None)["accuracy"] < 0.05
    captioned = ScenesSource(128)
    images, labels = captioned.batch(torch.arange(8))
    titles = [captioned.caption(i) for i in range(8)]
    assert pick_scorer(captioned)(images, labels, titles)["all"] == 1


# ---- the text encoder of the embedded models -----------------------------------------------------

def test_words_are_the_same_everywhere_and_tell_prompts_apart():
    text = encode_words(["a large red ring", "a large ring red", ""], 6)
    assert text.tokens.shape == (3, 6, 256)
    assert text.pooled.shape == (3, 256)
    assert text.guidance is None
    assert text.mask.sum(dim=1).tolist() == [5, 5, 1]            # a full stop after the last word
    assert not text.tokens[~text.mask].any()
    assert text.tokens[0, 0, :6].tolist() == [1, 1, -1, -1, 1, -1]   # of the hash of "a"
    assert torch.equal(text.tokens[0, :2], text.tokens[1, :2])
    assert relative_error(text.tokens[0, 2], text.tokens[1, 2]) > 0.5
    assert torch.equal(encode_words(["A LARGE, red ring!"], 6).tokens, text.tokens[:1])
    assert 0.7 < text.pooled[0].square().mean().sqrt() < 1.6         # about as large as a token


def test_a_token_holds_the_two_words_before_it():
    small, large = encode_words(["a small red ring", "a large red ring"], 6).tokens[:, 3]
    assert relative_error(small, large) > 0.3


def test_a_prompt_that_is_cut_is_noted_once(capsys):
    whole = encode_words(["a large red ring"], 6)
    assert torch.equal(encode_words(["a large red ring"], 4).tokens[0], whole.tokens[0, :4])
    assert "its end is lost" in capsys.readouterr().out
    encode_words(["a large red ring"], 4)
    assert not capsys.readouterr().out                               # not at every step of a training
