"""Wan2.2 against diffusers' pipelines: two experts that take turns, and TI2V's start image at timestep 0."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from reward_lora.lora.adapter import LoraUse, applied, inject_new
from reward_lora.lora.files import read_lora
from reward_lora.selfcheck.exactness import ToyReward
from reward_lora.tests.families import wan as family
from reward_lora.training.config import TrainConfig
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.trainer import Trainer
from reward_lora.video_models import WeightFileError, common, load_video_model, wan
from reward_lora.video_models.wan import WanModel, rest
from reward_lora.video_models.wan_parts import build_vae


def written(tmp_path_factory, layout):
    folder = tmp_path_factory.mktemp("wan22") / "model"
    folder.mkdir()
    family.write(folder, layout)
    return folder


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    return written(tmp_path_factory, "2.2 original i2v pair")


@pytest.fixture(scope="module")
def pair(pair_folder):
    return load_video_model(pair_folder, dtype="float32")


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory):
    return load_video_model(written(tmp_path_factory, "2.2 original ti2v"), dtype="float32")


def walk(model, branch, noise, sigmas):
    x = noise
    with torch.no_grad():
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            x = model.step(x, model.predict(x, sigma, branch), sigma, following)
    return x


def pipeline(model, **options):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    first, *second = model.denoisers.values()
    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=model.vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=first,
        transformer_2=second[0] if second else None,
        **options,
    )


def latents_of(pipe, image, text, noise, steps):
    """What diffusers' pipeline makes of the noise, and the sigmas it went by."""
    _, _, t, h, w = noise.shape
    stride = pipe.vae.config.scale_factor_spatial
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        image=image, prompt_embeds=text[None], height=h * stride, width=w * stride, num_frames=(t - 1) * 4 + 1,
        num_inference_steps=steps, guidance_scale=1.0, latents=noise, output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    return made, pipe.scheduler.sigmas.double()


def test_two_experts_paint_what_diffusers_pipeline_paints(pair):
    assert (pair.spec.experts, pair.spec.boundary) == (("high", "low"), 0.9)
    image, text = torch.rand(1, 3, 32, 48), torch.randn(512, 24)
    shape = pair.spec.latent_shape(48, 32, 5)
    noise = pair.initial_latents(shape, [1])
    reference, sigmas = latents_of(pipeline(pair, boundary_ratio=0.9), image, text, noise, 5)
    experts = [pair.spec.expert_at(sigma) for sigma in sigmas[:-1]]
    assert set(experts) == {"high", "low"}
    assert experts == sorted(experts)
    branch = pair.conditioning([text], None, shape, start_image=image).positive
    assert torch.allclose(walk(pair, branch, noise, sigmas), reference, atol=2e-4)


def test_ti2v_paints_what_diffusers_pipeline_paints(ti2v):
    image, text = torch.rand(1, 3, 32, 64), torch.randn(512, 24)
    shape = ti2v.spec.latent_shape(64, 32, 9)
    noise = ti2v.initial_latents(shape, [1])
    reference, sigmas = latents_of(pipeline(ti2v, expand_timesteps=True), image, text, noise, 4)
    branch = ti2v.conditioning([text], None, shape, start_image=image).positive
    ours = walk(ti2v, branch, noise, sigmas)
    assert torch.allclose(ours, reference, atol=2e-4)
    assert torch.allclose(ours[:, :, :1], branch["first"], atol=1e-5)  # the solver ends in the image
    assert not torch.allclose(
        ours, walk(ti2v, ti2v.conditioning([text], None, shape).positive, noise, sigmas), atol=0.1
    )


def test_ti2v_takes_one_image_a_sample_and_no_end(ti2v):
    shape, texts = ti2v.spec.latent_shape(32, 32, 5), [torch.randn(4, 24)] * 2
    images = torch.rand(2, 3, 32, 32)
    both = ti2v.conditioning(texts, texts, shape, start_image=images)
    x, sigma = ti2v.initial_latents(shape, [1, 2]), torch.tensor(0.8, dtype=torch.float64)
    together = ti2v.predict(x, sigma, both.positive)
    alone = ti2v.conditioning(texts[1:], None, shape, start_image=images[1:]).positive
    assert torch.allclose(ti2v.predict(x[1:], sigma, alone), together[1:], atol=1e-4, rtol=1e-4)
    assert torch.equal(both.negative["first"], both.positive["first"])
    with pytest.raises(ValueError, match="cannot end with one; leave the end image out"):
        ti2v.conditioning(texts, None, shape, end_image=images)


def test_ti2v_decodes_as_diffusers_does(ti2v):
    latents = torch.randn(1, 48, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(ti2v.vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        reference = ti2v.vae.decode(latents * std + mean, return_dict=False)[0]
        assert torch.allclose(ti2v.decode(latents) * 2 - 1, reference, atol=1e-5)


def test_ti2v_has_its_published_defaults(ti2v):
    spec = ti2v.spec
    assert (spec.latent_channels, spec.image_to_video, spec.experts) == (48, True, ("transformer",))
    assert (spec.width, spec.height, spec.frames, spec.fps, spec.guidance_scale) == (1280, 704, 121, 24, 5.0)


@pytest.mark.parametrize(("layout", "boundary", "shift"), [("i2v", 0.9, 5.0), ("t2v", 0.875, 12.0)])
def test_a_pair_has_the_boundary_and_shift_of_its_kind(tmp_path, layout, boundary, shift):
    family.write(tmp_path, f"2.2 original {layout} pair")
    model = load_video_model(tmp_path, text=False)
    assert model.spec.boundary == boundary
    assert float(model.sigmas(2)[1]) == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))
    (tmp_path / "reward_lora.json").write_text(json.dumps({"boundary": 0.5}))
    model = load_video_model(tmp_path, text=False)
    assert [model.spec.expert_at(sigma) for sigma in (1.0, 0.5, 0.49)] == ["high", "high", "low"]


def test_experts_of_different_models_are_refused(pair_folder, tmp_path):
    folder = shutil.copytree(pair_folder, tmp_path / "mixed")
    other = tmp_path / "other"
    other.mkdir()
    family.write(other, "2.2 original t2v pair")
    shutil.rmtree(folder / "low_noise_model")
    shutil.copytree(other / "low_noise_model", folder / "low_noise_model")
    with pytest.raises(WeightFileError, match="two experts of mixed are of different models"):
        load_video_model(folder, text=False)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index", {"boundary_ratio": "high"}, "boundary_ratio in .* above 0 and at most at 1, got 'high'"),
        ("scheduler/scheduler_config", {"flow_shift": [3]}, r"shift in .* above 0 and at most at 1000, got \[3\]"),
        ("model_index", {"transformer_2": True, "boundary_ratio": 0}, "boundary_ratio in .*, got 0"),
    ],
)
def test_numbers_of_a_diffusers_folder_that_cannot_be_meant_are_refused(tmp_path, file, change, message):
    for name, content in (("model_index", {"_class_name": "WanPipeline"}), ("scheduler/scheduler_config", {})):
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content | change if name == file else content))
    with pytest.raises(WeightFileError, match=message):
        load_video_model(tmp_path)


def test_a_vae_halves_the_frames_or_not():
    with torch.device("meta"), pytest.raises(ValueError, match=r"must hold true or false, got \['x', True\]"):
        build_vae({"base_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": ["x", True]})


def test_a_vae_of_another_model_is_refused(tmp_path):
    family.write(tmp_path, "2.1 original t2v")
    other = tmp_path / "other"
    other.mkdir()
    family.write(other, "2.2 original ti2v")
    (other / f"{family.VAE_FILE_22}.pth").rename(tmp_path / f"{family.VAE_FILE}.pth")
    with pytest.raises(WeightFileError, match="latents of 16 channels, and its VAE reads 48"):
        load_video_model(tmp_path, text=False)


def test_only_the_expert_at_work_is_on_the_device(pair, monkeypatch):
    """Who moves where, told by those who move; nothing is computed."""
    model = WanModel(pair.spec, dict(pair.denoisers), pair.vae)
    names, moves = {id(network): name for name, network in model.denoisers.items()}, []
    monkeypatch.setattr(wan, "rest", lambda network: moves.append((names[id(network)], "cpu")))
    for place in (wan, common):
        monkeypatch.setattr(place, "bring", lambda network, device: moves.append((names[id(network)], str(device))))
    monkeypatch.setattr(WanModel, "device", torch.device("cuda"))
    model.to("cuda", "denoiser")
    assert moves == [("low", "cpu"), ("high", "cuda")]
    moves.clear()
    for expert in ("high", "low", "low", "high"):
        assert model.put_to_work(expert) is model.denoisers[expert]
    assert moves == [("high", "cpu"), ("low", "cuda"), ("low", "cpu"), ("high", "cuda")]


def test_what_is_trained_does_not_go_when_its_expert_rests():
    """The meta device again: from it nothing could be moved."""
    network = torch.nn.ModuleDict({"frozen": torch.nn.Linear(2, 2), "trained": torch.nn.Linear(2, 2, device="meta")})
    network["frozen"].requires_grad_(False)
    rest(network)
    assert network["trained"].weight.is_meta
    network["trained"].requires_grad_(False)
    with pytest.raises(NotImplementedError):
        rest(network)


@pytest.mark.gpu
def test_experts_take_turns_on_a_gpu(pair_folder):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = load_video_model(pair_folder, dtype="float32", device="cuda")
    trained = inject_new(model.denoisers["low"], ("to_q",), 2, 2.0, 0)
    shape = model.spec.latent_shape(32, 32, 5)
    branch = model.conditioning(model.encode_text(["a"]), None, shape).positive
    x = model.initial_latents(shape, [1])
    for sigma, working in ((1.0, "high"), (0.5, "low"), (0.95, "high")):
        assert model.predict(x, torch.tensor(sigma, dtype=torch.float64), branch).is_cuda
        for name, network in model.denoisers.items():
            devices = {p.device.type for p in network.parameters() if not p.requires_grad}
            assert devices == {"cuda" if name == working else "cpu"}
    assert all(parameter.is_cuda for parameter in trained.parameters().values())


ONE_STEP = {
    "steps": 1, "rank": 2, "network_alpha": 2, "learning_rate": 0.05, "width": 32, "height": 32, "frames": 5,
    "sampler_steps": 4, "guidance_scale": 1.0, "sample_every": 1, "sample_count": 1, "save_dtype": "float32",
    "backprop": BackpropSchedule("last"),
}  # fmt: skip


def test_a_lora_is_trained_on_top_of_distilled_ones(pair, tmp_path):
    """As with Wan2.2-Lightning: one frozen LoRA an expert lies under the one that is trained, without guidance."""

    def trained(name, **settings):
        trainer = Trainer(pair, ToyReward(), ["a red circle"], TrainConfig(**ONE_STEP | settings), tmp_path / name)
        events = list(trainer)
        assert events[-1].grad_norm > 0
        return [LoraUse(read_lora(path), 1.0) for path in trainer.lora_paths.values()], events

    distilled, _ = trained("distilled", backprop=BackpropSchedule("tail", 4))
    assert [use.experts(pair) for use in distilled] == [["high"], ["low"]]  # the files say whose they are
    _, bare = trained("bare", experts=("low",))
    with applied(pair, distilled):
        (top,), events = trained("top", experts=("low",))
        before = events[0].evaluation.frames
    assert not torch.equal(before, bare[0].evaluation.frames), "the distilled LoRAs had no part in it"
    with applied(pair, distilled):
        assert torch.equal(painted(pair, tmp_path), before)
    with applied(pair, [*distilled, top]):
        assert torch.equal(painted(pair, tmp_path), events[-1].evaluation.frames)


def painted(model, folder):
    """What the trainer's evaluation paints."""
    return Trainer(model, ToyReward(), ["a red circle"], TrainConfig(**ONE_STEP), folder / "again").evaluate().frames
