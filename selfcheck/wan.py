"""Wan against VideoX-Fun's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..lora.adapter import Adapter, inject_weights, linear_shapes
from ..lora.files import match, read_lora
from ..lora.names import ModuleNames, split_key
from ..training.gradient import Objective, Walk, judge, replay, rollout
from ..training.schedule import BackpropSchedule, Plan
from ..video_models import wan_keys
from ..video_models.protocol import ModelSpec
from ..video_models.wan import WanModel
from .exactness import relative_error
from .report import Line

if TYPE_CHECKING:
    from .fixtures import Fixture


def build(transformer: Mapping[str, Tensor], config: Mapping, vae: Mapping[str, Tensor], vae_meta: Mapping) -> WanModel:
    """A float32 model from the publisher's tensors. A missing VAE is replaced by a tiny one nobody asks.

    Args:
        transformer: In the publisher's names.
        config: The publisher's transformer configuration.
        vae: In the publisher's names, or empty.
        vae_meta: May hold ``latents_mean`` and ``latents_std``.
    """
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    network = WanTransformer3DModel(**wan_keys.transformer_config(transformer, config))
    network.load_state_dict(wan_keys.convert_transformer(transformer))
    statistics = {key: vae_meta[key] for key in ("latents_mean", "latents_std") if vae_meta.get(key)}
    if vae:
        decoder = AutoencoderKLWan(**wan_keys.vae_config(vae), **statistics)
        decoder.load_state_dict(wan_keys.convert_vae(vae))
    else:
        decoder = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    levels = decoder.config.temperal_downsample
    channels, spatial = network.config.out_channels, 2 ** len(levels)
    targets = ("all-linear",)
    spec = ModelSpec(
        "wan", "fixture", channels, 2 ** sum(levels), spatial, 2 * spatial, True, targets, 0, 0, 1, 1, 1.0, 8
    )
    return WanModel(spec, network, decoder)


def _largest(ours: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the reference's largest entry where that exceeds 1."""
    if ours.shape != reference.shape:
        return float("inf")
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1))


def _with_lora(model: WanModel, fixture: Fixture, strength: float) -> Adapter:
    declared = (fixture.meta.get("lora") or {}).get("file")
    found = sorted(path.name for path in fixture.folder.glob("lora*.safetensors") if "grad" not in path.name)
    lora = read_lora(fixture.folder / (declared or found[0]))
    network = model.transformer
    matched = match(lora, model.lora_names("transformer"), linear_shapes(network))
    if matched.unmatched:
        raise ValueError(f"LoRA modules without a place: {', '.join(matched.unmatched[:3])}")
    return inject_weights(network, matched, strength)


def _predict(model: WanModel, io: Mapping[str, Tensor]) -> Tensor:
    """The transformer's output sample by sample, each at its own timestep."""
    outputs = []
    for i in range(io["x"].shape[0]):
        conditioning = model.conditioning([io["context"][i]], None, io["x"].shape[1:])
        branch = dict(conditioning.positive)
        if "y" in io:
            branch["latents"] = io["y"][i : i + 1]
        if "clip" in io:
            branch["image"] = io["clip"][i : i + 1]
        outputs.append(model.predict(io["x"][i : i + 1], io["t"][i].double() / 1000, branch))
    return torch.cat(outputs)


def check_transformer(fixture: Fixture) -> Iterator[Line]:
    """The bare model, with the LoRA at every strength, the LoRA's gradients, and bare again (bit for bit)."""
    io, meta = fixture.tensors("io.safetensors"), fixture.meta
    weights = fixture.tensors(meta.get("transformer") or "transformer.safetensors")
    model = build(weights, meta["transformer_config"], {}, {})
    tolerance = _tolerance(fixture, "out", 1e-4)
    with torch.no_grad():
        base = _predict(model, io)
    yield Line("base", "", _largest(base, io["out_base"]), tolerance)
    strengths = {f"out_lora_{strength}": float(strength) for strength in meta.get("weights") or ()} | {"out_lora": 1.0}
    for key in sorted(strengths.keys() & io.keys()):
        adapter = _with_lora(model, fixture, strengths[key])
        with torch.no_grad():
            yield Line(key, "", _largest(_predict(model, io), io[key]), tolerance)
        adapter.remove()
    if "grad_weight" in io:
        adapter = _with_lora(model, fixture, 1.0)
        adapter.train()
        with torch.enable_grad():
            (_predict(model, io) * io["grad_weight"]).mean().backward()
        reference = fixture.tensors("lora_grads.safetensors")
        yield _compare_gradients("gradients", fixture, adapter, model, reference, ())
        adapter.remove()
    with torch.no_grad():
        same = torch.equal(_predict(model, io), base)
    yield Line("LoRA removed, to the bit", "", 0.0 if same else float("inf"), 0.0)


def check_vae(fixture: Fixture) -> Iterator[Line]:
    """Decoding of all latents and of the first, its gradient, and encoding."""
    from diffusers import AutoencoderKLWan

    io, meta = fixture.tensors("io.safetensors"), fixture.meta
    weights = fixture.tensors("vae.safetensors")
    statistics = {key: meta[key] for key in ("latents_mean", "latents_std") if meta.get(key)}
    vae = AutoencoderKLWan(**wan_keys.vae_config(weights), **statistics)
    vae.load_state_dict(wan_keys.convert_vae(weights))
    model = _vae_only(vae)
    tolerance, gradient_tolerance = _tolerance(fixture, "decode", 1e-4), _tolerance(fixture, "grad_rel", 1e-3)
    with torch.no_grad():
        decoded = model.decode(io["latents"]) * 2 - 1
        yield Line("decode all", "", _largest(decoded, io["decoded_all"]), tolerance)
        mean = model.encode(io["video"])
        yield Line("encode", "", _largest(mean, io["encoded_mean"]), tolerance)
    latents = io["latents"][:, :, : io["grad_first"].shape[2]].clone().requires_grad_()
    with torch.enable_grad():
        first = model.decode(latents) * 2 - 1
        first.square().mean().backward()
    yield Line("decode first", "", _largest(first.detach(), io["decoded_first"]), tolerance)
    error = relative_error({"": latents.grad}, {"": io["grad_first"]})
    yield Line("gradient", "", error, gradient_tolerance)


def _vae_only(vae) -> WanModel:
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=12, text_dim=4, freq_dim=8, num_layers=0)
    spec = ModelSpec("wan", "fixture", vae.config.z_dim, 1, 1, 1, False, ("all-linear",), 0, 0, 1, 1, 1.0, 8)
    return WanModel(spec, network, vae)


class WeightedMean:
    """The fixtures' reward: ``(frames * weight).mean()`` of one sample; frames of one latent."""

    name, differentiable, needs = "weighted mean", True, frozenset()

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight  # [3, H, W], or [3, T, H, W]

    def score(self, frames: Tensor, prompts: Sequence[str], *, reference: Tensor | None = None) -> Tensor:
        weight = self._weight if self._weight.dim() == 4 else self._weight[:, None]
        return (frames * weight).flatten(1).mean(1)


def check_train_step(fixture: Fixture) -> Iterator[Line]:
    """A whole reward step: latents, frames, reward, and the LoRA's gradients of every strategy."""
    meta, io = fixture.meta, fixture.tensors("io.safetensors")
    model = build(
        fixture.tensors("transformer.safetensors"), meta["transformer_config"], fixture.tensors("vae.safetensors"), meta
    )
    adapter = _with_lora(model, fixture, 1.0)
    adapter.train()
    noise = io["init_noise"]
    texts = [[io[f"context_{side}"]] * noise.shape[0] for side in ("cond", "uncond")]
    walk = Walk(model, model.conditioning(*texts, noise.shape[1:]), float(meta["guidance_scale"]))
    sigmas = io["sigmas"].double()
    reward = WeightedMean(io["reward_weight"])
    objective = Objective(meta.get("max_reward"), float(meta.get("loss_scale", 1.0)), hinge=False)
    for name, strategy in meta["strategies"].items():
        schedule = schedule_of(strategy)
        plan = schedule.draw(sigmas, 0)
        if "backprop_steps" in strategy and plan.trained != tuple(sorted(strategy["backprop_steps"])):
            # A random strategy's draw is the reference's own chance; its steps are given.
            plan = Plan(sigmas, tuple(sorted(strategy["backprop_steps"])))
        final, kept = rollout(walk, noise, plan)
        verdict = judge(walk, final, reward, [""] * noise.shape[0], objective,
                        judged_latents=int(meta.get("num_decoded_latents") or 1),
                        judged_frames=int(meta.get("num_sampled_frames") or 0))  # fmt: skip
        replay(walk, kept, plan, verdict.gradient, schedule.coupling)
        yield Line(
            f"{name}, latents",
            "",
            _largest(final, io["final_latents"]),
            _tolerance(fixture, "latents", 1e-4),
        )
        yield Line(
            f"{name}, frames",
            "",
            _largest(verdict.frames, io["frames"]),
            _tolerance(fixture, "frames", 1e-4),
        )
        expected = strategy.get("reward", float(io["reward"].mean()))
        error = abs(float(verdict.rewards.mean()) - expected)
        yield Line(f"{name}, reward", "", error, _tolerance(fixture, "reward", 1e-3))
        reference = fixture.tensors(f"train_step_{name}.safetensors")
        noise_only = {*(strategy.get("near_zero_params") or ()), *(strategy.get("zero_grad_params") or ())}
        yield _compare_gradients(f"{name}, gradients", fixture, adapter, model, reference, noise_only)
        for parameter in adapter.parameters().values():
            parameter.grad = None


def schedule_of(strategy: Mapping) -> BackpropSchedule:
    """A fixture's strategy in our terms."""
    coupling = 0.0 if strategy.get("stop_latent_model_input_gradient") else 1.0
    if strategy.get("step_list"):
        return BackpropSchedule("list", coupling=coupling, step_list=tuple(strategy["step_list"]))
    steps = strategy.get("backprop_steps") or []
    if strategy.get("strategy") not in ("last", "tail"):
        return BackpropSchedule("list", coupling=coupling, step_list=tuple(steps))
    return BackpropSchedule(strategy["strategy"], int(strategy.get("num_steps") or len(steps) or 1), coupling)


def _compare_gradients(
    label: str, fixture: Fixture, adapter: Adapter, model: WanModel, reference: Mapping[str, Tensor], noise_only
) -> Line:
    """Over all parameters, and the worst single one that is not rounding noise: whichever is nearer to its limit."""
    names, parameters = ModuleNames(model.lora_names("transformer")), adapter.parameters()
    overall_tolerance = _tolerance(fixture, "grad_global_rel", 1e-3)
    single_tolerance = _tolerance(fixture, "grad_param_rel", 2e-3)
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


def _tolerance(fixture: Fixture, key: str, default: float) -> float:
    given = fixture.meta.get("tolerance")
    if isinstance(given, Mapping):
        return float(given.get(key, default))
    return float(given) if isinstance(given, (int, float)) else default
