"""Kill -9 and resume: one harness for every script that writes for a long time.

    DCGEN_KILLS=20 python -m pytest -q tests/test_resume.py       as many kills a script, at random moments
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints import read_config, read_tensors
from helpers import ROOT, digest
from train import is_finished

SAME = ["--pictures", "64", "--batch", "8", "--save-every", "2", "--device", "cpu", "--dtype", "fp32"]
# script, flags, flags to resume with, the file after whose appearance it is killed
WRITERS = {
    "alignment": (
        "align.py", [*SAME, "--head-samples", "64", "--stage2-steps", "12", "--count", "0"], ["--resume"],
        "stage2.state.safetensors"),
    "alignment by AdamW": (
        "align.py", [*SAME, "--solver", "adamw", "--stage1-steps", "12", "--stage2-steps", "2",
                     "--count", "0"], ["--resume"], "stage1.state.safetensors"),
    "fine-tuning": (
        "finetune.py", [*SAME, "--init", "base", "--rank", "4", "--train-steps", "12"], ["--resume"],
        "train.state.safetensors"),
    "a data set": (
        "sample.py", ["--base", "tiny-sana", "--prompts", "prompts.txt", "--count", "12", "--batch", "2",
                      "--dataset", "--num-steps", "4", "--device", "cpu", "--dtype", "fp32"], [],
        "00001_seed1.png"),
}


def command(script, *flags):
    return [sys.executable, str(ROOT / script), *flags]


def contents(folder: Path) -> dict:
    """Every file of a run: bytes, tensors and facts, or rows without what a clock measures. config.json names
    the folder, and the state of training is compared in test_train.py."""
    files = {}
    for file in sorted(folder.rglob("*.*")):
        name = file.relative_to(folder).as_posix()
        if name == "metrics.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            files[name] = [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]
        elif file.suffix == ".safetensors" and ".state." not in name:
            files[name] = digest(read_tensors(file)), read_config(file)
        elif file.suffix == ".png" or name in ("metadata.jsonl", "dataset.json"):
            files[name] = file.read_bytes()
    return files


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
KILLS = int(os.environ.get("DCGEN_KILLS", 0))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    prompts = ["a large red ring on green", "two small blue circles on yellow"]
    (root / "prompts.txt").write_text("\n".join(prompts))
    return root


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_killed_resumes_to_the_same_files(writer, workplace):
    script, flags, resume, file = WRITERS[writer]
    straight, killed = (workplace / f"{writer}-{kind}" for kind in ("straight", "killed"))
    subprocess.run(command(script, *flags, "--out", str(straight)), cwd=workplace, env=ENV, check=True,
                   capture_output=True)

    victim = subprocess.Popen(command(script, *flags, "--out", str(killed)), cwd=workplace, env=ENV,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / file).exists() and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (killed / "model.safetensors").exists(), "it finished before it was killed"
    assert not (killed / "metadata.jsonl").exists(), "it finished before it was killed"

    subprocess.run(command(script, *flags, "--out", str(killed), *resume), cwd=workplace, env=ENV, check=True,
                   capture_output=True)
    expected, found = contents(straight), contents(killed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name] == found[name], name


@pytest.mark.skipif(KILLS == 0, reason="DCGEN_KILLS asks for kills at random moments, minutes of them")
@pytest.mark.parametrize("writer", WRITERS)
def test_killed_at_random_moments_it_ends_as_the_run_that_was_not(writer, workplace):
    """Kills come at any moment of the command, from its start to its last file; what is finished in between
    is compared, and another run begins."""
    script, flags, resume, _ = WRITERS[writer]
    moments = random.Random(writer)
    begun = time.monotonic()
    straight = workplace / f"{writer}-reference"
    subprocess.run(command(script, *flags, "--out", str(straight)), cwd=workplace, env=ENV, check=True,
                   capture_output=True)
    duration = time.monotonic() - begun
    expected = contents(straight)

    kills = finished = 0
    while kills < KILLS or finished == 0:
        out = workplace / f"{writer}-{finished}"
        started = any(out.glob("*.state.safetensors"))
        if started and is_finished(out):                             # killed after its last file
            assert contents(out) == expected
            finished += 1
            continue
        victim = subprocess.Popen(
            command(script, *flags, "--out", str(out), *(resume if started else [])), cwd=workplace, env=ENV,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, errors = victim.communicate(timeout=None if kills >= KILLS else moments.uniform(0, duration))
        except subprocess.TimeoutExpired:
            victim.kill()
            victim.communicate()
            kills += 1
            continue
        assert victim.returncode == 0, errors
        found = contents(out)
        assert expected.keys() == found.keys()
        for name in expected:
            assert expected[name] == found[name], name
        finished += 1
    print(f"{writer}: {kills} kills, {finished} runs finished")
