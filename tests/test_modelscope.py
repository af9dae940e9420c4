"""ModelScope against diffusers' pipeline, which is its reference, and what diffusers does not give: checkpointing."""

import math

import pytest
import torch
from reward_lora.tests.families.modelscope import write
from reward_lora.training.gradient import Walk, rollout
from reward_lora.training.schedule import Plan
from reward_lora.video_models import load_video_model
from reward_lora.video_models.loading import diffusers
from reward_lora.video_models.modelscope_files import _convert_vae

PROMPT, NEGATIVE = "a red circle moves right", "blue square on the left"
SHAPE = (4, 3, 6, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("modelscope")
    write(where, "diffusers")
    return where


@pytest.fixture(scope="module")
def model(folder):
    return load_video_model(folder, dtype="float32")


def inputs(model):
    texts = model.encode_text([PROMPT, NEGATIVE])
    return model.initial_latents(SHAPE, [5]), model.conditioning(texts[:1], texts[1:], SHAPE)


def test_a_video_is_that_of_diffusers_pipeline(model, folder):
    from diffusers import TextToVideoSDPipeline

    noise, conditioning = inputs(model)
    latents, _ = rollout(Walk(model, conditioning, 9.0), noise, Plan(model.sigmas(4), ()))
    pipeline = TextToVideoSDPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_frames": 3, "height": 48, "width": 32, "num_inference_steps": 4, "guidance_scale": 9.0}
    settings |= {"prompt": PROMPT, "negative_prompt": NEGATIVE, "latents": noise}
    theirs = pipeline(**settings, output_type="latent").frames
    assert (latents - theirs).abs().max() < 1e-4 * theirs.abs().max()
    frames = pipeline(**settings, output_type="pt").frames.transpose(1, 2)
    with torch.no_grad():
        assert (model.decode(latents) - frames).abs().max() < 1e-4


def test_words_matter(model):
    one, other = model.encode_text([PROMPT, NEGATIVE])
    assert one.shape == other.shape == (11, 12)
    assert (one - other).abs().max() > 0.1


def gradient(model, checkpointed):
    """Of a loss to the input, and how many numbers were kept for it."""
    noise, conditioning = inputs(model)
    x, kept = noise.requires_grad_(), {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    if checkpointed:
        model.unet.enable_gradient_checkpointing()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.predict(x, torch.tensor(0.9), conditioning.positive).square().sum()
        loss.backward()
    finally:
        model.unet.disable_gradient_checkpointing()
    weights = {p.data_ptr() for p in model.unet.parameters()}
    return x.grad, sum(numel for pointer, numel in kept.items() if pointer not in weights)


def test_checkpointing_gives_the_same_gradient_and_keeps_less(model):
    plain, much = gradient(model, checkpointed=False)
    checkpointed, little = gradient(model, checkpointed=True)
    assert plain.abs().max() > 0
    assert torch.equal(plain, checkpointed)
    assert little < 0.6 * much
    assert not model.unet.is_gradient_checkpointing


def test_dropout_is_asleep(model):
    noise, conditioning = inputs(model)
    with torch.no_grad():
        one, other = (model.predict(noise, torch.tensor(0.7), conditioning.positive) for _ in range(2))
    assert torch.equal(one, other)


def test_the_real_models_names_and_sizes():
    """``ali-vilab/text-to-video-ms-1.7b``: its configuration gives 1.41 billion weights under these names."""
    with torch.device("meta"):
        unet = diffusers("UNet3DConditionModel")({"attention_head_dim": 64, "sample_size": 32})
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    assert len(shapes) == 1480
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_411_233_860
    assert shapes["transformer_in.proj_in.weight"] == (512, 320)
    assert shapes["down_blocks.2.temp_convs.1.conv4.3.weight"] == (1280, 1280, 3, 1, 1)
    assert shapes["up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k.weight"] == (320, 1024)
    assert shapes["mid_block.temp_attentions.0.transformer_blocks.0.ff.net.0.proj.weight"] == (10240, 1280)


def test_the_published_vaes_attention_is_renamed():
    old = [f"encoder.mid_block.attentions.0.{part}.weight" for part in ("query", "key", "value", "proj_attn")]
    new = [f"encoder.mid_block.attentions.0.{part}.weight" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    assert list(_convert_vae(dict.fromkeys(old))) == new
    assert list(_convert_vae(dict.fromkeys(new))) == new
    assert list(_convert_vae({"decoder.mid_block.attentions.0.group_norm.bias": None})) == [
        "decoder.mid_block.attentions.0.group_norm.bias"
    ]
