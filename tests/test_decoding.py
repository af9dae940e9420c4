"""The gradient of a whole clip, taken chunk by chunk, is the gradient of one autograd graph."""

import pytest
import torch
from reward_lora.benchmarks.allocated import peak_bytes
from reward_lora.selfcheck import exactness
from reward_lora.tests.families import cases
from reward_lora.training.config import TrainConfig
from reward_lora.training.decoding import Decoder, sparse
from reward_lora.training.gradient import Walk, silent
from reward_lora.training.judge import Objective, View, judge, seen_frames
from reward_lora.video_models import load_video_model
from reward_lora.video_models.precision import float64_throughout
from reward_lora.video_models.wan import WanModel

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


@pytest.mark.parametrize("every", [1, 2, 3, 5, 9])
def test_boundaries_that_are_not_kept_are_made_again_and_change_nothing(model, latents, every):
    decoder = Decoder(model, silent)
    clips, given = decoder.forward(latents)
    upstream = [torch.full_like(clip, 1.0 + i) for i, clip in enumerate(clips)]
    expected = decoder.backward(latents, given, upstream)
    ticks = []
    thrifty = Decoder(model, ticks.append, keep_every=every)
    _, given = thrifty.forward(latents)
    assert [entry is not None for entry in given] == [i % every == 0 for i in range(LATENTS)]
    ticks.clear()
    assert torch.equal(thrifty.backward(latents, given, upstream), expected)
    again = sum(entry is None for entry in given)
    assert LATENTS + again <= len(ticks) <= LATENTS + again + again // max(1, every - 1) + 1
    assert sparse(21) == 5
    assert sparse(1) == 1


def memory_of(model, count, save_memory):
    """Peak bytes of a clip's decoding and its gradient, those of the largest boundary, and those of the frames."""
    latents = model.initial_latents((model.spec.latent_channels, count, 4, 4), [0])
    chunks = len(model.chunks(count))
    decoder = Decoder(model, silent, save_memory, keep_every=sparse(chunks) if save_memory else 1)
    carried, frames = [], []

    def run():
        clips, given = decoder.forward(latents)
        carried[:] = [sum(e.nbytes for e in entry if isinstance(e, torch.Tensor)) for entry in given if entry]
        gradients = [torch.ones_like(clip) for clip in clips]
        frames[:] = [clip.nbytes for clip in clips]
        del clips
        decoder.backward(latents, given, gradients)

    return peak_bytes(run), max(carried, default=0), sum(frames)


@pytest.mark.parametrize("save_memory", [False, True])
def test_a_long_clip_needs_the_memory_of_a_short_one_and_what_is_carried(save_memory):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=16, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[True, True],
                           latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # fmt: skip
    tiny = exactness.tiny_wan(dtype=torch.float32)
    model = WanModel(tiny.spec, tiny.transformer, vae)
    two, of_first, _ = memory_of(model, 2, save_memory)
    three, boundary, frames_of_three = memory_of(model, 3, save_memory)
    many, same, frames_of_many = memory_of(model, 21, save_memory)
    assert boundary == same > of_first
    every = sparse(21) if save_memory else 1
    waiting = 4 + 4 if save_memory else 20  # kept, and of one stretch made again
    assert waiting == sum(i % every == 0 for i in range(1, 21)) + every - 1
    assert many - waiting * boundary <= 1.3 * (two - of_first)
    a_latent = (many - three) / 18  # the frames are the reward's
    assert a_latent - (frames_of_many - frames_of_three) / 18 <= (0.4 if save_memory else 1.01) * boundary


VAES = {
    "wan-2.1": ("wan", "2.1 original t2v"),
    "wan-2.2": ("wan", "2.2 original ti2v"),
    "cogvideox": ("cogvideox", "diffusers 2b"),
    "easyanimate-v5": ("easyanimate", "original v5 inp, sharded"),
    "easyanimate-v5.1": ("easyanimate", "diffusers v5.1 t2v"),
    "opensora": ("opensora", "beside each other"),
    "videocrafter": ("videocrafter", "original"),
    "modelscope": ("modelscope", "diffusers"),
}
APART = ("opensora", "videocrafter", "modelscope")
"""Whose chunks know nothing of each other."""


@pytest.fixture(scope="module", params=VAES)
def in_float64(request, tmp_path_factory):
    """A family's model with its VAE in float64, and that VAE's own way to decode a whole clip."""
    (case,) = [case for case in cases() if (case.family, case.layout) == VAES[request.param]]
    folder = tmp_path_factory.mktemp("vae") / "model"
    case.write(folder)
    model = load_video_model(case.source(folder), dtype="float32", text=False)
    model.vae.double()

    def library(latents):
        if case.family == "easyanimate":
            pixels = model.vae.decode(latents / model.vae.config.scaling_factor, return_dict=False)[0]
            return (pixels / 2 + 0.5).clamp(0, 1)
        if case.family == "wan":
            scaled = latents * model._latents_std.to(latents) + model._latents_mean.to(latents)
            with float64_throughout(latents.dtype):
                return (model.vae.decode(scaled, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        if case.family == "opensora":
            return (model.vae.decode(latents) / 2 + 0.5).clamp(0, 1)
        return model.decode(latents)  # CogVideoX's is diffusers' own; the others' frames are pictures

    return request.param, model, library


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_every_vaes_gradient_by_chunks_is_that_of_its_own_whole_decode(in_float64, count):
    name, model, library = in_float64
    latents = model.initial_latents((model.spec.latent_channels, count, 2, 3), [1]).double()
    leaf = latents.clone().requires_grad_()
    with torch.enable_grad():
        frames = library(leaf)
        EveryFrame().score(frames, [""]).sum().backward()
    chunks = model.chunks(count)
    assert sum(chunks) == count
    for save_memory, every in ((False, 1), (True, 2)):
        decoder = Decoder(model, silent, save_memory, keep_every=every)
        clips, given = decoder.forward(latents)
        torch.testing.assert_close(torch.cat(clips, dim=2), frames.detach(), rtol=1e-10, atol=1e-12)
        seen = torch.cat(clips, dim=2).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(EveryFrame().score(seen, [""]).sum(), seen)
        upstream = gradient.split([clip.shape[2] for clip in clips], dim=2)
        found = decoder.backward(latents, given, upstream)
        assert (found - leaf.grad).norm() <= 1e-10 * leaf.grad.norm()
    # The same with the gradient of what is carried cut off is another gradient: the check above would see it.
    _, given = Decoder(model, silent).forward(latents)
    parts = zip(decoder.split(latents), given, upstream, strict=True)
    cut = torch.cat([decoder._chunk_gradient(part, carried, g, ())[0] for part, carried, g in parts], dim=2)
    error = (cut - leaf.grad).norm() / leaf.grad.norm()
    assert error > 1e-3 if len(chunks) > 1 and name not in APART else error <= 1e-10


@pytest.mark.parametrize("save_memory", [False, True])
def test_besides_frames_and_what_is_carried_a_long_clip_needs_the_memory_of_a_short_one(in_float64, save_memory):
    name, model, _ = in_float64
    if name in (*APART, "wan-2.1", "easyanimate-v5.1"):
        return  # nothing is carried, and chunks are alike; it is above; it has the VAE of v5
    rest = []
    for count in (2, 21):
        peak, boundary, frames = memory_of(model, count, save_memory)
        chunks = len(model.chunks(count))
        every = sparse(chunks) if save_memory else 1
        rest.append(peak - frames - ((chunks - 1) // every + every - 1) * boundary)  # kept, and of one stretch
    assert rest[1] <= 1.3 * rest[0]


def test_a_part_of_whole_chunks_is_split_as_the_clip_is(in_float64):
    """Random latents count on it."""
    _, model, _ = in_float64
    for total in range(1, 23):
        chunks = model.chunks(total)
        for n in range(1, len(chunks) + 1):
            assert model.chunks(sum(chunks[:n])) == chunks[:n]


class Frames:
    """The mean over the frames of a curve of each frame."""

    name, differentiable, needs = "frames", True, frozenset()

    def of_each(self, frames):
        return ((frames - 0.4) ** 3 + frames.square()).mean((1, 3, 4))

    def score(self, frames, prompts, *, reference=None):
        return self.of_each(frames).mean(1)


def judged(model, latents, view, reward=None):
    walk = Walk(model, model.conditioning([torch.zeros(2, 8)] * 2, None, latents.shape[1:]), 1.0)
    return judge(walk, latents, reward or Frames(), ["", ""], Objective(), view)


def whole(model, latents, weigh):
    """Frames of all latents in one graph, and the gradient of the weighted sum over the scores of each frame."""
    leaf = latents.clone().requires_grad_()
    with torch.enable_grad():
        frames = model.decode(leaf)
        each = Frames().of_each(frames)
        (-(each * weigh(each.shape[1]).to(each)).sum(1)).mean().backward()
    return frames.detach(), leaf.grad


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("save_memory", [False, True])
def test_random_latents_get_the_exact_gradient_of_their_frames_and_nothing_behind_them_is_decoded(
    model, latents, seed, save_memory
):
    view = View(2, latent_choice="random", seed=seed, save_memory=save_memory)
    drawn = view.draw(LATENTS)
    seen = [frame for i in drawn for frame in (range(2 * i - 1, 2 * i + 1) if i else [0])]  # two frames a latent
    frames, expected = whole(model, latents, lambda n: torch.tensor([f in seen for f in range(n)]).double() / len(seen))
    verdict = judged(model, latents, view)
    torch.testing.assert_close(verdict.frames, frames[:, :, seen], rtol=1e-12, atol=1e-12)
    assert (verdict.gradient - expected).norm() < 1e-12 * expected.norm()
    assert view.part(model, latents).shape[2] == drawn[-1] + 1
    walk = Walk(model, None, 1.0)
    torch.testing.assert_close(seen_frames(walk, latents, view), verdict.frames)


def test_every_latent_is_drawn_in_time_and_the_same_one_again():
    drawn = [tuple(View(2, latent_choice="random", seed=seed).draw(6)) for seed in range(200)]
    assert {i for pair in drawn for i in pair} == set(range(6))
    assert len(set(drawn)) == 15
    assert drawn == [tuple(View(2, latent_choice="random", seed=seed).draw(6)) for seed in range(200)]
    assert View(0, latent_choice="random").draw(6) == View(9).draw(6) == list(range(6))


@pytest.mark.parametrize(("weights", "curve"), [
    ((0.0, 1.0), lambda t: t),
    ((3.0, 1.0), lambda t: 3 - 2 * t),
    ((0.0, 1.0, 0.0), lambda t: 1 - (2 * t - 1).abs()),
    ((2.0,), lambda t: torch.ones_like(t)),
])  # fmt: skip
def test_weights_give_the_gradient_of_the_weighted_mean(model, latents, weights, curve):
    def weigh(count):
        wanted = curve(torch.linspace(0, 1, count, dtype=torch.float64))
        return wanted / wanted.sum()

    frames, expected = whole(model, latents, weigh)
    verdict = judged(model, latents, View(0, weights=weights))
    assert (verdict.gradient - expected).norm() < 1e-12 * expected.norm()
    torch.testing.assert_close(verdict.rewards, Frames().of_each(frames).mean(1))
    one = judged(model, latents[:, :, :1], View(0, weights=weights)).gradient  # a single frame has nothing to outweigh
    torch.testing.assert_close(one, judged(model, latents[:, :, :1], View(0)).gradient)


def test_weights_of_drawn_latents_are_those_of_their_time_in_the_video(model, latents):
    """So that their mean over many draws is the gradient with all latents judged."""
    total = model.spec.frames_of(LATENTS)
    along = torch.linspace(0, 1, total, dtype=torch.float64) / 0.5
    view = View(2, latent_choice="random", weights=(0.0, 1.0), seed=3)
    shown, weights = view.shown(model, LATENTS, total)
    torch.testing.assert_close(weights, along[shown])
    seen = [frame in shown for frame in range(total)]
    _, expected = whole(model, latents, lambda n: along[:n] * torch.tensor(seen) / sum(seen))
    assert (judged(model, latents, view).gradient - expected).norm() < 1e-12 * expected.norm()


def test_weights_are_refused_for_a_reward_that_judges_what_happens_between_frames(model, latents):
    moving = Frames()
    moving.name, moving.per_frame = "moving", False
    with pytest.raises(ValueError, match="the reward moving judges what happens between them"):
        judged(model, latents, View(0, weights=(0.0, 1.0)), moving)


def test_weights_are_checked():
    assert TrainConfig.from_dict({"judged_latents": 0, "judged_weights": [0, 1]}).judged_weights == (0.0, 1.0)
    for settings, words in (
        ({"judged_weights": (-1.0, 2.0)}, "judged_weights must be 0 or more each, and not all 0"),
        ({"judged_weights": (0.0, 0.0)}, "and not all 0"),
        ({"judged_weights": (0.0, 1.0), "judged_latents": 1}, "only the first is judged"),
        ({"judged_weights": (0.0, 1.0), "judged_frames": 1}, "judged_frames must not be 1"),
        ({"judged_from": "last"}, "judged_from must be one of first, random, got 'last'"),
    ):
        with pytest.raises(ValueError, match=words):
            TrainConfig(**{"judged_latents": 0, **settings})
