"""Open-Sora 1.2 against VADER's numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..lora.adapter import inject_weights, linear_shapes
from ..lora.match import match
from ..video_models.opensora import flow_step, time_ratio, transformed
from ..video_models.opensora_files import network_config, temporal_config
from ..video_models.opensora_transformer import STDiT3, positions
from ..video_models.opensora_vae import OpenSoraVae
from ..video_models.solvers import flow_match_sigmas
from .parity import relative, tolerance
from .report import Line
from .videocrafter import read

if TYPE_CHECKING:
    from .fixtures import Fixture


@torch.no_grad()
def check_transformer(fixture: Fixture) -> Iterator[Line]:
    """The denoiser with and without masks, of text and of frames, padded, guided, with VADER's LoRA; and its parts."""
    io, meta = fixture.tensors("io.safetensors"), fixture.meta
    network = STDiT3(network_config(meta["config"])).eval()
    network.load_state_dict(fixture.tensors("model.safetensors"))
    allowed = tolerance(fixture, "rel_rms", 1e-5)
    size = float(io["height"][0]), float(io["width"][0])
    text, mask = io["y"][:, 0], io["mask"].bool()

    def predict(x: Tensor, mask: Tensor = mask, given: Tensor | None = None) -> Tensor:
        return network(x, io["timestep"], text, mask, io["fps"], size, given)

    base = predict(io["x"])
    yield Line("bare", "", relative(base, io["out"]), allowed)
    yield Line("all text", "", relative(predict(io["x"], torch.ones_like(mask)), io["out_no_mask"]), allowed)
    yield Line("given frames", "", relative(predict(io["x"], given=~io["x_mask"]), io["out_x_mask"]), allowed)
    none_given = torch.zeros_like(io["x_mask"])
    yield Line("no given frame", "", relative(predict(io["x"], given=none_given), io["out_x_mask_all_true"]), allowed)
    yield Line("odd size", "", relative(predict(io["pad_x"]), io["pad_out"]), allowed)
    branches = len(io["cfg_y"])  # the caption and none, which is cut to the tokens of the caption
    guided = network(
        io["cfg_x"].expand(branches, -1, -1, -1, -1),
        io["cfg_timestep"].expand(branches),
        io["cfg_y"][:, 0],
        io["cfg_mask"].bool().expand(branches, -1),
        io["fps"][:1].expand(branches),
        size,
    )
    yield Line("both branches", "", relative(guided, io["cfg_out"]), allowed)
    patches = zip(io["x"].shape[3:], network.config.patch_size[1:], strict=True)
    rows, columns = (-(-count // patch) for count, patch in patches)
    scale = (size[0] * size[1]) ** 0.5 / network.config.input_sq_size
    where = positions(rows, columns, network.config.hidden_size, scale, torch.float32)
    parts = {
        "pos_emb": where[None],
        "t_embed": network.t_embedder(io["timestep"]),
        "fps_embed": network.fps_embedder(io["fps"]),
        "rope_out": network.rope(io["rope_in"]),
    }
    for name in parts.keys() & io.keys():
        yield Line(name, "", relative(parts[name], io[name]), allowed)
    for path in sorted(fixture.folder.glob("lora*.safetensors")):
        names = {name: name for name in linear_shapes(network)}
        matched = match(read(path, meta.get("lora") or {}), names, linear_shapes(network))
        if matched.unmatched:
            raise ValueError(f"LoRA modules without a place: {', '.join(matched.unmatched[:3])}")
        adapter = inject_weights(network, matched)
        yield Line(path.stem, "", relative(predict(io["x"]), io["out_lora"]), allowed)
        adapter.remove()
        same = torch.equal(predict(io["x"]), base)
        yield Line("LoRA removed, to the bit", "", 0.0 if same else float("inf"), 0.0)


@torch.no_grad()
def check_vae(fixture: Fixture) -> Iterator[Line]:
    """Each part of the decoder and of the encoder, for videos of every length there is."""
    from diffusers import AutoencoderKL

    io, meta = fixture.tensors("io.safetensors"), fixture.meta
    vae = OpenSoraVae(
        AutoencoderKL(**meta["spatial_cfg"]), temporal_config(meta["temporal_cfg"]), int(meta["micro_frame_size"])
    ).eval()
    vae.load_state_dict(fixture.tensors("model.safetensors"))
    allowed = tolerance(fixture, "rel_rms", 5e-6)
    lengths = sorted(int(found[1]) for key in io if (found := re.fullmatch(r"z_(\d+)", key)))
    for frames in lengths:
        latents = io[f"z_{frames}"]
        middle = torch.cat(list(vae.decode_time(latents, frames)), dim=2)
        yield Line(f"{frames} frames, time", "", relative(middle, io[f"xz_{frames}"]), allowed)
        yield Line(f"{frames} frames", "", relative(vae.decode(latents, frames), io[f"video_{frames}"]), allowed)
    if "vader_frame_video" in io:  # one latent alone; of which video is not told
        index = int(io["vader_frame_index"])
        latents = [io[f"z_{frames}"] for frames in lengths]
        alone = [part[:, :, i : i + 1] for part in latents for i in (0, index) if i < part.shape[2]]
        errors = [relative(vae.decode(part), io["vader_frame_video"]) for part in alone]
        yield Line("one latent alone", "", min(errors), allowed)
    moments = vae.encode_time(io["enc_xz"])
    yield Line("moments", "", relative(moments, io["enc_moments"]), allowed)
    yield Line("latents", "", relative(vae.normalised(moments), io["enc_z"]), allowed)
    pictures = vae.encode_space(io["enc_frames"])
    yield Line("pictures", "", relative(pictures, io["enc_frames_spatial_mean_scaled"]), allowed)


def check_solver(fixture: Fixture) -> Iterator[Line]:
    """The timesteps of every size, whole walks with a linear velocity, and a noised video found again."""
    io = fixture.tensors("io.safetensors")
    yield from _timesteps(io, tolerance(fixture, "timesteps", 1e-3))
    yield from _walks(fixture, io, tolerance(fixture, "rel_rms", 1e-6))


def _timesteps(io: Mapping[str, Tensor], allowed: float) -> Iterator[Line]:
    """Of sizes that are exact; the publisher's own rounding of them to bfloat16 is not followed."""
    for key in sorted(io):
        found = re.fullmatch(r"(tt|real_(\d+)steps)_(\d+)f_(\d+)x(\d+)", key)
        if found is None:
            continue
        frames, height, width = (int(number) for number in found.groups()[2:])
        even = flow_match_sigmas(int(found[2]), 1.0)[:-1] if found[2] else io["tt_in"].double() / 1000
        ours = 1000 * transformed(even, time_ratio(height, width, frames))
        yield Line(key, "", float((ours - io[key]).abs().max()), allowed)


def _walks(fixture: Fixture, io: Mapping[str, Tensor], allowed: float) -> Iterator[Line]:
    meta, channels = fixture.meta, io["z0"].shape[1]

    def velocity(x: Tensor, part: Tensor, text: Tensor) -> Tensor:
        output = torch.einsum("oc,bcthw->bothw", io["vel_W"], x)
        constant = io["vel_b"] + part.float() * io["vel_t"] + text.mean(dim=-2) @ io["vel_Y"]
        return output + constant.expand(len(x), -1)[:, :, None, None, None]

    even = flow_match_sigmas(int(meta["num_sampling_steps"]), 1.0)
    ratio = time_ratio(int(meta["height"]), int(meta["width"]), int(meta["num_frames"]))
    walks = {"plain": even, "transform": transformed(even, ratio), "discrete": (1000 * even).round() / 1000}
    for name, parts in walks.items():
        x = io["z0"]
        for index, (part, after) in enumerate(zip(parts[:-1], parts[1:], strict=True)):
            timestep = io[f"{name}_t"][index]
            yield Line(f"{name} {index}, time", "", float((1000 * part - timestep).abs().max()), 1e-3)
            both = [velocity(x, part, text) for text in (io["y"][:, 0], io["y_null"])]
            yield Line(f"{name} {index}, model", "", relative(torch.cat(both), io[f"{name}_model_out"][index]), allowed)
            cond, none = (output[:, :channels] for output in both)
            x = flow_step(x, none + float(meta["guidance_scale"]) * (cond - none), part, after)
        yield Line(name, "", relative(x, io[f"{name}_out"]), allowed)
    for i, timestep in enumerate(io["an_t"]):
        clean, noise, noisy = (io[f"an_{name}"][i] for name in ("x0", "noise", "xt"))
        found = flow_step(noisy, clean - noise, timestep.double() / 1000, torch.zeros(()))
        yield Line(f"noised to {float(timestep):.0f}", "", relative(found, clean), allowed)
