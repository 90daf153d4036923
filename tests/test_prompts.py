import re
import shutil
import sys
from inspect import signature

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
from data import SANA_INSTRUCTION, cache_prompts, check_encoders, read_prompts, text_folder
from helpers import PROMPTS, assert_near, encoders, relative_error  # noqa: F401
from model import BASES
from shapes import encode_words


def official_pipeline(kind: str, root):
    """diffusers' pipeline around the same encoders, nothing else in it."""
    import diffusers
    import transformers

    def part(cls, name):
        return getattr(transformers, cls).from_pretrained(root / kind / name)

    tokenizer = part("AutoTokenizer", "tokenizer")
    if kind == "sana":
        return diffusers.SanaPipeline(tokenizer, part("Gemma2Model", "text_encoder"), None, None, None)
    clip = part("CLIPTextModel", "text_encoder")
    t5 = part("T5EncoderModel", "text_encoder_2")
    return diffusers.FluxPipeline(None, None, clip, tokenizer, t5, part("AutoTokenizer", "tokenizer_2"), None)


def encode(kind, root, prompts, length, cache, **options):
    return cache_prompts(kind, root / kind, prompts, length, cache=cache, **options)


def test_flux_prompts_match_diffusers(encoders, tmp_path):
    got = encode("flux", encoders, PROMPTS, 40, tmp_path)[:]
    pipeline = official_pipeline("flux", encoders)
    tokens, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", max_sequence_length=40)
    assert got.mask is None
    assert got.guidance is None
    assert_near(got.tokens, tokens)
    assert_near(got.pooled, pooled)


@pytest.mark.parametrize("length", [12, 300])
def test_sana_prompts_match_diffusers(length, encoders, tmp_path):
    """The instruction is the official text; the first token and the last length - 1 are kept."""
    pipeline = official_pipeline("sana", encoders)
    instruction = signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    assert SANA_INSTRUCTION == "\n".join(instruction)
    tokens, mask, null, null_mask = pipeline.encode_prompt(
        PROMPTS[:2], device="cpu", negative_prompt="two dogs", max_sequence_length=length,
        complex_human_instruction=instruction)
    texts = encode("sana", encoders, PROMPTS[:2], length, tmp_path, negative="two dogs")
    got = texts[:]
    assert torch.equal(got.mask, mask.bool())
    assert torch.equal(texts.null.mask, null_mask[:1].bool())
    assert_near(got.tokens, tokens)
    assert_near(texts.null.tokens, null[:1])


def test_sana_prompts_keep_capitals_but_not_the_spaces_around_them(encoders, tmp_path):
    tokens = encode("sana", encoders, ["a CAT", "a cat", " a cat "], 40, tmp_path)[:].tokens
    assert relative_error(tokens[0], tokens[1]) > 1e-3               # diffusers lowers them
    assert torch.equal(tokens[1], tokens[2])


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The classes of the text encoders that were loaded."""
    classes = []
    load = data.load_encoder

    def counting(found, *args):
        classes.append(found.encoder.class_name)
        return load(found, *args)

    monkeypatch.setattr(data, "load_encoder", counting)
    return classes


def test_encoders_are_loaded_one_after_the_other_and_only_for_new_prompts(encoders, tmp_path, loads):
    three = encode("flux", encoders, PROMPTS, 16, tmp_path)[:]
    assert loads == ["T5EncoderModel", "CLIPTextModel"]
    texts = encode("flux", encoders, [PROMPTS[1], PROMPTS[1], PROMPTS[0]], 16, tmp_path)
    assert len(loads) == 2
    assert torch.equal(texts[:].tokens, three.tokens[[1, 1, 0]])
    assert torch.equal(texts[torch.tensor([2])].pooled, three.pooled[:1])


class Killed(BaseException):
    """Unlike KeyboardInterrupt, it does not end pytest too."""


def test_a_killed_filling_goes_on_and_encodes_nothing_twice(encoders, tmp_path, monkeypatch):
    """Killed while the third of eight files is written."""
    save = data.save_file
    files = []

    def dies_once(tensors, file):
        files.append(file)
        save(tensors, file)
        if len(files) == 3:
            raise Killed

    monkeypatch.setattr(data, "save_file", dies_once)
    with pytest.raises(Killed):
        encode("flux", encoders, PROMPTS, 16, tmp_path)
    encode("flux", encoders, PROMPTS, 16, tmp_path)
    assert len(files) == 8 + 1
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize("change", [
    dict(length=17), dict(dtype=torch.bfloat16), dict(negative=PROMPTS[0]), dict(prompts=["a dog"])])
def test_everything_that_changes_the_numbers_is_another_file(change, encoders, tmp_path, loads):
    given = dict(prompts=PROMPTS[:1], length=16, cache=tmp_path)
    cache_prompts("flux", encoders / "flux", **given)
    texts = cache_prompts("flux", encoders / "flux", **{**given, **change})
    assert len(loads) == 4
    assert texts[:].pooled.dtype == change.get("dtype", torch.float32)


def test_prompts_belong_to_the_encoder_wherever_it_lies(encoders, tmp_path, loads):
    cache = tmp_path / "cache"
    before = encode("flux", encoders, PROMPTS, 16, cache)[:].tokens
    shutil.copytree(encoders / "flux", tmp_path / "flux")
    encode("flux", tmp_path, PROMPTS, 16, cache)
    assert len(loads) == 2
    # a fine-tuned T5
    file = tmp_path / "flux/text_encoder_2/model.safetensors"
    weights = load_file(file)
    weights["encoder.final_layer_norm.weight"] *= 1.5
    save_file(weights, file, {"format": "pt"})
    after = encode("flux", tmp_path, PROMPTS, 16, cache)[:].tokens
    assert relative_error(after, before) > 0.1
    assert loads[2:] == ["T5EncoderModel"]


def test_a_damaged_encoded_prompt_is_refused_with_the_reason(encoders, tmp_path):
    texts = encode("sana", encoders, PROMPTS, 16, tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="text-.*safetensors is missing or damaged .*delete it and run"):
        texts[:]


def test_the_null_prompt_is_the_encoded_empty_one(encoders, tmp_path):
    """SANA dropped captions but kept their masks when it was trained; a negative prompt has its own mask."""
    null = encode("sana", encoders, PROMPTS, 20, tmp_path).null
    assert null.mask is None
    flux = encode("flux", encoders, PROMPTS, 20, tmp_path).null
    assert len(flux) == 1
    assert flux.pooled.abs().max() > 0.1                             # not zeros
    assert flux.tokens.abs().max() > 0.1


def test_words_are_encoded_at_once_behind_the_same_interface(tmp_path):
    texts = cache_prompts("words", None, ["a red ring", "a blue cross"], 8, cache=tmp_path)
    assert torch.equal(texts[torch.tensor([1])].tokens, encode_words(["a blue cross"], 8).tokens)
    assert not any(tmp_path.iterdir())


def test_words_that_no_bundled_model_knows_are_named_once(capsys):
    prompts = ["a large rde ring on blue", "purple elephants"]
    for _ in range(2):
        cache_prompts("words", None, [*prompts, "two small red crosses left of a ring"], 16, negative="dark")
    out = capsys.readouterr().out
    assert out.count("not trained on: dark, elephants, purple, rde (red?); they know: a two three") == 1


def test_long_prompts_are_cut_with_a_note(encoders, tmp_path, capsys):
    encode("flux", encoders, ["a cat " * 30], 16, tmp_path)
    note = r"note: a prompt of \d+ tokens is cut to 16; its end is lost: ... '.*cat "
    assert re.search(note, capsys.readouterr().out)


def test_text_encoders_that_are_missing_or_damaged_are_one_clear_error(encoders, tmp_path, monkeypatch):
    parts = "text_encoder_2, tokenizer_2, text_encoder, tokenizer"
    missing = f"flux.text_encoder_2: no such folder; the text encoders are {parts} of a diff.*--text-encoders"
    with pytest.raises(ValueError, match=missing):
        encode("flux", tmp_path, ["x"], 16, tmp_path)
    shutil.copytree(encoders / "sana", tmp_path / "sana")
    (tmp_path / "sana/text_encoder/model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="text_encoder and tokenizer are not a whole Gemma2Model"):
        encode("sana", tmp_path, ["x"], 16, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        encode("sana", encoders, ["never encoded before"], 16, tmp_path)


def test_text_encoders_are_checked_before_anything_is_loaded(encoders, tmp_path, monkeypatch):
    for kind in (None, "words", "flux", "sana"):
        check_encoders(kind)
    check_encoders("flux", encoders / "flux")
    check_encoders("sana", encoders / "sana")
    with pytest.raises(ValueError, match="text_encoder: no such folder; .*--text-encoders DIR"):
        check_encoders("sana", tmp_path)
    # a tokenizer that only sentencepiece reads
    shutil.copytree(encoders / "sana", tmp_path / "sana")
    (tmp_path / "sana/tokenizer/tokenizer.json").rename(tmp_path / "sana/tokenizer/tokenizer.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="sana.tokenizer holds no tokenizer.json: pip install sentencepiece"):
        check_encoders("sana", tmp_path / "sana")
    monkeypatch.setitem(sys.modules, "transformers", None)
    check_encoders("words")
    with pytest.raises(ValueError, match="pip install transformers"):
        check_encoders("sana", encoders / "sana")


def test_a_prompt_cache_that_cannot_be_made_is_one_clear_error(encoders, tmp_path, loads):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--cache .*file: File exists; give a folder that can be written"):
        encode("sana", encoders, PROMPTS, 16, tmp_path / "file")
    assert loads == []                                               # not after minutes of loading


def test_text_encoders_are_looked_for_where_the_weights_came_from(encoders, tmp_path):
    flux = BASES["flux-krea"]
    assert text_folder("test", BASES["tiny-flux"], None, None) is None
    assert text_folder("test", flux, None, str(encoders / "flux")) == encoders / "flux"
    assert text_folder("test", flux, str(tmp_path), str(encoders / "flux")) == tmp_path
    with pytest.raises(ValueError, match="--text-encoders .*gone: no such file"):
        text_folder("test", flux, str(tmp_path / "gone"), None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_prompt_files_have_a_prompt_a_line(encoding, tmp_path):
    """A byte order mark is no part of the first prompt."""
    file = tmp_path / "p.txt"
    file.write_text(" a cat \n# mine\n\nein Hündchen\n", encoding=encoding)
    assert read_prompts(file) == ["a cat", "ein Hündchen"]


@pytest.mark.parametrize("content, error", [
    (b"# nothing\n", "no prompts in it"), (b"\xff\xfe\xff", "not a readable text file")])
def test_prompt_files_without_prompts_are_one_clear_error(content, error, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"--prompts .*p.txt: {error}"):
        read_prompts(file)
