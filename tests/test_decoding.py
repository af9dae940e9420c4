"""The gradient of a whole clip, taken chunk by chunk, is the gradient of one autograd graph."""

import pytest
import torch
from reward_lora.selfcheck import exactness
from reward_lora.tests.families import cases
from reward_lora.training.decoding import Decoder
from reward_lora.training.gradient import Walk, silent
from reward_lora.training.judge import Objective, View, judge
from reward_lora.video_models import load_video_model
from reward_lora.video_models.precision import float64_throughout

LATENTS = 5


class EveryFrame:
    """Each frame with a weight of its own, and a curve: no two frames may be mixed up."""

    name, differentiable, needs = "every frame", True, frozenset()

    def score(self, frames, prompts, *, reference=None):
        weights = torch.linspace(0.5, 2, frames.shape[2], dtype=frames.dtype).view(1, 1, -1, 1, 1)
        return (weights * (frames - 0.3).square()).flatten(1).mean(1)


@pytest.fixture(scope="module")
def model():
    return exactness.tiny_wan()


@pytest.fixture(scope="module")
def latents(model):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, model.spec.latent_channels, LATENTS, 4, 4, generator=generator, dtype=torch.float64)


def one_graph(model, latents, view):
    leaf = latents.clone().requires_grad_()
    part = leaf[:, :, : view.latents] if view.latents else leaf
    with torch.enable_grad():
        frames = model.vae.decode(part * model._latents_std.to(part) + model._latents_mean.to(part), return_dict=False)[
            0
        ]
        frames = (frames / 2 + 0.5).clamp(0, 1)
        seen = frames[:, :, view.pick(frames.shape[2])]
        (-EveryFrame().score(seen, ["", ""])).mean().backward()
    return seen.detach(), leaf.grad


@pytest.mark.parametrize(
    "view",
    [
        View(0),
        View(0, save_memory=True),
        View(3),
        View(1, save_memory=True),
        View(0, frames=3),
        View(0, frames=4, choice="random", seed=3),
    ],
    ids=str,
)
def test_the_gradient_chunk_by_chunk_is_that_of_one_graph(model, latents, view):
    with float64_throughout(torch.float64):
        frames, expected = one_graph(model, latents, view)
    walk = Walk(model, model.conditioning([torch.zeros(2, 8)] * 2, None, latents.shape[1:]), 1.0)
    verdict = judge(walk, latents, EveryFrame(), ["", ""], Objective(), view)
    torch.testing.assert_close(verdict.frames, frames, rtol=1e-12, atol=1e-12)
    error = (verdict.gradient - expected).norm() / expected.norm()
    assert error < 1e-12
    assert expected.norm() > 0


def test_what_is_carried_matters(model, latents):
    """The check above would see a gradient that is cut between chunks."""
    decoder = Decoder(model, silent)
    clips, given = decoder.forward(latents)
    ones = [torch.ones_like(clip) for clip in clips]
    whole = decoder.backward(latents, given, ones)
    cut = torch.cat(
        [decoder._chunk_gradient(part, carried, one, ())[0]
         for part, carried, one in zip(decoder.split(latents), given, ones, strict=True)], dim=2,
    )  # fmt: skip
    assert (whole - cut).norm() / whole.norm() > 0.01


def test_chunks_that_nobody_looks_at_are_not_decoded_again(model, latents):
    ticks = []
    decoder = Decoder(model, ticks.append)
    clips, given = decoder.forward(latents)
    gradients = [torch.zeros_like(clip) for clip in clips]
    gradients[1] += 1
    ticks.clear()
    gradient = decoder.backward(latents, given, gradients)
    assert len(ticks) == 2  # chunks 1 and 0
    assert gradient[:, :, 2:].abs().max() == 0
    assert gradient[:, :, 0].abs().max() > 0


@pytest.mark.parametrize("case", {case.family: case for case in cases()}.values(), ids=str)
def test_every_familys_chunks_are_its_decoder_and_so_is_their_gradient(case, tmp_path):
    case.write(tmp_path / "model")
    model = load_video_model(case.source(tmp_path / "model"), dtype="float32", text=False)
    spec, (width, height, _) = model.spec, case.size
    shape = (spec.latent_channels, 5, height // spec.spatial_stride, width // spec.spatial_stride)
    latents = model.initial_latents(shape, [1])
    assert sum(model.chunks(5)) == 5
    leaf = latents.clone().requires_grad_()
    with torch.enable_grad():
        frames = model.decode(leaf)
        EveryFrame().score(frames, [""]).sum().backward()
    for save_memory in (False, True):
        decoder = Decoder(model, silent, save_memory)
        clips, given = decoder.forward(latents)
        torch.testing.assert_close(torch.cat(clips, dim=2), frames.detach(), rtol=1e-4, atol=1e-5)
        seen = torch.cat(clips, dim=2).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(EveryFrame().score(seen, [""]).sum(), seen)
        found = decoder.backward(latents, given, gradient.split([clip.shape[2] for clip in clips], dim=2))
        assert (found - leaf.grad).norm() <= 1e-4 * leaf.grad.norm()
