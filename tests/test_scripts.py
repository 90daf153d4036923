from common import *


def test_align_writes_a_whole_run(aligned):
    run = aligned / "runs/align-tiny-1"
    assert {"config.json", "model.safetensors", "metrics.jsonl", "samples.png", "gap.png", "curves.png"} <= {p.name for p in run.iterdir()}
    model, info = checkpoints.load_run(run)
    assert info["kind"] == "align" and model.cfg.ae == "tiny-dc-ae-f32c32" and model.cfg.patch_size == 1
    assert set(read_tensors(run / "model.safetensors")) == {"x_embedder.proj.weight", "x_embedder.proj.bias", "final_layer.linear.weight", "final_layer.linear.bias",
                                                            "final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"}
    assert info["stages"][1]["gap"] > info["stages"][2]["gap"]                   # stage 1 closes the gap


@pytest.mark.parametrize("flags, kind", [([], "finetune"), (["--tune", "full"], "finetune"), (["--init", "base"], "noalign"), (["--init", "scratch"], "scratch")])
def test_finetune_trains_saves_and_draws(aligned, monkeypatch, flags, kind):
    monkeypatch.chdir(aligned)
    out = Path("runs") / f"{kind}-{len(flags)}-{flags[-1:] or ['lora']}"
    finetune.main([*flags, "--pictures", "64", "--train-steps", "2", "--batch", "8", "--out", str(out), "--device", "cpu", "--dtype", "fp32"])
    model, info = checkpoints.load_run(out)
    assert (out / "samples.png").exists() and info["kind"] == kind
    keys = set(read_tensors(out / "model.safetensors"))
    if flags in ([], ["--init", "base"]):
        assert any(k.endswith("attn.qkv.A") for k in keys) and "x_embedder.proj.weight" in keys and not any(k.endswith("qkv.weight") for k in keys)
        x, y = torch.randn(2, 32, 4, 4), torch.tensor([1, 2])
        before = model(x, torch.tensor([0.3, 0.6]), y)
        assert_close(lora.merge_lora(model)(x, torch.tensor([0.3, 0.6]), y), before, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="holds a finished run"):
        finetune.main([*flags, "--out", str(out)])


def test_alignment_in_closed_form_alone_is_a_run_too(aligned, monkeypatch, capsys):
    monkeypatch.chdir(aligned)
    align.main(["--pictures", "64", "--head-samples", "64", "--stage2-steps", "0", "--count", "0", "--out", "runs/closed", "--device", "cpu", "--dtype", "fp32"])
    said = capsys.readouterr().out
    assert "samples.png, gap.png)" in said and not Path("runs/closed/curves.png").exists()
    assert [row["stage"] for row in checkpoints.load_run("runs/closed")[1]["stages"]] == ["base", "not aligned", "stage 1: embedder", "head in closed form"]


def test_the_numbers_of_the_optimiser_are_flags(aligned, monkeypatch):
    monkeypatch.chdir(aligned)
    group = lambda file: torch.load(file, weights_only=True)["optimizer"]["param_groups"][0]
    same = ["--pictures", "64", "--betas", "0.8", "0.95", "--device", "cpu", "--dtype", "fp32"]
    finetune.main([*same, "--train-steps", "1", "--batch", "8", "--warmup", "4", "--out", "runs/f"])
    assert tuple(group("runs/f/train.train")["betas"]) == (0.8, 0.95) and group("runs/f/train.train")["lr"] == pytest.approx(1e-3 / 4)
    align.main([*same, "--solver", "adamw", "--stage1-steps", "1", "--stage2-steps", "1", "--batch", "8", "--batch1", "16", "--lr2", "4e-3", "--warmup", "8", "--count", "0", "--out", "runs/a"])
    assert tuple(group("runs/a/stage1.train")["betas"]) == tuple(group("runs/a/stage2.train")["betas"]) == (0.8, 0.95)
    assert group("runs/a/stage1.train")["lr"] == 1e-2 and group("runs/a/stage2.train")["lr"] == pytest.approx(4e-3 / 8)


def test_a_run_carries_on_what_the_run_before_it_had_trained(aligned, monkeypatch):
    """Alignment has moved the final modulation, which no base has; then LoRA on top, merged, and a second LoRA."""
    monkeypatch.chdir(aligned)
    flags = ["--pictures", "64", "--train-steps", "2", "--batch", "8", "--lr", "1e-2", "--ema", "0", "--device", "cpu", "--dtype", "fp32"]
    finetune.main(["--init", "runs/align-tiny-1", "--no-final-adaln", "--out", "runs/carry-1", *flags])
    before, after = (read_tensors(f"runs/{r}/model.safetensors") for r in ("align-tiny-1", "carry-1"))
    key = "final_layer.adaLN_modulation.1.weight"
    assert torch.equal(before[key], after[key])
    with pytest.raises(ValueError, match="--merge"):
        finetune.main(["--init", "runs/carry-1", "--rank", "4", "--out", "runs/carry-2", *flags])
    finetune.main(["--init", "runs/carry-1", "--merge", "--rank", "4", "--out", "runs/carry-2", *flags])
    first, second = (checkpoints.load_run(f"runs/{r}")[0] for r in ("carry-1", "carry-2"))
    trunk = first.blocks[0].attn.qkv
    assert_close(second.blocks[0].attn.qkv.base.weight, trunk.base.weight + trunk.delta())
    assert second.blocks[0].attn.qkv.A.shape[0] == 4


def test_a_finished_run_is_the_next_base(words_base, tmp_path):
    """f8 to f32, LoRA, and from there on to another latent space: the trunk is the merged one, and the chain loads by itself."""
    align_job(tmp_path, "runs/align")
    finetune_job(tmp_path, "runs/tuned", "--lora-ramp", "2", "--layer-rates", "3", "--sample-every", "2")
    rows = [json.loads(line) for line in Path("runs/tuned/metrics.jsonl").read_text().splitlines()]
    assert "val_loss_ema" in rows[-1] and "val_t0.06" in rows[0] and {"samples_000000.png", "samples_000002.png", "samples_000003.png", "guidance.png"} <= {p.name for p in Path("runs/tuned").iterdir()}
    from PIL import Image
    assert Image.open("runs/tuned/samples_000003.png").height > 66 + Image.open("runs/tuned/samples_000000.png").height - 1      # raw and average
    flags = [f if f != "test-words" else "runs/tuned" for f in WORDS]
    align.main([*flags, "--ae", "tiny-kl-f8c4", "--stage2-steps", "1", "--head-samples", "16", "--count", "0", "--pos-step", "2", "--out", "runs/next"])
    net, info = load_run("runs/next")
    merged = merge_lora(load_run("runs/tuned")[0])
    assert info["base"] == "runs/tuned" and net.cfg.ae == "tiny-kl-f8c4" and net.cfg.pos_step == 2.0 and checkpoints.preset_of("runs/tuned") == "test-words"
    assert_close(net.double_blocks[0].img_attn.qkv.weight, merged.double_blocks[0].img_attn.qkv.weight)
    with pytest.raises(ValueError, match="--ae tiny-dc-ae-f32c32: the base is on it already; .*finetune.py --init runs/tuned"):
        align.main([*flags, "--out", "runs/x"])


@pytest.mark.parametrize("script, flags", [(align, []), (align, ["--solver", "adamw", "--stage1-steps", "0"]), (finetune, ["--init", "base", "--rank", "4", "--lora-ramp", "9"])])
def test_a_dry_run_measures_and_leaves_a_note(script, flags, words_base, capsys):
    before = {p for p in Path().rglob("*")}
    script.main([*WORDS, *flags, "--dry-run"])
    said, left = capsys.readouterr().out, {str(p) for p in Path().rglob("*") if p not in before}
    note = f"runs/dry-run-{'align' if script is align else 'noalign'}-test-words.txt"
    assert left == {"runs", note} and Path(note).read_text() in said
    for what in ("parameters", "gradients", "a step", "with 8 pictures", "a save", "8 pictures", "peak memory"):
        assert what in said


def test_sample_draws_from_the_newest_run_and_evaluate_scores_it(aligned, monkeypatch, capsys):
    monkeypatch.chdir(aligned)
    sample.main(["--count", "2", "--num-steps", "2", "--ckpt", "runs/align-tiny-1", "--device", "cpu"])
    assert len(list(Path("runs/align-tiny-1/samples").glob("*.png"))) == 2 and Path("runs/align-tiny-1/samples-grid.png").exists()
    evaluate.main(["runs/align-tiny-1", "--count", "16", "--num-steps", "2", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "align-tiny-1" in said and "N 16" in said and Path("runs/evaluate.json").exists()


def test_a_class_models_data_set_is_folders_that_it_learns_from(tiny, capsys):
    sample.main(["--base", "test", "--classes", "7", "2", "--count", "42", "--num-steps", "1", "--cfg-scale", "1", "--dataset", "--out", "drawn", "--device", "cpu", "--dtype", "fp32"])
    source = ImageFolder("drawn", 64)
    assert {p.parent.name for p in source.files} == {"0002", "0007"} and sorted(source.labels.unique().tolist()) == [2, 7]
    entry = json.loads(Path("drawn/metadata.jsonl").read_text().splitlines()[1])
    assert entry["file_name"] == "0002/00001_seed1.png" and entry["text"] == SHAPES[2]
    align.main(["--base", "test", "--images", "drawn", "--ae", "tiny-dc-ae-f32c32", "--out", "run", "--stage2-steps", "1", "--batch", "8", "--head-samples", "16", "--count", "0", "--device", "cpu", "--dtype", "fp32"])
    assert Path("run/model.safetensors").is_file() and "note:" not in capsys.readouterr().out
    Path("drawn/0002").rename("drawn/triangle")
    align.main(["--base", "test", "--images", "drawn", "--ae", "tiny-dc-ae-f32c32", "--dry-run", "--device", "cpu", "--dtype", "fp32"])
    assert "note: drawn has 2 class folders, the model 8 classes: they are taken for its first ones, in alphabetical order; if they are others, name every folder by the number" in capsys.readouterr().out


def test_finetune_without_an_alignment_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="python align.py --base tiny"):
        finetune.main([])


def test_kill_9_and_resume_give_the_losses_of_an_unbroken_run(aligned, tmp_path):
    """The real script, the real signal: killed in mid-run, started again with --resume."""
    import os, signal, subprocess, sys, time
    flags = ["--init", "base", "--pictures", "64", "--train-steps", "14", "--batch", "8", "--save-every", "4", "--device", "cpu", "--dtype", "fp32"]
    call = lambda out, *more: [sys.executable, str(HERE / "finetune.py"), *flags, "--out", str(tmp_path / out), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(call("straight"), cwd=aligned, env=env, check=True, capture_output=True)
    victim = subprocess.Popen(call("killed"), cwd=aligned, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if (tmp_path / "killed/train.train").exists() or victim.poll() is not None:
            break
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "killed/model.safetensors").exists(), "it finished before it was killed"
    subprocess.run(call("killed", "--resume"), cwd=aligned, env=env, check=True, capture_output=True)
    read = lambda out: [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
    last = lambda out: [r for r in read(out) if r["step"] == 14]
    assert last("straight") == last("killed")
    a, b = (read_tensors(tmp_path / out / "model.safetensors") for out in ("straight", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a)
