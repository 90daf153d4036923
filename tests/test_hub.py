from common import *


def test_weights_come_from_the_hub_whole_and_once(tmp_path):
    """Complete, interrupted, missing, of the wrong size, gated; then the same cache without a network."""
    pytest.importorskip("huggingface_hub")
    blob = lambda n: np.random.default_rng(n).bytes(24 * 10**6 if n == 2 else 999)      # goes on in steps of ten million bytes
    pipe = {"sub/transformer/config.json": b"{}", "sub/transformer/model-00001-of-00002.safetensors": blob(1), "sub/transformer/model.fp16.safetensors": b"no",
            "sub/transformer/model.bin": b"no", "sub/vae/config.json": b"{}", "sub/scheduler/scheduler_config.json": b"no", "sub/tokenizer/spiece.model": b"s", "other.safetensors": b"no"}
    repos = {"a/b": {"w.safetensors": blob(0), "cut.safetensors": blob(2), "short.safetensors": blob(4)}, "a/pipe": pipe, "a/gated": {"w.safetensors": b"w"}}
    with Hub(repos, cut={"cut.safetensors"}, short={"short.safetensors"}, gated={"a/gated"}) as hub:
        url = f"http://127.0.0.1:{hub.server_port}"
        calls = [("m", "a/b::w.safetensors"), ("m", "a/b::cut.safetensors"), ("m", "a/b::none.safetensors"), ("m", "a/b::short.safetensors"), ("m", "a/gated::w.safetensors"),
                 ("m", "a/pipe::sub/", None, ["transformer", "tokenizer"]), ("m", "a/pipe::sub/", None, ["unet"])]
        got, said = ask_hub(tmp_path, url, calls, HF_TOKEN="hf_secret")
        whole, cut, none, short, gated, folder, part = got
        assert Path(whole).read_bytes() == blob(0) and Path(cut).read_bytes() == blob(2)
        ranges = [r for method, where, r, _ in hub.asked if method == "GET" and "cut" in where]
        assert ranges[0] is None and len(ranges) == 2 and 0 < int(ranges[1][6:-1]) <= 12 * 10**6     # not from the start
        assert none.startswith("error: m wants none.safetensors of a/b; it is not in ") and f"({url}: RemoteEntryNotFoundError)\nWith it at hand, give --weights PATH" in none
        assert "could not be downloaded" in short and "OSError" in short and not list((tmp_path / "hub").rglob("*short*"))
        assert f"accept their licence: do that at {url}/a/gated, and set HF_TOKEN" in gated
        assert sorted(str(f.relative_to(folder)) for f in Path(folder).rglob("*") if f.is_file()) == ["tokenizer/spiece.model", "transformer/config.json", "transformer/model-00001-of-00002.safetensors"]
        assert folder.endswith("/sub") and "have no unet\nWith it at hand, give --weights DIR" in part
        assert all(e.count("\n") == 1 for e in (none, short, gated, part))
        assert all(auth == "Bearer hf_secret" for _, where, _, auth in hub.asked if "a/" in where) and "hf_secret" not in said
        asked = len(hub.asked)
        again, _ = ask_hub(tmp_path, url, calls[:2] + calls[4:6], HF_TOKEN="hf_member")
        assert again[:2] == [whole, cut] and Path(again[2]).read_bytes() == b"w" and again[3] == folder
        assert not [w for method, w, *_ in hub.asked[asked:] if method == "GET" and "/resolve/" in w and "gated" not in w]       # no file twice
        asked = len(hub.asked)
        offline, _ = ask_hub(tmp_path, url, [*calls[:1], ("m", "a/b::none.safetensors"), calls[5], ("m", "new/repo::x/")], HF_HUB_OFFLINE="1")
        assert [offline[0], offline[2]] == [whole, folder] and "(HF_HUB_OFFLINE is set)\n" in offline[1] and "(HF_HUB_OFFLINE is set)\n" in offline[3] and len(hub.asked) == asked
    dead, _ = ask_hub(tmp_path, url, [("m", "a/b::w.safetensors"), ("m", "new/repo::", None, ["vae"])])
    assert dead[0] == whole and f"m wants {{vae}} of new/repo; it is not in {tmp_path / 'hub/hub'} and could not be downloaded ({url}: LocalEntryNotFoundError)\nWith it" in dead[1]


def test_without_the_hubs_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"m wants x/\{transformer,vae\} of a/b, and downloading needs: pip install huggingface_hub\nWith it at hand, give --weights DIR"):
        find_weights("m", "a/b::x/", parts=("transformer", "vae"))
