"""Flags that scripts share, and what they mean: a script's command line, devices, classes, prompts, sizes.

    p = Parser(__doc__, "[--base NAME]")     one line for a wrong flag, before anything is loaded
    add_model_args(p)                        what load_base and load_autoencoder take
    device = device_here(args.device)        ValueError if it is not there
    run_main(main)                           an error of the user is one line and exit code 2
"""

import argparse
import copy
import difflib
import math
import os
import re
import signal
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model import BASES, Sampling, Text
from shapes import SHAPES
from data import imagenet_names, plain, read_prompts
from fast import bf16_is_fast


# ---- the command line ----------------------------------------------------------------------------

class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written; names such as dit-xl stay on one line."""

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """A script's command line: a short usage line, whole flags only, and one line for a wrong one.
    doc: the script's docstring; usage: the arguments to show first, as "[RUN]"."""

    def __init__(self, doc: str, usage: str = ""):
        usage = f"{usage} [options]".strip()
        super().__init__(description=doc, usage=f"%(prog)s {usage}; --help lists them",
                         formatter_class=HelpFormatter, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"unrecognised {flag}{did_you_mean(flag, self._option_string_actions)}")
        return namespace

    def typed(self, argv=None) -> dict:
        """What the command line gives, {dest: value}, without defaults."""
        bare = copy.deepcopy(self)
        bare._defaults.clear()                                       # those of set_defaults
        for action in bare._actions:
            action.default = argparse.SUPPRESS
        return vars(bare.parse_args(argv))

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            hint = did_you_mean(str(value), map(str, action.choices))
            choices = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"{value}: choose from {choices}{hint}")

    def error(self, message: str):
        # argparse writes "argument --batch: 0: at least 1"
        message = re.sub(r"^argument (\S+): (?=\S+: )", r"\1 ", message).removeprefix("argument ")
        self.exit(2, f"error: {message}\n")


def did_you_mean(word: str, known) -> str:
    # the dashes that all flags have in common make none alike
    names = {name.lstrip("-"): name for name in known}
    near = difflib.get_close_matches(word.lstrip("-"), names, n=1)
    return f"; did you mean {names[near[0]]}?" if near else ""


def within(kind, low, high):
    """A flag's type: an int or a float from low to high; nan and infinity are neither."""
    wanted = f"{low} to {high}" if high < math.inf else f"at least {low}"
    noun = "a whole number" if kind is int else "a number"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: not {noun}; {wanted}") from None
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text}: {wanted}")
        return value
    return parse


def at_least(kind, low):
    """A flag's type: an int or a float that is not below low."""
    return within(kind, low, math.inf)


def positive(text: str) -> float:
    """A flag's type: a float above zero."""
    value = at_least(float, 0)(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text}: above 0")
    return value


# ---- flags of most scripts ------------------------------------------------------------------------

def add_model_args(p: argparse.ArgumentParser, res=at_least(int, 1)):
    """Add the flags that choose a model: what load_base and load_autoencoder take. res: the type of --res.
    Returns the model's group."""
    model = add_base_args(p)
    model.add_argument(
        "--base-ae-weights", metavar="FILE",
        help="weight file of the base's own autoencoder (default: as above)")
    sides = ", or WIDTHxHEIGHT" if res is str else ""
    model.add_argument("--res", type=res, help=f"pixels a side{sides} (default: the base's)")
    add_compute_args(p)
    return model


def add_base_args(p: argparse.ArgumentParser):
    """Add --base and --weights; returns their group."""
    model = p.add_argument_group("the model")
    model.add_argument(
        "--base", default="tiny", metavar="NAME|RUN",
        help=f"pretrained model: {', '.join(BASES)}, or a finished run's folder (default tiny)")
    model.add_argument(
        "--weights", metavar="PATH",
        help="the base's weights: a file in any published layout, or a pipeline folder (default: shipped, or "
             "the model hub's cache)")
    return model


def add_compute_args(p: argparse.ArgumentParser):
    """Add --device, --dtype and --seed."""
    add_device_arg(p).add_argument(
        "--dtype", default="auto", choices=("auto", "bf16", "fp32"),
        help="arithmetic; auto = bf16 where it is faster (default auto)")
    p.add_argument("--seed", type=within(int, 0, 2**32 - 1), default=0,
                   help="seed; picture i of a batch uses seed + i (default 0)")


def add_device_arg(p: argparse.ArgumentParser):
    """Add --device, which device_here reads; returns its group."""
    group = p.add_argument_group("the device")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                       help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    return group


def device_here(device: str) -> str:
    """The device of this process, made the current one: streams, events and graphs are of the current device.
    "cuda" as torchrun means it: every process on a machine has its own. ValueError if there is none."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: unknown; give cpu, cuda, or cuda:1 for the second GPU")
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this PyTorch sees no GPU; use --device cpu, or install PyTorch "
                         "for CUDA (pytorch.org) and a driver")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    number = torch.device(device).index or 0
    count = torch.cuda.device_count()
    if number >= count:
        raise ValueError(f"--device {device}: this machine has {count} GPU(s), the last is cuda:{count - 1}")
    if device != "cuda":
        torch.cuda.set_device(device)
    return device


def dtype_of(args) -> torch.dtype:
    """The type of the arithmetic that --dtype and --device stand for."""
    bf16 = args.dtype == "bf16" or (args.dtype == "auto" and bf16_is_fast(args.device))
    return torch.bfloat16 if bf16 else torch.float32


def run_main(main):
    """Run a script's main: an error of the user, a file or memory is one line and exit code 2, an interrupt
    exits with 130. Anything else is a bug, and keeps its traceback."""
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        # from here on a second Ctrl-C kills at once, whatever thread or process is still waited for
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(130)


def message_of(error: Exception) -> str:
    """The message for the user."""
    if isinstance(error, torch.OutOfMemoryError):
        return ("the GPU's memory is full; lower --batch (in training split it with --accumulate) or --res, "
                "or give --dtype bf16")
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


# ---- what they mean --------------------------------------------------------------------------------

def choose_sampling(cfg, **given) -> Sampling:
    """How the model's authors draw with it, with what is given, unless None, in its place."""
    return replace(cfg.sampling, **{name: value for name, value in given.items() if value is not None})


def with_guidance(text: Text, guidance: float | None) -> Text:
    """The text with the same guidance number for every prompt; None: none."""
    if guidance is None:
        return replace(text, guidance=None)
    return replace(text, guidance=torch.full((len(text),), guidance, device=text.device))


def reject(condition, flag: str, why: str):
    if condition:
        raise ValueError(f"{flag}: {why}")


def check_paths(args, *names: str):
    """ValueError for a flag's path that is given and not there: found before anything is loaded."""
    for name in names:
        path = getattr(args, name)
        reject(path and not Path(path).exists(), f"{flag_of(name)} {path}", "no such file or folder")


def check_base(base: str | None, run, info: dict):
    """ValueError if a base is given that is not the one of a run with this info."""
    own = info["base"]
    another = base is not None and Path(base).resolve() != Path(own).resolve()
    reject(another, f"--base {base}", f"{run} was trained from {own}; leave --base out")


def check_finite(module: torch.nn.Module, source: str):
    """ValueError naming the first weight that is NaN or infinite: one spoils every picture."""
    for name, value in module.state_dict().items():
        # torch asks this of no number of 8 bits
        wide = value.float() if value.dtype == torch.float8_e4m3fn else value
        if not wide.isfinite().all():
            raise ValueError(f"{source}: {name} is not finite (NaN or infinity), so nothing can be drawn; "
                             "take another file, or an earlier state of the run")


def check_pictures(images: Tensor, source: str):
    """ValueError if pictures (B,3,H,W) are not finite."""
    broken = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    reject(broken, source, f"{broken} of {len(images)} pictures are not finite (NaN or infinity); try "
                           "--dtype fp32, and a --cfg-scale and a --shift nearer to the model's own")


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_size(text: str | None, res: int) -> tuple[int, int]:
    """"1024" or "1216x832", width first as everybody writes it -> (H,W) in pixels."""
    sides = str(text or res).lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"--res {text}: give pixels a side, or WIDTHxHEIGHT, as 1024 or 1216x832")
    return int(sides[-1]), int(sides[0])


def class_names(cfg, info: dict) -> tuple[str, ...]:
    """The names of a model's classes: the run's own, the bundled shapes, ImageNet's, or numbers."""
    if info.get("classes"):
        return tuple(info["classes"])
    if cfg.num_classes == len(SHAPES):
        return SHAPES
    if cfg.num_classes == 1000:
        return imagenet_names()
    return tuple(map(str, range(cfg.num_classes)))


def parse_classes(text: list[str] | None, names: tuple[str, ...], count: int) -> Tensor:
    """Class numbers or names -> (B,); None -> the first classes in turn. ValueError lists the valid ones."""
    if not text:
        return torch.arange(count) % len(names)
    numbers = {plain(name): k for k, name in reversed(list(enumerate(names)))}
    picked = []
    for word in map(str, text):
        k = numbers.get(plain(word))
        # a name goes before a number
        if k is None and word.isdecimal() and int(word) < len(names):
            k = int(word)
        if k is None:
            listed = ", ".join(names) if len(names) <= 20 else "a name"
            raise ValueError(f"--classes {word}: not a class; give 0 .. {len(names) - 1} or {listed}"
                             f"{did_you_mean(word, names)}")
        picked.append(k)
    count = max(count, len(picked))
    return torch.tensor(picked).repeat(-(-count // len(picked)))[:count]


def pick_prompts(given: list[str] | None, file: str | None, count: int | None) -> list[str]:
    """The prompts of --prompt and of a file, in turn up to `count` (default: each once)."""
    prompts = (given or []) + (read_prompts(file) if file else [])
    if not prompts:
        raise ValueError("this model draws prompts: give --prompt TEXT (again for another), or --prompts "
                         "FILE with one on a line")
    count = max(count or 0, len(prompts))
    return (prompts * -(-count // len(prompts)))[:count]


def check_flags(cfg, label: str, cfg_scale: float, flags: dict):
    """ValueError for a flag that this kind of model does not have. flags: their values as given, by name."""
    foreign = {}
    if cfg.text_encoder:
        foreign["classes"] = f"{label} draws prompts, not classes: use --prompt"
    else:
        why = f"{label} draws classes, not prompts: use --classes"
        foreign |= dict.fromkeys(("prompt", "prompts", "negative", "text_tokens"), why)
    if cfg.text_encoder and cfg_scale == 1:
        foreign["negative"] = "a negative prompt acts in classifier-free guidance: give --cfg-scale above 1"
    if not getattr(cfg, "guidance_embed", False):
        foreign["guidance"] = f"{label} reads no guidance number: it is guided in two passes, by --cfg-scale"
    for name, why in foreign.items():
        reject(flags[name] not in (None, ""), flag_of(name), why)


def guidance_of(cfg, sampling: Sampling) -> float | None:
    """The number that a distilled model reads; None for any other model."""
    return sampling.guidance if getattr(cfg, "guidance_embed", False) else None
