from common import *


def test_lora_starts_as_identity():
    base, tuned, _ = with_lora()
    assert torch.equal(tuned(*X), base(*X))
    assert all(v.eq(0).all() == k.endswith(".B") for k, v in lora_state(tuned).items())
    assert off(draw_b(tuned)(*X), base(*X)) > 1e-3


def test_merged_equals_unmerged_and_the_base_stays():
    base, tuned, names = with_lora(rank=4, alpha=6)
    before, y = hash_of(base.state_dict()), draw_b(tuned)(*X)
    merged = merge_lora(tuned)
    assert merged.state_dict().keys() == base.state_dict().keys() and not lora_state(merged)
    close(merged(*X), y, 1e-6)
    assert hash_of(base.state_dict()) == before
    shared = {k for k, v in merged.state_dict().items() if v.data_ptr() == base.state_dict()[k].data_ptr()}
    assert base.state_dict().keys() - shared == {f"{n}.weight" for n in names}


def test_merging_into_a_bf16_base_rounds_no_more_than_its_storage():
    """bf16 keeps 8 bits: what a weight loses is up to 8 % of a small delta, and a fraction of a percent of the output."""
    base, tuned, _ = with_lora()
    for net in (base, tuned):
        for m in net.modules():
            if not isinstance(m, LoRALinear):
                for p in m.parameters(recurse=False):
                    p.data = p.data.bfloat16()
    assert {v.dtype for v in lora_state(tuned).values()} == {torch.float32}
    x, t, y = X
    with torch.autocast("cpu", torch.bfloat16):
        unmerged = draw_b(tuned)(x.bfloat16(), t, y)
    layer = tuned.blocks[0].mlp.fc1
    delta, weight = layer.delta(), layer.base.weight.clone()
    merge_lora(tuned)
    with torch.autocast("cpu", torch.bfloat16):
        merged = tuned(x.bfloat16(), t, y)
    now = tuned.blocks[0].mlp.fc1.weight
    assert now.dtype == torch.bfloat16 and torch.equal(now, (weight.float() + delta).bfloat16())
    assert off(merged, unmerged) < 0.01


def test_lora_runs_on_a_bf16_base_without_autocast():
    layer = LoRALinear(nn.Linear(6, 5).bfloat16(), 2, 2)
    layer.B.data.normal_()
    x = torch.randn(3, 6).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16 and layer.A.dtype == torch.float32
    y.float().sum().backward()
    assert layer.A.grad.dtype == torch.float32 and layer.A.grad.ne(0).any() and layer.base.weight.grad is None


def test_lora_is_scaled_by_alpha_over_rank():
    delta = lambda rank, alpha: draw_b(with_lora(rank, alpha)[1]).blocks[0].attn.qkv
    layer = delta(4, None)
    assert layer.scale == 1
    for rank, alpha in ((4, 8), (4, 1), (2, 8)):
        layer = delta(rank, alpha)
        assert layer.scale == alpha / rank and layer.A.shape == (rank, 48) and layer.B.shape == (144, rank)
        close(layer.delta(), alpha / rank * (layer.B @ layer.A), 1e-6)
        x = torch.randn(2, 48)
        close(layer(x) - layer.base(x), alpha / rank * x @ layer.A.T @ layer.B.T, 1e-4)


def test_a_lora_of_diffusers_loads_at_its_strength_and_merges_to_the_same_weights():
    net, lora, run, out = flux_lora_case()
    close(run(net), out["base"])
    assert lora_from_peft(net, lora) == []
    assert net.single_blocks[0].linear1.scale == 2.0                 # alpha 8, rank 4 of each of its four parts
    close(run(net), out["with_alpha"])
    back, alphas = lora_to_peft(net)                                 # alpha kept, each part its own rank again
    assert set(alphas.values()) == {8.0} and all(torch.equal(lora[f"transformer.{k}"], v) for k, v in back.items())
    assert len(back) == sum(not k.endswith("alpha") for k in lora)
    merge_lora(net)
    close(run(net), out["with_alpha_merged"])
    merged = unmap_keys(net.state_dict(), TABLES[Flux]["diffusers"])
    for k in [k for k in out if k.startswith("merged.")]:
        close(merged[k.removeprefix("merged.")], out[k], 1e-6)
    net, lora, run, out = flux_lora_case()
    lora_from_peft(net, {k: v for k, v in lora.items() if not k.endswith("alpha")})
    close(run(net), out["without_alpha"])
    net, lora, run, out = flux_lora_case()
    lora_from_peft(net, {k: v / 2 if k.endswith("alpha") else v for k, v in lora.items()})
    close(run(net), out["with_alpha_scale_half"])


@pytest.mark.parametrize("name", TINIES)
def test_a_saved_lora_brings_its_embedder_and_head_and_draws_the_same(name, tmp_path):
    cfg = TINIES[name]
    base = scramble(FAMILIES[type(cfg)](cfg))
    deep = lambda: to_deep_model(base, to_deep_latent(cfg, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    tuned = deep()
    names = add_lora(tuned, 4, 6)
    assert len(names) == {"dit": 12, "flux": 2 * 8 + 2 * 2, "sana": 2 * 7}[name], names
    assert not any(re.search(r"mod|norm|img_in|txt_in|embedder|final|t_block", n) for n in names)
    assert torch.equal(run_of(tuned), run_of(merge_lora(tuned)))
    add_lora(tuned, 4, 6), draw_b(tuned)
    save_peft(tuned, tmp_path)
    again = deep()
    assert load_peft(again, tmp_path) == []
    close(run_of(again), run_of(tuned), 1e-6)
    assert {m.scale for m in again.modules() if isinstance(m, LoRALinear)} == {1.5}
    with pytest.raises(ValueError, match="already"):
        load_peft(again, tmp_path)
    with pytest.raises(ValueError, match="no LoRA"):
        save_peft(base, tmp_path / "other")


def test_a_lora_of_the_base_loads_onto_the_deep_model_without_what_is_bound_to_the_old_latent():
    base = scramble(Flux(TINY_FLUX))
    add_lora(base, 3, targets=r"img_in|final_layer\.linear|double_blocks\.0\.img_attn\.qkv|double_blocks\.1\.txt_mod\.lin|final_layer\.adaLN_modulation\.1"), draw_b(base)
    tensors, alphas = lora_to_peft(base)
    tensors = {k: v for k, v in tensors.items() if "to_k" not in k}  # trainers often leave some out
    deep = to_deep_model(scramble(Flux(TINY_FLUX)), to_deep_latent(TINY_FLUX, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    before = deep.double_blocks[0].img_attn.qkv.weight.clone()
    assert sorted(lora_from_peft(deep, {f"base_model.model.{k}": v for k, v in tensors.items()}, alphas)) == ["proj_out", "x_embedder"]
    assert isinstance(deep.final_layer.adaLN_modulation[1], LoRALinear)
    close(deep.final_layer.adaLN_modulation[1].delta(), base.final_layer.adaLN_modulation[1].delta(), 1e-6)        # its halves are swapped twice
    delta, want = deep.double_blocks[0].img_attn.qkv.delta(), base.double_blocks[0].img_attn.qkv.delta()
    close(delta[:48], want[:48], 1e-6), close(delta[96:], want[96:], 1e-6)
    assert not delta[48:96].any() and torch.equal(deep.double_blocks[0].img_attn.qkv.base.weight, before)
    fresh = scramble(Flux(TINY_FLUX))
    bad = {**tensors, "transformer_blocks.7.attn.to_q.lora_A.weight": torch.zeros(3, 48), "transformer_blocks.7.attn.to_q.lora_B.weight": torch.zeros(48, 3)}
    for wrong, said in ((bad, "transformer_blocks.7"), ({"transformer.x.diff": torch.zeros(1)}, "not a LoRA's tensor"),
                        ({k: v[..., :20] if "to_q.lora_A" in k else v for k, v in tensors.items()}, "another model")):
        with pytest.raises(ValueError, match=said):
            lora_from_peft(fresh, wrong)
    assert not any(isinstance(m, LoRALinear) for m in fresh.modules())      # all or nothing


def test_parts_of_different_strength_add_up_in_one_matrix():
    net = scramble(Flux(TINY_FLUX))
    g = torch.Generator().manual_seed(3)
    name = "transformer_blocks.0.attn.{}.lora_{}.weight"
    lora = {name.format(x, m): torch.randn(*((r, 48) if m == "A" else (48, r)), generator=g) for x, r in (("to_q", 2), ("to_v", 5)) for m in "AB"}
    lora_from_peft(net, lora | {"transformer_blocks.0.attn.to_v.alpha": torch.tensor(15.0)}, {})
    delta = net.double_blocks[0].img_attn.qkv.delta()
    for part, x, scale in ((slice(0, 48), "to_q", 1), (slice(96, 144), "to_v", 3)):
        close(delta[part], scale * lora[name.format(x, "B")] @ lora[name.format(x, "A")], 1e-5)


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_stock_diffusers_loads_a_saved_lora_at_its_strength(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    net = tiny_of(name)
    export_diffusers(net, tmp_path)
    add_lora(net, 4, 10), draw_b(net)
    save_peft(net, tmp_path / "lora")
    pipeline = diffusers.FluxPipeline if name == "flux" else diffusers.SanaPipeline
    cls = diffusers.FluxTransformer2DModel if name == "flux" else diffusers.SanaTransformer2DModel
    theirs = cls.from_pretrained(tmp_path, subfolder="transformer")
    parts = dict(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=theirs)
    pipe = pipeline(**parts, text_encoder_2=None, tokenizer_2=None) if name == "flux" else pipeline(**parts)
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    merged = unmap_keys(merge_lora(net).state_dict(), TABLES[type(net)]["diffusers"])
    fused = theirs.state_dict()
    assert fused.keys() == merged.keys()
    for k, v in merged.items():
        close(fused[k], v, 1e-5)


def test_lora_on_a_pointwise_convolution_and_no_other():
    net = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 3, padding=1)).requires_grad_(False)
    x = torch.randn(2, 3, 6, 7)
    add_lora(net, 2, 3, targets="0")
    before = net(x)
    draw_b(net)
    y = net(x)
    assert off(y, before) > 1e-3
    close(merge_lora(net)(x), y, 1e-6)
    for bad in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, stride=2)):
        net = nn.Sequential(nn.Linear(4, 4), bad)
        with pytest.raises(ValueError, match="plain 1x1 convolutions"):
            add_lora(net, 2, targets=r"\d")
        assert not lora_state(net)                                   # refused as a whole


def test_lora_is_refused_twice_and_nowhere():
    _, tuned, _ = with_lora()
    with pytest.raises(ValueError, match="carries a LoRA already"):
        add_lora(tuned, 2)
    add_lora(merge_lora(tuned), 2)                                   # after merging there is room for the next
    with pytest.raises(ValueError, match="no layer is called 'transformer"):
        add_lora(DiT(TINY_DIT), targets="transformer.*")


def test_lora_adapts_attention_and_mlp_of_the_trunk_only():
    _, tuned, names = with_lora()
    assert names == [f"blocks.{i}.{n}" for i in range(3) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert [k for k, p in tuned.named_parameters() if p.requires_grad] == [f"{n}.{m}" for n in names for m in "AB"]
