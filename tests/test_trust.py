"""What a run promises: a wrong command is one line and leaves nothing; a run resumes as what it was, or says
why not. Tables: a line a reproduction."""

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import align
import bench
import checkpoints
import evaluate
import finetune
import quant
import sample
import train
from checkpoints import read_tensors, write_tensors
from flags import run_main
from helpers import ROOT, digest, tiny_base  # noqa: F401
from train import read_settings, resume_flags

SCRIPTS = dict(align=align, bench=bench, evaluate=evaluate, finetune=finetune, quant=quant, sample=sample)


def refused(command: str, capsys) -> str:
    """The one line that a wrong command ends with; exit code 2, no traceback."""
    script, *flags = command.split()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_main(partial(SCRIPTS[script].main, flags))
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert message.startswith("error: ")
    assert len(message.splitlines()) <= 2, message
    return message


# ---- before anything is read ---------------------------------------------------------------------

WRONG = [
    # a number that cannot be
    ("align --batch 0", "--batch 0: at least 1"),
    ("align --batch 2.5", "--batch 2.5: not a whole number"),
    ("align --pictures -5", "--pictures -5: at least 1"),
    ("align --stage2-steps -1", "--stage2-steps -1: at least 0"),
    ("align --stage1-steps -5", "--stage1-steps -5: at least 0"),
    ("align --head-samples -1", "--head-samples -1: at least 0"),
    ("align --count -1", "--count -1: at least 0"),
    ("align --previews -1", "--previews -1: at least 0"),
    ("align --save-every 0", "--save-every 0: at least 1"),
    ("align --accumulate 0", "--accumulate 0: at least 1"),
    ("align --lr2 0", "--lr2 0: above 0"),
    ("align --lr2 nan", "--lr2 nan"),
    ("align --label-dropout 2", "--label-dropout 2: 0 to 1"),
    ("align --betas 0.9 1", "--betas 1"),
    ("align --warmup -1", "--warmup -1: at least 0"),
    ("align --clip -1", "--clip -1: at least 0"),
    ("align --res 0", "--res 0: at least 1"),
    ("align --pos-step 0", "--pos-step 0: above 0"),
    ("align --text-tokens 0", "--text-tokens 0: at least 1"),
    ("finetune --train-steps 0", "--train-steps 0: at least 1"),
    ("finetune --train-steps -5", "--train-steps -5: at least 1"),
    ("finetune --rank 0", "--rank 0: at least 1"),
    ("finetune --alpha 0", "--alpha 0: above 0"),
    ("finetune --ema 1", "--ema 1: 0 to 0.999999"),
    ("finetune --sample-every -1", "--sample-every -1: at least 0"),
    ("finetune --num-classes 0", "--num-classes 0: at least 1"),
    ("sample --count 0", "--count 0: at least 1"),
    ("sample --num-steps 0", "--num-steps 0: 1 to 10000"),
    ("sample --batch 0", "--batch 0: at least 1"),
    ("sample --cfg-scale -1", "--cfg-scale -1: at least 0"),
    ("evaluate --count 0", "--count 0: at least 1"),
    ("evaluate --num-steps 0", "--num-steps 0: 1 to 10000"),
    # a flag or a name that is not there
    ("align --bach 8", "unrecognised --bach; did you mean --batch?"),
    ("align --solver adam", "--solver adam: choose from closed-form, adamw; did you mean adamw?"),
    ("align --base dit-xxl", "--base dit-xxl: not a preset"),
    ("align --ae vae", "no autoencoder is called 'vae'"),
    ("sample --sampler eular", "did you mean euler?"),
    # a device that is not there
    ("align --device tpu", "--device tpu: unknown"),
    ("finetune --device tpu", "--device tpu: unknown"),
    ("sample --device tpu", "--device tpu: unknown"),
    ("evaluate --device tpu", "--device tpu: unknown"),
    ("bench --device tpu", "--device tpu: unknown"),
    # a file or a folder that is not there
    ("align --images nope", "--images nope: no such file or folder"),
    ("align --base dit-xl --images nope", "--images nope: no such file or folder"),
    ("align --base flux-krea --images nope", "--images nope: no such file or folder"),
    ("align --ae-weights nope", "--ae-weights nope: no such file or folder"),
    ("align --base-ae-weights nope", "--base-ae-weights nope: no such file or folder"),
    ("align --weights nope", "--weights nope: no such file or folder"),
    ("align --base tiny-flux --prompts nope", "--prompts nope: no such file or folder"),
    ("align --out a-file", "--out a-file: a file of this name exists"),
    ("finetune --init nope", "nope"),
    ("finetune --init base --images nope", "--images nope: no such file or folder"),
    ("sample nope", "nope"),
    ("evaluate nope", "nope"),
    ("evaluate --images nope", "nope"),
    ("evaluate --fid nope --reference nope", "nope"),
    # flags that contradict each other or the model
    ("align --match upsample", "--match upsample has no closed form here; use --solver adamw"),
    ("align --objective guided", "not distilled"),
    ("align --base tiny-flux --guidance-range 5 1", "the smaller first"),
    ("align --res 100", "--res 100: tiny-dc-ae-f32c32 with patch 1 needs a multiple of 32; try 96 or 128"),
    ("align --resume", "--resume: runs/ holds no unfinished run of align.py"),
    ("align --resume --out empty", "--resume: nothing to resume in empty"),
    ("finetune --init align", "no alignment of tiny in runs/; first: python align.py --base tiny"),
    ("sample --base tiny --guidance 5", "--cfg-scale"),
    # few bits
    ("quant --rank -1", "--rank -1: at least 0"),
    ("quant --count 0", "--count 0: at least 1"),
    ("quant --tokens 0", "--tokens 0: at least 1"),
    ("quant --form nvfp5", "--form nvfp5: choose from fp8, nvfp4, int4; did you mean nvfp4?"),
    ("quant --form fp8 --weights-only", "--weights-only: fp8 rounds weights and inputs"),
    ("quant --base nope", "--base nope: not a preset"),
    ("quant --weights nope", "--weights nope: no such file or folder"),
    ("quant --base tiny-flux --prompts nope", "--prompts nope: not a readable text file"),
    ("quant --prompts a-file", "--prompts: tiny draws classes, not prompts"),
    ("quant --base tiny-flux --text-encoders nope", "--text-encoders nope: no such file or folder"),
    ("quant --out a-file", "--out a-file: a file of this name exists; name a new folder"),
    ("quant --out .", "--out .: it is not empty; name a new folder"),
    ("quant --device tpu", "--device tpu: unknown"),
    ("sample --quant int5", "--quant int5: choose from fp8, nvfp4, int4; did you mean int4?"),
    ("sample --weights-only", "--weights-only: it goes with --quant nvfp4 or int4"),
    ("sample --quant fp8 --weights-only", "--weights-only: it goes with --quant nvfp4 or int4"),
    ("sample --quant int4 --export x", "--export: diffusers has no quantised layers of this kind"),
]


@pytest.mark.parametrize("command, message", WRONG, ids=[command for command, _ in WRONG])
def test_a_wrong_command_is_one_line_before_any_weights_are_read(command, message, tmp_path, monkeypatch,
                                                                 capsys):
    def read(*args, **kw):
        raise AssertionError("weights were read")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "read_tensors", read)
    Path("a-file").touch()
    Path("empty").mkdir()
    assert message in refused(command, capsys)
    assert {path.name for path in Path(".").iterdir()} == {"a-file", "empty"}
    assert not any(Path("empty").iterdir())


def numeric_flags():
    """(script, flag) of every flag that is a number."""
    for name in ("align", "evaluate", "finetune", "quant", "sample"):
        for action in SCRIPTS[name].parser()._actions:
            if action.type is not None and action.type is not train.number_or_rule and action.nargs is None:
                if action.option_strings and action.type is not str:
                    yield name, action.option_strings[0]


@pytest.mark.parametrize("name, flag", numeric_flags())
@pytest.mark.parametrize("value", ["-5", "nan"])
def test_no_number_is_negative_or_none(name, flag, value, capsys):
    assert f"{flag} {value}: " in refused(f"{name} {flag} {value}", capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda_without_a_gpu_is_one_line(script, capsys):
    assert "--device cuda: this PyTorch sees no GPU; use --device cpu" in refused(f"{script} --device cuda",
                                                                                  capsys)


# ---- resuming ------------------------------------------------------------------------------------

SMALL = ("--base test --ae tiny-dc-ae-f32c32 --pictures 32 --batch 8 --previews 0 --device cpu --dtype fp32 "
         "--save-every 2 ")
ALIGN = "align " + SMALL + "--head-samples 16 --stage2-steps 6 --count 0 --cache cache "
TUNE = "finetune " + SMALL + "--init base --train-steps 6 --rank 4 --cache cache "


def run(command: str):
    script, *flags = command.split()
    SCRIPTS[script].main(flags)


@contextmanager
def interrupted(monkeypatch, after: int):
    """Inside, training stops after so many steps, as by Ctrl-C."""
    steps = []

    @contextmanager
    def signals():
        class Stop:
            def __bool__(self):
                steps.append(1)
                return len(steps) >= after
        yield Stop()

    with monkeypatch.context() as m:
        m.setattr(train, "stop_signals", signals)
        with pytest.raises(KeyboardInterrupt, match="--resume --out .* continues"):
            yield


def contents(folder) -> dict:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.fixture
def stopped(tiny_base, monkeypatch):  # noqa: F811
    """Two runs that were interrupted at step 4 of 6, in a folder of their own."""
    for command, out in ((ALIGN, "aligned"), (TUNE, "tuned")):
        with interrupted(monkeypatch, after=4):
            run(f"{command} --out {out}")
    return tiny_base


OTHER = [
    ("aligned", "align --lr2 1e-4", "--lr2 0.0001: aligned was started with 0.0002; a resumed run keeps its"),
    ("aligned", "align --batch 4", "--batch 4: aligned was started with 8"),
    ("aligned", "align --seed 1", "--seed 1: aligned was started with 0"),
    ("aligned", "align --pictures 16", "--pictures 16: aligned was started with 32"),
    ("aligned", "align --base tiny", "--base tiny: aligned was started with test"),
    ("aligned", "align --solver adamw", "--solver adamw: aligned was started with closed-form"),
    ("aligned", "align --stage2-steps 5", "--stage2-steps 5: aligned was started with 6; .*steps only grow"),
    ("aligned", "align --dtype bf16", "--dtype bf16: aligned was started with fp32"),
    ("aligned", "finetune", "--resume: aligned is a run of align.py"),
    ("tuned", "finetune --rank 8", "--rank 8: tuned was started with 4"),
    ("tuned", "finetune --lr 1", "--lr 1.0: tuned was started with 0.0002"),
    ("tuned", "finetune --tune full", "--tune full: tuned was started with lora"),
    ("tuned", "finetune --train-steps 3", "--train-steps 3: tuned was started with 6; .*steps only grow"),
]


def test_a_run_is_never_resumed_as_another_one(stopped, capsys):
    """It went on with the new flags before."""
    for folder, command, message in OTHER:
        before = contents(folder)
        assert re.search(message, refused(f"{command} --resume --out {folder}", capsys)), command
        assert contents(folder) == before, command


def test_a_resumed_run_has_the_flags_that_it_began_with(stopped, capsys):
    """Resumed with --resume alone it is the run that was never stopped, and then it is finished."""
    for folder, command in (("aligned", ALIGN), ("tuned", TUNE)):
        run(f"{command} --out {folder}-straight")
        script = command.split()[0]
        Path("runs").mkdir(exist_ok=True)
        moved = f"runs/{script}-test-7"
        shutil.move(folder, moved)
        capsys.readouterr()
        run(f"{script} --resume")
        assert f"resuming {moved} at step 4 of " in capsys.readouterr().out
        straight, resumed = (digest(read_tensors(f"{run}/model.safetensors"))
                             for run in (f"{folder}-straight", moved))
        assert straight == resumed
        logs = []
        for log in (f"{folder}-straight", moved):
            rows = map(json.loads, Path(log, "metrics.jsonl").read_text().splitlines())
            logs.append([{k: v for k, v in row.items() if k != "images_per_s"} for row in rows])
        assert logs[0] == logs[1]
        assert "is finished; only more steps go on with it" in refused(f"{script} --resume --out {moved}",
                                                                       capsys)


def test_more_steps_go_on_with_a_finished_run(stopped):
    run("finetune --resume --out tuned")
    run("finetune --resume --out tuned --train-steps 8 --save-every 3")
    settings = read_settings("tuned")
    assert settings["finished"]
    assert (settings["flags"]["train_steps"], settings["flags"]["save_every"]) == (8, 3)
    rows = [json.loads(line) for line in Path("tuned/metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 8
    assert checkpoints.read_config(Path("tuned/model.safetensors"))["steps"] == 8


def test_a_run_does_not_go_on_with_other_weights_or_other_pictures(stopped, tmp_path, capsys):
    """Both went on before."""
    other = {key: value + 0.01 for key, value in stopped.state_dict().items()}
    write_tensors("other.safetensors", other)
    message = refused("align --resume --out aligned --weights other.safetensors", capsys)
    assert "aligned began with base weights" in message and "start another run" in message

    def draw(name, shade):
        file = Path(f"pictures/{name}/{shade}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 50 + shade).convert("RGB").save(file)

    for shade in range(24):
        draw(("circle", "ring")[shade % 2], shade)
    command = TUNE.replace("--pictures 32", "--images pictures")
    with pytest.MonkeyPatch.context() as m, interrupted(m, after=4):
        run(f"{command} --out photographs")
    draw("ring", 99)
    before = contents("photographs")
    assert "photographs began with " in refused("finetune --resume --out photographs", capsys)
    assert contents("photographs") == before
    Path("pictures/ring/99.png").unlink()
    # the same pictures in another place are the same data
    Path("pictures").rename("moved")
    Path("moved").rename("elsewhere")
    Path("elsewhere").rename("pictures")
    run("finetune --resume --out photographs")


def test_the_settings_of_a_run_are_all_in_its_config(stopped):
    """The recipe's numbers too, which are no flags that were typed."""
    flags = read_settings("tuned")["flags"]
    expected = dict(base="test", ae="tiny-dc-ae-f32c32", lr=2e-4, warmup=2000, schedule="constant",
                    ema=0.999, clip=1.0, weight_decay=1e-3, batch=8, res=64, rank=4, alpha=4.0, dtype="fp32",
                    objective="flow", shift=1.0, pos_step=2.0, sample_every=1)
    assert expected.items() <= flags.items()
    assert read_settings("tuned")["facts"].keys() >= {"weights", "pictures", "source", "autoencoders"}
    assert f"torch {torch.__version__}" in read_settings("tuned")["versions"]


def test_the_base_of_a_run_is_the_runs(stopped, capsys):
    """finetune.py --init RUN trained on the wrong base's recipe before, or asked for --base."""
    run("align --resume --out aligned")
    tune = TUNE.replace("--base test ", "").replace("--init base", "--init aligned").replace(
        "--ae tiny-dc-ae-f32c32 ", "")
    message = refused(f"{tune} --base tiny", capsys)
    assert "--base tiny: aligned was trained from test; leave --base out" in message
    run(f"{tune} --out on-it")
    assert read_settings("on-it")["flags"]["base"] == "test"


def test_the_newest_unfinished_run_is_found_by_what_was_typed(stopped, capsys):
    Path("runs").mkdir()
    shutil.move("aligned", "runs/align-test-1")
    shutil.move("tuned", "runs/noalign-test-1")
    Path("runs/old").mkdir()
    Path("runs/old/config.json").write_text('{"of": "an older version"}')
    for script, typed, found in (("align", {}, "runs/align-test-1"), ("finetune", {}, "runs/noalign-test-1")):
        args = Namespace(out=None, device="cpu")
        resume_flags(script, args, typed)
        assert args.out == found
    message = refused("align --resume --base tiny", capsys)
    assert "no unfinished run of align.py of --base tiny that" in message


# ---- disks ---------------------------------------------------------------------------------------

LIMITED = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path.insert(0, {root!r})
sys.argv = {argv!r}
import runpy
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("flags, size, kept", [
    ("--pictures 400 --previews 0 --count 0", 100_000, set()),                   # the latents do not fit
    ("--pictures 16 --batch 8 --previews 0 --count 0 --head-samples 16 --stage2-steps 4 --save-every 2",
     300_000, {"cache"}),                                                        # the state does not fit
])
def test_a_full_disk_is_one_line_and_leaves_no_run(flags, size, kept, tmp_path):
    """A full disk killed the process with a bus error, or ended in a traceback."""
    script = str(ROOT / "align.py")
    argv = [script, *flags.split(), "--cache", "cache", "--out", "run", "--device", "cpu", "--dtype", "fp32"]
    code = LIMITED.format(bytes=size, root=str(ROOT), argv=argv, script=script)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == set()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("locked").mkdir(mode=0o555)
    assert "locked" in refused("align --out locked/run", capsys)
