"""Replay against one long autograd graph, on a tiny random Wan in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..lora.adapter import Adapter, inject_new
from ..training.gradient import Walk, replay, rollout
from ..training.judge import Objective, View, judge
from ..training.schedule import BackpropSchedule, Plan
from ..video_models.protocol import ModelSpec
from .report import Line

TOLERANCE = 1e-12
STEPS = 6
LATENT_SHAPE = (4, 2, 4, 4)

SCHEDULES = {
    "last": BackpropSchedule("last"),
    "tail 3": BackpropSchedule("tail", 3),
    "tail 3, coupling 0.5": BackpropSchedule("tail", 3, coupling=0.5),
    "tail 3, coupling 0 (DRTune)": BackpropSchedule("tail", 3, coupling=0.0),
    "all steps": BackpropSchedule("tail", STEPS),
    "uniform 3, coupling 0": BackpropSchedule("uniform", 3, coupling=0.0),
    "uniform 2": BackpropSchedule("uniform", 2),
    "random 3": BackpropSchedule("random", 3),
    "random 2, coupling 0.3": BackpropSchedule("random", 2, coupling=0.3),
    "list 1 4": BackpropSchedule("list", step_list=(1, 4)),
    "one-step x0 (ReFL)": BackpropSchedule("random", 1, start=2, judge="x0"),
    "x0 of three coupled steps": BackpropSchedule("list", step_list=(0, 2, 3), judge="x0"),
}


class ToyReward:
    """A smooth, differentiable function of all pixels; stands for a judge where only gradients matter."""

    name, differentiable, needs = "toy", True, frozenset()

    def score(self, frames: Tensor, prompts: Sequence[str], *, reference: Tensor | None = None) -> Tensor:
        weight = torch.linspace(-1, 1, frames[0].numel(), dtype=frames.dtype, device=frames.device).view_as(frames[0])
        return ((frames * weight).flatten(1).mean(1) * 3).sin() + frames.flatten(1).square().mean(1)


def tiny_wan(seed: int = 0, dtype: torch.dtype = torch.float64):
    """A random image-to-video Wan with the real classes: transformer 2 layers, VAE one stage a level."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    from ..video_models.wan import WanModel

    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.1, 0.9, 1.0, 1.2],
    )  # fmt: skip
    spec = ModelSpec("wan", "tiny random Wan", 4, 2, 2, 4, False, ("all-linear",), 8, 8, 3, STEPS, 3.0, 8)
    to = torch.nn.Module.to  # diffusers' own warns that real models keep some layers in float32
    return WanModel(spec, to(transformer, dtype), to(vae, dtype), shift=5.0)


def one_graph(
    walk: Walk, x: Tensor, plan: Plan, reward, objective: Objective, coupling: float, judged_latents: int | None = None,
    prompts: Sequence[str] = (),
) -> Tensor:  # fmt: skip
    """The reference: every step in one autograd graph, untrained steps detached, one backward."""
    for i in range(len(plan.sigmas) - 1):
        seen = x if coupling == 1 else coupling * x + (1 - coupling) * x.detach() if coupling else x.detach()
        prediction = walk.predict(seen, plan.sigmas[i])
        x = walk.step(x, prediction if i in plan.trained else prediction.detach(), plan, i)
    frames = walk.model.decode(x[:, :, :judged_latents])
    objective(reward.score(frames, prompts or [""] * x.shape[0])).mean().backward()
    return x.detach()


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    """Move the adapter's gradients out."""
    found = {}
    for key, parameter in adapter.parameters().items():
        found[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        parameter.grad = None
    return found


def relative_error(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """``|ours - reference| / |reference|`` over all entries of all tensors."""
    difference = sum(float((ours[k].double() - reference[k].double()).square().sum()) for k in reference)
    size = sum(float(reference[k].double().square().sum()) for k in reference)
    return (difference / size) ** 0.5 if size else float("inf")


def check() -> Iterator[Line]:
    """One line a schedule, and one for guidance in an interval; batched and sequential guidance both."""
    with torch.enable_grad():
        model, reward, objective = tiny_wan(), ToyReward(), Objective()
        adapter = inject_new(model.transformer, ("all-linear",), rank=2, alpha=2.0, seed=1)
        generator = torch.Generator().manual_seed(2)
        for parameter in adapter.parameters().values():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        texts = [torch.randn(5 + i, 8, generator=generator, dtype=torch.float64) for i in range(4)]
        walk = Walk(model, model.conditioning(texts[:2], texts[2:], LATENT_SHAPE), guidance_scale=3.0)
        noise = model.initial_latents(LATENT_SHAPE, [3, 4]).double()

        def error(walk: Walk, schedule: BackpropSchedule) -> float:
            """The larger of two relative errors, of the gradients and of the final latents."""
            plan, worst = schedule.draw(model.sigmas(STEPS), seed=5), 0.0
            expected_final = one_graph(walk, noise, plan, reward, objective, schedule.coupling)
            reference = gradients(adapter)
            for batched in (True, False):
                ours = replace(walk, batched_guidance=batched)
                final, kept = rollout(ours, noise, plan)
                verdict = judge(ours, final, reward, ["", ""], objective, View(0))
                replay(ours, kept, plan, verdict.gradient, schedule.coupling)
                worst = max(worst, relative_error(gradients(adapter), reference))
                worst = max(worst, relative_error({"": final}, {"": expected_final}))
            return worst

        try:
            for name, schedule in SCHEDULES.items():
                yield Line(f"replay: {name}", "exactness", error(walk, schedule), TOLERANCE)
            middle = replace(walk, guidance_interval=(0.6, 0.92))  # three of six steps
            yield Line("replay: guidance in an interval", "exactness", error(middle, SCHEDULES["all steps"]), TOLERANCE)
        finally:
            adapter.remove()
