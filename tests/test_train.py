"""train.py: the loop, its state, ranks, memory and runs; align.py's objective."""

import json
import math
import os
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

import align
import finetune
from align import Objective, flow_matching_loss, next_autoencoder
from checkpoints import read_config, read_tensors
from helpers import (  # noqa: F401
    ROOT, TINIES, TINY_FLUX, fresh_compiler, random_condition, scramble, tiny_model)
from lora import add_lora
from model import BASES, FAMILIES, Flux, Text
from train import (
    EMA, Plan, Run, checkpoint_blocks, compile_blocks, decay_groups, is_finished, named_parameters_with,
    open_run, planned, prepare_for_training, train, write_run)
from training import FLOW, SHORT, run_train, small_pair

STATE = "train.state.safetensors"


def without_speed(log):
    return [{key: value for key, value in row.items() if key != "images_per_s"} for row in log]


def assert_equal_weights(a, b):
    for (key, v), (_, w) in zip(a.state_dict().items(), b.state_dict().items()):
        assert torch.equal(v, w), key


def fails_at(call, error):
    """A wrapper for run_train: the loss raises `error` at its n-th call."""
    def wrap(flow, model):
        calls = []

        def loss(indices, generator):
            calls.append(1)
            if len(calls) == call:
                raise error
            return flow(indices, generator)

        return loss
    return wrap


# ---- the loop ------------------------------------------------------------------------------------

@pytest.mark.parametrize("plan, step, expected", [
    (Plan(100, 1.0, 8), 50, 1.0),
    (Plan(100, 1.0, 8, warmup=10), 0, 0.1),
    (Plan(100, 1.0, 8, warmup=10), 9, 1.0),
    (Plan(100, 1.0, 8, schedule="cosine"), 50, 0.5),
    (Plan(100, 1.0, 8, schedule="linear"), 75, 0.25),
])
def test_the_learning_rate_follows_the_plan(plan, step, expected):
    assert plan.lr_at(step) == pytest.approx(expected)


def test_a_plan_takes_the_flags_that_are_given_and_fills_the_others():
    plan = Plan(10, 1.0, 8, clip=1.0, ema=0.9)
    flags = Namespace(train_steps=3, lr=None, clip=0.0)
    assert planned(plan, flags, steps="train_steps", lr="lr", clip="clip") == replace(plan, steps=3, clip=0.0)
    assert vars(flags) == dict(train_steps=3, lr=1.0, clip=0.0)


def test_weight_decay_spares_norms_biases_and_embeddings():
    base, *_ = small_pair()
    names = {id(p): name for name, p in base.named_parameters()}
    spared = {True: set(), False: set()}
    for group in decay_groups(list(base.named_parameters()), 0.1):
        spared[group["weight_decay"] == 0] |= {names[id(p)] for p in group["params"]}
    assert {name.split(".")[-1] for name in spared[False]} == {"weight"}
    assert spared[True] == {name for name in names.values() if "bias" in name or "embedding_table" in name}


def test_hooks_scale_the_rate_by_name_and_see_every_step(tmp_path):
    _, start, z, _, y = small_pair()
    _, model, *_ = small_pair()
    steps = []

    def loss(indices, generator):
        return FLOW.train_loss(model, z[indices], y[indices], generator)

    def half_for_the_embedder(name):
        return 0.5 if name.startswith(model.EMBEDDER) else 1.0

    named = named_parameters_with(model, (model.EMBEDDER, model.HEAD))
    train(Run(tmp_path), "train", model, named, loss, 48, replace(SHORT, steps=1), on_step=steps.append,
          lr_scale=half_for_the_embedder)
    moved = {key: (model.state_dict()[key] - start.state_dict()[key]).abs().max().item() for key, _ in named}
    assert steps == [0]                                              # AdamW's first step is the learning rate
    assert moved["x_embedder.proj.weight"] == pytest.approx(0.5e-3, rel=1e-2)
    assert moved["final_layer.linear.weight"] == pytest.approx(1e-3, rel=1e-2)


def test_accumulated_gradients_equal_the_big_batch(tmp_path):
    """The same eight samples, with the same noise, in one pass or in parts whose sizes differ."""
    sizes = []

    def fixed_noise(flow, model):
        _, _, z_dc, _, y = small_pair()
        x0 = torch.randn(z_dc.shape, generator=torch.Generator().manual_seed(3))

        def loss(indices, generator):
            sizes.append(len(indices))
            t = torch.full((len(indices),), 0.4)
            return flow_matching_loss(model, z_dc[indices], t, y[indices], x0[indices])[0].mean(), {}

        return loss

    one, *_ = run_train(tmp_path / "a", steps=3, wrap=fixed_noise)
    parts, *_ = run_train(tmp_path / "b", steps=3, wrap=fixed_noise, accumulate=3)
    assert sizes == [8] * 3 + [3, 3, 2] * 3
    for v, w in zip(one.state_dict().values(), parts.state_dict().values()):
        assert_close(v, w, atol=2e-6, rtol=1e-5)


def poison(calls):
    """A wrapper for run_train: the loss is not a number at these calls."""
    def wrap(flow, model):
        count = []

        def loss(indices, generator):
            count.append(1)
            value, metrics = flow(indices, generator)
            return value * (math.nan if len(count) in calls else 1.0), metrics

        return loss
    return wrap


def test_a_step_whose_gradient_is_not_finite_is_left_out(tmp_path, capsys):
    model, *_ = run_train(tmp_path, wrap=poison({4, 5}))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert capsys.readouterr().out.count("not finite, step skipped") == 2


def test_the_third_gradient_in_a_row_that_is_not_finite_ends_the_run_after_the_last_good_state(tmp_path):
    before, *_ = run_train(tmp_path / "a", steps=5)
    with pytest.raises(ValueError, match="three non-finite gradients in a row at step 7"):
        run_train(tmp_path / "b", wrap=poison({6, 7, 8}))
    saved = read_tensors(tmp_path / "b" / STATE)
    assert read_config(tmp_path / "b" / STATE)["step"] == 5
    assert torch.equal(saved["weights.x_embedder.proj.weight"], before.x_embedder.proj.weight)


# ---- state: killed anywhere, the same numbers ----------------------------------------------------

class Killed(BaseException):
    pass


@pytest.mark.parametrize("ema", [0.0, 0.99])
@pytest.mark.parametrize("call", [3, 9, 12])
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, ema, call):
    """Killed before the first state, in the middle and at the last step: twelve steps all the same, bit for
    bit, and across the end of an epoch (six steps of eight are one)."""
    straight, _, log, averaged = run_train(tmp_path / "a", ema=ema)
    with pytest.raises(Killed):
        run_train(tmp_path / "b", ema=ema, wrap=fails_at(call, Killed()))
    resumed, _, log2, averaged2 = run_train(tmp_path / "b", ema=ema)
    assert without_speed(log) == without_speed(log2)
    assert_equal_weights(straight, resumed)
    with averaged(), averaged2():
        assert_equal_weights(straight, resumed)


def test_a_state_of_more_steps_is_not_taken_for_fewer(tmp_path):
    run_train(tmp_path, steps=4)
    with pytest.raises(ValueError, match="train.state.safetensors is of step 4, and this run has 3"):
        run_train(tmp_path, steps=3)


def test_a_run_killed_while_it_saves_resumes_from_the_state_before(tmp_path, monkeypatch):
    import checkpoints
    straight, _, log, _ = run_train(tmp_path / "a")
    save_file = checkpoints.save_file
    saves = []

    def dies(tensors, file, **kw):
        saves.append(file)
        if len(saves) == 2:
            Path(file).write_bytes(b"half a state")
            raise Killed
        save_file(tensors, file, **kw)

    with monkeypatch.context() as m:
        m.setattr(checkpoints, "save_file", dies)
        with pytest.raises(Killed):
            run_train(tmp_path / "b")
    assert read_config(tmp_path / "b" / STATE)["step"] == 5
    resumed, _, log2, _ = run_train(tmp_path / "b")
    assert without_speed(log) == without_speed(log2)
    assert_equal_weights(straight, resumed)


def test_a_run_killed_between_its_last_step_and_its_last_evaluation_only_evaluates(tmp_path):
    """It ended in KeyError: 'val_loss' before."""
    def watch(step, averaged):
        if step == 12 and not (tmp_path / "second").exists():
            raise Killed
        return {"val_loss": float(step)}

    with pytest.raises(Killed):
        run_train(tmp_path / "run", watch=watch)
    (tmp_path / "second").touch()
    _, _, log, _ = run_train(tmp_path / "run", watch=watch, wrap=fails_at(1, AssertionError("trained again")))
    assert log[-1] == {"stage": "train", "step": 12, "val_loss": 12.0}
    assert [row["step"] for row in log if "val_loss" in row] == [0, 12]


def test_a_run_that_is_resumed_after_its_last_evaluation_makes_nothing_twice(tmp_path):
    def watch(step, averaged):
        return {"val_loss": float(step)}

    _, _, log, _ = run_train(tmp_path, watch=watch)
    _, _, again, _ = run_train(tmp_path, watch=watch, wrap=fails_at(1, AssertionError("trained again")))
    assert again == log


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_ends(tmp_path, sign):
    old = signal.getsignal(sign)

    def interrupted(flow, model):
        calls = []

        def loss(indices, generator):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), sign)
            return flow(indices, generator)

        return loss

    message = "stopped after step 3, saved in .*--resume --out .* continues"
    with pytest.raises(KeyboardInterrupt, match=message):
        run_train(tmp_path, wrap=interrupted)
    assert read_config(tmp_path / STATE)["step"] == 3
    assert signal.getsignal(sign) is old


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    """It was ignored before."""
    def interrupted(flow, model):
        def loss(indices, generator):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return flow(indices, generator)
        return loss

    with pytest.raises(KeyboardInterrupt, match="interrupted"):
        run_train(tmp_path, wrap=interrupted)
    assert not (tmp_path / STATE).exists()


def test_the_moving_average_warms_up_in_float32():
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    ema = EMA([p], decay=0.999)
    p.data.fill_(1.0)
    ema.update(step=0)                                          # decay (1 + 0) / (10 + 0)
    assert_close(ema.values[0], torch.full((3,), 0.9))


def test_the_moving_average_stands_in_for_the_weights_inside_its_context():
    p = nn.Parameter(torch.ones(2))
    ema = EMA([p], 0.9)
    ema.values[0].zero_()
    with pytest.raises(KeyError):
        with ema.swapped_in():
            assert p.tolist() == [0, 0]
            raise KeyError
    assert p.tolist() == [1, 1]


# ---- the objective -------------------------------------------------------------------------------

def test_conditions_are_dropped_at_the_given_rate_to_the_null_class():
    base, *_ = small_pair()
    y = torch.arange(10_000) % 8
    z = torch.zeros(10_000, 1, 1, 1)
    _, _, dropped, _ = Objective().draw(base, z, y, torch.Generator().manual_seed(0))
    assert 0.08 < float((dropped == 8).float().mean()) < 0.12
    assert torch.equal(dropped[dropped != 8], y[dropped != 8])


def test_training_reads_guidance_uniformly_from_its_range():
    net = tiny_model("flux")
    net.null = Text(torch.zeros(1, 1, 1))
    objective = Objective(guidance=(1.0, 14.0))
    y = Text(torch.zeros(4000, 1, 1))
    _, _, y, _ = objective.draw(net, torch.ones(4000, 1, 1, 1), y, torch.Generator().manual_seed(0))
    counts = torch.histc(y.guidance, 13, 1.0, 14.0)
    assert counts.sum() == 4000 and counts.min() > 240 and counts.max() < 380


def test_the_validation_loss_is_the_mean_of_eight_fixed_times():
    _, net, z, _, y = small_pair()
    metrics = FLOW.validate(net, z, y)
    assert list(metrics) == ["val_loss"] + [f"val_t{(k + 0.5) / 8:.2f}" for k in range(8)]
    assert metrics["val_loss"] == pytest.approx(sum(list(metrics.values())[1:]) / 8, rel=1e-5)
    assert metrics == FLOW.validate(net, z, y)


def test_a_distilled_model_is_validated_at_every_time_with_every_guidance():
    seen = []

    def loss(model, z, t, y, x0):
        seen.extend(zip(t.tolist(), y.guidance.tolist()))
        return (t,)

    Objective(loss, guidance=(1.0, 5.0)).validate(None, torch.zeros(64, 1, 1, 1), Text(torch.zeros(64, 1, 1)))
    assert len(set(seen)) == 64
    assert sorted({g for _, g in seen}) == [1.25 + 0.5 * k for k in range(8)]


FLUX = BASES["flux-krea"]


@pytest.mark.parametrize("own, asked, expected", [
    ("flux-vae-f8c16", None, "dc-ae-f32c32-in-1.0"),
    ("dc-ae-f32c32-in-1.0", None, "dc-ae-f64c128-1.5"),
    ("dc-ae-f32c32-in-1.0", "dc-ae-f64c128-in-1.0", "dc-ae-f64c128-in-1.0"),
])
def test_the_next_autoencoder_is_the_recipes_or_the_one_asked_for(own, asked, expected):
    assert next_autoencoder(asked, replace(FLUX, ae=own), "flux-krea").name == expected


@pytest.mark.parametrize("own, asked, message", [
    ("dc-ae-f64c128-1.5", None, "where its recipe ends; name the autoencoder to move to with --ae, one of "),
    ("flux-vae-f8c16", "flux-vae-f8c16", "the base is on it already; .*finetune.py --init BASE"),
    ("flux-vae-f8c16", "vae", "no autoencoder is called 'vae'"),
])
def test_an_autoencoder_that_cannot_be_moved_to_is_one_clear_error(own, asked, message):
    with pytest.raises(ValueError, match=message):
        next_autoencoder(asked, replace(FLUX, ae=own), "BASE")


# ---- memory --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TINIES)
def test_recomputing_blocks_changes_no_gradient(name):
    gradients = []
    for recompute in (False, True):
        net = scramble(FAMILIES[type(TINIES[name])](TINIES[name]))
        names = [key for key, _ in net.named_parameters()]
        params = prepare_for_training(net, names, "cpu", recompute=recompute)
        z = torch.randn(2, net.cfg.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([0.2, 0.7])
        loss = flow_matching_loss(net, z, t, random_condition(net.cfg), torch.zeros_like(z))[0].mean()
        loss.backward()
        gradients.append({key: p.grad for key, p in params.items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, grad in gradients[0].items():
        assert torch.equal(grad, gradients[1][key]), key


def test_blocks_are_compiled_inside_their_checkpoints(fresh_compiler):  # noqa: F811
    """Above 1e9 parameters --compile did nothing before."""
    gradients = []
    for compiled in (False, True):
        net = tiny_model("flux").requires_grad_(True)
        if compiled:
            compile_blocks(net, backend="eager")
        checkpoint_blocks(net)
        z = torch.randn(2, net.cfg.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
        net(z, torch.tensor([0.2, 0.7]), random_condition(net.cfg)).square().mean().backward()
        gradients.append({key: p.grad for key, p in net.named_parameters() if p.grad is not None})
        # a program for each class of block
        assert fresh_compiler["stats"]["unique_graphs"] == 2 * compiled
    assert gradients[0].keys() == gradients[1].keys()
    for key, grad in gradients[0].items():
        assert_close(grad, gradients[1][key])


@pytest.mark.parametrize("tokens, spared", [(300, False), (64, True), (320, True), (512, False)])
def test_cudnn_is_left_out_where_its_backward_is_wrong(tokens, spared, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    net = tiny_model("sana")
    net.cfg = replace(net.cfg, text_tokens=tokens)
    prepare_for_training(net, [], "cpu")
    assert calls == [False] * spared


def test_frozen_blocks_may_be_bf16_and_everything_that_learns_is_float32():
    net = scramble(Flux(TINY_FLUX)).bfloat16()
    add_lora(net, rank=2)
    trained = [name for name, _ in finetune.stage3_parameters(net, "lora")]
    for name, p in prepare_for_training(net, trained, "cpu", torch.bfloat16).items():
        frozen_block = "_blocks." in name and name not in trained
        assert p.dtype == (torch.bfloat16 if frozen_block else torch.float32), name
        assert p.requires_grad == (name in trained), name


# ---- runs ----------------------------------------------------------------------------------------

def flags_of_a_run(**flags):
    return Namespace(**{"base": "tiny", "out": None, "resume": False, "train_steps": 12, **flags})


def test_runs_are_numbered_and_what_has_trained_nothing_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError):
        with open_run("align-tiny", None, False) as run:
            run.settle("align", flags_of_a_run(), {})
            run.log({"stage": "base"})
            raise KeyError
    assert not Path("runs").exists()
    for number in (1, 2):
        with open_run("align-tiny", None, False) as run:
            run.log({"stage": "base"})
            assert run.folder == Path(f"runs/align-tiny-{number}")
    # a run that has logged a training step is kept, and so is what was in the folder before
    Path("other").mkdir()
    Path("other/notes.txt").touch()
    for kept, row in ((set(), {"stage": "base"}), ({"metrics.jsonl"}, {"stage": "train", "loss": 1.0})):
        with pytest.raises(KeyError):
            with open_run("align-tiny", "other", False) as run:
                run.log(row)
                raise KeyError
        assert {file.name for file in Path("other").iterdir()} == {"notes.txt"} | kept


def test_a_run_is_one_processs_and_a_dead_one_lets_go(tmp_path):
    """Two processes wrote into one folder before."""
    code = ("import sys, time, train\n"
            "with train.open_run('x', sys.argv[1], False): print('in', flush=True); time.sleep(60)")
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match="run is in use: another process trains in it"):
        with open_run("x", str(tmp_path / "run"), False):
            pass
    other.kill()
    other.wait()
    with open_run("x", str(tmp_path / "run"), False):
        pass


@pytest.mark.parametrize("finished, message", [
    (False, "holds an unfinished run; continue it with --resume, or give another --out"),
    (True, "holds a finished run; continue it with --resume, or give another --out"),
])
def test_a_run_is_never_written_over(tmp_path, finished, message):
    run = Run(tmp_path)
    run.settle("align", flags_of_a_run(), {})
    (tmp_path / STATE).touch()
    if finished:
        run.finish()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        with open_run("x", str(tmp_path), False):
            pass
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_run_is_finished_when_everything_is_written(tmp_path, monkeypatch):
    import train as room
    run = Run(tmp_path)
    run.settle("align", flags_of_a_run(), {})
    model, _, log, averaged = run_train(tmp_path, steps=2, ema=0.9)
    named = named_parameters_with(model, (model.EMBEDDER,))
    written = []
    write_tensors = room.write_tensors

    def note(path, *args):
        assert not is_finished(tmp_path)
        written.append(path.name)
        write_tensors(path, *args)

    monkeypatch.setattr(room, "write_tensors", note)
    write_run(run, {}, named, averaged)
    assert written == ["ema.safetensors", "model.safetensors"]
    assert is_finished(tmp_path)
    raw, average = (read_tensors(tmp_path / file) for file in reversed(written))
    assert not torch.equal(raw["x_embedder.proj.weight"], average["x_embedder.proj.weight"])


def test_the_log_grows_row_by_row_and_the_curves_at_every_save(tmp_path, capsys):
    """A killed run had neither before."""
    seen = []

    def wrap(flow, model):
        def loss(indices, generator):
            rows = (tmp_path / "metrics.jsonl")
            seen.append((len(rows.read_text().splitlines()) if rows.exists() else 0,
                         (tmp_path / "curves.png").exists()))
            return flow(indices, generator)
        return loss

    run_train(tmp_path, wrap=wrap)
    assert seen == [(step, step >= 5) for step in range(12)]
    # no terminal here: a line a row
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train ")]
    assert len(lines) == 12 and lines[4].startswith("train 5/12: loss ")
    # a resumed run has its old rows again, once
    run_train(tmp_path, steps=14)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 15))


@pytest.mark.parametrize("flags, message", [
    (["--match", "upsample"], "adamw"),
    (["--ae", "vae"], "tiny-dc-ae-f32c32"),
    (["--base", "dit-huge"], "dit-xl"),
    (["--objective", "guided"], "not distilled"),
    (["--guidance-range", "1", "5"], "not distilled"),
    (["--base", "tiny-flux", "--guidance-range", "5", "1"], "the smaller first"),
    (["--text-tokens", "8"], "this model reads classes"),
    (["--base", "tiny-flux", "--flip"], "left from right"),
    (["--res", "100"], "--res 100: tiny-dc-ae-f32c32 with patch 1 needs a multiple of 32; try 96 or 128"),
    (["--init", "align"], "no alignment of tiny in runs/; first: python align.py --base tiny"),
    (["--init", "scratch", "--base", "runs/x"], "a run is no preset; there are tiny, "),
])
def test_bad_flags_are_one_clear_error(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    script = finetune if "--init" in flags else align
    with pytest.raises(ValueError, match=message):
        script.main([*flags, "--device", "cpu"])


def test_a_missing_hub_is_an_error_of_two_lines_with_the_way_out(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*args, **kw):
        raise OSError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    with pytest.raises(ValueError, match="(?s)facebook/DiT-XL-2-256.*\n.*--weights PATH") as error:
        align.main(["--base", "dit-xl", "--device", "cpu"])
    assert len(str(error.value).split("\n")) == 2
