"""What a compiler makes of the blocks: how many kernels, and how many bytes do they move? Launches nothing.

    python experiments/kernels.py                       on a GPU: what fast.py's blocks compile to there
    python experiments/kernels.py --only flux --device cpu

    own      kernels that the compiler generated
    library  products, attention and convolutions
    MB       read and written by its own kernels, every buffer once

One block of each kind, of DC-Gen's models at the sizes of the paper's tables, modulations hoisted, in bf16
and FP8. Tensors have shapes and no memory, so that a GPU is asked for nothing but its kind.
"""

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the rooms lie beside this folder
from bench import Workload, environment, workloads
from checkpoints import check_writable, write_json
from fast import Stored, attention_priority, compile_blocks, example_condition, modulation_layers
from flags import Parser, add_device_arg, device_here, run_main
from model import FAMILIES, DiTConfig, FluxConfig
from quant import fp8_linears

# base, size and rows of a forward pass
WORKS = {"flux": ("flux-krea", 1024, 1), "sana": ("sana-1.6b", 1024, 2), "dit": ("dit-xl", 256, 2)}


class Generated(Exception):
    """The code of a block is there; all that comes after it needs a GPU."""


@contextmanager
def generated(found: dict):
    """Inside, Inductor stops once it has written a program; its kernels and bytes come into `found`."""
    from torch._inductor import ir, metrics
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    codegen = GraphLowering.codegen

    def count(graph):
        metrics.reset()
        codegen(graph)
        library = 0
        moved = 0
        for node in graph.scheduler.nodes:
            if isinstance(node, ExternKernelSchedulerNode):
                # the parts of a result are nodes too
                library += not isinstance(node.node, ir.MultiOutput)
            elif not isinstance(node, NopKernelSchedulerNode):
                moved += node.get_read_write_buffers_sizes()
        found.update(own=metrics.generated_kernel_count, library=library, MB=moved / 1e6)
        raise Generated

    GraphLowering.codegen = count
    try:
        yield
    finally:
        GraphLowering.codegen = codegen


def as_tensors(x, device):
    """Shapes -> tensors of these shapes on the device, in what a block is called with."""
    if isinstance(x, torch.Tensor):
        return torch.empty(x.shape, dtype=x.dtype, device=device)
    return type(x)(as_tensors(part, device) for part in x) if isinstance(x, tuple) else x


def blocks_of(work: Workload, rows: int, fp8: bool) -> dict[str, tuple[nn.Module, tuple]]:
    """{kind: (a block on the meta device, what the model calls it with)}, hoisted."""
    cfg = work.cfg
    one = dict(depth=1, depth_single=1) if isinstance(cfg, FluxConfig) else dict(depth=1)
    with torch.device("meta"):
        model = FAMILIES[type(cfg)](replace(cfg, **one)).bfloat16().requires_grad_(False).eval()
        z = torch.empty(rows, cfg.in_channels, *work.grid, dtype=torch.bfloat16)
        cond = example_condition(cfg, rows)
        calls = {}

        def keep(block, inputs):
            calls[type(block).__name__] = (block, inputs)

        hooks = [block.register_forward_pre_hook(keep) for block in model.blocks]
        model(z, torch.empty(rows), cond if isinstance(cfg, DiTConfig) else cond.to(dtype=torch.bfloat16))
        for hook in hooks:
            hook.remove()
        for name, layer in modulation_layers(model).items():
            wide = [m.out_features for m in layer.modules() if isinstance(m, nn.Linear)]
            model.set_submodule(name, Stored(torch.empty(rows, *wide, dtype=torch.bfloat16)))
        if fp8:
            fp8_linears(model)
    return calls


@torch.no_grad()
def count_kernels(block: nn.Module, inputs: tuple, device) -> dict:
    """{own, library, MB} of the compiled block."""
    torch._dynamo.reset()
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True), generated(found), attention_priority():
        block = block.to_empty(device=device)
        compile_blocks([block])
        try:
            block(*as_tensors(inputs, device))
        except Exception:
            # the compiler has an error of its own around what stopped it
            if not found:
                raise
    return found


def main(argv=None):
    p = Parser(__doc__, "[--only FAMILY]")
    p.add_argument("--only", choices=WORKS, help="one family")
    p.add_argument("--out", metavar="FILE", help="write the counts as JSON")
    add_device_arg(p)
    args = p.parse_args(argv)
    device = torch.device(device_here(args.device))
    if args.out:
        check_writable(args.out)
    rows = []
    for family in [args.only] if args.only else WORKS:
        name, res, batch = WORKS[family]
        work = workloads(name, res)[1]
        for fp8 in (False, True):
            for kind, call in blocks_of(work, batch, fp8).items():
                form = "FP8" if fp8 else "bf16"
                row = dict(model=work.name, res=res, batch=batch, block=kind, form=form)
                rows.append(row | count_kernels(*call, device))
                print("{model} {res}, {batch} at once, {block} in {form}: {own} own kernels, {library} of "
                      "libraries, {MB:.1f} MB".format(**rows[-1]), flush=True)
    if args.out:
        write_json(args.out, dict(device=environment(device)["device"], rows=rows))


if __name__ == "__main__":
    run_main(main)
