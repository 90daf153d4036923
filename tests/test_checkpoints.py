from common import *


@pytest.mark.parametrize("name", TINIES)
def test_an_exported_model_loads_again_with_or_without_its_configuration(name, tmp_path):
    net = tiny_of(name)
    export_diffusers(net, tmp_path, shard_bytes=100_000)
    folder = tmp_path / "transformer"
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    for place in (tmp_path, folder, folder / "diffusion_pytorch_model.safetensors.index.json"):
        assert hash_of(build(net.cfg, place).state_dict()) == hash_of(net.state_dict()), place
    found = build(None, tmp_path).cfg                                # config.json knows the heads and axes
    keys = ("hidden_size", "depth", "num_heads") + (("axes_dim", "depth_single") if name == "flux" else ("in_channels", "patch_size"))
    assert all(getattr(found, k) == getattr(net.cfg, k) for k in keys)
    with pytest.raises(ValueError, match="holds a model already"):
        export_diffusers(net, tmp_path)
    with pytest.raises(ValueError, match="merge"):
        export_diffusers(merge_lora(net) if not add_lora(net, 2) else net, tmp_path / "lora")


@pytest.mark.parametrize("channels, patch", [(4, 2), (12, 1)])
@pytest.mark.parametrize("name", TINIES)
def test_stock_diffusers_loads_an_exported_model_with_equal_outputs(name, channels, patch, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    cfg = replace(TINIES[name], in_channels=channels, patch_size=patch)
    net = scramble(FAMILIES[type(cfg)](cfg))
    export_diffusers(net, tmp_path, shard_bytes=200_000)
    cls = {"dit": diffusers.DiTTransformer2DModel, "flux": diffusers.FluxTransformer2DModel, "sana": diffusers.SanaTransformer2DModel}[name]
    theirs, said = cls.from_pretrained(tmp_path, subfolder="transformer", output_loading_info=True)
    assert not any(said[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x, clock, cond = torch.randn(2, channels, 8, 8), torch.tensor([0.25, 0.875]), condition_of(cfg)
    if name == "flux":
        n = 8 // patch
        ids = torch.stack([torch.zeros(n, n), *torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")], dim=-1).view(-1, 3)
        want = net.unpatchify(theirs(net.patchify(x), cond.tokens, cond.pooled, clock, ids, torch.zeros(5, 3), cond.guidance).sample, (8, 8))
    elif name == "sana":
        clock = 1000 * clock
        want = theirs(x, cond.tokens, clock, encoder_attention_mask=cond.mask).sample
    else:
        clock = torch.tensor([250, 875])                             # diffusers' DiT wants whole steps
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0       # 128, as trained
        want = theirs(x, timestep=clock, class_labels=cond).sample
    close(net.forward_native(x, clock, cond), want, 2e-5 if name == "sana" else 1e-5)      # SANA: the epsilon of cross-attention


@pytest.mark.parametrize("cfg", [TINY_KL, replace(TINY_KL, quant_conv=True), *STYLES.values()], ids=lambda c: c.name)
def test_stock_diffusers_loads_an_exported_autoencoder_with_equal_outputs(cfg, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    cfg = replace(cfg, scale=0.61)
    ae = scramble(ae_class(cfg)(cfg))
    export_autoencoder(ae, tmp_path)
    theirs, said = (diffusers.AutoencoderKL if isinstance(cfg, KLConfig) else diffusers.AutoencoderDC).from_pretrained(tmp_path, subfolder="vae", output_loading_info=True)
    assert not any(said[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.scaling_factor == 0.61
    x, z = torch.randn(1, 3, 4 * cfg.f, 2 * cfg.f), torch.randn(1, cfg.channels, 2, 3)
    latent = theirs.encode(x).latent_dist.mean if isinstance(cfg, KLConfig) else theirs.encode(x).latent
    close(ae.moments(x)[0], latent), close(ae.decode_raw(z), theirs.decode(z).sample)
    # and back: the folder's config.json is believed, the scale above all
    monkeypatch.setitem(AUTOENCODERS, cfg.name, replace(cfg, scale=99.0))
    monkeypatch.setattr(checkpoints, "find_weights", lambda name, spec, path: Path(path))
    again = load_autoencoder(cfg.name, tmp_path)
    assert diffusers_ae_config(again.cfg) == diffusers_ae_config(cfg)
    assert all(torch.equal(v, ae.state_dict()[k]) for k, v in again.state_dict().items())


def test_the_scale_of_a_folder_is_the_one_in_its_config_and_a_foreign_folder_is_refused(tmp_path, monkeypatch):
    """The DC-Gen releases state their scaling factor in vae/config.json, and nowhere else for certain."""
    monkeypatch.setattr(checkpoints, "find_weights", lambda name, spec, path: Path(path))
    cfg = replace(STYLES["in"], scale=0.25)
    monkeypatch.setitem(AUTOENCODERS, "preset", replace(cfg, name="preset"))
    ae = scramble(DCAE(cfg))
    export_autoencoder(ae, tmp_path)
    file = tmp_path / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.7}))
    got = load_autoencoder("preset", tmp_path)
    x = torch.randn(1, 3, 16, 16)
    close(got.encode(x), 0.7 * ae.moments(x)[0], 1e-6), close(got.decode(got.encode(x)), ae.decode_raw(ae.moments(x)[0]), 1e-4)
    for other, said in ((replace(cfg, channels=16), "f8c8, and preset is f8c16"), (TINY_KL, "AutoencoderDC, and")):
        monkeypatch.setitem(AUTOENCODERS, "preset", replace(other, name="preset"))
        with pytest.raises(ValueError, match=said):
            load_autoencoder("preset", tmp_path)


def test_checkpoints_of_the_authors_trainer_load(tmp_path):
    net = tiny_of("flux")
    theirs = {f"0.{k}": v for k, v in unmap_keys(net.state_dict(), TABLES[Flux]["diffusers"]).items()}
    other = {k: v + 1 for k, v in theirs.items()}
    for i, saved in enumerate(({"model_state_dict": theirs, "step": 3}, {"model_state_dict": other, "ema_model_state_dict": {0.9: other, 0.999: theirs}},
                               {"model_state_dict": other, "ema": {"0.999": theirs}, "optimizer_state_dict": {"state": {}}}, {"model_state_dict": theirs, "ema_model_state_dict": {}})):
        torch.save(saved, tmp_path / f"{i}.pt")
        assert hash_of(build(net.cfg, tmp_path / f"{i}.pt").state_dict()) == hash_of(net.state_dict()), i
    torch.save({"state_dict": sana_original(tiny_of("sana")), "epoch": 1}, tmp_path / "sana.pth")
    assert hash_of(build(TINY_SANA, tmp_path / "sana.pth").state_dict()) == hash_of(tiny_of("sana").state_dict())


def test_a_file_of_another_model_is_one_error_that_says_what_it_is_and_what_fits(tmp_path, monkeypatch):
    flux, sana = tiny_of("flux"), tiny_of("sana")
    monkeypatch.setitem(BASES, "fits", TINY_SANA)
    write_tensors(tmp_path / "sana.safetensors", sana_original(sana))
    write_tensors(tmp_path / "flux.safetensors", flux.state_dict())
    write_tensors(tmp_path / "ae.safetensors", scramble(KLVAE(TINY_KL)).state_dict())
    deep = to_deep_latent(TINY_FLUX, AUTOENCODERS["tiny-dc-ae-f32c32"])
    for cfg, file, said in ((TINY_FLUX, "sana", ("a Sana with", "a Flux of another", "the preset that fits them is fits")), (replace(TINY_SANA, depth=3), "sana", ("depth 2 (not 3)", "fits")),
                            (deep, "flux", ("token_channels 16 (not 32)", "no preset fits")), (TINY_DIT, "flux", ("a Flux with hidden_size 48",)),
                            (TINY_FLUX, "ae", ("not the weights of a DiT, FLUX or SANA", "--ae-weights"))):
        with pytest.raises(ValueError) as e:
            build(cfg, tmp_path / f"{file}.safetensors")
        assert f"{file}.safetensors" in str(e.value) and all(part in str(e.value) for part in said) and "\n" not in str(e.value), str(e.value)
    broken = flux.state_dict()
    broken.pop("double_blocks.1.txt_attn.norm.key_norm.scale")
    write_tensors(tmp_path / "part.safetensors", broken)
    with pytest.raises(ValueError, match="1 missing: double_blocks.1.txt_attn.norm.key_norm.scale"):
        build(TINY_FLUX, tmp_path / "part.safetensors")
    broken.pop("img_in.weight")
    write_tensors(tmp_path / "part.safetensors", broken)
    with pytest.raises(ValueError, match="img_in.weight is missing, and every Flux has it"):
        build(TINY_FLUX, tmp_path / "part.safetensors")
    monkeypatch.delitem(BASES, "fits")
    with pytest.raises(ValueError, match="64 does not divide into 20 heads"):        # nothing states them: a default, checked
        build(None, tmp_path / "sana.safetensors")


def test_an_index_that_points_elsewhere_or_is_incomplete_is_one_clear_error(tmp_path):
    net = tiny_of("flux")
    export_diffusers(net, tmp_path, shard_bytes=100_000)
    folder, name = tmp_path / "transformer", "diffusion_pytorch_model.safetensors.index.json"
    good = (folder / name).read_text()
    shard = sorted(set(json.loads(good)["weight_map"].values()))[0]
    (tmp_path / shard).write_bytes((folder / shard).read_bytes())    # the bait exists
    for bait in (f"../{shard}", str(tmp_path / shard), f"..\\\\{shard}", f"C:{shard}", f"./{shard}", "config.json", ".hidden.safetensors"):
        (folder / name).write_text(good.replace(f'"{shard}"', f'"{bait}"', 1))
        with pytest.raises(ValueError, match="beside the index"):
            read_tensors(folder)
    for text in ("{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{}"):
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match="not an index"):
            read_tensors(folder)
    (folder / name).write_text(good)
    whole = (folder / shard).read_bytes()
    for content, said in ((whole[: len(whole) // 2], "not a whole safetensors"), (b"version https://git-lfs.github.com/spec/v1\nsize 5\n", "git lfs pull"), (b"", "not a whole")):
        (folder / shard).write_bytes(content)
        with pytest.raises(ValueError, match=said) as e:
            build(TINY_FLUX, tmp_path)
        assert shard in str(e.value) and "\n" not in str(e.value)
    (folder / shard).unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of the .* shards.*{shard}"):
        build(TINY_FLUX, tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no weights"):
        build(TINY_FLUX, tmp_path / "none")
    (folder / shard).write_bytes(whole)
    with pytest.raises(ValueError, match="one part of several"):
        build(TINY_FLUX, folder / shard)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        build(TINY_FLUX, tmp_path)


def test_what_is_loaded_as_it_is_stays_the_files_own_memory(tmp_path):
    """Twelve billion weights must not be in memory twice."""
    net = tiny_of("flux").bfloat16()
    write_tensors(tmp_path / "w.safetensors", net.state_dict())
    before = (tmp_path / "w.safetensors").read_bytes()
    with open("/proc/self/maps" if Path("/proc/self/maps").exists() else os.devnull) as maps:
        loaded = build(TINY_FLUX, tmp_path / "w.safetensors", dtype=None)
        spans = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps if "w.safetensors" in line]
    if Path("/proc/self/maps").exists():
        assert all(any(a <= v.data_ptr() < b for a, b in spans) for v in loaded.state_dict().values())
    assert hash_of(loaded.state_dict()) == hash_of(net.state_dict())
    loaded.img_in.weight.zero_()                                     # the map is private
    assert (tmp_path / "w.safetensors").read_bytes() == before
    assert {v.dtype for v in build(TINY_FLUX, tmp_path / "w.safetensors", torch.float32).state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("schedule", ["flowmatch", "flux2"])
def test_a_dc_gen_pipeline_folder_draws_what_the_authors_pipeline_draws(schedule, tmp_path, monkeypatch):
    """Transformer and autoencoder from one diffusers folder, each with its config.json; the sampler's noise levels as stored."""
    config, weights, x, out = fixture("dcgen_pipeline")
    for part, name in (("transformer", "FluxTransformer2DModel"), ("vae", "AutoencoderDC")):
        write_tensors(tmp_path / part / "diffusion_pytorch_model.safetensors", {k[len(part) + 1 :]: v for k, v in weights.items() if k.startswith(part)})
        (tmp_path / part / "config.json").write_text(json.dumps({**config[part], "_class_name": name}))
    monkeypatch.setattr(checkpoints, "find_weights", lambda name, spec, path: Path(path))
    monkeypatch.setitem(AUTOENCODERS, "any", DCAEConfig("any", 8, scale=None, widths=(8, 8, 16, 32)))
    net, ae = build(None, tmp_path), load_autoencoder("any", tmp_path)
    text = Text(x["prompt_embeds"], None, x["pooled_prompt_embeds"], torch.full((2,), config["guidance_scale"]))
    states, times = [], (1 - out[f"{schedule}_sigmas"].double()).tolist()
    with torch.no_grad():
        for i in range(len(times) - 1):
            states.append(integrate(lambda x, t: net(x, t, text), states[-1] if states else x["noise"], times[i : i + 2]))
        close(torch.stack([net.patchify(z) for z in states]), out[f"{schedule}_steps"], 1e-4)
        close((ae.decode(states[-1]) / 2 + 0.5).clamp(0, 1), out[f"{schedule}_image"], 1e-4)


def test_weights_with_an_odd_header_load(tmp_path):
    """Writers that do not pad their header leave the tensors at odd addresses."""
    values = torch.arange(6, dtype=torch.float32)
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "none": {"dtype": "F32", "shape": [0], "data_offsets": [24, 24]}}).encode()
    for pad in range(4):
        padded = header + b" " * pad
        (tmp_path / "odd.safetensors").write_bytes(len(padded).to_bytes(8, "little") + padded + values.numpy().tobytes())
        got = read_tensors(tmp_path / "odd.safetensors")
        assert torch.equal(got["a"], values.view(2, 3)) and got["none"].shape == (0,)
