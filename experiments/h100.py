"""The first half hour on an H100: what the hardware reaches, and whether the models draw as they should.

    python experiments/h100.py facts                  versions, ceilings, attention, convolutions, products
    python experiments/h100.py draw 1024 2048 4096    DC-Gen-FLUX: is it right, how fast, what takes the time
    python experiments/h100.py base 1024 2048 4096    FLUX.1-Krea, by single steps
    python experiments/h100.py tokens                 SANA and DiT in large batches, without the decoder

Every entry is printed and kept in DIR/PART.json as soon as it is finished; one that fails is kept with its
reason, and the rest goes on. Nothing begins after --deadline SECONDS. Variants, protocol and seeds are
bench.py's. As there, an error against eager is the rounding of bf16 below 0.03, of FP8 below 0.15.

Three commands of at most ten minutes each:
    1. pytest -q tests/test_{fast,bench}.py -k "captured or cudnns or layouts or fp8_blocks"
       python experiments/h100.py facts --deadline 80
       python experiments/h100.py draw 1024 --deadline 150
    2. python experiments/h100.py draw 4096 2048 --deadline 200
       python experiments/h100.py base 4096 2048 1024 --deadline 250
    3. python bench.py --res 1024 --switches eager attention hoist decoder uint8 graph fp8 --repeats 6
           --warm 4 --minutes 4.5 --out runs/h100/b1k
       python experiments/h100.py tokens --deadline 150
and with what is left:
       python bench.py --model flux-krea --res 1024 --train --repeats 6 --out runs/h100/train

Without a GPU small twins run on the CPU: the same code, not the same figures.
"""

import copy
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import cycle
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
import bench
from autoencoder import ae_config, build_autoencoder
from bench import Settings, Variant, Workload, attempt, build_pair, workloads
from checkpoints import write_json
from fast import example_condition, synchronized_time
from flags import Parser, at_least, positive, run_main
from model import FAMILIES, attention
from quant import e4m3_rows

ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Sizes:
    """How large the measurements of `facts` and `tokens` are."""
    matrix: int                         # side of a square product
    copy_bytes: int
    sustained: float                    # seconds until a GPU has slowed down to its power limit
    repeats: int                        # calls in a row that are timed together
    layers: int                         # most shapes of layers that are timed, of each model
    attentions: dict                    # (B, N, M, heads, d); where N is not M, a mask hides some of the keys
    state: tuple                        # (B heads, d, N) of SANA's linear attention
    batches: tuple                      # (base, resolution, batch)


if ON_GPU:
    SETTINGS = Settings(
        torch.device("cuda"), torch.bfloat16, bench.SWITCHES, compiler={}, repeats=10, warm=8.0)
    SIZES = Sizes(
        matrix=8192, copy_bytes=2**30, sustained=10.0, repeats=20, layers=10,
        attentions={
            "FLUX 768": (1, 768, 768, 24, 128),
            "FLUX 1536": (1, 1536, 1536, 24, 128),
            "FLUX 4608": (1, 4608, 4608, 24, 128),
            "FLUX 16896": (1, 16896, 16896, 24, 128),
            "DiT 256": (128, 256, 256, 16, 72),
            "DiT 64": (128, 64, 64, 16, 72),
            "SANA's text": (128, 256, 300, 20, 112),
        },
        state=(128 * 70, 32, 256),
        batches=(("sana-1.6b", 1024, 64), ("dit-xl", 256, 128), ("dit-xl", 512, 64)))
else:
    SETTINGS = Settings(
        torch.device("cpu"), torch.float32, bench.switches_on("cpu"), compiler=dict(backend="eager"),
        num_steps=4, repeats=3, warm=0.0)
    SIZES = Sizes(
        matrix=64, copy_bytes=2**20, sustained=0.1, repeats=2, layers=3,
        attentions={"96": (1, 96, 96, 4, 32), "text": (2, 16, 24, 2, 16)},
        state=(4, 32, 256),
        batches=(("sana-1.6b", 1024, 2), ("dit-xl", 256, 2)))


# ---- drawing -------------------------------------------------------------------------------------
# a part yields its entries, each a name and what was found, as soon as they are there

ROWS = (SETTINGS.fastest, "fp8")


def make(work: Workload, parts: tuple, row: str, num_steps=SETTINGS.num_steps, **options) -> Variant:
    """The variant of a row of bench.py's table. parts: (model, autoencoder)."""
    switches = bench.switches_up_to(row, SETTINGS.device)
    return Variant(work, *parts, switches, compiler=SETTINGS.compiler, num_steps=num_steps, **options)


def pair_of(name: str, res: int) -> tuple[Workload, Workload]:
    """The base and its DC-Gen sibling; without a GPU their small twins."""
    return workloads(name, res, twin=not ON_GPU)


def models_of(pair: tuple[Workload, Workload]) -> list[tuple[nn.Module, nn.Module]]:
    return build_pair(pair, SETTINGS.device, SETTINGS.dtype)


def noise_of(variant: Variant) -> Tensor:
    """The same noise for every variant of a size."""
    torch.manual_seed(1)
    return variant.noise()


def draw(res: int, until: float):
    """DC-Gen-FLUX in bf16 and in FP8, all switches on: times of an image and its parts, errors against
    eager, kernels of a step and of decoding. until: the deadline, as a time.perf_counter()."""
    pair = pair_of("flux-krea", res)
    make_row = partial(make, pair[1], models_of(pair)[1])
    eager = make_row("eager")
    x0 = noise_of(eager)
    latent = eager.denoise(x0, 3)
    picture = eager.decode(latent)
    bench.free()

    # half of the time that is left: kernels and other resolutions need theirs
    now = time.perf_counter()
    quantised = {}
    makers = {row: partial(make_row, row, quantised=quantised) for row in ROWS}
    rows, variants = bench.measure(makers, SETTINGS.repeats, SETTINGS.warm, now + (until - now) / 2)
    for name, row in rows.items():
        if name in variants:
            row["step_ms"] = row["denoise_ms"] / variants[name].num_steps
        yield name, row
    # a fast row that draws something else is no row
    for name, variant in variants.items():
        yield f"{name}, errors", tried(errors, variant, x0, latent, picture)
    for name, variant in variants.items():
        yield f"{name}, a step", tried(kernels, partial(variant.denoise, x0, 1))
    if SETTINGS.fastest in variants:
        decode = partial(variants[SETTINGS.fastest].decode, latent)
        yield "decoding", tried(kernels, decode)


def errors(variant: Variant, x0: Tensor, latent: Tensor, picture: Tensor) -> dict:
    """How far a variant's latent after three steps is from eager's, and its picture of eager's latent."""
    drawn = variant.decode(latent)
    return dict(
        latent=bench.relative_error(variant, x0, 3, latent),
        picture=((drawn - picture).norm() / picture.norm()).item())


def base(res: int):
    """FLUX.1-Krea, as fast as it gets in bf16, and eager: three times one step and a decode, scaled."""
    pair = pair_of("flux-krea", res)
    parts = models_of(pair)[0]
    for row in (SETTINGS.fastest, "eager"):
        maker = partial(make, pair[0], parts, row)
        # where a step takes a second each has the memory for itself
        yield row, bench.measure({row: maker}, 3, steps=1)[0][row]
        bench.free()


def tokens(name: str, res: int, batch: int):
    """SANA or DiT and its DC-Gen sibling in a large batch: a step's time, images a minute, its kernels."""
    pair = pair_of(name, res)
    models = models_of(pair)
    # DC-Gen first: if time ends early, its figures are there
    for i in (1, 0):
        for row in ROWS:
            # a variant is made within its entry: it may be too large, and it is gone afterwards
            maker = partial(make, pair[i], models[i], row, num_steps=4, batch=batch)
            yield f"{pair[i].name}, {row}", tried(time_steps, maker)
            bench.free()


def time_steps(maker) -> dict:
    """Four steps of a variant's batch, scaled to an image's; the decoder is left out."""
    variant = maker()
    x0 = noise_of(variant)
    # compiles, tunes and captures
    bench.check_magnitude(variant.work.name, variant.denoise(x0))
    seconds = seconds_of(partial(variant.denoise, x0)) / variant.num_steps
    image = seconds * variant.work.num_steps
    rate = 60 * variant.sampling.batch / image
    step = kernels(partial(variant.denoise, x0, 1))
    return dict(step_ms=1e3 * seconds, images_per_minute=rate) | step


# ---- facts ---------------------------------------------------------------------------------------

def versions():
    """What the figures were made with."""
    packages = ("torch", "triton", "einops", "numpy", "safetensors", "matplotlib", "transformers")
    yield "packages", {package: version(package) for package in packages}
    # Triton needs a C compiler
    yield "machine", bench.environment(SETTINGS.device) | dict(
        python=platform.python_version(), cpus=os.cpu_count(), gcc=shutil.which("gcc") is not None)
    yield "GPU", nvidia_smi("name,driver_version,power.limit,clocks.max.sm,memory.total")


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def nvidia_smi(fields: str) -> dict[str, str]:
    """What nvidia-smi reports of the first GPU, by field; empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return dict(zip(fields.split(","), lines[0].split(", "))) if lines else {}


def seconds_of(f, repeats: int = 1) -> float:
    """Mean seconds of a call of f among so many in a row, after a first one that compiles and tunes."""
    f()
    start = synchronized_time(SETTINGS.device)
    if not ON_GPU:
        for _ in range(repeats):
            f()
        return (time.perf_counter() - start) / repeats
    first = torch.cuda.Event(enable_timing=True)
    last = torch.cuda.Event(enable_timing=True)
    # a pause of some 10 ms, in which calls queue up: short kernels would otherwise wait for Python
    torch.cuda._sleep(20_000_000)
    first.record()
    for _ in range(repeats):
        f()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=SETTINGS.device, dtype=SETTINGS.dtype)


def rates(seconds: float, flops: float) -> dict:
    return dict(ms=1e3 * seconds, tflop_per_s=flops / seconds / 1e12)


def ceilings():
    """A copy's GB/s; a product's TFLOP/s at once, and after seconds of products, when power is the limit."""
    power = "clocks.sm,power.draw,temperature.gpu"
    yield "at rest", nvidia_smi(power)
    source = torch.empty(SIZES.copy_bytes, device=SETTINGS.device, dtype=torch.uint8)
    copied = 2 * source.nbytes / seconds_of(source.clone, 5)         # read and written
    yield "copy", dict(gb_per_s=copied / 1e9)

    n = SIZES.matrix
    product = partial(torch.matmul, random(n, n), random(n, n))
    yield "product at once", rates(seconds_of(product, 3), 2 * n**3)
    seconds = []
    end = time.perf_counter() + SIZES.sustained
    while time.perf_counter() < end:
        seconds.append(seconds_of(product, 10 * SIZES.repeats))
    # clock and power are read while products are still queued: they fall as soon as the GPU rests
    for _ in range(40 * SIZES.repeats):
        product()
    found = nvidia_smi(power)
    slow = statistics.median(seconds[len(seconds) // 2 :])
    yield "product, sustained", rates(slow, 2 * n**3) | found


def attentions():
    """Softmax attention as the blocks call it, by the library that computes it, and its error."""
    for name, shape in SIZES.attentions.items():
        for kind in backends(masked=shape[1] != shape[2]):
            yield f"{name}, {kind.name}", tried(time_attention, kind, *shape)


def backends(masked: bool) -> list[SDPBackend]:
    """What can compute attention here: with a mask FlashAttention cannot, except on a CPU."""
    if not ON_GPU:
        return [SDPBackend.FLASH_ATTENTION]
    other = SDPBackend.EFFICIENT_ATTENTION if masked else SDPBackend.FLASH_ATTENTION
    return [SDPBackend.CUDNN_ATTENTION, other]


def time_attention(kind: SDPBackend, B: int, N: int, M: int, heads: int, d: int) -> dict:
    # heads behind tokens, as the blocks' linear maps leave them
    q = random(B, N, heads, d)
    k = random(B, M, heads, d)
    v = random(B, M, heads, d)
    mask = None
    if N != M:
        lengths = torch.randint(8, M, (B, 1), device=q.device)
        mask = torch.arange(M, device=q.device) < lengths            # B M
    with sdpa_kernel(kind):
        out = attention(q, k, v, mask)
        seconds = seconds_of(partial(attention, q, k, v, mask), SIZES.repeats)
    found = rates(seconds, 4 * B * heads * N * M * d)
    # the reference has the whole table of scores in float32
    if B * heads * N * M < 2**31:
        with sdpa_kernel(SDPBackend.MATH):
            want = attention(q.float(), k.float(), v.float(), mask)
        found["error"] = ((out - want).norm() / want.norm()).item()
    return found


@dataclass
class Call:
    """A layer, the shape of what it is called with, its arithmetic, and how often that happens."""
    layer: nn.Module
    shape: torch.Size
    flops: float
    times: int = 0


@torch.no_grad()
def layer_calls(kind: type, f, *args) -> dict[str, Call]:
    """The calls of layers of one kind, nn.Linear or nn.Conv2d, within f(*args), by the shapes of weight and
    input, those with the most arithmetic first. Run it on the meta device."""
    calls = {}

    def count(layer, inputs, out):
        if isinstance(layer, kind):
            shape = inputs[0].shape
            name = f"{list(layer.weight.shape)} of {list(shape)}"
            # one multiplication with its addition for each number of a filter and of the output
            flops = 2 * out.numel() * layer.weight[0].numel()
            call = calls.setdefault(name, Call(layer, shape, flops))
            call.times += 1

    # a hook on all modules, since those of a layer would be copied with it
    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        f(*args)
    finally:
        hook.remove()
    heaviest = sorted(calls, key=lambda name: -calls[name].flops * calls[name].times)
    return {name: calls[name] for name in heaviest[: SIZES.layers]}


def decoder_calls(work: Workload) -> dict[str, Call]:
    """Convolutions of decoding one picture, in the strips or tiles that the decoder makes of it."""
    with torch.device("meta"):
        ae = build_autoencoder(ae_config(work.cfg.ae)).eval()
        z = torch.empty(1, work.cfg.in_channels, *work.grid)
        return layer_calls(nn.Conv2d, ae.decode_raw, z)


def model_calls(work: Workload, kind: type, batch: int = 1) -> dict[str, Call]:
    """Layers of one kind in a forward pass of the model."""
    with torch.device("meta"):
        model = FAMILIES[type(work.cfg)](work.cfg).eval()
        z = torch.empty(batch, work.cfg.in_channels, *work.grid)
        return layer_calls(kind, model, z, torch.empty(batch), example_condition(work.cfg, batch))


def convolutions():
    """The heaviest convolutions of DC-Gen-FLUX's decoders at 4K and 1K, and of SANA's blocks at 1K, channels
    last; the product in SANA's linear attention, which is in float32, with and without TF32."""
    sana, res, batch = SIZES.batches[0]
    calls = {
        "4K": decoder_calls(pair_of("flux-krea", 4096)[1]),
        "1K": decoder_calls(pair_of("flux-krea", 1024)[1]),
        "SANA": model_calls(pair_of(sana, res)[1], nn.Conv2d, 2 * batch)}        # guidance: two passes
    for model in calls:
        for name, call in calls[model].items():
            yield f"{model} {name}", tried(time_convolution, call)

    heads, d, N = SIZES.state
    v = torch.randn(heads, d, N, device=SETTINGS.device)
    k = torch.randn(heads, N, d, device=SETTINGS.device)
    for precision in ("high", "highest"):                            # the default last
        torch.set_float32_matmul_precision(precision)
        seconds = seconds_of(partial(torch.matmul, v, k), SIZES.repeats)
        yield f"SANA's state, {precision}", rates(seconds, 2 * heads * d * d * N)


@torch.no_grad()
def time_convolution(call: Call) -> dict:
    layer = bench.init_random_(copy.deepcopy(call.layer), SETTINGS.device, SETTINGS.dtype)
    layer = layer.to(memory_format=torch.channels_last)
    x = random(*call.shape).contiguous(memory_format=torch.channels_last)
    seconds = seconds_of(partial(layer, x), 5)
    return dict(calls=call.times) | rates(seconds, call.flops)


def products():
    """The heaviest linear maps of a step of DC-Gen-FLUX at 1K and 4K: in bf16, with GELU, and in FP8."""
    for res in (1024, 4096):
        calls = model_calls(pair_of("flux-krea", res)[1], nn.Linear)
        for name, call in calls.items():
            M = call.shape[:-1].numel()
            N, K = call.layer.weight.shape
            yield f"{res} {name}", dict(calls=call.times) | tried(time_product, M, N, K)


def time_product(M: int, N: int, K: int) -> dict:
    """ms and TFLOP/s of (M,K) -> (M,N) in every way that it can be multiplied; the error in FP8."""
    # three weights in turn: in a model a weight comes from memory, not from the cache
    weights = [random(N, K) * K**-0.5 for _ in range(3)]
    x = random(M, K)
    bias = random(N)
    bf16_bias = bias.bfloat16()
    codes, scale = e4m3_rows(x)
    quantised = []
    for weight in weights:
        rows, scales = e4m3_rows(weight)
        quantised.append((rows.t(), scales.t().contiguous()))

    def linear(weight: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    def gelu(weight: Tensor) -> Tensor:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)

    def fp8(weight: tuple, **inside) -> Tensor:
        columns, scales = weight
        return torch._scaled_mm(
            codes, columns, scale, scales, out_dtype=torch.bfloat16, use_fast_accum=True, **inside)

    def fp8_bias(weight: tuple) -> Tensor:
        return fp8(weight, bias=bf16_bias)

    # a way that this GPU or this version of torch refuses leaves the others
    found = {}
    for way, operands in ((linear, weights), (gelu, weights), (fp8, quantised), (fp8_bias, quantised)):
        seconds, failure = attempt(seconds_of, in_turn(way, operands), SIZES.repeats)
        if failure:
            found["failed"] = f"{way.__name__}: {failure}"
            continue
        timing = rates(seconds, 2 * M * N * K)
        found |= {f"{way.__name__} {unit}": value for unit, value in timing.items()}
    if "failed" not in found:
        want = F.linear(x.float(), weights[0].float(), bias.float())
        found["fp8 error"] = ((fp8_bias(quantised[0]) - want).norm() / want.norm()).item()
    return found


def in_turn(f, operands: list):
    """A function without arguments: f of one operand after the other, over and over."""
    turn = cycle(operands)

    def call():
        return f(next(turn))

    return call


# ---- what a call spends its time on --------------------------------------------------------------

def kernels(f) -> dict:
    """ms of a call of f, and of its kernels: together, by kind with their number, and the largest. On a CPU
    operators stand for kernels."""
    # without the profiler, which slows the host down
    wall = seconds_of(f)
    calls = bench.profile(f, SETTINGS.device)
    found = dict(wall_ms=1e3 * wall, **bench.by_kind(calls))
    largest = sorted(calls, key=lambda call: call.ms, reverse=True)[:15]
    found["largest"] = [f"{call.ms:.3f} ms, {call.count} x {call.name[:70]}" for call in largest]
    return found


# ---- keeping -------------------------------------------------------------------------------------

def tried(f, *args) -> dict:
    """What f(*args) finds, or why it failed."""
    found, failure = attempt(f, *args)
    return dict(failed=failure) if failure else found


class Record:
    """Keeps what the parts find, each in a file of the folder. No entry begins after the time.perf_counter()
    `until`. failed: the names of what did."""

    def __init__(self, folder: Path, until: float):
        self.folder = folder
        self.until = until
        self.failed = []

    def part(self, name: str, entries):
        """Run a part, a generator of entries; keep and print each as soon as it is there, and why the part
        failed, if it did."""
        found = {}
        file = self.folder / f"{name.replace(' ', '-')}.json"
        # the deadline is looked up before each entry, as a part may be as long as all others together
        while time.perf_counter() < self.until:
            start = time.perf_counter()
            entry, failure = attempt(next, entries, None)
            if failure:
                entry = ("the rest", dict(failed=failure))
            # a generator that has failed is at its end too
            if entry is None:
                break
            key, found[key] = entry
            write_json(file, found)
            self.show(f"[{name}] {key}", found[key], time.perf_counter() - start)
        else:
            print(f"[{name}] no time left", flush=True)
        # its models go with it
        entries.close()
        bench.free()

    def show(self, name: str, entry: dict, seconds: float):
        if "failed" in entry:
            self.failed.append(name)
        values = [f"{key} {bench.cell(value)}" for key, value in entry.items() if key != "largest"]
        print(f"{name}: {', '.join(values)}  ({seconds:.1f} s)", flush=True)
        for line in entry.get("largest", [])[:5]:
            print(f"    {line}", flush=True)


# ---- main ----------------------------------------------------------------------------------------

FACTS = (versions, ceilings, attentions, convolutions, products)


def parts_of(name: str, sizes: list[int], until: float) -> dict:
    """The parts that a name stands for, by their own names: generators, of which none has begun."""
    if sizes and name in ("facts", "tokens"):
        raise ValueError(f"{name} {sizes[0]}: resolutions are for draw and base; leave them out")
    sizes = sizes or [1024, 2048, 4096]
    match name:
        case "facts":
            return {fact.__name__: fact() for fact in FACTS}
        case "draw":
            return {f"draw {res}": draw(res, until) for res in sizes}
        case "base":
            return {f"base {res}": base(res) for res in sizes}
        case "tokens":
            return {f"tokens {model} {res}": tokens(model, res, batch) for model, res, batch in SIZES.batches}


def main(argv=None):
    start = time.perf_counter()
    p = Parser(__doc__, "facts|draw|base|tokens")
    p.add_argument("part", choices=("facts", "draw", "base", "tokens"))
    p.add_argument("res", type=at_least(int, 1), nargs="*",
                   help="pixels a side, for draw and base (default 1024 2048 4096)")
    p.add_argument("--deadline", type=positive, default=540.0, metavar="SECONDS",
                   help="nothing begins later than this after the start (default 540)")
    p.add_argument("--out", metavar="DIR", type=Path, default=os.environ.get("OUT", "runs/h100"),
                   help="where results are kept (default: the variable OUT, or runs/h100)")
    args = p.parse_args(argv)
    record = Record(args.out, start + args.deadline)
    parts = parts_of(args.part, args.res, record.until)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = ON_GPU                          # shapes are fixed
    if not ON_GPU:
        print("no GPU: small twins on the CPU; these are not a GPU's figures")
    for name, entries in parts.items():
        record.part(name, entries)
    if record.failed:
        sys.exit(f"{len(record.failed)} entries failed: {', '.join(record.failed)}")


if __name__ == "__main__":
    run_main(main)
