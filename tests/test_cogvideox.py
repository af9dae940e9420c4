"""CogVideoX against VideoX-Fun's numbers (``tests/fixtures``) and against diffusers' own pipelines and solvers.

Loading, painting, learning and refusals of every layout are in ``test_families.py``.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from reward_lora.lora.adapter import inject_new
from reward_lora.selfcheck import exactness, fixtures
from reward_lora.tests.families import cogvideox as tiny
from reward_lora.training.gradient import Walk, replay, rollout
from reward_lora.training.judge import Objective, View, judge
from reward_lora.training.sample import sample_prompt
from reward_lora.video_models import WeightFileError, load_video_model
from reward_lora.video_models.cogvideox import CogVideoXModel, position_table, resize_positions, rotary_of
from reward_lora.video_models.cogvideox_files import build_transformer, describe, read_solver
from reward_lora.video_models.images import GIVEN_NOISE
from reward_lora.video_models.loading import load_tokenizer
from reward_lora.video_models.solvers import Ddim

FIXTURES = Path(__file__).parent / "fixtures"
SHAPE = (16, 3, 6, 4)
"""Latents of ``tiny.SIZE``."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every layout, by name."""
    made = {}
    for layout in tiny.LAYOUTS:
        made[layout] = tmp_path_factory.mktemp("model") / layout.replace(" ", "-").replace(",", "")
        made[layout].mkdir()
        tiny.write(made[layout], layout)
    return made


@pytest.fixture
def model(folders):
    """A model by the beginning of its layout's name, freshly loaded."""

    def load(name, **options) -> CogVideoXModel:
        return load_video_model(folders[next(layout for layout in folders if layout.startswith(name))], **options)

    return load


# Against the publishers


def test_a_reward_step_equals_videox_funs():
    lines = list(fixtures.check([FIXTURES / "cogvideox_train_step"], parts=True))
    assert [str(line) for line in lines if line.failed] == []
    assert {"schedule", "timesteps", "positions resized", "last, frames", "tail2, latents"} <= {
        line.name.partition(": ")[2] for line in lines
    }


@pytest.mark.parametrize("steps", [1, 3, 5, 6, 7, 30, 48, 50])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_the_walk_is_diffusers(steps, spacing):
    """Also where the steps do not divide the 1000 timesteps and diffusers' latents and network part by one."""
    from diffusers import CogVideoXDDIMScheduler

    config = tiny.scheduler_config(3.0) | {"timestep_spacing": spacing}
    scheduler, solver = CogVideoXDDIMScheduler.from_config(config), Ddim.from_config(config)
    scheduler.set_timesteps(steps)
    sigmas = solver.sigmas(steps)
    assert sigmas.shape == (steps + 1,)
    assert (sigmas.diff() < 0).all()
    x = y = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        assert solver.timestep(sigmas[i]) == t
        x = scheduler.step((3 * x + t / 100).sin(), t, x, return_dict=False)[0]
        y = solver.step(y, (3 * y + t / 100).sin(), sigmas[i], sigmas[i + 1])
    torch.testing.assert_close(y, x, rtol=0, atol=1e-12)


def test_a_step_to_zero_gives_the_clean_prediction():
    solver = Ddim.from_config(tiny.scheduler_config(1.0) | {"timestep_spacing": "trailing"})
    x, v = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sigma in (solver.sigmas(7)[3], solver.sigmas(10)[3]):
        alpha = solver.alphas[solver.timestep(sigma)]
        x0 = solver.step(x, v, sigma, torch.tensor(0.0))
        torch.testing.assert_close(x0, alpha.sqrt() * x - (1 - alpha).sqrt() * v)
    noise = solver.sigmas(10)[0]
    assert noise == 1  # all noise: what comes in does not count
    torch.testing.assert_close(solver.step(x, v, noise, torch.tensor(0.0)), -v)


def test_inp_models_have_no_shifted_schedule(folders, model):
    path = folders["fun 2b inp"] / "scheduler" / "scheduler_config.json"
    plain, shifted = read_solver(path, "inp"), read_solver(path, "text")
    assert plain.alphas[500] == read_solver(path, "text", 1.0).alphas[500] > 1.5 * shifted.alphas[500]
    assert torch.equal(model("fun 2b", text=False).solver.alphas, plain.alphas)
    assert torch.equal(model("diffusers 2b", text=False).solver.alphas, shifted.alphas)
    assert plain.spacing == "trailing"  # whatever the file says


def test_text_is_diffusers_with_its_padding(model, folders):
    from diffusers import CogVideoXPipeline

    ours = model("diffusers 2b")
    pipeline = CogVideoXPipeline.from_pretrained(folders["diffusers 2b"])
    prompts = ["a red circle moves right", "", "the blue square moves left on the red circle moves right on the a"]
    reference = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=12, device="cpu")
    embeddings = ours.encode_text(prompts)
    torch.testing.assert_close(torch.stack(embeddings), reference, atol=1e-5, rtol=1e-4)
    assert torch.equal(ours.encode_text(prompts[1:2])[0], embeddings[1])
    branch = ours.conditioning(embeddings, None, SHAPE).positive
    assert torch.equal(branch["text"], torch.stack(embeddings))
    with pytest.raises(ValueError, match=r"takes texts of 12 tokens, got \[5, 12\]"):
        ours.conditioning([embeddings[0][:5], embeddings[1]], None, SHAPE)


def test_the_tokenizer_answers_as_transformers_without_its_protobuf(folders, monkeypatch):
    pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece models through protobuf")
    from transformers import AutoTokenizer

    folder = folders["diffusers 2b"] / "tokenizer"
    theirs = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setitem(sys.modules, "google.protobuf", None)  # as in a fresh ComfyUI
    ours = load_tokenizer(folder)
    texts = ["a red circle moves right", "", "  two   spaces ", "\u00e9t\u00e9 \u4e2d\u6587 A-b, c!", "the square " * 9]
    for text in texts:
        for options in ({"truncation": True}, {"truncation": True, "padding": "max_length", "return_tensors": "pt"}):
            reference = theirs(text, max_length=12, **options).input_ids
            answer = ours(text, max_length=12, **options).input_ids
            assert torch.equal(torch.as_tensor(answer), torch.as_tensor(reference)), text
    (folder / "spiece.model").rename(folder / "aside")
    (folder / "spiece.model").write_bytes(b"no model")
    with pytest.raises(WeightFileError, match="tokenizer in .* cannot be read"):
        load_tokenizer(folder)
    (folder / "aside").replace(folder / "spiece.model")


@pytest.mark.parametrize("name", ["diffusers 2b", "diffusers 5b i2v, sharded"])
def test_a_video_is_diffusers(folders, name, monkeypatch):
    """Prompt to frames, in four steps of a size that is not the training size where diffusers can."""
    import diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[name])
    pipeline.scheduler = diffusers.CogVideoXDDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    pipeline.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) if "i2v" in name else None
    width, height, frames = tiny.SIZE if image is None else (96, 64, 17)  # the learned table has one size there
    model = load_video_model(folders[name])
    frames_of_ours = sample_prompt(
        model, "a red circle", 5, negative_prompt="the", width=width, height=height, frames=frames, steps=4,
        guidance_scale=3.0, start_image=image,
    )  # fmt: skip
    noise = model.initial_latents(model.spec.latent_shape(width, height, frames), [5]).transpose(1, 2)
    reference = pipeline(
        prompt="a red circle", negative_prompt="the", width=width, height=height, num_frames=frames,
        num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="pt", max_sequence_length=12,
        **({} if image is None else {"image": image}),
    ).frames  # fmt: skip
    torch.testing.assert_close(frames_of_ours, reference.transpose(1, 2), atol=1e-4, rtol=0)
    assert reference.std() > 0.1


def noise_of(model, seed=0, shape=SHAPE):
    return model.initial_latents(shape, [seed])


def predict(model, **images):
    texts = model.encode_text(["a red circle"])
    branch = model.conditioning(texts, None, SHAPE, **images).positive
    with torch.no_grad():
        return model.predict(noise_of(model), model.sigmas(4)[1], branch)


def test_the_publishers_2b_keeps_diffusers_positions_and_funs_are_resized(model):
    inp, plain = model("fun 2b"), model("diffusers 2b")
    from diffusers import CogVideoXTransformer3DModel

    for ours in (inp, plain):
        theirs = CogVideoXTransformer3DModel.from_config(ours.transformer.config)
        theirs.load_state_dict(ours.transformer.state_dict())
        branch = ours.conditioning(ours.encode_text(["a red circle"]), None, SHAPE).positive
        inputs = torch.cat([noise_of(ours), *(branch[key] for key in branch if key == "latents")], dim=1)
        timestep = ours.solver.timestep(ours.sigmas(4)[1])[None]
        with torch.no_grad():
            output = theirs(inputs.transpose(1, 2), branch["text"], timestep, return_dict=False)[0]
        difference = (output.transpose(1, 2) - predict(ours)).abs().max()
        assert (difference < 1e-5) == (ours is plain)
        assert ours is plain or difference > 0.01


def test_the_resized_table_is_the_trained_one_at_its_own_size():
    config = tiny.transformer_config(tiny.TINY, 33, rotary=False, **tiny.POSITIONS)
    patch = build_transformer(config).patch_embed
    assert torch.equal(position_table(patch, 12, (5, 4, 6)), patch.pos_embedding)
    shorter = position_table(patch, 12, (2, 4, 6))
    assert torch.equal(shorter, patch.pos_embedding[:, : 12 + 2 * 24])
    assert not position_table(patch, 12, (1, 3, 2))[:, :12].any()
    with pytest.raises(ValueError, match="has 5 latent frames, got 6"):
        position_table(patch, 12, (6, 4, 6))


def test_rotary_tables_are_diffusers_where_the_crop_starts_at_zero(model):
    """Elsewhere newer diffusers spaces the grid otherwise than these models were trained; see the parity fixtures."""
    from diffusers import CogVideoXImageToVideoPipeline

    ours = model("diffusers 5b", text=False)
    pipeline = CogVideoXImageToVideoPipeline(None, None, ours.vae, ours.transformer, None)
    for width, height, same in ((96, 64, True), (48, 32, True), (32, 48, False)):
        reference = pipeline._prepare_rotary_positional_embeddings(height, width, 3, "cpu")
        tables = rotary_of(ours.transformer.config, (3, height // 16, width // 16))
        assert all(torch.allclose(a, b, atol=1e-5) == same for a, b in zip(tables, reference, strict=True))


# Images


def test_image_to_video_conditioning_is_diffusers(model, monkeypatch):
    from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    ours = model("diffusers 5b")
    pipeline = CogVideoXImageToVideoPipeline(None, None, ours.vae, ours.transformer, CogVideoXDDIMScheduler())
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    image = torch.rand(1, 3, 48, 32, generator=torch.Generator().manual_seed(1))
    _, reference = pipeline.prepare_latents(image * 2 - 1, 1, 16, 9, 48, 32, torch.float32, "cpu", None, None)
    texts = ours.encode_text(["a", "the"])
    branch = ours.conditioning(texts, texts, SHAPE, start_image=image).negative
    assert branch["latents"].shape == (2, *SHAPE)
    torch.testing.assert_close(branch["latents"][1:], reference.transpose(1, 2))
    assert not ours.conditioning(texts, None, SHAPE).positive["latents"].any()
    with pytest.raises(ValueError, match="takes a start image, and no end image"):
        ours.conditioning(texts, None, SHAPE, start_image=image, end_image=image)


@pytest.mark.parametrize("given", [("start",), ("end",), ("start", "end")])
def test_inp_conditioning_is_videox_funs(model, given):
    """Mask times scaling factor, 1 where given; frames of -1 elsewhere; the mask averages frames 2 and 3 of each 4."""
    ours = model("fun 5b")
    ours.transformer.register_to_config(add_noise_in_inpaint_model=False)
    pictures = torch.rand(2, 1, 3, 48, 32, generator=torch.Generator().manual_seed(1))
    images = {f"{name}_image": pictures[i] for i, name in enumerate(("start", "end")) if name in given}
    latents = ours.conditioning(ours.encode_text(["a"]), None, SHAPE, **images).positive["latents"]
    assert latents.shape == (1, 17, *SHAPE[1:])
    video = torch.full((1, 3, 9, 48, 32), -1.0)
    if "start" in given:
        video[:, :, 0] = pictures[0] * 2 - 1
    if "end" in given:
        video[:, :, 8] = pictures[1] * 2 - 1
    scale = ours.vae.config.scaling_factor
    reference = ours.vae.encode(video).latent_dist.mode() * scale
    torch.testing.assert_close(latents[:, 1:], reference)
    first = scale if "start" in given else 0.0  # of an end image the mask says nothing, as published
    torch.testing.assert_close(latents[0, 0].mean((1, 2)), torch.tensor([first, 0.0, 0.0]))
    assert latents[0, 0].std((1, 2)).max() < 1e-6


def test_without_an_image_inp_gets_zeros_and_with_one_a_little_noise(model):
    ours = model("fun 2b")
    texts = ours.encode_text(["a"])

    def given(noise, image=None):
        ours.transformer.register_to_config(add_noise_in_inpaint_model=noise)
        return ours.conditioning(texts, None, SHAPE, start_image=image).positive["latents"]

    assert not given(True).any()
    image, black = torch.rand(1, 3, 48, 32), torch.zeros(1, 3, 48, 32)
    assert torch.equal(given(True, image), given(True, image))
    assert 0 < (given(True, image) - given(False, image)).std() < 10 * GIVEN_NOISE
    assert torch.equal(given(True, black), given(False, black))  # black counts as not given


def test_an_image_that_does_not_fit_is_refused(model):
    plain, inp = model("diffusers 2b"), model("fun 2b")
    texts = plain.encode_text(["a", "the"])
    with pytest.raises(ValueError, match="text-to-video model and takes no start or end image"):
        plain.conditioning(texts, None, SHAPE, start_image=torch.rand(1, 3, 48, 32))
    with pytest.raises(ValueError, match=r"end image must be \[1 or 2, 3, H, W\], got \[3, 3, 48, 32\]"):
        inp.conditioning(texts, None, SHAPE, end_image=torch.rand(3, 3, 48, 32))
    with pytest.raises(ValueError, match="2 positive prompts need as many negative ones, got 1"):
        inp.conditioning(texts, texts[:1], SHAPE)
    images = torch.rand(2, 3, 48, 32)
    both = inp.conditioning(texts, None, SHAPE, start_image=images).positive["latents"]
    alone = inp.conditioning(texts[:1], None, SHAPE, start_image=images[:1]).positive["latents"]
    torch.testing.assert_close(both[:1, :1], alone[:, :1])


# Exactness


@pytest.mark.parametrize("name", ["fun 2b", "diffusers 5b"])
def test_replay_equals_one_graph_in_float64(model, name):
    double = model(name, text=False)
    for part in (double.transformer, double.vae):
        torch.nn.Module.double(part)
    generator = torch.Generator().manual_seed(0)
    adapter = inject_new(double.transformer, ("all-linear",), rank=2, alpha=2.0, seed=1)
    for parameter in adapter.parameters().values():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
    texts = [torch.randn(12, 20, generator=generator, dtype=torch.float64) for _ in range(4)]
    walk = Walk(double, double.conditioning(texts[:2], texts[2:], SHAPE), 3.0)
    noise = double.initial_latents(SHAPE, [3, 4]).double()
    reward, objective = exactness.ToyReward(), Objective()
    for key in ("tail 3, coupling 0.5", "x0 of three coupled steps"):
        schedule = exactness.SCHEDULES[key]
        plan = schedule.draw(double.sigmas(exactness.STEPS), 5)  # six steps: with timesteps between two levels
        expected = exactness.one_graph(walk, noise, plan, reward, objective, schedule.coupling)
        reference = exactness.gradients(adapter)
        final, kept = rollout(walk, noise, plan)
        verdict = judge(walk, final, reward, ["", ""], objective, View(0))
        replay(walk, kept, plan, verdict.gradient, schedule.coupling)
        assert exactness.relative_error(exactness.gradients(adapter), reference) < 1e-12
        assert exactness.relative_error({"": final}, {"": expected}) < 1e-12


def test_the_decoders_gradient_passes_its_cache(model):
    """Five latents are decoded as three and two; a finite difference sees what passes from chunk to chunk."""
    double = model("diffusers 2b", text=False)
    double.vae.double()
    generator = torch.Generator().manual_seed(0)
    latents, direction = torch.randn(2, 1, 16, 5, 2, 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 3, 17, 16, 16, generator=generator, dtype=torch.float64)
    leaf = (latents * 0.1).requires_grad_()
    frames = double.decode(leaf)
    assert frames.shape == weight.shape
    (gradient,) = torch.autograd.grad((frames * weight).sum(), leaf)
    (late,) = torch.autograd.grad((double.decode(leaf) * weight)[:, :, 9:].sum(), leaf)
    assert late[:, :, :3].abs().max() > 0
    with torch.no_grad():
        ahead, back = (double.decode(leaf + sign * 1e-6 * direction) for sign in (1, -1))
    expected = (((ahead - back) / 2e-6) * weight).sum()
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-6, atol=1e-9)


def test_a_batch_predicts_what_its_samples_predict_alone(model):
    ours = model("fun 5b")
    texts, images = ours.encode_text(["a red circle", "the blue square moves left"]), torch.rand(2, 3, 48, 32)
    x, sigma = ours.initial_latents(SHAPE, [1, 2]), ours.sigmas(4)[2]
    together = ours.predict(x, sigma, ours.conditioning(texts, None, SHAPE, start_image=images[:1]).positive)
    for i in range(2):
        branch = ours.conditioning(texts[i : i + 1], None, SHAPE, start_image=images[:1]).positive
        torch.testing.assert_close(ours.predict(x[i : i + 1], sigma, branch), together[i : i + 1], atol=1e-5, rtol=1e-4)
    frames = ours.decode(x)
    torch.testing.assert_close(ours.decode(x[1:]), frames[1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["fun 2b", "diffusers 5b"])
def test_everything_stays_on_the_models_device(model, name):
    """The meta device stands for a GPU: it too refuses tensors of another device."""
    ours = model(name)
    texts, image = ours.encode_text(["a red circle"]), torch.rand(1, 3, 48, 32)
    ours.to("meta", "denoiser")
    with_image = ours.conditioning(texts, texts, SHAPE, start_image=image)
    ours.to("meta")
    x, sigmas = ours.initial_latents(SHAPE, [1]), ours.sigmas(2)
    for branch in (with_image.positive, ours.conditioning(texts, None, SHAPE).positive):
        x = ours.step(x, ours.predict(x, sigmas[0], branch), sigmas[0], sigmas[1])
    assert x.is_meta
    assert ours.decode(x).is_meta
    with pytest.raises(ValueError, match="unknown parts"):
        ours.to("cpu", "unet")


def test_a_model_loaded_under_inference_mode_can_carry_gradients(model):
    with torch.inference_mode():  # as ComfyUI runs its nodes
        ours = model("fun 2b")
    tensors = [*ours.transformer.parameters(), *ours.transformer.buffers(), *ours.vae.parameters(), ours.solver.alphas]
    assert not any(tensor.is_inference() for tensor in tensors)


# The published models


def real(heads, layers, channels=16, **more):
    """``transformer/config.json`` and the key list of a published model."""
    sizes = {"heads": heads, "head": 64, "layers": layers, "time": 512, "text": 4096}
    positions = {"sample_width": 90, "sample_height": 60, "sample_frames": 49, "max_text_seq_length": 226}
    learned = 226 + 13 * 30 * 45 if more.get("use_learned_positional_embeddings") else 0
    config = tiny.transformer_config(sizes, channels, rotary=heads == 48, **positions, **more)
    return config, tiny.transformer_shapes(**sizes, channels=channels, learned=learned)


REAL = {
    "CogVideoX-2b": (*real(30, 30), 736, 1_693_783_872),
    "CogVideoX-5b": (*real(48, 42), 1024, 5_570_283_072),
    "CogVideoX-5b-I2V": (*real(48, 42, 32, use_learned_positional_embeddings=True), 1025, 5_625_087_552),
    "CogVideoX-Fun-V1.1-2b-InP": (*real(30, 30, 33, add_noise_in_inpaint_model=True), 736, 1_693_914_432),
    "CogVideoX-Fun-V1.1-5b-InP": (*real(48, 42, 33, add_noise_in_inpaint_model=True), 1024, 5_570_491_968),
}


@pytest.mark.parametrize("name", REAL)
def test_the_published_models_have_the_keys_the_loader_expects(name):
    from diffusers import AutoencoderKLCogVideoX

    config, shapes, keys, parameters = REAL[name]
    vae_config = tiny.vae_config((128, 256, 256, 512), 3, 32)
    with torch.device("meta"):
        network, vae = build_transformer(config), AutoencoderKLCogVideoX.from_config(vae_config)
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == shapes
    assert len(shapes) == keys
    assert sum(value.numel() for value in network.state_dict().values()) == parameters
    expected = tiny.vae_shapes(widths=(128, 256, 256, 512), layers=3)
    assert {key: tuple(value.shape) for key, value in vae.state_dict().items()} == expected
    assert len(expected) == 436
    spec = describe(name, network, vae)
    assert (spec.width, spec.height, spec.frames, spec.size_multiple) == (720, 480, 49, 16)
    assert spec.latent_shape(720, 480, 49) == (16, 13, 60, 90)
    model = CogVideoXModel(spec, network, vae, Ddim.from_config({}))
    names = model.lora_names("transformer")
    blocks = ("norm1.linear", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "norm2.linear")
    blocks += ("ff.net.0.proj", "ff.net.2")
    outside = {"patch_embed.text_proj", "time_embedding.linear_1", "time_embedding.linear_2", "norm_out.linear"}
    linear = {f"transformer_blocks.{i}.{part}" for i in range(config["num_layers"]) for part in blocks}
    assert names == {name: name for name in linear | outside | {"proj_out"}}


def test_t5_xxl_has_the_keys_the_loader_expects():
    from reward_lora.video_models.loading import build_t5, fit_names

    sizes = {"dim": 4096, "inner": 4096, "ffn": 10240, "layers": 24, "heads": 64, "vocabulary": 32128}
    config = {"model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    config |= {"vocab_size": 32128, "feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        module = build_t5(config)
        published = {key: torch.empty(size) for key, size in tiny.text_shapes(**sizes).items()}
    assert len(published) == 219
    fitted = fit_names(published, module)
    assert {k: v.shape for k, v in fitted.items()} == {k: v.shape for k, v in module.state_dict().items()}


def test_frames_are_those_the_vae_can_decode():
    config, *_ = REAL["CogVideoX-5b"]
    with torch.device("meta"):
        from diffusers import AutoencoderKLCogVideoX

        spec = describe("Cog", build_transformer(config), AutoencoderKLCogVideoX())
    assert [spec.nearest_frames(n) for n in (-3, 1, 4, 8, 9, 14, 48, 49, 81)] == [1, 1, 1, 9, 9, 17, 49, 49, 49]
    with pytest.raises(ValueError, match=r"must be 8n\+1 and at most 49 for Cog, got 81; the nearest is 49"):
        spec.check_size(720, 480, 81)
    with pytest.raises(ValueError, match="multiples of 16 for Cog, got 250x256; the nearest is 256x256"):
        spec.check_size(250, 256, 49)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer/config", {"patch_size_t": 2}, "is a CogVideoX 1.5 model"),
        ("transformer/config", {"in_channels": 32}, r"takes 32 input channels; supported are 16 .*not control"),
        ("transformer/config", {"in_channels": [32]}, r"has \[32\] input and 16 output channels; they must be whole"),
        ("scheduler/scheduler_config", {"beta_schedule": "cosine"}, "beta_schedule must be linear or scaled_linear"),
        ("scheduler/scheduler_config", {"clip_sample": True}, "clip_sample must be off"),
        ("scheduler/scheduler_config", {"beta_end": -1}, "beta_start <= beta_end < 1, got 1000, 0.00085 and -1"),
        ("scheduler/scheduler_config", {"beta_end": None}, "beta_end must be a number, got None"),
        ("reward_lora", {"shift": 3.0}, "unknown option shift; allowed are .*snr_shift_scale"),
        ("reward_lora", {"snr_shift_scale": 0}, r"snr_shift_scale must be above 0 in reward_lora\.json, got 0"),
    ],
)
def test_variants_we_cannot_run_are_refused(tmp_path, part, change, message):
    tiny.write(tmp_path, "fun 2b inp")
    path = tmp_path / f"{part}.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))
    with pytest.raises(WeightFileError, match=message) as caught:
        load_video_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_options_of_the_folder_are_heard(tmp_path):
    tiny.write(tmp_path, "fun 2b inp")
    options = {"name": "Mine", "width": 64, "height": 32, "frames": 9, "snr_shift_scale": 3.0, "lora_targets": ["to_q"]}
    (tmp_path / "reward_lora.json").write_text(json.dumps(options))
    model = load_video_model(tmp_path, text=False)
    assert (model.spec.name, model.spec.width, model.spec.frames, model.spec.lora_targets) == ("Mine", 64, 9, ("to_q",))
    assert model.spec.recipe == "cogvideox-fun-v1.1-2b-inp"
    assert torch.equal(model.solver.alphas, Ddim.from_config(tiny.scheduler_config(3.0)).alphas)


def test_positions_are_resized_once_and_only_where_there_is_a_table():
    without = build_transformer(tiny.transformer_config(tiny.TINY, 33, rotary=True, **tiny.POSITIONS))
    resize_positions(without)
    assert not without.patch_embed._forward_hooks
    table = build_transformer(tiny.transformer_config(tiny.TINY, 33, rotary=False, **tiny.POSITIONS))
    for _ in range(2):
        resize_positions(table)
    assert len(table.patch_embed._forward_hooks) == 1
