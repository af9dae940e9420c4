"""LoRAs in the precision of their layers while no gradient is taken: nothing but rounding, and in 16 bits alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from reward_lora.lora.adapter import at_input_precision, inject_new, inject_weights
from reward_lora.lora.files import LoraModule, MatchedLora
from reward_lora.selfcheck.exactness import LATENT_SHAPE, relative_error, tiny_wan
from reward_lora.training.gradient import Walk, rollout
from reward_lora.training.schedule import Plan
from torch import nn

STEPS = 4
STRENGTHS = (0.7, 0.0, -1.0)


def walk_of(model, tick=lambda phase: None):
    text = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    return Walk(model, model.conditioning([text], [text * 0], LATENT_SHAPE), 3.0, tick=tick)


def as_peft_computes(walk, x):
    sigmas = walk.model.sigmas(STEPS)
    with torch.no_grad():
        for i in range(STEPS):
            x = walk.step(x, walk.predict(x, sigmas[i]), Plan(sigmas, ()), i)
    return x


def filled_wan(dtype):
    """A tiny Wan whose weights are numbers of 16 bits, whatever they are stored in, and a large LoRA."""
    model = tiny_wan(dtype=torch.float32)
    for number_type in (torch.bfloat16, dtype):
        nn.Module.to(model.transformer, number_type)
    adapter = inject_new(model.transformer, ("all-linear",), rank=2, alpha=2.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model, adapter


def test_in_float32_a_rollout_is_the_same_to_the_bit():
    model, _ = filled_wan(torch.float32)
    walk, noise = walk_of(model), model.initial_latents(LATENT_SHAPE, [4])
    assert torch.equal(rollout(walk, noise, Plan(model.sigmas(STEPS), ()))[0], as_peft_computes(walk, noise))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_near_to_float32_as_before_and_the_loras_weights_stay(dtype):
    exact, _ = filled_wan(torch.float32)
    model, adapter = filled_wan(dtype)
    before = {name: (p, p.clone()) for name, p in adapter.parameters().items()}
    ours, theirs = [], []
    for seed in range(8):
        noise = model.initial_latents(LATENT_SHAPE, [seed])
        wanted = as_peft_computes(walk_of(exact), noise)
        found = rollout(walk_of(model), noise, Plan(model.sigmas(STEPS), ()))[0]
        ours.append(relative_error({"": found}, {"": wanted}))
        theirs.append(relative_error({"": as_peft_computes(walk_of(model), noise)}, {"": wanted}))
    assert ours != theirs
    assert sum(ours) < 1.15 * sum(theirs)
    for name, parameter in adapter.parameters().items():
        same, values = before[name]
        assert parameter is same
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, values)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_a_layer_adds_every_lora_at_its_strength_in_one_rounding_each(shape):
    generator = torch.Generator().manual_seed(5)

    def random(*size):
        return torch.randn(*size, generator=generator).bfloat16().float()

    network = nn.Sequential(nn.Linear(8, 6, dtype=torch.bfloat16))
    base, x = copy.deepcopy(network), random(*shape).bfloat16()
    pairs = [(random(3, 8), random(6, 3)) for _ in range(3)]
    for index, ((down, up), strength) in enumerate(zip(pairs, STRENGTHS, strict=True)):
        lora = MatchedLora({"0": LoraModule(down, up, 3.0)}, (), "a")
        inject_weights(network, lora, strength, f"lora_{index}")
    wanted = base.double()(x.double())
    for (down, up), strength in zip(pairs, STRENGTHS, strict=True):
        wanted = wanted + strength * x.double() @ down.double().T @ up.double().T
    model = SimpleNamespace(denoisers={"transformer": network})
    with torch.no_grad(), at_input_precision(model), at_input_precision(model):
        found = network(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 4 * 2**-9 * wanted.abs().max()


def test_whatever_happens_the_layers_are_as_they_were():
    model, _ = filled_wan(torch.bfloat16)
    kinds = [type(module) for module in model.transformer.modules()]

    def stop(phase):
        assert [type(module) for module in model.transformer.modules()] != kinds
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollout(walk_of(model, stop), model.initial_latents(LATENT_SHAPE, [4]), Plan(model.sigmas(STEPS), ()))
    assert [type(module) for module in model.transformer.modules()] == kinds
