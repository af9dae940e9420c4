"""VideoCrafter2 against VADER's numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..lora.adapter import inject_weights, linear_shapes
from ..lora.match import match
from ..lora.names import ModuleNames, split_key
from ..lora.read import VADER_ALPHA, read_lora
from ..lora.weights import LoraFile
from ..video_models import videocrafter_keys as keys
from ..video_models.videocrafter import VideoCrafterModel
from ..video_models.videocrafter_ddim import Diffusion, ddim_factors, ddim_step, ddim_timesteps, scaled_diffusion
from ..video_models.videocrafter_files import describe
from ..video_models.videocrafter_unet import VideoCrafterUNet
from .parity import relative, tolerance
from .report import Line

if TYPE_CHECKING:
    from .fixtures import Fixture

OMITTED_FPS = 16
"""What the publisher's network takes when nobody says a frame rate."""


def build(fixture: Fixture, eta: float = 1.0) -> VideoCrafterModel:
    """The fixture's UNet with a tiny VAE nobody asks."""
    from diffusers import AutoencoderKL

    meta = fixture.meta
    weights = fixture.tensors(meta.get("unet") or "model.safetensors")
    options = meta.get("unet_config")
    network = VideoCrafterUNet(keys.published_unet_config(options) if options else keys.unet_config(weights))
    network.load_state_dict(weights)
    vae = AutoencoderKL(norm_num_groups=1, block_out_channels=(1,))
    return VideoCrafterModel(describe("fixture", network, vae, eta), network, vae, eta=eta, diffusion=diffusion(meta))


def diffusion(meta: Mapping) -> Diffusion:
    """The noise a fixture speaks of."""
    names = {
        "start": "linear_start",
        "end": "linear_end",
        "timesteps": "timesteps",
        "scale_start": "scale_a",
        "scale_end": "scale_b",
        "scale_steps": "mid_step",
    }
    given = meta.get("diffusion") or {}
    return scaled_diffusion(**{ours: given[name] for ours, name in names.items() if name in given})


def read(path: Path, meta: Mapping) -> LoraFile:
    """A LoRA of VADER's, which does not hold its alpha: the reader is told only one that VADER does not use."""
    alpha = meta.get("lora_alpha", VADER_ALPHA)
    return read_lora(path, None if alpha == VADER_ALPHA else float(alpha))


def predict(model: VideoCrafterModel, x: Tensor, timesteps: Tensor, context: Tensor, fps: Tensor) -> Tensor:
    """The UNet's output sample by sample, each at its own timestep."""
    levels = model.diffusion.levels
    outputs = [
        model.predict(x[i : i + 1], levels[timesteps[i]], {"text": context[i : i + 1], "fps": fps[i : i + 1]})
        for i in range(len(x))
    ]
    return torch.cat(outputs)


def check_unet(fixture: Fixture) -> Iterator[Line]:
    """The UNet at the given frame rates, at one for all, and at none."""
    io, model = fixture.tensors("io.safetensors"), build(fixture)
    allowed = tolerance(fixture, "rel_rms", 3e-6)
    for key in sorted(name for name in io if name.startswith("out")):
        if found := re.fullmatch(r"out_fps_(?:int(\d+)|omitted)", key):
            fps = torch.full_like(io["timesteps"], int(found[1] or OMITTED_FPS))
        else:
            fps = io["fps"]
        with torch.no_grad():
            yield Line(
                key, "", relative(predict(model, io["x"], io["timesteps"], io["context"], fps), io[key]), allowed
            )


def check_lora(fixture: Fixture) -> Iterator[Line]:
    """VADER's LoRA in the UNet: output, the gradient of every matrix, and bare again (bit for bit)."""
    io, model = fixture.tensors("io.safetensors"), build(fixture)
    names, shapes = model.lora_names("transformer"), linear_shapes(model.unet)
    allowed = tolerance(fixture, "out", 1e-5)
    inputs = [io[name] for name in ("x", "timesteps", "context", "fps")]
    with torch.no_grad():
        base = predict(model, *inputs)
    yield Line("base", "", relative(base, io["out_base"]), allowed)
    reference = fixture.tensors("lora_grads.safetensors")
    for path in sorted(fixture.folder.glob("*.pt")) + [fixture.folder / "lora.safetensors"]:
        matched = match(read(path, fixture.meta), names, shapes)
        if matched.unmatched:
            raise ValueError(f"LoRA modules without a place: {', '.join(matched.unmatched[:3])}")
        adapter = inject_weights(model.unet, matched)
        adapter.train()
        with torch.enable_grad():
            output = predict(model, *inputs)
            (output * io["grad_weight"]).mean().backward()
        yield Line(f"{path.name}, output", "", relative(output.detach(), io["out_lora"]), allowed)
        parameters, places = adapter.parameters(), ModuleNames(names)
        errors = {}
        for key, gradient in reference.items():
            module, part = split_key(key)
            errors[key] = relative(parameters.pop(f"{places.find(module)}.{part}").grad, gradient)
        if parameters:
            raise ValueError(f"the fixture has no gradient for {min(parameters)}")
        worst = max(errors, key=errors.get)
        yield Line(f"{path.name}, gradient of {worst}", "", errors[worst], tolerance(fixture, "grads", 1e-4))
        adapter.remove()
    with torch.no_grad():
        same = torch.equal(predict(model, *inputs), base)
    yield Line("LoRA removed, to the bit", "", 0.0 if same else float("inf"), 0.0)


def check_solver(fixture: Fixture) -> Iterator[Line]:
    """Tables, schedules, single steps, and a whole walk with the UNet."""
    io, noise = fixture.tensors("io.safetensors"), diffusion(fixture.meta)
    yield from _tables(io, noise, tolerance(fixture, "schedule", 1e-7))
    yield from _single_steps(fixture, io, noise, tolerance(fixture, "single steps", 1e-5))
    yield from _loop(fixture, io, tolerance(fixture, "loop_out", 1e-4))


def _tables(io: Mapping[str, Tensor], noise: Diffusion, allowed: float) -> Iterator[Line]:
    for name, ours in (("alphas_cumprod", noise.alphas), ("scale_arr", noise.scales)):
        yield Line(name, "", _largest(ours, io[name][: len(ours)]), allowed)
    for key in sorted(io):
        if not (found := re.fullmatch(r"s(\d+)_eta(\d+)_timesteps", key)):
            continue
        prefix, steps, eta = key.removesuffix("timesteps"), int(found[1]), float(found[2])
        times = ddim_timesteps(noise, steps)[::-1]
        before = [0, *times[:-1]]
        fresh = [
            ddim_factors(noise, noise.levels[t], noise.levels[p], eta)[-1] for t, p in zip(times, before, strict=True)
        ]
        walk = {
            "timesteps": torch.tensor(times),
            "alphas": noise.alphas[times],
            "alphas_prev": noise.alphas[before],
            "sigmas": torch.tensor(fresh, dtype=torch.float64),
            "scale": noise.scales[times],
            "scale_prev": noise.scales[before],
        }
        for name, values in walk.items():
            yield Line(prefix + name, "", _largest(values, io[prefix + name]), allowed)


def _largest(ours: Tensor, reference: Tensor) -> float:
    """Largest difference."""
    return float((ours.double() - reference).abs().max()) if ours.shape == reference.shape else float("inf")


def _single_steps(fixture: Fixture, io: Mapping[str, Tensor], noise: Diffusion, allowed: float) -> Iterator[Line]:
    for i, t in enumerate(io["q_t"]):  # noised as in training, a step to 0 must find the signal again
        x0 = ddim_step(noise, io["q_xt"][i], io["q_noise"][i], noise.levels[t], 0.0, eta=0.0)
        yield Line(f"signal of t = {int(t)}", "", relative(x0, io["q_x0"][i]), allowed)
    steps = int(re.search(r"\d+", str(fixture.meta.get("single_step_schedule", 25)))[0])
    times = [0, *ddim_timesteps(noise, steps)[::-1]]
    cond, uncond = io["step_eps_cond"], io["step_eps_uncond"]
    guided = uncond + float(fixture.meta["guidance_scale"]) * (cond - uncond)
    for key in sorted(io):
        if not (found := re.fullmatch(r"step_i(\d+)_eta(\d+)_x_prev", key)):
            continue
        index, eta = int(found[1]), float(found[2])
        now, after = noise.levels[times[index + 1]], noise.levels[times[index]]
        stepped = ddim_step(noise, io["step_x"], guided, now, after, eta, io["step_noise"])
        yield Line(key, "", relative(stepped, io[key]), allowed)
        clean = ddim_step(noise, io["step_x"], guided, now, 0.0, eta)
        key = key.replace("x_prev", "pred_x0")
        yield Line(key, "", relative(clean, io[key]), allowed)


@torch.no_grad()
def _loop(fixture: Fixture, io: Mapping[str, Tensor], allowed: float) -> Iterator[Line]:
    settings = fixture.meta["loop"]
    scale = float(settings.get("guidance_scale", fixture.meta["guidance_scale"]))
    model = build(fixture, float(settings["eta"]))
    branches = [{"text": io[name], "fps": io["loop_fps"]} for name in ("loop_context", "loop_uncond_context")]
    x, sigmas = io["loop_x_T"], model.sigmas(int(settings["S"]))
    for index, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        cond, uncond = (model.predict(x, sigma, branch) for branch in branches)
        guided = uncond + scale * (cond - uncond)
        clean = model.step(x, guided, sigma, sigma.new_zeros(()))
        x = model.step(x, guided, sigma, sigma_next, io["loop_noise"][index])
        yield Line(f"walk {index}, x0", "", relative(clean, io[f"loop_{index}_pred_x0"]), allowed)
        yield Line(f"walk {index}", "", relative(x, io[f"loop_{index}_x_prev"]), allowed)
    yield Line("walk's end", "", relative(x, io["loop_out"]), allowed)
