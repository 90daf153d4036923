from common import *


def test_imports_point_left():
    line = "model lora autoencoder checkpoints shapes data fast quant sample evaluate train align finetune bench".split()
    for i, name in enumerate(line):
        tree = ast.parse((HERE / f"{name}.py").read_text())
        ours = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} | {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert ours & set(line[i:]) == set(), f"{name}.py imports {ours & set(line[i:])}"


def test_every_flag_in_the_readme_exists():
    commands = re.findall(r"python ([\w/]+)\.py([^\n`]*)", (HERE / "README.md").read_text())
    assert commands
    for script, rest in commands:
        known = set(re.findall(r"--[a-z0-9-]+", (HERE / f"{script}.py").read_text() + (HERE / "sample.py").read_text() + (HERE / "train.py").read_text()))
        assert set(re.findall(r"--[a-z0-9-]+", rest)) <= known, f"python {script}.py{rest}"
