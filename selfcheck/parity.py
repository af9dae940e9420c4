"""What the families' parity checks share: a family gives a model and its way of asking it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..lora.adapter import Adapter, inject_weights, linear_shapes
from ..lora.files import match, read_lora
from ..lora.names import ModuleNames, split_key
from ..training.gradient import Walk, replay, rollout
from ..training.judge import Objective, View, judge
from ..training.schedule import BackpropSchedule, Plan
from ..video_models.protocol import VideoModel
from .exactness import relative_error
from .report import Line

if TYPE_CHECKING:
    from .fixtures import Fixture


def largest(ours: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the reference's largest entry where that exceeds 1."""
    if ours.shape != reference.shape:
        return float("inf")
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1))


def relative(ours: Tensor, reference: Tensor) -> float:
    """Root of the mean squared difference, relative to the reference's root mean square."""
    return relative_error({"": ours}, {"": reference}) if ours.shape == reference.shape else float("inf")


def with_lora(model: VideoModel, fixture: Fixture, strength: float) -> Adapter:
    """The fixture's LoRA put into the model; raises ``ValueError`` for a module without a place."""
    declared = (fixture.meta.get("lora") or {}).get("file")
    found = sorted(path.name for path in fixture.folder.glob("lora*.safetensors") if "grad" not in path.name)
    lora = read_lora(fixture.folder / (declared or found[0]))
    (network,) = model.denoisers.values()
    matched = match(lora, model.lora_names("transformer"), linear_shapes(network))
    if matched.unmatched:
        raise ValueError(f"LoRA modules without a place: {', '.join(matched.unmatched[:3])}")
    return inject_weights(network, matched, strength)


def check_network(
    fixture: Fixture, model: VideoModel, io: Mapping[str, Tensor], predict: Callable[[], Tensor]
) -> Iterator[Line]:
    """A denoiser bare, with the LoRA at every strength, the LoRA's gradients, and bare again (bit for bit).

    Args:
        fixture: Kind ``transformer`` or ``lora``.
        model: With the fixture's weights.
        io: Tensors of the fixture: ``out_base``, ``out_lora*``, and ``grad_weight`` where gradients are given.
        predict: The model's output for the fixture's inputs, shaped like ``out_base``.
    """
    allowed = tolerance(fixture, "out", 1e-4)
    with torch.no_grad():
        base = predict()
    yield Line("base", "", largest(base, io["out_base"]), allowed)
    strengths = {f"out_lora_{strength}": float(strength) for strength in fixture.meta.get("weights") or ()}
    strengths["out_lora"] = 1.0
    for key in sorted(strengths.keys() & io.keys()):
        adapter = with_lora(model, fixture, strengths[key])
        with torch.no_grad():
            yield Line(key, "", largest(predict(), io[key]), allowed)
        adapter.remove()
    if "grad_weight" in io:
        adapter = with_lora(model, fixture, 1.0)
        adapter.train()
        with torch.enable_grad():
            (predict() * io["grad_weight"]).mean().backward()
        reference = fixture.tensors("lora_grads.safetensors")
        yield compare_gradients("gradients", fixture, adapter, model, reference, ())
        adapter.remove()
    with torch.no_grad():
        same = torch.equal(predict(), base)
    yield Line("LoRA removed, to the bit", "", 0.0 if same else float("inf"), 0.0)


def check_vae(
    fixture: Fixture, pixels: Callable[[Tensor], Tensor], encode: Callable[[Tensor], Tensor]
) -> Iterator[Line]:
    """Decoding of all latents and of the first, its gradient, and encoding.

    Args:
        fixture: Kind ``vae``.
        pixels: From latents to frames in about -1..1, differentiable.
        encode: From frames to the mean that the fixture stores.
    """
    io, allowed = fixture.tensors("io.safetensors"), tolerance(fixture, "decode", 1e-4)
    with torch.no_grad():
        yield Line("decode all", "", largest(pixels(io["latents"]), io["decoded_all"]), allowed)
        if "video" in io:
            yield Line("encode", "", largest(encode(io["video"]), io["encoded_mean"]), allowed)
    latents = io["latents"][:, :, : io["grad_first"].shape[2]].clone().requires_grad_()
    with torch.enable_grad():
        first = pixels(latents)
        first.square().mean().backward()
    yield Line("decode first", "", largest(first.detach(), io["decoded_first"]), allowed)
    yield Line("gradient", "", relative(latents.grad, io["grad_first"]), tolerance(fixture, "grad_rel", 1e-3))


class WeightedMean:
    """The fixtures' reward: ``(frames * weight).mean()`` of one sample; frames of one latent."""

    name, differentiable, needs = "weighted mean", True, frozenset()

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight  # [3, H, W], or [3, T, H, W]

    def score(self, frames: Tensor, prompts: Sequence[str], *, reference: Tensor | None = None) -> Tensor:
        weight = self._weight if self._weight.dim() == 4 else self._weight[:, None]
        return (frames * weight).flatten(1).mean(1)


def check_train_step(
    fixture: Fixture, walk: Walk, io: Mapping[str, Tensor], noise: Tensor, sigmas: Tensor, final_latents: Tensor
) -> Iterator[Line]:
    """A whole reward step: latents, frames, reward, and the LoRA's gradients of every strategy.

    Args:
        fixture: Kind ``train_step``.
        walk: Model and conditioning of the fixture.
        io: Its tensors.
        noise: Initial latents ``[B, C, t, h, w]``.
        sigmas: Noise levels of its solver, float64.
        final_latents: Where they must lead, laid out like ``noise``.
    """
    meta, model = fixture.meta, walk.model
    adapter = with_lora(model, fixture, 1.0)
    adapter.train()
    reward = WeightedMean(io["reward_weight"])
    view = View(int(meta.get("num_decoded_latents") or 1), int(meta.get("num_sampled_frames") or 0))
    objective = Objective(meta.get("max_reward"), float(meta.get("loss_scale", 1.0)), hinge=False)
    for name, strategy in meta["strategies"].items():
        schedule = schedule_of(strategy)
        plan = schedule.draw(sigmas, 0)
        if "backprop_steps" in strategy and plan.trained != tuple(sorted(strategy["backprop_steps"])):
            # A random strategy's draw is the reference's own chance; its steps are given.
            plan = Plan(sigmas, tuple(sorted(strategy["backprop_steps"])))
        final, kept = rollout(walk, noise, plan)
        verdict = judge(walk, final, reward, [""] * noise.shape[0], objective, view)
        replay(walk, kept, plan, verdict.gradient, schedule.coupling)
        yield Line(f"{name}, latents", "", largest(final, final_latents), tolerance(fixture, "latents", 1e-4))
        yield Line(f"{name}, frames", "", largest(verdict.frames, io["frames"]), tolerance(fixture, "frames", 1e-4))
        expected = strategy.get("reward", float(io["reward"].mean()))
        error = abs(float(verdict.rewards.mean()) - expected)
        yield Line(f"{name}, reward", "", error, tolerance(fixture, "reward", 1e-3))
        reference = fixture.tensors(f"train_step_{name}.safetensors")
        noise_only = {*(strategy.get("near_zero_params") or ()), *(strategy.get("zero_grad_params") or ())}
        yield compare_gradients(f"{name}, gradients", fixture, adapter, model, reference, noise_only)
        for parameter in adapter.parameters().values():
            parameter.grad = None
    adapter.remove()


def schedule_of(strategy: Mapping) -> BackpropSchedule:
    """A fixture's strategy in our terms."""
    coupling = 0.0 if strategy.get("stop_latent_model_input_gradient") else 1.0
    if strategy.get("step_list"):
        return BackpropSchedule("list", coupling=coupling, step_list=tuple(strategy["step_list"]))
    steps = strategy.get("backprop_steps") or []
    if strategy.get("strategy") not in ("last", "tail"):
        return BackpropSchedule("list", coupling=coupling, step_list=tuple(steps))
    return BackpropSchedule(strategy["strategy"], int(strategy.get("num_steps") or len(steps) or 1), coupling)


def compare_gradients(
    label: str, fixture: Fixture, adapter: Adapter, model: VideoModel, reference: Mapping[str, Tensor], noise_only
) -> Line:
    """Over all parameters, and the worst single one that is not rounding noise: whichever is nearer to its limit."""
    names, parameters = ModuleNames(model.lora_names("transformer")), adapter.parameters()
    overall_tolerance = tolerance(fixture, "grad_global_rel", 1e-3)
    single_tolerance = tolerance(fixture, "grad_param_rel", 2e-3)
    ours: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    worst, where = 0.0, ""
    for key, gradient in reference.items():
        key = key.removeprefix("grad.")
        split = split_key(key)
        if split is None:  # the step's other gradients, of frames and latents
            continue
        module = names.find(split[0])
        if module is None:
            raise ValueError(f"no module for the gradient {key}")
        name = f"{module}.{split[1]}"
        found = parameters[name].grad
        expected[name] = gradient
        ours[name] = torch.zeros_like(gradient) if found is None else found
        if key in noise_only or torch.equal(ours[name], gradient):
            continue
        error = relative_error({name: ours[name]}, {name: gradient})
        if not error <= worst:
            worst, where = error, key
    if parameters.keys() - expected.keys():
        raise ValueError(f"the fixture has no gradient for {min(parameters.keys() - expected.keys())}")
    overall = relative_error(ours, expected)
    if worst / single_tolerance > overall / overall_tolerance:
        return Line(f"{label}, {where}", "", worst, single_tolerance)
    return Line(label, "", overall, overall_tolerance)


def tolerance(fixture: Fixture, key: str, default: float) -> float:
    """The fixture's own tolerance under a key (or, in a sentence, behind that word), one for everything, or ours."""
    given = fixture.meta.get("tolerance")
    if isinstance(given, str):
        found = re.search(rf"\b{re.escape(key)}\D*?([\d.]+e-?\d+)", given)
        return float(found[1]) if found else default
    if isinstance(given, Mapping):
        return float(given.get(key, default))
    return float(given) if isinstance(given, (int, float)) else default
