from common import *


def test_every_caption_says_its_scene_and_reads_back():
    facts = scene_facts(torch.arange(600))
    said = [scene_of(facts, i) for i in range(600)]
    assert all(read_caption(caption(s)) == s for s in said)
    assert {len(s.things) for s in said} == {1, 2} and {s.things[0].number for s in said} == {1, 2, 3, 4} and {s.relation for s in said} == {None, *RELATIONS}
    assert {t.form for s in said for t in s.things} == set(FORMS) and {t.colour for s in said for t in s.things} == {s.background for s in said} == set(COLOURS)
    for s in said:                                                   # nothing has the background's colour; two differ in form and colour
        assert s.background not in [t.colour for t in s.things] and len({t.form for t in s.things}) == len({t.colour for t in s.things}) == len(s.things)
    assert read_caption(" A large RED ring above a small blue square on green\n").things[1] == Thing(1, "small", "blue", "square")
    assert read_caption("a dog") is None and read_caption("a large red ring") is None and read_caption("a large red ring near a small blue square on green") is None


def test_a_captioned_picture_depends_on_its_number_alone_and_shows_its_facts():
    source, rows = ScenesSource(64), torch.tensor([7, 3, 30000])
    images, labels = source.batch(rows)
    assert torch.equal(images[1:2], source.batch(rows[1:2])[0]) and labels.tolist() == rows.tolist()
    assert off(F.avg_pool2d(ScenesSource(128).batch(rows)[0], 2), images) < 0.06          # at any resolution
    assert [source.caption(int(i)) for i in rows] == [caption(scene_of(scene_facts(rows), k)) for k in range(3)] and source.caption(3) != ScenesSource(64, split="val").caption(3)
    f = scene_facts(torch.arange(2000))
    there = torch.arange(4) < f["number"][:, None]
    assert all((there <= (f[k] - f["radius"] > 0) & (f[k] + f["radius"] < 1)).all() for k in "xy")                  # whole, inside
    gap = ((f["x"][:, 0] - f["x"][:, 1]) ** 2 + (f["y"][:, 0] - f["y"][:, 1]) ** 2).sqrt() - f["radius"][:, 0] - f["radius"][:, 1]
    assert gap[f["number"] > 1].min() > 0


def test_the_judge_of_captions_finds_all_in_real_pictures_and_nothing_in_noise():
    source, rows = ScenesSource(128, split="val"), torch.arange(200)
    images, said = source.batch(rows)[0], [source.caption(i) for i in range(200)]
    assert set(scene_scores(images, said).values()) == {1.0}
    swapped = scene_scores(images, said[1:] + said[:1])              # another picture's caption
    assert swapped["all"] == 0 and swapped["binding"] < 0.1 and swapped["colour"] < 0.6
    noise = scene_scores(torch.rand(20, 3, 128, 128) * 2 - 1, said[:20])
    assert noise["all"] == 0 and noise["position"] < 0.3
    with pytest.raises(ValueError, match="'a dog' is not a caption"):
        scene_scores(images[:1], ["a dog"])


def test_every_question_of_the_judge_is_about_one_thing():
    """A picture as asked, and one wrong in one way."""
    asked = read_caption("a large red ring above a small blue square on green")
    ring, square = DetectedObject("ring", "red", "large", 0.5, 0.25), DetectedObject("square", "blue", "small", 0.55, 0.75)
    wrong = lambda seen, background="green": {k for k, right in judge_scene(seen, background, asked).items() if not right}
    assert wrong([ring, square]) == wrong([square, ring]) == set()
    assert wrong([ring, square], "pink") == {"all"}
    assert wrong([ring]) == {"object", "count", "colour", "position", "binding", "all"}
    assert wrong([ring, square, ring]) == {"count", "binding", "all"}
    assert wrong([ring, square._replace(colour="pink")]) == {"colour", "binding", "all"}
    assert wrong([ring._replace(colour="blue"), square._replace(colour="red")]) == {"binding", "all"}        # each colour is there, on the other
    assert wrong([ring, square._replace(size="large")]) == {"binding", "all"}
    assert wrong([ring, square._replace(y=0.1)]) == {"position", "all"} and wrong([ring, square._replace(x=0.1, y=0.3)]) == {"position", "all"}
    assert wrong([ring._replace(form="cross"), square]) == {"object", "position", "binding", "all"}
    three = read_caption("three small pink crosses on yellow")
    cross = DetectedObject("cross", "pink", "small", 0.5, 0.5)
    assert judge_scene([cross] * 3, "yellow", three) == dict(object=True, count=True, colour=True, binding=True, all=True)
    assert not judge_scene([cross] * 2, "yellow", three)["count"] and not judge_scene([cross] * 4, "yellow", three)["binding"]


def test_words_are_the_same_everywhere_and_tell_prompts_apart(capsys):
    text = encode_words(["a large red ring", "a large ring red", ""], 6)
    assert text.tokens.shape == (3, 6, 256) and text.pooled.shape == (3, 256) and text.guidance is None
    assert text.mask.sum(dim=1).tolist() == [5, 5, 1] and not text.tokens[~text.mask].any()          # an end after the last word
    assert text.tokens[0, 0, :6].tolist() == [1, 1, -1, -1, 1, -1]   # of the hash of "a": on every machine
    assert torch.equal(text.tokens[0, :2], text.tokens[1, :2]) and off(text.tokens[0, 2], text.tokens[1, 2]) > 0.5
    assert torch.equal(encode_words(["A LARGE, red ring!"], 6).tokens, text.tokens[:1])
    assert 0.7 < text.pooled[0].square().mean().sqrt() < 1.6        # about as large as a token
    ring = encode_words(["a small red ring", "a large red ring"], 6).tokens[:, 3]
    assert off(*ring) > 0.3                                          # a token knows the two words before it
    assert torch.equal(encode_words(["a large red ring"], 4).tokens[0], text.tokens[0, :4]) and "its end is lost" in capsys.readouterr().out
    encode_words(["a large red ring"], 4)
    assert not capsys.readouterr().out                               # said once, not at every step of a training
