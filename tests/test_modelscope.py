"""ModelScope against diffusers' pipeline, which is its reference, and what diffusers does not give: checkpointing."""

import math

import pytest
import torch
from reward_lora.tests.families import videocrafter
from reward_lora.tests.families.modelscope import TINY_UNET, unet_shapes, write
from reward_lora.training.gradient import Walk, rollout
from reward_lora.training.schedule import Plan
from reward_lora.video_models import load_video_model
from reward_lora.video_models.loading import diffusers
from reward_lora.video_models.modelscope_files import rename_attention
from reward_lora.video_models.modelscope_keys import convert_unet, unet_config

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


def test_every_name_of_the_real_unet_has_its_place():
    """The publisher's names, and diffusers' of ``ali-vilab/text-to-video-ms-1.7b``: 1.41 billion weights."""
    with torch.device("meta"):
        published = {name: torch.empty(shape) for name, shape in unet_shapes(**videocrafter.UNET).items()}
        config = unet_config(published)
        unet = diffusers("UNet3DConditionModel")({"attention_head_dim": 64, "sample_size": 32})
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in convert_unet(published).items()} == shapes
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_411_233_860
    for key, value in config.items():
        assert list(value) == list(unet.config[key]) if isinstance(value, list) else value == unet.config[key], key


def test_the_publishers_blocks_are_read_in_their_order():
    """A tensor out of each kind of place."""
    tensors = {name: torch.tensor(0.0).expand(shape) for name, shape in unet_shapes(**TINY_UNET).items()}
    found = convert_unet(tensors)
    for theirs, ours in (
        ("input_blocks.1.0.temopral_conv.conv4.3.bias", "down_blocks.0.temp_convs.0.conv4.3.bias"),
        ("input_blocks.2.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
        ("input_blocks.3.0.skip_connection.weight", "down_blocks.1.resnets.0.conv_shortcut.weight"),
        ("middle_block.3.emb_layers.1.weight", "mid_block.resnets.1.time_emb_proj.weight"),
        ("output_blocks.1.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("output_blocks.3.2.proj_out.bias", "up_blocks.1.temp_attentions.1.proj_out.bias"),
    ):
        assert theirs in tensors
        assert found[ours].shape == tensors[theirs].shape


def test_the_publishers_folder_loads_with_its_own_tokenizer_and_schedule(tmp_path):
    write(tmp_path, "original")
    model = load_video_model(tmp_path, dtype="float32")
    assert model.encode_text([PROMPT])[0].shape == (77, 32)
    # One block less than in the file: the last is not asked for.
    assert model.text_encoder.config.num_hidden_layers == 1
    assert model.sigmas(25)[-1] == pytest.approx(0.02915, abs=1e-5)


def test_the_published_vaes_attention_is_renamed():
    old = [f"encoder.mid_block.attentions.0.{part}.weight" for part in ("query", "key", "value", "proj_attn")]
    new = [f"encoder.mid_block.attentions.0.{part}.weight" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    assert list(rename_attention(dict.fromkeys(old))) == new
    assert list(rename_attention(dict.fromkeys(new))) == new
    assert list(rename_attention({"decoder.mid_block.attentions.0.group_norm.bias": None})) == [
        "decoder.mid_block.attentions.0.group_norm.bias"
    ]
