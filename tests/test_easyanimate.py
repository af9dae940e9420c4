"""EasyAnimate against its publisher's numbers and against diffusers, and what the two text encoders ask for."""

import json
import math
from pathlib import Path

import pytest
import torch
from reward_lora.selfcheck.easyanimate import check_transformer
from reward_lora.selfcheck.fixtures import check, find
from reward_lora.tests.families import easyanimate as family
from reward_lora.training.gradient import Walk, rollout
from reward_lora.training.prompts import EmbeddingStore
from reward_lora.training.schedule import Plan
from reward_lora.video_models import WeightFileError, load_video_model
from reward_lora.video_models.easyanimate_files import build_vae
from reward_lora.video_models.easyanimate_keys import convert_transformer, transformer_config
from reward_lora.video_models.easyanimate_text import build_bert, build_qwen, convert_qwen, pack, unpack
from reward_lora.video_models.loading import diffusers, materialise
from safetensors.torch import load_file, save_file

FIXTURE = Path(__file__).parent / "fixtures" / "easyanimate_v51"
PROMPTS = ["a red circle moves right", "the blue square"]
SHAPE = (16, 3, 4, 6)
"""Latents of 48x32 pixels, where the grid's crop starts at 0 and diffusers' tables are the trained ones too."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of every layout."""
    made = {layout: tmp_path_factory.mktemp("easyanimate") / "model" for layout in family.LAYOUTS}
    for layout, folder in made.items():
        folder.mkdir()
        family.write(folder, layout)
    return dict(zip(("v5", "v51", "diffusers"), made.values(), strict=True))


@pytest.fixture(scope="module")
def models(folders):
    return {name: load_video_model(folder, dtype="float32") for name, folder in folders.items()}


def test_the_publishers_numbers():
    lines = [line for fixture in find([FIXTURE]) for line in check_transformer(fixture)]
    assert [line.name for line in lines if line.failed] == []
    assert {"rotary cos", "base", "out_lora_0.5", "out_lora_1.0", "LoRA removed, to the bit"} <= {x.name for x in lines}


def test_the_vaes_selfcheck_agrees_with_diffusers_and_sees_another_scale(folders, tmp_path):
    config = json.loads((folders["v5"] / "vae" / "config.json").read_text())
    vae, factor = build_vae(config), config["scaling_factor"]
    generator = torch.Generator().manual_seed(6)
    latents, video = (torch.randn(1, *size, generator=generator) for size in ((16, 3, 2, 3), (3, 9, 16, 24)))
    first = latents[:, :, :1].clone().requires_grad_()
    decoded_first = vae.decode(first / factor).sample
    decoded_first.square().mean().backward()
    with torch.no_grad():
        io = {"latents": latents, "video": video, "decoded_all": vae.decode(latents / factor).sample}
        io |= {
            "decoded_first": decoded_first,
            "grad_first": first.grad,
            "encoded_mean": vae.encode(video).latent_dist.mean,
        }
    save_file({name: tensor.detach().contiguous() for name, tensor in io.items()}, tmp_path / "io.safetensors")
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    for scale, failures in ((1, 0), (1.1, 3)):  # the mean is compared without the factor
        meta = {"kind": "vae", "family": "easyanimate", "vae_config": config | {"scaling_factor": factor * scale}}
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        lines = list(check([tmp_path], parts=True))
        assert len(lines) == 4
        assert sum(line.failed for line in lines) == failures


REAL = {"inner": 3072, "head": 64, "time": 512}
SMALL, LARGE = {"layers": 36, "mmdit": 18}, {"layers": 48, "mmdit": 48}
TWO_TEXTS, ONE_TEXT = {"text": 1024, "text_t5": 2048}, {"text": 3584, "normed": True}


@pytest.mark.parametrize(
    ("sizes", "billions"),
    [
        (SMALL | TWO_TEXTS, 6.81),
        (LARGE | TWO_TEXTS, 11.80),
        (SMALL | ONE_TEXT, 6.81),
        (LARGE | ONE_TEXT, 11.80),
        (LARGE | ONE_TEXT | {"channels": 16}, 11.80),
    ],
    ids=["v5 7b", "v5 12b", "v5.1 7b", "v5.1 12b", "v5.1 12b t2v"],
)
def test_every_name_of_a_real_transformer_has_its_place(sizes, billions):
    with torch.device("meta"):
        tensors = {name: torch.empty(s) for name, s in family.transformer_shapes(**REAL, **sizes).items()}
        network = diffusers("EasyAnimateTransformer3DModel")(transformer_config(tensors, {}))
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in convert_transformer(tensors).items()} == expected
    assert sum(math.prod(shape) for shape in expected.values()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_every_name_of_the_real_vae_and_of_qwen_has_its_place():
    config = json.loads(
        '{"block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "layers_per_block": 2,'
        '"norm_num_groups": 32, "scaling_factor": 0.7125, "mid_block_use_attention": false, "cache_mag_vae": true}'
    )
    qwen = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    qwen |= {"num_key_value_heads": 4, "vocab_size": 152064, "model_type": "qwen2_vl", "vision_config": {}}
    qwen |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1e6}
    with torch.device("meta"):
        vae, text = build_vae(config), build_qwen(qwen)
        published = family.qwen_shapes(dim=3584, key_value=512, mlp=18944, layers=28, vocabulary=152064)
        language = convert_qwen({name: torch.empty(shape) for name, shape in published.items()})
    shapes = family.vae_shapes(widths=(128, 256, 512, 512), blocks=2)
    assert {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()} == shapes
    assert {name: t.shape for name, t in text.state_dict().items()} == {name: t.shape for name, t in language.items()}


def test_newer_names_of_qwen_are_the_same_tensors():
    old = {"model.norm.weight": 1, "lm_head.weight": 2, "visual.norm.bias": 3}
    new = {"model.language_model.norm.weight": 1, "lm_head.weight": 2, "model.visual.norm.bias": 3}
    assert convert_qwen(old) == convert_qwen(new) == {"norm.weight": 1}


def test_loras_speak_of_the_publishers_names(models):
    names = models["v5"].lora_names("transformer")
    assert names["transformer_blocks.0.attn1.add_q_proj"] == "transformer_blocks.0.attn2.to_q"
    assert names["transformer_blocks.0.attn1.to_add_out"] == "transformer_blocks.0.attn2.to_out.0"
    published = family.transformer_shapes(**family.TINY, **family.V5)
    layers = {n.removesuffix(".weight") for n, shape in published.items() if len(shape) == 2}
    assert set(names.values()) == layers


def test_a_video_is_that_of_diffusers_pipeline(models, folders):
    """V5.1 text to video, at the noise levels of the pipeline's scheduler."""
    from diffusers import AutoencoderKLMagvit, EasyAnimatePipeline, EasyAnimateTransformer3DModel
    from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler
    from transformers import Qwen2VLForConditionalGeneration

    model, folder = models["diffusers"], folders["diffusers"]
    pipeline = EasyAnimatePipeline(
        vae=AutoencoderKLMagvit.from_pretrained(folder / "vae"),
        text_encoder=Qwen2VLForConditionalGeneration.from_pretrained(folder / "text_encoder").float(),
        tokenizer=model._towers[0].tokenizer,
        transformer=EasyAnimateTransformer3DModel.from_pretrained(folder / "transformer"),
        scheduler=Scheduler.from_pretrained(folder / "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    texts = model.encode_text(PROMPTS)
    with torch.no_grad():
        theirs = pipeline.encode_prompt(PROMPTS[0], 1, True, PROMPTS[1], max_sequence_length=128)
    for ours, reference, mask in zip(texts, theirs[:2], theirs[2:], strict=True):
        words = int(mask.sum())
        assert 40 < words < 128
        assert (ours[:words] - reference[0, :words]).abs().max() < 1e-5
    noise = model.initial_latents(SHAPE, [1])
    embeddings = {"prompt_embeds": texts[0][None], "negative_prompt_embeds": texts[1][None]}
    masks = {"prompt_attention_mask": theirs[2], "negative_prompt_attention_mask": theirs[3]}
    frames = pipeline(
        **embeddings, **masks, latents=noise, num_frames=9, height=32, width=48, num_inference_steps=3,
        guidance_scale=6.0, output_type="pt",
    ).frames  # fmt: skip
    walk = Walk(model, model.conditioning(texts[:1], texts[1:], SHAPE), 6.0)
    latents, _ = rollout(walk, noise, Plan(pipeline.scheduler.sigmas.double(), ()))
    with torch.no_grad():
        painted = model.decode(latents)
    reference = torch.as_tensor(frames)
    reference = reference if reference.shape[1] == 3 else reference.transpose(1, 2)
    assert painted.shape == (1, 3, 9, 32, 48)
    assert (painted - reference).abs().max() < 1e-4


def test_padding_stands_where_the_trained_model_saw_it(models, folders):
    """As transformers 4.46 numbered it: all at position 1."""
    from transformers import Qwen2VLForConditionalGeneration

    (tower,) = models["v51"]._towers
    message = [{"role": "user", "content": [{"type": "text", "text": PROMPTS[0]}]}]
    text = tower.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text.endswith(f"<|im_start|>user\n{PROMPTS[0]}<|im_end|>\n<|im_start|>assistant\n")
    ids = tower.tokenizer(text).input_ids
    padding = 128 - len(ids)
    positions = torch.tensor([*range(len(ids)), *[1] * padding])
    whole = Qwen2VLForConditionalGeneration.from_pretrained(folders["v51"] / "text_encoder").float()
    with torch.no_grad():
        states = whole.eval()(
            input_ids=torch.tensor([[*ids, *[tower.tokenizer.pad_token_id] * padding]]),
            attention_mask=torch.tensor([[*[1] * len(ids), *[0] * padding]]),
            position_ids=positions.expand(3, 1, -1),
            output_hidden_states=True,
        ).hidden_states
    assert len(states) == 4
    assert (models["v51"].encode_text(PROMPTS[:1])[0] - states[2][0]).abs().max() < 1e-5


def test_v5_joins_bert_and_t5_without_masks(models, folders, tmp_path):
    from transformers import AutoTokenizer, BertModel, MT5EncoderModel

    model, folder = models["v5"], folders["v5"]
    expected = []
    for number, kind, tokens in (("", BertModel, 9), ("_2", MT5EncoderModel, 12)):
        tokenizer = AutoTokenizer.from_pretrained(folder / f"tokenizer{number}")
        inputs = tokenizer(PROMPTS[0], padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
        encoder = kind.from_pretrained(folder / f"text_encoder{number}").eval()
        with torch.no_grad():
            expected.append(encoder(inputs.input_ids).last_hidden_state[0])
    store = EmbeddingStore(model, tmp_path)
    store.prepare(PROMPTS[:1], lambda phase: None)
    again = EmbeddingStore(load_video_model(folder, dtype="float32", text=False), tmp_path)
    again.prepare(PROMPTS[:1], lambda phase: pytest.fail("the embedding is in the cache"))
    branch = model.conditioning([again[PROMPTS[0]]], None, SHAPE).positive
    assert (branch["text"][0] - expected[0]).abs().max() < 1e-5
    assert (branch["text_t5"][0] - expected[1]).abs().max() < 1e-5
    with pytest.raises(RuntimeError, match="text=True"):
        load_video_model(folder, dtype="float32", text=False).encode_text(PROMPTS)


def test_packed_texts_come_apart_and_others_are_refused():
    parts = [torch.randn(2, 3), torch.randn(4, 5)]
    for ours, part in zip(unpack(pack(parts)[None], (2, 4), (3, 5)), parts, strict=True):
        assert torch.equal(ours[0], part)
    with pytest.raises(ValueError, match="must be 6x5, got"):
        unpack(torch.zeros(1, 7, 5), (2, 4), (3, 5))


def test_a_published_pooler_is_left_aside():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=5, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    published = BertModel(config).eval()
    assert "pooler.dense.weight" in published.state_dict()
    ours = materialise(build_bert, config.to_dict(), published.state_dict(), Path("x"), torch.float32, "cpu")
    ids = torch.tensor([[1, 3, 2, 0]])
    with torch.no_grad():
        assert torch.equal(ours(ids)[0], published(ids).last_hidden_state)


def test_images_mark_and_fill_the_given_frames(models):
    model = models["v5"]
    text, factor = model.encode_text(PROMPTS[:1]), model.vae.config.scaling_factor
    start, end = torch.rand(2, 1, 3, 32, 48, generator=torch.Generator().manual_seed(0))

    def latents(**images):
        return model.conditioning(text, None, SHAPE, **images).positive["latents"]

    assert not latents().any(), "text to video sees nothing"
    only_start, only_end = latents(start_image=start), latents(end_image=end)
    both = latents(start_image=start, end_image=end)
    assert only_start.shape == (1, 17, *SHAPE[1:])
    assert torch.equal(only_start[:, 0, 0], torch.full((1, 4, 6), factor))
    assert not only_start[:, 0, 1:].any()
    assert not only_end[:, 0].any(), "the last of four frames vanishes when the mask is resized, as published"
    # The VAE is causal: the first latent is that of the start image alone, with the noise it was trained with.
    clean = model.encode((start * 2 - 1)[:, :, None])
    error = (only_start[:, 1:, :1] - clean).abs().mean() / clean.abs().mean()
    assert 0 < error < 0.2
    assert torch.equal(only_start[:, 1:, :1], both[:, 1:, :1])
    assert (only_start[:, 1:, -1] - both[:, 1:, -1]).abs().max() > 0.01
    assert torch.equal(only_start, latents(start_image=start)), "the noise is the same every time"


def test_a_text_to_video_model_takes_no_image(models):
    model = models["diffusers"]
    with pytest.raises(ValueError, match="takes no start or end image"):
        model.conditioning(model.encode_text(PROMPTS[:1]), None, SHAPE, start_image=torch.zeros(1, 3, 32, 48))


def test_the_first_latent_decodes_alone_as_in_the_whole_with_the_same_gradient(models):
    model = models["v51"]
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(4))
    whole, alone = latents.clone().requires_grad_(), latents[:, :, :1].clone().requires_grad_()
    frames, first = model.decode(whole), model.decode(alone)
    assert frames.shape == (2, 3, 9, 32, 48)
    assert (frames[:, :, :1] - first).abs().max() < 1e-6
    frames[:, :, 0].square().sum().backward()
    first.square().sum().backward()
    assert not whole.grad[:, :, 1:].any(), "the VAE is causal"
    assert (whole.grad[:, :, :1] - alone.grad).norm() < 1e-4 * alone.grad.norm()
    later = torch.autograd.grad(model.decode(whole)[:, :, -1].sum(), whole)[0]
    assert (later.abs().amax(dim=(0, 1, 3, 4)) > 0).all(), "the last frame depends on every latent"


def test_an_interrupted_call_leaves_no_trace(models, monkeypatch):
    """The VAE's convolutions remember what they saw last."""
    model, frames = models["v51"], torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(2))
    latents = model.encode(frames)
    with torch.no_grad():
        painted = model.decode(latents)
    vae = model.vae

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    for module, call, given in (
        (vae.quant_conv, model.encode, frames),
        (vae.decoder.conv_out, model.decode, latents),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                call(given)
    with torch.no_grad():
        assert torch.equal(model.encode(frames), latents)
        assert torch.equal(model.decode(latents), painted)


def test_blocks_without_weights_for_text_treat_it_as_video(models):
    """Without positions a token's output must not depend on which of the two it is counted among."""
    own, *shared = models["v51"].transformer.transformer_blocks
    one, other = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(1))

    def difference(block):
        as_video, as_text = block.attn1(one, encoder_hidden_states=other), block.attn1(other, encoder_hidden_states=one)
        return max((a - b).abs().max() for a, b in zip(as_video, as_text[::-1], strict=True))

    with torch.no_grad():
        assert [difference(block) < 1e-5 for block in shared] == [True, True]
        assert difference(own) > 0.1


def test_positions_are_counted_on_the_fixed_grid_at_any_size(models):
    """VideoX-Fun's formula, written as numpy has it."""
    numpy = pytest.importorskip("numpy")
    rotary = models["v5"].transformer.rope_embedding
    for (t, h, w), (top, bottom), (left, right) in (
        ((2, 8, 8), (0, 30), (8, 38)),
        ((1, 4, 12), (8, 23), (0, 45)),
        ((3, 12, 4), (0, 30), (18, 28)),
    ):
        cos, sin = rotary(torch.zeros(1, 16, t, h, w))
        rows = numpy.linspace(top, bottom, h // 2, endpoint=False, dtype=numpy.float32)
        columns = numpy.linspace(left, right, w // 2, endpoint=False, dtype=numpy.float32)
        cos, sin = (table.view(t, h // 2, w // 2, 16) for table in (cos, sin))
        assert cos[-1, 0, 0, 0] == pytest.approx(math.cos(t - 1), abs=1e-6)
        assert numpy.allclose(cos[0, :, 0, 4], numpy.cos(rows), atol=1e-5)
        assert numpy.allclose(sin[0, 0, :, 10], numpy.sin(columns), atol=1e-5)


def test_a_batch_predicts_what_its_samples_predict_alone(models):
    for model in models.values():
        texts, x = model.encode_text(PROMPTS), model.initial_latents(SHAPE, [1, 2])
        sigma = model.sigmas(4)[1]
        with torch.no_grad():
            together = model.predict(x, sigma, model.conditioning(texts, None, SHAPE).positive)
            for i in range(2):
                branch = model.conditioning(texts[i : i + 1], None, SHAPE).positive
                assert (model.predict(x[i : i + 1], sigma, branch) - together[i : i + 1]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("transformer/config.json", {"num_layers": 9}, "config.json says num_layers is 9, the weights say 3"),
        ("transformer/config.json", {"patch_size": 4}, "patch_size"),
        ("text_encoder/config.json", {"model_type": "llama"}, "the text encoder 'llama'"),
        ("scheduler/scheduler_config.json", {"clip_sample": True}, "clip_sample must be off"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}, "beta_schedule must be"),
        ("scheduler/scheduler_config.json", {"_class_name": True, "num_train_timesteps": 0}, r"in 1\.\.100000"),
    ],
)
def test_what_does_not_belong_together_is_said(folders, file, change, message):
    path = folders["v5"] / file
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | change))
    try:
        with pytest.raises(WeightFileError, match=message):
            load_video_model(folders["v5"], dtype="float32")
    finally:
        path.write_text(before)


def test_control_variants_are_refused(folders):
    path = folders["v51"] / "transformer" / "diffusion_pytorch_model.safetensors"
    config, whole = path.with_name("config.json"), path.read_bytes()
    before = config.read_text()
    save_file(load_file(path) | {"proj.weight": torch.zeros(32, 48, 2, 2)}, path)
    config.write_text(json.dumps(json.loads(before) | {"in_channels": 48}))
    try:
        with pytest.raises(WeightFileError, match="48 input channels; supported are text-to-video .16. and InP .33."):
            load_video_model(folders["v51"], dtype="float32")
    finally:
        path.write_bytes(whole)
        config.write_text(before)


def test_a_transformer_of_the_other_version_is_refused(models):
    v5, v51 = models["v5"], models["v51"]
    with pytest.raises(ValueError, match="takes 2 text encoders, got 1"):
        type(v5)(v5.spec, v5.transformer, v5.vae, v51._towers, v51._solver)


def test_v5_is_ddim_and_v51_flows(models):
    assert models["v5"].spec.solver == "DDIM, v_prediction"
    assert models["v51"].spec.solver == "flow-matching Euler"
    # mu = 1 shifts by e: half way of two steps lies at e / (1 + e).
    assert models["v51"].sigmas(2).tolist() == pytest.approx([1, math.e / (1 + math.e), 0])
    assert models["v5"].sigmas(1).tolist() == pytest.approx([0.0413, 0], abs=1e-3)
