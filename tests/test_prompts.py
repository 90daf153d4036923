from common import *


@pytest.mark.parametrize("length", [16, 40])
def test_flux_prompts_match_diffusers(length, encoders, tmp_path):
    got = encode_prompts("flux", encoders / "flux", PROMPTS, length, cache=tmp_path)
    tokens, pooled, _ = official_pipeline("flux", encoders).encode_prompt(PROMPTS, device="cpu", max_sequence_length=length)
    assert got.tokens.shape == (3, length, 64) and got.mask is None and got.guidance is None
    close(got.tokens, tokens), close(got.pooled, pooled)


def test_sana_prompts_match_diffusers(encoders, tmp_path):
    """The instruction is the official text, the first token and the last length - 1 are kept, and nothing is cleaned."""
    from inspect import signature
    from diffusers import SanaPipeline
    official, instruction = official_pipeline("sana", encoders), signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert SANA_INSTRUCTION == "\n".join(instruction)
    for length in (12, 300):
        tokens, mask, null, null_mask = official.encode_prompt(PROMPTS[:2], device="cpu", negative_prompt="", max_sequence_length=length, complex_human_instruction=instruction)
        got, plain = encode_prompts("sana", encoders / "sana", PROMPTS[:2], length, cache=tmp_path), encode_prompts("sana", encoders / "sana", [""], length, True, tmp_path)
        assert got.tokens.shape == (2, length, 64) and torch.equal(got.mask, mask.bool()) and torch.equal(plain.mask, null_mask[:1].bool()) and got.mask.sum() > 10
        close(got.tokens, tokens), close(plain.tokens, null[:1])
    upper = [encode_prompts("sana", encoders / "sana", [p], 40, cache=tmp_path).tokens for p in ("a CAT", "a cat", " a cat ")]
    assert off(upper[0], upper[1]) > 1e-3 and torch.equal(upper[1], upper[2])       # capitals are kept, unlike in diffusers, spaces at the ends are not


def test_prompts_are_read_once_and_by_themselves(encoders, tmp_path, monkeypatch):
    loads, load = [], data._load_encoder
    monkeypatch.setattr(data, "_load_encoder", lambda cls, *args: (loads.append(cls), load(cls, *args))[1])
    read = lambda prompts, folder=encoders / "flux", **kw: encode_prompts("flux", folder, prompts, cache=tmp_path / "cache", **{"length": 16} | kw)
    three = read(PROMPTS)
    assert loads == ["T5EncoderModel", "CLIPTextModel"]              # one after the other
    again = read([PROMPTS[1], PROMPTS[1], PROMPTS[0]])
    assert len(loads) == 2 and torch.equal(again.tokens, three.tokens[[1, 1, 0]]) and torch.equal(again.pooled, three.pooled[[1, 1, 0]])
    alone = encode_prompts("flux", encoders / "flux", [PROMPTS[1]], 16, cache=tmp_path / "other")
    assert torch.equal(alone.tokens, three.tokens[1:2]) and torch.equal(alone.pooled, three.pooled[1:2])
    for n, change in ((4, dict(length=17)), (6, dict(length=16, dtype=torch.bfloat16)), (8, dict(plain=True))):          # each is another file
        read(PROMPTS[:1], **change)
        assert len(loads) > n
    moved = tmp_path / "moved"
    shutil.copytree(encoders / "flux", moved)
    count = len(loads)
    assert torch.equal(read(PROMPTS, moved).tokens, three.tokens) and len(loads) == count                             # the same encoder elsewhere
    weights = load_file(moved / "text_encoder_2/model.safetensors")
    save_file({k: v * 1.5 if "final_layer_norm" in k else v for k, v in weights.items()}, moved / "text_encoder_2/model.safetensors", {"format": "pt"})
    assert off(read(PROMPTS, moved).tokens, three.tokens) > 0.1 and len(loads) == count + 1                           # a fine-tuned one
    assert all(f.suffix == ".safetensors" for f in (tmp_path / "cache").iterdir())


def test_the_null_prompt_is_the_encoded_empty_one(encoders, tmp_path):
    """SANA dropped captions but kept their masks when it was trained; a negative prompt has tokens of its own to show."""
    read = lambda family, text: null_prompt(family, encoders / family, 20, text, cache=tmp_path)
    null, negative = read("sana", ""), read("sana", "two blue squares")
    assert len(null) == 1 and null.mask is None and negative.mask.sum() > 3 and off(null.tokens, negative.tokens) > 0.1
    close(null.tokens, encode_prompts("sana", encoders / "sana", [""], 20, True, tmp_path).tokens)
    flux = read("flux", "")
    assert flux.mask is None and flux.guidance is None and flux.pooled.abs().max() > 0.1 and flux.tokens.abs().max() > 0.1      # not zeros


def test_long_prompts_are_cut_with_a_note(encoders, tmp_path, capsys):
    encode_prompts("flux", encoders / "flux", ["a cat " * 30], 16, cache=tmp_path)
    assert re.search(r"note: a prompt of \d+ tokens is cut to 16; its end is lost: ... '.*cat ", capsys.readouterr().out)


def test_text_encoders_that_cannot_be_had_are_one_clear_error(encoders, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="gone.text_encoder_2: no such folder; the text encoders are text_encoder_2, tokenizer_2, text_encoder, tokenizer of a diffusers pipeline.*--text-encoders"):
        encode_prompts("flux", tmp_path / "gone", ["x"], 16, cache=tmp_path)
    shutil.copytree(encoders / "sana", tmp_path / "sana")
    (tmp_path / "sana/text_encoder/model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="text_encoder and tokenizer are not a whole Gemma2Model with its tokenizer"):
        encode_prompts("sana", tmp_path / "sana", ["x"], 16, cache=tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        encode_prompts("sana", encoders / "sana", ["never read before"], 16, cache=tmp_path)


def test_prompt_files_have_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_text("# mine\n a cat \n\nein Hündchen\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "ein Hündchen"]
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    for name, said in (("empty.txt", "no prompts in it"), ("bytes.txt", "not a readable text file"), ("gone.txt", "not a readable text file .FileNotFound")):
        with pytest.raises(ValueError, match=f"--prompts .*{name}: {said}"):
            read_prompts(tmp_path / name)
