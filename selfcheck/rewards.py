"""Rewards and their preprocessing against VideoX-Fun's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..reward_models import aesthetic, clip_score, hps, mps
from ..reward_models.networks import below
from ..reward_models.preprocess import CLIP_MEAN, CLIP_STD, normalize, resize_and_crop, squash, unit_range
from ..reward_models.scoring import FrameReward
from .exactness import relative_error
from .parity import largest, tolerance
from .report import Line

if TYPE_CHECKING:
    from .fixtures import Fixture

PREPROCESSING: dict[str, Callable[[Tensor, int], Tensor]] = {
    "clip": lambda images, size: normalize(squash(images, size), CLIP_MEAN, CLIP_STD),
    "pickscore": lambda images, size: normalize(resize_and_crop(images, size), CLIP_MEAN, CLIP_STD),
    "siglip": lambda images, size: normalize(squash(images, size), aesthetic.HALF, aesthetic.HALF),
}


class _Rounded(mps.MpsJudge):
    """Lets pixels pass float16, as the reference does, and their gradient too: at the size it has there, a share of
    the mean over clips and frames, where float16 has few digits left."""

    share = 1.0

    def pixels(self, images: Tensor) -> Tensor:
        pixels = super().pixels(images)
        rounded = pixels.half().float()
        if rounded.requires_grad:
            rounded.register_hook(lambda gradient: gradient * self.share)
            pixels.register_hook(lambda gradient: gradient / self.share)
        return rounded


def check_rewards(fixture: Fixture) -> Iterator[Line]:
    """Every reward the fixture has a configuration of, then the preprocessing."""
    io = fixture.tensors("io.safetensors")
    for name, config in fixture.meta.get("configs", {}).items():
        if name not in CHECKS:
            yield Line(name, "", None, note=f"the reward {name} is not checked yet")
        elif not all((fixture.folder / file).is_file() for file in CHECKS[name][0]):
            yield Line(name, "", None, note=f"the weights of {name} are not in the folder")
        else:
            yield from CHECKS[name][1](fixture, io, config)
    if (fixture.folder / "preprocess.safetensors").is_file():
        yield from _check_preprocessing(fixture)


def _check_pickscore(fixture: Fixture, io: Mapping[str, Tensor], config: Mapping) -> Iterator[Line]:
    weights = fixture.tensors("pickscore_clip.safetensors")
    clip = clip_score.build_clip(weights, _clip_config(config), fixture.name, torch.float32)
    yield from _compare(fixture, io, "pickscore", clip_score.ClipJudge(clip, _given_ids(io)))


def _check_hps(fixture: Fixture, io: Mapping[str, Tensor], config: Mapping) -> Iterator[Line]:
    config = {"vision_cfg": config["vision"], "text_cfg": config["text"]} | {
        key: config[key] for key in ("embed_dim", "quick_gelu") if key in config
    }
    clip = hps.build_hps(fixture.tensors("hps_open_clip.safetensors"), config, fixture.name, torch.float32)
    yield from _compare(fixture, io, "hps", hps.HpsJudge(clip, _given_ids(io), "videox-fun"))


def _check_mps(fixture: Fixture, io: Mapping[str, Tensor], config: Mapping) -> Iterator[Line]:
    """The reference measures relevance against the whole batch, ours against the sample: compared are samples whose
    tokens count the same in both, and the first alone."""
    weights = fixture.tensors("mps.safetensors")
    networks = mps.build_mps(weights, _clip_config(config["clip"]), fixture.name, torch.float32)
    judge, rounded = mps.MpsJudge(*networks, _given_ids(io)), _Rounded(*networks, _given_ids(io))
    rounded.share = 1 / io["frames_u8"][:, 0, :, 0, 0].numel()
    with torch.no_grad():
        texts = [judge.encode_text(str(i)) for i in range(len(io["prompt_ids"]))]
    alike = [i for i, text in enumerate(texts) if torch.equal(text[2], io["mps.text_token_kept"][i])]
    summaries = F.normalize(torch.stack([text[1] for text in texts]), dim=-1)
    reference = F.normalize(io["mps.text_features_eos_t0"], dim=-1)
    yield Line("mps, text", "", largest(summaries, reference), tolerance(fixture, "features", 1e-4))
    alone = FrameReward(judge, "mps").score(io["frames_u8"][:1], ["0"])
    yield Line("mps, alone, pixels not rounded", "", largest(alone, io["mps.reward_sample0_alone"]), 1e-4)
    yield from _compare(fixture, io, "mps", rounded, alike, tolerance(fixture, "mps_reward", 1e-5))


def _check_aesthetic_v2(fixture: Fixture, io: Mapping[str, Tensor], config: Mapping) -> Iterator[Line]:
    tensors = fixture.tensors("aesthetic_v2_clip_vision.safetensors")
    tower = aesthetic.clip_tower(tensors, config["clip_vision"], fixture.name, torch.float32)
    head = fixture.tensors("aesthetic_v2_mlp.safetensors")
    judge = aesthetic.AestheticJudge(tower, aesthetic.read_head(head, fixture.name, tower.width, torch.float32))
    raw = io["aesthetic_v2.embedding_raw"].requires_grad_()
    scores = judge.head(F.normalize(raw, dim=-1))[:, 0]
    (gradient,) = torch.autograd.grad(scores.sum(), raw)
    error = largest(scores.detach(), io["aesthetic_v2.embedding_score"])
    yield Line("aesthetic_v2, head", "", error, tolerance(fixture, "reward", 1e-5))
    error = relative_error({"": gradient}, {"": io["aesthetic_v2.embedding_grad_of_sum"]})
    yield Line("aesthetic_v2, head, gradient", "", error, tolerance(fixture, "grad_rel", 1e-3))
    yield from _compare(fixture, io, "aesthetic_v2", judge)


def _check_aesthetic_v25(fixture: Fixture, io: Mapping[str, Tensor], config: Mapping) -> Iterator[Line]:
    tensors = fixture.tensors("aesthetic_v25_siglip.safetensors")
    head = below(tensors, "layers.")
    tensors = {key: value for key, value in tensors.items() if not key.startswith("layers.")}
    tower = aesthetic.siglip_tower(tensors, config["siglip_vision"], fixture.name, torch.float32)
    judge = aesthetic.AestheticJudge(tower, aesthetic.read_head(head, fixture.name, tower.width, torch.float32))
    first = normalize(squash(unit_range(io["frames_u8"][:, :, 0]), tower.size), tower.mean, tower.std)
    with torch.no_grad():
        error = largest(tower.embed(first), io["aesthetic_v25.pooler_output_t0"])
    yield Line("aesthetic_v25, embedding", "", error, tolerance(fixture, "features", 1e-4))
    yield from _compare(fixture, io, "aesthetic_v25", judge)


CHECKS: dict[str, tuple[tuple[str, ...], Callable[[Fixture, Mapping[str, Tensor], Mapping], Iterator[Line]]]] = {
    "pickscore": (("pickscore_clip.safetensors",), _check_pickscore),
    "hps": (("hps_open_clip.safetensors",), _check_hps),
    "mps": (("mps.safetensors",), _check_mps),
    "aesthetic_v2": (("aesthetic_v2_clip_vision.safetensors", "aesthetic_v2_mlp.safetensors"), _check_aesthetic_v2),
    "aesthetic_v25": (("aesthetic_v25_siglip.safetensors",), _check_aesthetic_v25),
}
"""The files of weights a check needs, and the check."""


def _compare(
    fixture: Fixture,
    io: Mapping[str, Tensor],
    name: str,
    judge: nn.Module,
    samples: list[int] | None = None,
    allowed: float | None = None,
) -> Iterator[Line]:
    """Scores of all (or the given) samples, of the first alone, and the gradient of the reference's loss."""
    reward = FrameReward(judge, name, reads_prompt=hasattr(judge, "encode_text"))
    frames = unit_range(io["frames_u8"]).requires_grad_()
    count = frames.shape[0]
    samples = list(range(count)) if samples is None else samples
    allowed = tolerance(fixture, "reward", 1e-5) if allowed is None else allowed
    with torch.enable_grad():
        scores = reward.score(frames, [str(i) for i in range(count)])
        meta = fixture.meta["results"][name]
        top, scale = meta.get("max_reward"), float(meta.get("loss_scale", 1.0))
        loss = -scores if top is None else (scores - top).abs()
        (gradient,) = torch.autograd.grad(loss.mean() * scale, frames)
    alone = reward.score(frames.detach()[:1], ["0"])
    yield Line(f"{name}, alone", "", largest(alone, io[f"{name}.reward_sample0_alone"]), allowed)
    if samples:
        error = largest(scores.detach()[samples], io[f"{name}.reward_per_sample"][samples])
        yield Line(f"{name}, scores", "", error, allowed)
        stride = int(fixture.meta.get("grad_stride", 1))
        ours = gradient[samples][..., ::stride, ::stride]
        error = relative_error({"": ours}, {"": io[f"{name}.grad_frames"][samples]})
        yield Line(f"{name}, gradient", "", error, tolerance(fixture, "grad_rel", 1e-3))


def _check_preprocessing(fixture: Fixture) -> Iterator[Line]:
    tensors = fixture.tensors("preprocess.safetensors")
    for key in sorted(key for key in tensors if key.endswith(".sub")):
        size_of_image, way = key.split(".")[:2]
        facts = fixture.meta["preprocess"][f"{size_of_image}.{way}"]
        image = unit_range(tensors[f"{size_of_image}.image_u8"])[None].requires_grad_()
        with torch.enable_grad():
            pixels = PREPROCESSING[way.rstrip("0123456789")](image, facts["shape"][-1])
            gradient_key = f"{size_of_image}.{way}.grad_of_mean_square"
            if gradient_key in tensors:
                (gradient,) = torch.autograd.grad(pixels.square().mean(), image)
                error = relative_error({"": gradient[0]}, {"": tensors[gradient_key]})
                yield Line(f"{size_of_image} {way}, gradient", "", error, tolerance(fixture, "grad_rel", 1e-3))
        pixels = pixels.detach()[0]
        stride = pixels.shape[-1] // tensors[key].shape[-1]
        offset = (stride - 1) // 2
        allowed = tolerance(fixture, "pixel_values", 1e-4)
        found = {"mean": pixels.mean((1, 2)), "std": pixels.std((1, 2)), "min": pixels.amin((1, 2)),
                 "max": pixels.amax((1, 2))}  # fmt: skip
        error = max(
            largest(pixels[:, offset::stride, offset::stride], tensors[key]),
            *(largest(value, torch.tensor(facts[name])) for name, value in found.items() if name in facts),
        )
        yield Line(f"{size_of_image} {way}", "", error, allowed)


def _given_ids(io: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """Prompts are numbers of rows of ids; the condition of MPS has its own."""

    def tokenize(text: str) -> Tensor:
        return io["condition_ids"] if text == mps.CONDITION else io["prompt_ids"][int(text)][None]

    return tokenize


def _clip_config(config: Mapping) -> dict:
    return {
        "text_config": config["text"],
        "vision_config": config["vision"],
        "projection_dim": config["projection_dim"],
    }
