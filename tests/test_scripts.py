"""align.py, finetune.py and sample.py from end to end: what runs hand to each other."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import align
import evaluate
import finetune
import sample
from checkpoints import load_autoencoder, load_run, newest_run, read_tensors, write_json
from data import ImageFolder
from helpers import ROOT, WORDS_FLAGS, tiny_base, words_base  # noqa: F401
from lora import merge_lora
from shapes import SHAPES
from test_trust import interrupted
from train import Plan, read_settings

QUICK = ["--pictures", "64", "--batch", "8", "--previews", "0", "--device", "cpu", "--dtype", "fp32"]
CPU = ["--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder in which the bundled base was aligned in a hurry."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(root)
        align.main([*QUICK, "--stage2-steps", "2", "--head-samples", "64", "--count", "0"])
    return root


@pytest.fixture
def aligned(project, monkeypatch):
    monkeypatch.chdir(project)
    return "runs/align-tiny-1"


def forward(model):
    x = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    return model(x, torch.tensor([0.3, 0.6]), torch.tensor([1, 2]))


# ---- what a run holds ----------------------------------------------------------------------------

@pytest.mark.parametrize("flags, kind, lora", [
    ([], "finetune", True),
    (["--tune", "full"], "finetune", False),
    (["--init", "base"], "noalign", True),
    (["--init", "scratch"], "scratch", False),
])
def test_a_run_holds_what_it_trained_and_loads_as_what_it_was(aligned, flags, kind, lora):
    out = f"runs/{kind}-{len(flags)}-{flags[-1] if flags else 'lora'}"
    finetune.main([*QUICK, *flags, "--train-steps", "2", "--out", out])
    model, info = load_run(out)
    keys = set(read_tensors(f"{out}/model.safetensors"))
    assert info["kind"] == kind
    assert ("blocks.0.attn.qkv.A" in keys, "blocks.0.attn.qkv.weight" in keys) == (lora, not lora)
    if lora:
        before = forward(model)
        assert_close(forward(merge_lora(model)), before, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="holds a finished run"):
        finetune.main([*QUICK, *flags, "--train-steps", "2", "--out", out])


def test_alignment_in_closed_form_alone_is_a_run_too(aligned, capsys):
    flags = ["--head-samples", "64", "--stage2-steps", "0", "--count", "0", "--out", "runs/closed"]
    align.main([*QUICK, *flags])
    stages = [row["stage"] for row in load_run("runs/closed")[1]["stages"]]
    assert stages == ["base", "not aligned", "stage 1: embedder", "head in closed form"]
    assert not Path("runs/closed/curves.png").exists()
    assert "(config.json, gap.png, metrics.jsonl, model.safetensors)" in capsys.readouterr().out


def test_stage_2_holds_the_embedder_near_eq_1(aligned):
    gaps = {}
    for name, flags in {"held": [], "free": ["--hold", "0"], "head": ["--head-only"]}.items():
        few = ["--head-samples", "512", "--stage2-steps", "20", "--count", "0", "--out", f"runs/{name}"]
        align.main([*QUICK, *few, *flags])
        gaps[name] = [row["gap"] for row in load_run(f"runs/{name}")[1]["stages"] if "gap" in row]
    solved, last = zip(*(rows[-2:] for rows in gaps.values()))
    assert len(set(solved)) == 1
    held, free, head = last
    # the head does not move the features; the flow loss does, and Eq. 1 pulls them back
    assert head == solved[0] and held - head < 0.5 * (free - head)
    settings = [read_settings(f"runs/{name}")["flags"]["hold"] for name in gaps]
    assert settings == [align.TINY.hold, 0, 0]
    with pytest.raises(ValueError, match="--hold 3: with --head-only nothing learns from Eq. 1"):
        align.main([*QUICK, "--head-only", "--hold", "3"])


def test_a_run_from_before_hold_goes_on_without_it(aligned, monkeypatch):
    flags = ["--head-samples", "64", "--stage2-steps", "4", "--count", "0", "--out", "runs/old"]
    with interrupted(monkeypatch, after=2):
        align.main([*QUICK, *flags])
    settings = read_settings("runs/old")
    assert settings["flags"].pop("hold") == align.TINY.hold
    write_json("runs/old/config.json", settings)
    align.main(["--resume", "--out", "runs/old", "--device", "cpu"])
    assert read_settings("runs/old")["flags"]["hold"] == 0


def test_the_numbers_of_table_7_are_flags(aligned, monkeypatch):
    plans = {}

    def note(out, name, model, named, loss_fn, num_samples, plan, **kw):
        plans[name] = plan
        raise KeyboardInterrupt

    monkeypatch.setattr(align, "train", note)
    monkeypatch.setattr(finetune, "train", note)
    numbers = [*QUICK, "--betas", "0.8", "0.95", "--warmup", "4", "--clip", "0.1", "--schedule", "linear",
               "--accumulate", "2"]
    stage3 = ["--train-steps", "3", "--lr", "4e-3", "--weight-decay", "0.1", "--ema", "0.9"]
    with pytest.raises(KeyboardInterrupt):
        finetune.main([*numbers, *stage3])
    stage2 = ["--head-samples", "8", "--stage2-steps", "3", "--lr2", "4e-3", "--count", "0"]
    with pytest.raises(KeyboardInterrupt):
        align.main([*numbers, *stage2])
    same = dict(warmup=4, schedule="linear", betas=[0.8, 0.95], clip=0.1, accumulate=2)
    assert plans["train"] == Plan(3, 4e-3, 8, weight_decay=0.1, ema=0.9, **same)
    assert plans["stage2"] == Plan(3, 4e-3, 8, **same)


# ---- from run to run -----------------------------------------------------------------------------

def test_a_run_carries_on_what_the_run_before_it_had_trained(aligned):
    """Alignment has moved the final modulation, which no base has; then LoRA on top, merged, and a second
    LoRA."""
    flags = [*QUICK, "--train-steps", "2", "--lr", "1e-2", "--ema", "0"]
    finetune.main([*flags, "--init", aligned, "--no-final-adaln", "--out", "runs/carry-1"])
    key = "final_layer.adaLN_modulation.1.weight"
    before, after = (read_tensors(f"{run}/model.safetensors")[key] for run in (aligned, "runs/carry-1"))
    assert torch.equal(before, after)

    with pytest.raises(ValueError, match="carries a LoRA of its own.*--merge"):
        finetune.main([*flags, "--init", "runs/carry-1", "--rank", "4", "--out", "runs/carry-2"])
    assert not Path("runs/carry-2").exists()
    finetune.main([*flags, "--init", "runs/carry-1", "--merge", "--rank", "4", "--out", "runs/carry-2"])
    first, second = (load_run(f"runs/carry-{i}")[0].blocks[0].attn.qkv for i in (1, 2))
    assert_close(second.base.weight, first.base.weight + first.delta())
    assert second.A.shape[0] == 4


def test_a_finished_run_is_the_next_base(words_base):  # noqa: F811
    """f8 to f32, LoRA, and from there to another latent space: the trunk is the merged one, and the chain
    loads."""
    few = ["--stage2-steps", "1", "--head-samples", "16", "--count", "0"]
    align.main([*WORDS_FLAGS, *few, "--out", "runs/align"])
    finetune.main([*WORDS_FLAGS, "--init", "runs/align", "--train-steps", "3", "--rank", "4",
                   "--sample-every", "2", "--out", "runs/tuned"])
    pictures = {file.name for file in Path("runs/tuned").glob("*.png")}
    assert {"samples_000000.png", "samples_000002.png", "samples_000003.png", "guidance.png"} <= pictures
    rows = [json.loads(line) for line in Path("runs/tuned/metrics.jsonl").read_text().splitlines()]
    assert "val_loss_ema" in rows[-1] and "val_t0.06" in rows[0]

    flags = [flag if flag != "test-words" else "runs/tuned" for flag in WORDS_FLAGS]
    align.main([*flags, *few, "--ae", "tiny-kl-f8c4", "--pos-step", "2", "--out", "runs/next"])
    model, info = load_run("runs/next")
    merged = merge_lora(load_run("runs/tuned")[0])
    assert (info["base"], model.cfg.ae, model.cfg.pos_step) == ("runs/tuned", "tiny-kl-f8c4", 4.0)
    assert_close(model.double_blocks[0].img_attn.qkv.weight, merged.double_blocks[0].img_attn.qkv.weight)
    with pytest.raises(ValueError, match="the base is on it already; .*finetune.py --init runs/tuned"):
        align.main([*flags, "--out", "runs/x"])


def test_a_run_keeps_the_size_and_the_prompt_length_that_it_was_trained_with(words_base):  # noqa: F811
    small = [flag for flag in WORDS_FLAGS if flag not in ("--ae", "tiny-dc-ae-f32c32")]
    few = ["--stage2-steps", "0", "--head-samples", "16", "--count", "0"]
    align.main([*WORDS_FLAGS, *few, "--text-tokens", "12", "--res", "96", "--out", "runs/a"])
    short = [*small, "--init", "runs/a", "--rank", "2", "--train-steps", "1"]
    finetune.main([*short, "--out", "runs/b"])
    finetune.main([*short, "--text-tokens", "10", "--res", "64", "--out", "runs/c"])
    configs = [load_run(f"runs/{run}")[0].cfg for run in "abc"]
    assert [(cfg.text_tokens, cfg.res) for cfg in configs] == [(12, 96), (12, 96), (10, 64)]


def test_sample_and_evaluate_take_the_newest_run(aligned, capsys):
    sample.main([*CPU, "--count", "2", "--num-steps", "2"])
    newest = newest_run()
    assert len(list((newest / "samples").glob("*.png"))) == 2
    evaluate.main([*CPU, str(newest), "--count", "16", "--num-steps", "2"])
    assert newest.name in capsys.readouterr().out


def test_a_class_models_data_set_is_folders_that_it_learns_from(tiny_base):  # noqa: F811
    sample.main([*CPU, "--base", "test", "--classes", "7", "2", "--count", "42", "--num-steps", "1",
                 "--cfg-scale", "1", "--dataset", "--out", "drawn"])
    source = ImageFolder("drawn", 64)
    assert sorted(source.labels.unique().tolist()) == [2, 7]
    entry = json.loads(Path("drawn/metadata.jsonl").read_text().splitlines()[1])
    assert (entry["file_name"], entry["text"]) == ("0002/00001_seed1.png", SHAPES[2])

    learn = [*CPU, "--base", "test", "--images", "drawn", "--ae", "tiny-dc-ae-f32c32", "--stage2-steps", "0",
             "--head-samples", "16", "--count", "0"]
    align.main([*learn, "--out", "run"])
    before = read_settings("run")["facts"]
    # a class by its name is the class by its number
    Path("drawn/0002").rename(f"drawn/{SHAPES[2]}")
    align.main([*learn, "--out", "named"])
    source = ImageFolder("drawn", 64, names=SHAPES, num_classes=8)
    assert sorted(source.labels.unique().tolist()) == [2, 7]
    Path(f"drawn/{SHAPES[2]}").rename("drawn/zebra")
    with pytest.raises(ValueError, match="--any-classes"):
        align.main([*learn, "--out", "other"])
    assert not Path("other").exists()
    align.main([*learn, "--any-classes", "--out", "other"])
    assert read_settings("other")["facts"] != before


def test_the_python_lines_of_the_readme_draw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(block, names)
    assert names["images"].shape == (2, 3, 128, 128)
    assert Path("shapes.png").is_file()


def test_no_folder_is_left_by_a_size_that_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script, flags in ((align, []), (finetune, ["--init", "base"])):
        with pytest.raises(ValueError, match="--res 100: .* needs a multiple of 32; try 96 or 128"):
            script.main([*QUICK, *flags, "--res", "100", "--out", "run"])
    assert not Path("run").exists()


def test_the_file_of_another_autoencoder_is_refused(tmp_path):
    """It was loaded under the name that was asked for, and broke alignment later."""
    with pytest.raises(ValueError, match="this is an autoencoder of f8c4, and flux-vae-f8c16 is f8c16"):
        load_autoencoder("flux-vae-f8c16", str(ROOT / "weights/tiny-kl-f8c4.safetensors"))
