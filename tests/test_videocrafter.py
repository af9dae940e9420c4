"""VideoCrafter2: the published names, OpenCLIP's text, the noisy solver, VADER's LoRA, and what is refused."""

import json
import math
import sys
from dataclasses import asdict

import pytest
import torch
from reward_lora.lora.adapter import LoraUse, applied, inject_new
from reward_lora.lora.read import read_lora
from reward_lora.selfcheck.exactness import ToyReward
from reward_lora.tests.families import videocrafter as tiny
from reward_lora.training.gradient import Walk, replay, rollout
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.video_models import WeightFileError, load_video_model
from reward_lora.video_models import videocrafter_keys as keys
from reward_lora.video_models.loading import build_clip_text, diffusers
from reward_lora.video_models.videocrafter_ddim import (
    ddim_factors,
    ddim_sigmas,
    ddim_step,
    ddim_timesteps,
    scaled_diffusion,
)
from reward_lora.video_models.videocrafter_unet import UNetConfig, VideoCrafterUNet

PROMPT = "a red circle moves right"
SHAPE = (4, 3, 4, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("VideoCrafter2")
    tiny.write(where, "original")
    return where


@pytest.fixture(scope="module")
def model(folder):
    return load_video_model(folder, dtype="float32")


def conditioning(model, prompts=(PROMPT,)):
    texts = model.encode_text(list(prompts))
    return model.conditioning(texts, model.encode_text([""] * len(texts)), SHAPE)


def on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(build, config):
    with torch.device("meta"):
        module = build(config)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_the_real_unets_names_and_sizes():
    shapes = tiny.unet_shapes(**tiny.UNET)
    assert len(shapes) == 1484
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_413_284_420  # 5.65 GB in float32
    assert shapes["input_blocks.8.0.temopral_conv.conv4.3.weight"] == (1280, 1280, 3, 1, 1)
    assert shapes["init_attn.0.proj_in.weight"] == (512, 320, 1)
    assert shapes["output_blocks.11.2.transformer_blocks.0.attn2.to_k.weight"] == (320, 320)
    assert "input_blocks.10.1.norm.weight" not in shapes  # no transformer on the coarsest level
    assert keys.unet_config(on_meta(shapes)) == UNetConfig()
    assert shapes_of(VideoCrafterUNet, UNetConfig()) == shapes


def test_the_real_vaes_names_become_diffusers():
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    published = on_meta(tiny.vae_shapes(**tiny.VAE))
    assert len(published) == 248
    config = keys.vae_config(published)
    converted = keys.convert_vae(published)
    ours = {name: tuple(tensor.shape) for name, tensor in converted.items()}
    assert ours == shapes_of(diffusers("AutoencoderKL"), config)
    prefixed = {f"first_stage_model.{name}": tensor for name, tensor in published.items()}
    theirs = convert_ldm_vae_checkpoint(prefixed, config)
    assert {name: id(tensor) for name, tensor in theirs.items() if tensor.dim() != 2} == {
        name: id(tensor) for name, tensor in converted.items() if tensor.dim() != 2
    }


def test_the_real_text_encoders_names_fit_without_its_last_block():
    published = on_meta(tiny.text_shapes(**tiny.TEXT))
    config = keys.text_config(published)
    assert (config["num_hidden_layers"], config["num_attention_heads"]) == (23, 16)
    fitted = {name.removeprefix("text_model."): s for name, s in shapes_of(build_clip_text, config).items()}
    assert {name: tuple(tensor.shape) for name, tensor in keys.convert_text(published).items()} == fitted


def test_text_is_openclips_last_but_one_layer(folder, model):
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 77, "vocab_size": tiny.TOKENS, "width": 32, "heads": 1, "layers": 2}
    vision = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 16, "image_size": 16}
    clip = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()
    saved = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    assert not clip.load_state_dict(keys.part_of(saved, "text"), strict=False).unexpected_keys
    with torch.no_grad():
        x = clip.token_embedding(open_clip.tokenize([PROMPT])) + clip.positional_embedding
        x = clip.ln_final(clip.transformer.resblocks[0](x, attn_mask=clip.attn_mask))[0]
    (ours,) = model.encode_text([PROMPT])
    assert ours.shape == (77, 32)
    assert torch.allclose(ours, x, atol=1e-5)


def test_every_condition_changes_what_is_painted(model):
    branch = conditioning(model).positive
    x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = model.predict(x, model.sigmas(4)[1], branch)
        assert not torch.allclose(base, model.predict(x, model.sigmas(4)[2], branch))
        assert not torch.allclose(base, model.predict(x, model.sigmas(4)[1], {**branch, "fps": branch["fps"] * 2}))
        assert not torch.allclose(base, model.predict(x, model.sigmas(4)[1], {**branch, "text": -branch["text"]}))
        flipped = model.predict(x.flip(2), model.sigmas(4)[1], branch).flip(2)
        assert not torch.allclose(base, flipped)  # the temporal convolutions tell the direction of time
        pair = conditioning(model, [PROMPT, "a blue square"]).positive
        twice = model.predict(torch.cat([x, torch.randn_like(x)]), model.sigmas(4)[1], pair)
    assert torch.allclose(base, twice[:1], atol=1e-5), "a sample depends on its neighbour"


def test_checkpointing_gives_the_same_gradient_and_keeps_less(model):
    branch = conditioning(model).positive

    def gradient():
        x, kept = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_(), {}

        def keep(tensor):
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.predict(x, model.sigmas(4)[1], branch).square().sum()
        loss.backward()
        weights = {p.data_ptr() for p in model.unet.parameters()}
        return x.grad, sum(numel for pointer, numel in kept.items() if pointer not in weights)

    plain, much = gradient()
    model.unet.enable_gradient_checkpointing()
    try:
        checkpointed, little = gradient()
    finally:
        model.unet.disable_gradient_checkpointing()
    assert plain.abs().max() > 0
    assert torch.equal(plain, checkpointed)
    assert little < 0.5 * much


def test_the_walk_is_the_published_one():
    diffusion = scaled_diffusion()
    assert ddim_timesteps(diffusion, 25) == list(range(961, 0, -40))
    assert [len(ddim_timesteps(diffusion, steps)) for steps in (4, 7, 16, 30, 60, 100)] == [4, 8, 17, 31, 63, 100]
    assert [ddim_timesteps(diffusion, steps)[0] for steps in (3, 300)] == [667, 997]  # the publisher's fail here
    sigmas = ddim_sigmas(diffusion, 25)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == 26
    assert (sigmas.diff() < 0).all()
    assert float(sigmas[-1]) == pytest.approx(math.sqrt(0.00085), abs=1e-6)  # the noise that is left in
    assert [diffusion.timestep(level) for level in diffusion.levels] == list(range(1000))
    assert diffusion.timestep(diffusion.levels[731].float()) == 731
    with pytest.raises(ValueError, match="steps must lie in 1..1000, got 0"):
        ddim_timesteps(diffusion, 0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_is_linear_and_keeps_the_amount_of_noise(eta):
    diffusion = scaled_diffusion()
    sigmas = ddim_sigmas(diffusion, 25)
    x, e, noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        *_, direction, fresh = ddim_factors(diffusion, sigma, after, eta)
        assert direction**2 + fresh**2 == pytest.approx(float(after) ** 2)
        assert (fresh > 0) == (eta > 0)
        step = ddim_step(diffusion, x, e, sigma, after, eta)
        assert torch.allclose(ddim_step(diffusion, 2 * x, 2 * e, sigma, after, eta), 2 * step)
        assert torch.allclose(ddim_step(diffusion, x, e, sigma, after, eta, noise) - step, fresh * noise)


def test_a_step_to_no_noise_finds_the_signal():
    diffusion = scaled_diffusion()
    signal, noise = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (0, 41, 399, 400, 961):
        noisy = diffusion.alphas[t].sqrt() * diffusion.scales[t] * signal + diffusion.levels[t] * noise
        found = ddim_step(diffusion, noisy, noise, diffusion.levels[t], 0.0, eta=1.0)
        assert torch.allclose(found, signal)
    assert diffusion.scales[[0, 399, 999]].tolist() == pytest.approx([1.0, 0.7, 0.7])


def test_replay_is_exact_through_a_solver_that_adds_noise(folder):
    model = load_video_model(folder, dtype="float32")
    model.unet.double()
    adapter = inject_new(model.unet, model.spec.lora_targets, rank=2, alpha=2.0, seed=1)
    adapter.model.double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    walk = Walk(model, conditioning(model), 3.0, batched_guidance=False, seeds=(5,))
    plan = BackpropSchedule("tail", 2).draw(model.sigmas(4), 0)
    noise = model.initial_latents(SHAPE, [5]).double()
    weight = torch.randn(1, *SHAPE, generator=generator).double()

    final, kept = rollout(walk, noise, plan)
    replay(walk, kept, plan, weight)
    replayed = {name: p.grad.clone() for name, p in adapter.parameters().items()}
    for parameter in adapter.parameters().values():
        parameter.grad = None
    x = kept[plan.trained[0]]
    for index in plan.trained:
        x = walk.step(x, walk.predict(x, plan.sigmas[index]), plan, index)
    assert torch.equal(x.detach(), final)
    (x * weight).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in adapter.parameters().values())
    assert largest > 0
    for name, parameter in adapter.parameters().items():
        assert torch.allclose(replayed[name], parameter.grad, atol=1e-12 * largest), name


def test_noise_of_the_solver_is_the_seeds(model):
    def paint(seed, spoil):
        walk = Walk(model, conditioning(model), 2.0, seeds=(seed,))
        with torch.no_grad():
            if spoil:
                torch.randn(3)
            return rollout(walk, torch.zeros(1, *SHAPE), BackpropSchedule("last").draw(model.sigmas(2), 0))[0]

    assert torch.equal(paint(1, False), paint(1, True))
    assert not torch.allclose(paint(1, False), paint(2, False))


def test_vaders_lora_file_acts_at_eight_over_its_rank(model, tmp_path):
    linears = {n: m for n, m in model.unet.named_modules() if n.rpartition(".")[2] in model.spec.lora_targets}
    assert len(linears) == 3 * 2 * (1 + 2 * 4)  # q, k, v; twice a transformer; at the input, and in three places
    generator = torch.Generator().manual_seed(0)
    file = {}
    for name, linear in linears.items():
        sizes = {"lora_A": (4, linear.in_features), "lora_B": (linear.out_features, 4)}
        for half, size in sizes.items():
            spelled = f"base_model.model.model.diffusion_model.{name}.{half}.weight"
            file[spelled] = torch.randn(size, generator=generator) * 0.1
    torch.save(file, tmp_path / "peft_model_450.pt")
    branch, x = conditioning(model).positive, torch.randn(1, *SHAPE, generator=generator)
    sigma = model.sigmas(4)[1]
    with torch.no_grad():
        base = model.predict(x, sigma, branch)
        with applied(model, [LoraUse(read_lora(tmp_path / "peft_model_450.pt"), 1.0)]):
            taught = model.predict(x, sigma, branch)
        before = {name: linear.weight.clone() for name, linear in linears.items()}
        for name, linear in linears.items():
            down, up = (file[f"base_model.model.model.diffusion_model.{name}.lora_{h}.weight"] for h in "AB")
            linear.weight += 8 / 4 * up @ down
        merged = model.predict(x, sigma, branch)
        for name, linear in linears.items():
            linear.weight.copy_(before[name])
        assert torch.equal(model.predict(x, sigma, branch), base)
    assert not torch.allclose(taught, base, atol=1e-2)
    assert torch.allclose(taught, merged, atol=1e-4)


def test_frames_are_decoded_one_by_one_with_the_same_gradient(model):
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3))

    def gradient(save_memory):
        leaf = latents.clone().requires_grad_()
        frames = [model.decode_chunk(part, save_memory=save_memory)[0] for part in leaf.split(1, dim=2)]
        ToyReward().score(torch.cat(frames, dim=2), [""]).sum().backward()
        return torch.cat(frames, dim=2).detach(), leaf.grad

    frames, plain = gradient(save_memory=False)
    again, saved = gradient(save_memory=True)
    assert model.chunks(3) == [1, 1, 1]
    assert torch.equal(frames, model.decode(latents))
    assert torch.equal(frames, again)
    assert plain.abs().max() > 0
    assert torch.equal(plain, saved)


def test_options_of_the_folder(folder, model, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.ckpt").symlink_to(folder / "model.ckpt")
    (copy / "reward_lora.json").write_text(json.dumps({"eta": 0, "conditioning_fps": 8, "frames": 12}))
    quiet = load_video_model(copy, dtype="float32", text=False)
    assert model.spec.step_noise
    assert not quiet.spec.step_noise
    assert quiet.spec.frames == 12
    assert quiet.conditioning(model.encode_text([PROMPT]), None, SHAPE).positive["fps"].tolist() == [8]
    assert conditioning(model).negative["fps"].tolist() == [24]
    x, sigmas = torch.ones(1, *SHAPE), quiet.sigmas(4)
    assert torch.equal(quiet.step(x, x, sigmas[0], sigmas[1], x), quiet.step(x, x, sigmas[0], sigmas[1]))
    (copy / "reward_lora.json").write_text(json.dumps({"eta": 2}))
    with pytest.raises(WeightFileError, match=r"eta must lie in 0\.\.1, got 2"):
        load_video_model(copy, text=False)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
def test_a_checkpoint_without_a_part_says_which(folder, tmp_path, prefix):
    saved = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    torch.save({n: t for n, t in saved.items() if not n.startswith(prefix)}, tmp_path / "model.ckpt")
    with pytest.raises(WeightFileError, match=f"model.ckpt does not hold .* is missing below {prefix}"):
        load_video_model(tmp_path)


def test_an_older_videocrafter_is_refused(folder, tmp_path):
    """VideoCrafter1 has no temporal convolutions."""
    saved = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    torch.save({n: t for n, t in saved.items() if "temopral_conv" not in n}, tmp_path / "model.ckpt")
    with pytest.raises(WeightFileError, match="does not fit VideoCrafterUNet"):
        load_video_model(tmp_path)
    published = asdict(UNetConfig()) | {"temporal_conv": False}
    with pytest.raises(ValueError, match="temporal_conv must be True"):
        keys.published_unet_config(published)


def test_without_open_clip_the_model_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(WeightFileError, match="pip install open_clip_torch"):
        load_video_model(folder)
    assert load_video_model(folder, text=False).text_encoder is None
    with pytest.raises(RuntimeError, match="load it with text=True"):
        load_video_model(folder, text=False).encode_text([PROMPT])


def test_images_are_refused(model):
    with pytest.raises(ValueError, match="takes no start or end image"):
        model.conditioning(model.encode_text([PROMPT]), None, SHAPE, start_image=torch.zeros(1, 3, 8, 8))
