from common import *


@pytest.mark.parametrize("name, how", [("dit", "ddp"), ("dit", "fsdp"), ("flux", "fsdp")])
def test_two_processes_give_the_run_of_one_and_either_goes_on_with_the_other(tmp_path, name, how):
    """Losses, gradient norms and validation losses of eight steps, to rounding: of one process in two parts, of two processes,
    and of either resuming the other at step 4."""
    one, weights, *_ = job(tmp_path / "one", name, None, 8, accumulate=2)
    job(tmp_path / "first", name, None, 4, accumulate=2)

    (two, ended, seen, wrote, second), (_, _, others, wrote_too, _) = together(two_jobs, tmp_path, name, how)
    then = job(tmp_path / "then", name, None, 8)[0]
    for log in (two, second, then):
        np.testing.assert_allclose(np.concatenate([*numbers([r for r in log if r["step"] >= 5])]), np.concatenate([*numbers([r for r in one if r["step"] >= 5])]), rtol=2e-4, atol=1e-6)
    for k in weights:
        np.testing.assert_allclose(weights[k], ended[k], atol=2e-5, err_msg=k)
    assert len([*(tmp_path / "two").glob("*.train")]) == len([*(tmp_path / "then").glob("*.train")]) == 1               # older ones are gone
    # steps 4 to 7: each process its part of the batch, with noise of its own
    assert len(seen) == len(others) == 4 and not {g for _, g in seen} & {g for _, g in others}
    assert [a + b for (a, _), (b, _) in zip(seen, others)] == [order(step, 8, 48, 0).tolist() for step in range(4, 8)]
    assert wrote and all(f.startswith("__1_") for f in wrote_too) and bool(wrote_too) == (how == "fsdp"), wrote_too      # its own share at most


def test_a_row_of_the_log_that_was_being_made_is_of_all_processes_and_goes_on(tmp_path):
    one = job(tmp_path / "one", "dit", None, 8, accumulate=2, log_every=3)[0]
    for log in together(broken_job, tmp_path / "two")[:1]:
        np.testing.assert_allclose(np.concatenate([*numbers(log)]), np.concatenate([*numbers(one)]), rtol=2e-4, atol=1e-6)


def test_the_scripts_in_two_processes_write_what_one_writes(words_base, tmp_path):
    """Alignment in closed form and by steps, then LoRA, with the guided loss: the same validation losses, one set of files."""
    read = lambda out: [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    same = lambda a, b: [pytest.approx(r["val_loss"], rel=2e-3) for r in read(a) if "val_loss" in r] == [r["val_loss"] for r in read(b) if "val_loss" in r]
    align_job(tmp_path, "runs/align"), together(align_job, tmp_path, "runs/two")
    assert same("runs/align", "runs/two") and {f.name for f in Path("runs/align").iterdir()} - {f.name for f in Path("runs/two").iterdir()} == set()
    finetune_job(tmp_path, "runs/tuned", "--accumulate", "2")
    together(finetune_job, tmp_path, "runs/shares", "--parallel", "fsdp")
    assert same("runs/tuned", "runs/shares") and Path("runs/shares/guidance.png").is_file()
    a, b = (read_tensors(f"runs/{k}/ema.safetensors") for k in ("tuned", "shares"))
    assert a.keys() == b.keys() and all(off(a[k], b[k]) < 0.02 for k in a)


def test_activation_checkpointing_changes_no_gradient():
    for name in TINIES:
        grads = []
        for recompute in (False, True):
            net = scramble(FAMILIES[type(TINIES[name])](TINIES[name]))
            names = [k for k, _ in net.named_parameters()]
            now = train.settle(net, names, "cpu", recompute=recompute)
            z, cond = torch.randn(2, net.cfg.in_channels, 8, 8, generator=torch.Generator().manual_seed(0)), condition_of(net.cfg)
            flow_matching_loss(net, z, torch.tensor([0.2, 0.7]), cond, torch.zeros_like(z))[0].mean().backward()
            grads.append({k: now[k].grad for k in names})
        assert sum(g is not None for g in grads[0].values()) > len(names) // 2
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*(g.values() for g in grads))), name


def test_a_big_model_is_frozen_in_bf16_and_learns_in_float32():
    net = scramble(FAMILIES[FluxConfig](TINY_FLUX)).bfloat16()
    add_lora(net, rank=2)
    trained = [k for k, _ in finetune.trainable(net, "lora")]
    for k, p in train.settle(net, trained, "cpu", torch.bfloat16).items():
        inside = "_blocks." in k and k not in trained
        assert p.dtype == (torch.bfloat16 if inside else torch.float32) and p.requires_grad == (k in trained), k
