import pytest
import torch
import torch.nn.functional as F

from helpers import relative_error
from shapes import (
    RELATIONS, DetectedObject, Group, ScenesSource, ShapesSource, caption, encode_words,
    judge_scene, known_words, pick_scorer, read_caption, scene_facts, scene_of, scene_scores, shape_facts,
    split_words)

every_source = pytest.mark.parametrize("kind", [ShapesSource, ScenesSource])


# ---- pictures ------------------------------------------------------------------------------------

@every_source
def test_a_picture_depends_on_its_number_alone(kind):
    source = kind(32)
    rows = torch.tensor([5, 12345, 5])
    images, labels = source.batch(rows)
    assert images.abs().max() <= 1
    assert torch.equal(images[0], images[2])
    for i, row in enumerate(rows.split(1)):
        image, label = source.batch(row)
        torch.testing.assert_close(image[0], images[i])
        assert label == labels[i]


@pytest.mark.parametrize("kind, colour", [
    (ShapesSource, [-0.05693, 0.08968, 0.01226]),
    (ScenesSource, [-0.08971, -0.14453, -0.25019]),
])
def test_a_picture_is_the_same_on_every_machine(kind, colour):
    """Caches and shipped weights rely on it."""
    images = kind(32).batch(torch.arange(16))[0]
    corner = images[:, :, :16, :16].mean(dim=(0, 2, 3))
    torch.testing.assert_close(corner, torch.tensor(colour), atol=1e-4, rtol=0)


@every_source
def test_a_picture_is_the_same_at_every_resolution(kind):
    rows = torch.arange(16)
    small = kind(32).batch(rows)[0]
    large = kind(128).batch(rows)[0]
    assert (F.avg_pool2d(large, 4) - small).abs().mean() < 0.03


def test_training_and_validation_share_no_picture():
    places = []
    for split in ("train", "val"):
        facts = shape_facts(torch.arange(32768), ShapesSource(32, split=split).seed)
        places.append(torch.stack([facts["x"], facts["y"]], dim=1))
    assert len(torch.cat(places).unique(dim=0)) == 2 * 32768
    train, val = (ShapesSource(32, split=split) for split in ("train", "val"))
    rows = torch.arange(8)
    assert (train.batch(rows)[0] - val.batch(rows)[0]).abs().mean() > 0.1
    assert train.identity != val.identity


# ---- captions ------------------------------------------------------------------------------------

def test_every_caption_reads_back_as_its_scene():
    facts = scene_facts(torch.arange(600))
    scenes = [scene_of(facts, i) for i in range(600)]
    assert all(read_caption(caption(scene)) == scene for scene in scenes)
    assert {scene.relation for scene in scenes} == {None, *RELATIONS}
    assert {group.number for scene in scenes for group in scene.groups} == {1, 2, 3, 4}
    for scene in scenes:
        colours = {scene.background, *(group.colour for group in scene.groups)}
        forms = {group.form for group in scene.groups}
        assert len(colours) == 1 + len(scene.groups)
        assert len(forms) == len(scene.groups)


def test_the_known_words_are_those_of_all_captions():
    facts = scene_facts(torch.arange(2000))
    used = {word for i in range(2000) for word in split_words(caption(scene_of(facts, i)))}
    assert set(known_words()) == used
    assert len(known_words()) == len(used)


def test_captions_are_read_whatever_their_case_and_spaces():
    scene = read_caption(" A large RED ring above a small blue square on green\n")
    assert scene.groups[1] == Group(1, "small", "blue", "square")


@pytest.mark.parametrize("text", [
    "a dog", "a large red ring", "a large red ring near a small blue square on green"])
def test_other_texts_are_no_captions(text):
    assert read_caption(text) is None


def test_a_pictures_caption_is_that_of_its_number():
    rows = torch.tensor([3, 30000])
    facts = scene_facts(rows)
    source = ScenesSource(64)
    assert [source.caption(i) for i in rows.tolist()] == [caption(scene_of(facts, k)) for k in range(2)]
    assert source.caption(3) != ScenesSource(64, split="val").caption(3)


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


def test_a_caption_of_another_world_is_refused():
    with pytest.raises(ValueError, match="'a dog' is not a caption"):
        scene_scores(torch.zeros(1, 3, 64, 64), ["a dog"])


PAIR = "a large red ring above a small blue square on green"
RING = DetectedObject("ring", "red", "large", 0.5, 0.25)
SQUARE = DetectedObject("square", "blue", "small", 0.55, 0.75)
ALIKE = "three small blue squares on green"


@pytest.mark.parametrize("text, found, wrong", [
    (PAIR, [SQUARE, RING], ""),
    (PAIR.replace("green", "pink"), [RING, SQUARE], "all"),
    (PAIR, [RING], "object count colour position binding all"),
    (PAIR, [RING, SQUARE, RING], "count binding all"),
    (PAIR, [RING._replace(colour="blue"), SQUARE._replace(colour="red")], "binding all"),
    (PAIR, [RING, SQUARE._replace(size="large")], "binding all"),
    (PAIR, [RING, SQUARE._replace(y=0.1)], "position all"),
    (PAIR, [RING, SQUARE._replace(x=0.1, y=0.3)], "position all"),
    (PAIR, [RING._replace(form="cross"), SQUARE], "object position binding all"),
    (ALIKE, 3 * [SQUARE], ""),
    (ALIKE, 2 * [SQUARE], "count binding all"),
    (ALIKE, 4 * [SQUARE], "count binding all"),
])
def test_every_question_of_the_judge_is_about_one_thing(text, found, wrong):
    answers = judge_scene(found, "green", read_caption(text))
    assert {question for question, passed in answers.items() if not passed} == set(wrong.split())
    assert ("position" in answers) == (text != ALIKE)


def test_every_source_has_the_scorer_of_its_kind():
    classes = ShapesSource(64, split="val")
    score = pick_scorer(classes)
    images, labels = classes.batch(torch.arange(64))
    assert score(images, labels, None)["accuracy"] > 0.95
    assert score(images, (labels + 1) % 8, None)["accuracy"] < 0.05
    captioned = ScenesSource(128)
    images, labels = captioned.batch(torch.arange(8))
    titles = [captioned.caption(i) for i in range(8)]
    assert pick_scorer(captioned)(images, labels, titles)["all"] == 1


# ---- the text encoder of the embedded models -----------------------------------------------------

def test_words_are_the_same_everywhere_and_tell_prompts_apart():
    text = encode_words(["a large red ring", "a large ring red", "a small red ring", ""], 6)
    assert text.tokens.shape == (4, 6, 256)
    assert text.mask.sum(dim=1).tolist() == [5, 5, 5, 1]             # a full stop after the last word
    assert not text.tokens[~text.mask].any()
    assert text.tokens[0, 0, :6].tolist() == [1, 1, -1, -1, 1, -1]   # of the hash of "a"
    assert torch.equal(text.tokens[0, :2], text.tokens[1, :2])
    assert relative_error(text.tokens[0, 2], text.tokens[1, 2]) > 0.5
    assert relative_error(text.tokens[0, 3], text.tokens[2, 3]) > 0.3     # a token holds the two before it
    assert torch.equal(encode_words(["A LARGE, red ring!"], 6).tokens, text.tokens[:1])
    assert 0.7 < text.pooled[0].square().mean().sqrt() < 1.6         # about as large as a token


def test_a_prompt_that_is_cut_is_noted_once(capsys):
    whole = encode_words(["a large red ring"], 6)
    for _ in range(2):                                               # not at every step of a training
        cut = encode_words(["a large red ring"], 4)
    assert torch.equal(cut.tokens[0], whole.tokens[0, :4])
    assert capsys.readouterr().out.count("its end is lost") == 1
