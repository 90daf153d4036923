"""Several ranks: two processes on this CPU that meet as torchrun's do."""

import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

import align
import finetune
from checkpoints import read_tensors
from data import order
from helpers import WORDS_FLAGS, make_words_base, relative_error, scramble, words_base  # noqa: F401
from train import (
    Plan, Run, destroy_distributed, full_tensor, init_distributed, prepare_for_training, train)
from training import FLOW, GUIDED, small_flux, small_pair


def in_process(rank, world_size, port, answers, job, *args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), TQDM_DISABLE="1",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        answers.put((rank, job(*args)))
        destroy_distributed()
    except BaseException as e:
        answers.put((rank, RuntimeError(f"rank {rank}: {e!r}")))


def on_two_ranks(job, *args) -> list:
    """What job(*args) returns on each rank. The processes come from a server that has only imported: a fork
    of a process whose threads have worked may hang."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_ranks"])
    answers = context.SimpleQueue()
    processes = []
    for rank in range(2):
        p = context.Process(target=in_process, args=(rank, 2, port, answers, job, *args), daemon=True)
        p.start()
        processes.append(p)
    found = {}
    while len(found) < 2:
        rank, answer = answers.get()
        found[rank] = answer
        if isinstance(answer, Exception):
            for p in processes:             # a rank that waits for one that failed waits for ever
                p.kill()
            raise answer
    return [found[0], found[1]]


def short_run(out, name, how, steps, accumulate=1, log_every=1, dies_at=None):
    """A short training -> its log, its final weights, and the indices and seeds of this rank's microbatches.
    Of DiT all parameters; of FLUX as finetune.py trains 12B: LoRA in float32 on blocks in bf16, which are
    recomputed."""
    device = init_distributed("cpu")
    flux = name == "flux"
    if flux:
        net, z, y = small_flux()
    else:
        _, net, z, _, y = small_pair()
    if how == "ddp" and os.environ.get("RANK") == "1":
        scramble(net)                                                # rank 0's weights count
    objective = GUIDED if flux else FLOW
    dtype = torch.bfloat16 if flux else torch.float32
    names = [key for key, _ in finetune.stage3_parameters(net, "lora" if flux else "full")]
    params = prepare_for_training(net, names, device, dtype, recompute=flux, shard=how == "fsdp")
    seen = []

    def loss(indices, generator):
        seen.append((indices.tolist(), generator.initial_seed()))
        if len(seen) == dies_at:
            raise KeyboardInterrupt
        return objective.train_loss(net, z[indices], y[indices], generator)

    def watch(step, averaged):
        return {"val_loss": objective.validate(net, z[:16], y[torch.arange(16)], dtype)["val_loss"]}

    plan = Plan(steps, 1e-3, 8, ema=0.9, accumulate=accumulate, save_every=4, log_every=log_every)
    named = [(key, params[key]) for key in names]
    log, _ = train(Run(out), "train", net, named, loss, 48, plan, dtype=dtype, watch=watch, watch_every=3)
    weights = {key: full_tensor(params[key]).numpy() for key in names}
    for key in weights:
        # softmax does not see a key's bias: its gradient is rounding alone, made large by Adam
        if name == "dit" and key.endswith("attn.qkv.bias"):
            weights[key] = weights[key].reshape(3, -1)[[0, 2]]
    return log, weights, seen


def numbers(log, first=0):
    keys = ("step", "loss", "grad_norm", "val_loss")
    return np.concatenate([[row[key] for key in keys if key in row] for row in log if row["step"] >= first])


def assert_same_log(a, b, first=0):
    np.testing.assert_allclose(numbers(a, first), numbers(b, first), rtol=2e-4, atol=1e-6)


def resumed_both_ways(root, name, how):
    """Four steps on two ranks, four more that resume them, and four that resume what one process has left."""
    short_run(root / "two", name, how, 4)
    if os.environ["RANK"] == "0":
        shutil.copytree(root / "two", root / "then")
    own = short_run(root / "two", name, how, 8)
    return own, short_run(root / "first", name, how, 8)[0]


@pytest.mark.parametrize("name, how", [("dit", "ddp"), ("dit", "fsdp"), ("flux", "fsdp")])
def test_two_ranks_give_the_run_of_one_and_either_resumes_the_other(tmp_path, name, how):
    one, weights, _ = short_run(tmp_path / "one", name, None, 8, accumulate=2)
    short_run(tmp_path / "first", name, None, 4, accumulate=2)
    (two, ended, seen), second = on_two_ranks(resumed_both_ways, tmp_path, name, how)[0]
    then = short_run(tmp_path / "then", name, None, 8)[0]
    for log in (two, second, then):
        assert_same_log(log, one, first=5)
    for key in weights:
        np.testing.assert_allclose(weights[key], ended[key], atol=2e-5, err_msg=key)


def seen_on(root):
    return short_run(root, "dit", "ddp", 4)[2]


def test_each_rank_reads_its_part_of_the_batch_with_noise_of_its_own(tmp_path):
    first, second = on_two_ranks(seen_on, tmp_path)
    batches = [a + b for (a, _), (b, _) in zip(first, second)]
    assert batches == [order(step, 8, 48, 0).tolist() for step in range(4)]
    assert not {seed for _, seed in first} & {seed for _, seed in second}


def interrupted_row(out):
    """Killed at its sixth step: the log row that was being made, of steps 4 to 6, has one step in the
    state."""
    with pytest.raises(KeyboardInterrupt):
        short_run(out, "dit", "ddp", 8, log_every=3, dies_at=6)
    return short_run(out, "dit", "ddp", 8, log_every=3)[0]


def test_a_log_row_that_was_being_made_is_of_all_ranks_and_continues(tmp_path):
    one = short_run(tmp_path / "one", "dit", None, 8, accumulate=2, log_every=3)[0]
    assert_same_log(on_two_ranks(interrupted_row, tmp_path / "two")[0], one)


def align_words(root, out, *more):
    os.chdir(root)
    make_words_base(root)
    flags = ["--stage2-steps", "3", "--head-samples", "32", "--count", "0", "--out", out]
    align.main([*WORDS_FLAGS, *flags, *more])


def finetune_words(root, out, *more):
    os.chdir(root)
    make_words_base(root)
    finetune.main([*WORDS_FLAGS, "--init", "runs/align", "--train-steps", "3", "--rank", "4", "--ema", "0.9",
                   "--out", out, *more])


def validation_losses(run):
    rows = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [row["val_loss"] for row in rows if "val_loss" in row]


def test_the_scripts_on_two_ranks_write_what_one_writes(words_base, tmp_path):  # noqa: F811
    """Alignment in closed form and by steps, then LoRA with the guided loss: the same losses, one set of
    files."""
    align_words(tmp_path, "runs/align", "--accumulate", "2")
    on_two_ranks(align_words, tmp_path, "runs/two")
    assert validation_losses("runs/two") == pytest.approx(validation_losses("runs/align"), rel=2e-4)
    assert {f.name for f in Path("runs/two").iterdir()} == {f.name for f in Path("runs/align").iterdir()}

    finetune_words(tmp_path, "runs/tuned", "--accumulate", "2")
    on_two_ranks(finetune_words, tmp_path, "runs/shards", "--parallel", "fsdp")
    assert validation_losses("runs/shards") == pytest.approx(validation_losses("runs/tuned"), rel=2e-3)
    one, two = (read_tensors(f"runs/{run}/ema.safetensors") for run in ("tuned", "shards"))
    assert one.keys() == two.keys()
    for key in one:
        assert relative_error(two[key], one[key]) < 0.02, key
