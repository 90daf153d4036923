"""Small things to train: a converted model on synthetic latents, an exact distilled model, a short run of the
loop."""

from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from align import Objective, guided_flow_matching_loss
from autoencoder import AUTOENCODERS
from helpers import TINY_FLUX, random_text, scramble
from lora import add_lora
from model import DiT, DiTConfig, Flux, Text, to_deep_latent, to_deep_model
from train import Plan, Run, named_parameters_with, train


def small_pair(seed=0):
    """A small base on f8 latents with a live (not zero-gated) trunk, its conversion, paired latents of 48
    pictures and their classes."""
    torch.manual_seed(seed)
    base = DiT(DiTConfig(32, 3, 4, 2, 4, "tiny-kl-f8c4", 64, num_classes=8)).init_from_scratch()
    for p in base.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15)
    base.requires_grad_(False)
    model = to_deep_model(base, to_deep_latent(base.cfg, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    g = torch.Generator().manual_seed(seed)
    z_base = torch.randn(48, 4, 16, 8, generator=g)
    mix = torch.randn(32, 4, generator=g)
    z_dc = 0.5 * torch.einsum("oc,bchw->bohw", mix, F.avg_pool2d(z_base, 2))
    z_dc = z_dc + 0.3 * torch.randn(48, 32, 8, 4, generator=g)
    return base, model, z_dc, z_base, torch.arange(48) % 8


def small_flux(seed=0):
    """A guidance-distilled FLUX on deep latents with LoRA, its latents and prompts."""
    torch.manual_seed(seed)
    base = scramble(Flux(TINY_FLUX))
    net = to_deep_model(base, to_deep_latent(TINY_FLUX, AUTOENCODERS["tiny-dc-ae-f32c32"]))
    scramble(net.final_layer.linear)
    net.null = random_text(TINY_FLUX, 1)
    add_lora(net, 4)
    z = torch.randn(48, 32, 2, 3, generator=torch.Generator().manual_seed(seed))
    return net, z, replace(random_text(TINY_FLUX, 48), guidance=None)


FLOW = Objective()
GUIDED = Objective(guided_flow_matching_loss, guidance=(1.0, 5.0))
SHORT = Plan(steps=12, lr=1e-3, batch=8, log_every=1, save_every=5)


def run_train(out, seed=0, wrap=None, watch=None, **plan):
    """A short run of the real loop on a small converted model -> model, base, log, averaged.
    wrap: (loss function, model) -> the loss function to use"""
    base, model, z_dc, _, y = small_pair(seed)

    def flow(indices, generator):
        return FLOW.train_loss(model, z_dc[indices], y[indices], generator)

    named = named_parameters_with(model, (model.EMBEDDER, model.HEAD))
    loss = wrap(flow, model) if wrap else flow
    plan = replace(SHORT, **plan)
    log, averaged = train(Run(out), "train", model, named, loss, 48, plan, seed=seed, watch=watch)
    return model, base, log, averaged


class Distilled:
    """An exact guidance-distilled model: for guidance g it gives g v(c) - (g - 1) v(null) of two given fields
    (Eq. 4)."""
    cfg = SimpleNamespace(in_channels=3)

    def __init__(self):
        self.w = torch.tensor(2.0, requires_grad=True)
        self.guidances = []

    def null_condition(self, y):
        return replace(y, tokens=torch.zeros_like(y.tokens))

    def undistilled(self, xt, t, y):
        """v(c), and v(null) where the tokens are zero."""
        c = y.tokens.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return self.w * xt * (1 + c) + c * t.view(-1, 1, 1, 1) - 1

    def __call__(self, xt, t, y):
        g = y.guidance.view(-1, 1, 1, 1)
        self.guidances.append(y.guidance.tolist())
        return g * self.undistilled(xt, t, y) - (g - 1) * self.undistilled(xt, t, self.null_condition(y))


def distilled_batch(n=6):
    """z, t, prompts with guidance from 1 to 14, x0 for Distilled."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, 3, 4, 4, generator=g)
    t = torch.rand(n, generator=g)
    y = Text(torch.randn(n, 5, 8, generator=g), guidance=torch.linspace(1, 14, n))
    return z, t, y, torch.randn(n, 3, 4, 4, generator=g)
