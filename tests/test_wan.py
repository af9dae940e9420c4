"""Wan against its publisher's numbers (``tests/fixtures``) and against diffusers, and loading from either layout."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reward_lora.tests.families import wan as family
from reward_lora.tests.families import wan_shapes as shapes
from reward_lora.tests.families.wan_shapes import fill
from reward_lora.video_models import WeightFileError, load_video_model, wan_encoder_keys, wan_keys, wan_vae_keys
from reward_lora.video_models.loading import build_t5, diffusers, materialise
from reward_lora.video_models.protocol import VideoModel
from reward_lora.video_models.wan import WanModel, clean_prompt
from reward_lora.video_models.wan_parts import build_transformer, make_spec
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

FIXTURES = Path(__file__).parent / "fixtures"


def fixture(name):
    """Tensors of one fixture by file stem, float32, and its meta.json."""
    folder = FIXTURES / name
    files = {p.stem: {k: v.float() for k, v in load_file(p).items()} for p in folder.glob("*.safetensors")}
    return SimpleNamespace(meta=json.loads((folder / "meta.json").read_text()), **files)


def build_wan(transformer, config, vae, dtype=torch.float32):
    """A model of the publisher's tensors."""
    source = Path("fixture")
    arguments = wan_keys.transformer_config(transformer, config)
    network = materialise(build_transformer, arguments, wan_keys.convert_transformer(transformer), source, dtype, "cpu")
    decoder = materialise(
        diffusers("AutoencoderKLWan"), wan_vae_keys.vae_config(vae), wan_vae_keys.convert_vae(vae), source, dtype, "cpu"
    )
    return WanModel(make_spec("fixture", network, decoder), network, decoder)


@pytest.fixture(scope="module")
def t2v():
    wan, vae = fixture("wan_t2v"), fixture("wan_vae")
    return build_wan(wan.transformer, wan.meta["transformer_config"], vae.vae)


@pytest.fixture(scope="module")
def train_step():
    return fixture("wan_train_step")


@pytest.fixture(scope="module")
def inp(train_step):
    """VideoX-Fun's InP model with the training fixture's LoRA merged."""
    model = build_wan(train_step.transformer, train_step.meta["transformer_config"], train_step.vae)
    lora, scale = train_step.lora_videox_fun, train_step.meta["lora"]["alpha"] / train_step.meta["lora"]["rank"]
    modules = dict(model.transformer.named_modules())
    merged = 0
    for name, original in model.lora_names("transformer").items():
        key = "lora_unet__" + original.replace(".", "_")
        modules[name].weight += scale * lora[f"{key}.lora_up.weight"] @ lora[f"{key}.lora_down.weight"]
        merged += 1
    assert merged == len(lora) // 3
    return model


# Against the publisher's numbers


def test_transformer_matches_the_publisher(t2v):
    wan = fixture("wan_t2v")
    for i, t in enumerate(wan.io["t"]):
        branch = t2v.conditioning([wan.io["context"][i]], None, wan.io["x"].shape[1:]).positive
        prediction = t2v.predict(wan.io["x"][i : i + 1], t / 1000, branch)
        assert (prediction - wan.io["out_base"][i : i + 1]).abs().max() < wan.meta["tolerance"]


def test_vae_matches_the_publisher(t2v):
    vae = fixture("wan_vae")
    tolerance, latents = vae.meta["tolerance"], vae.io["latents"]
    assert (t2v.decode(latents) * 2 - 1 - vae.io["decoded_all"]).abs().max() < tolerance["decode"]
    assert (t2v.encode(vae.io["video"]) - vae.io["encoded_mean"]).abs().max() < tolerance["decode"]
    first = latents[:, :, :1].clone().requires_grad_()
    frames = t2v.decode(first) * 2 - 1
    assert (frames - vae.io["decoded_first"]).abs().max() < tolerance["decode"]
    frames.square().mean().backward()
    reference = vae.io["grad_first"]
    assert (first.grad - reference).norm() < tolerance["grad_rel"] * reference.norm()


def test_sampling_matches_the_publisher(inp, train_step):
    io, meta = train_step.io, train_step.meta
    shape = io["init_noise"].shape[1:]
    conditioning = inp.conditioning([io["context_cond"]], [io["context_uncond"]], shape)
    assert all(not conditioning.positive[name].any() for name in ("latents", "image"))  # text-to-video on InP
    x, sigmas = io["init_noise"], io["sigmas"]
    for i in range(meta["num_inference_steps"]):
        wanted, unwanted = (inp.predict(x, sigmas[i], b) for b in (conditioning.positive, conditioning.negative))
        guided = unwanted + meta["guidance_scale"] * (wanted - unwanted)
        x = inp.step(x, guided, sigmas[i], sigmas[i + 1])
        assert (x - io["latents_after_step"][i]).abs().max() < meta["tolerance"]["latents"]
    frames = inp.decode(x[:, :, :1])
    assert (frames - io["frames"]).abs().max() < meta["tolerance"]["frames"]


def attention(q, k, v, heads, scale=None, bias=None):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2).flatten(2)


def test_umt5_computes_what_the_publisher_describes():
    tensors = fill(shapes.text_shapes(**shapes.TINY_TEXT), 3)
    arguments = wan_encoder_keys.umt5_config(tensors)
    encoder = materialise(build_t5, arguments, wan_encoder_keys.convert_umt5(tensors), Path("x"), torch.float32, "cpu")
    length, heads = 6, 2
    ids = torch.arange(length)[None] + 1

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * tensors[name + ".weight"]

    # Distances below 8 have their own bucket; those to the right use the upper half of the 32.
    offset = torch.arange(length)[None] - torch.arange(length)[:, None]
    bucket = offset.abs() + 16 * (offset > 0)
    x = tensors["token_embedding.weight"][ids]
    for block in ("blocks.0.", "blocks.1."):
        weight = {k.removeprefix(block).removesuffix(".weight"): v for k, v in tensors.items() if k.startswith(block)}
        h = norm(x, block + "norm1")
        q, k, v = (h @ weight[f"attn.{name}"].T for name in "qkv")
        bias = weight["pos_embedding.embedding"][bucket].permute(2, 0, 1)[None]
        x = x + attention(q, k, v, heads, scale=1.0, bias=bias) @ weight["attn.o"].T
        h = norm(x, block + "norm2")
        gate = F.gelu(h @ weight["ffn.gate.0"].T, approximate="tanh")
        x = x + (h @ weight["ffn.fc1"].T * gate) @ weight["ffn.fc2"].T
    ours = encoder(ids, torch.ones_like(ids)).last_hidden_state
    assert torch.allclose(ours, norm(x, "norm"), atol=1e-5)


def test_clip_computes_what_the_publisher_describes(original_i2v):
    tensors = {
        k.removeprefix("visual."): v
        for k, v in fill(shapes.clip_shapes(**shapes.TINY_CLIP), 4, 0.1).items()
        if k.startswith("visual.")
    }
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def layer(x, name, function):
        return function(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x, name):
        return layer(x, name, lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, 1e-5))

    pixels = F.interpolate(image, (224, 224), mode="bicubic")
    pixels = pixels - torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(1, 3, 1, 1)
    pixels = pixels / torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(1, 3, 1, 1)
    x = F.conv2d(pixels, tensors["patch_embedding.weight"], stride=14).flatten(2).transpose(1, 2)
    x = norm(torch.cat([tensors["cls_embedding"], x], dim=1) + tensors["pos_embedding"], "pre_norm")
    block = "transformer.0."  # all layers but the last, which is one of the two
    q, k, v = layer(norm(x, block + "norm1"), block + "attn.to_qkv", F.linear).chunk(3, dim=-1)
    x = x + layer(attention(q, k, v, 2), block + "attn.proj", F.linear)
    h = F.gelu(layer(norm(x, block + "norm2"), block + "mlp.0", F.linear))
    x = x + layer(h, block + "mlp.2", F.linear)
    model = load_video_model(original_i2v, dtype="float32", text=False)
    branch = model.conditioning([torch.zeros(1, 24)], None, (16, 1, 4, 4), start_image=image).positive
    assert torch.allclose(branch["image"], x, atol=1e-5)


# Loading


@pytest.fixture(scope="module")
def original_t2v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Wan2.1-T2V-tiny")
    family.write(folder, "2.1 original t2v")
    return folder


@pytest.fixture(scope="module")
def original_i2v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Wan2.1-Fun-tiny-InP")
    family.write(folder, "2.1 original inp")
    return folder


@pytest.fixture(scope="module")
def diffusers_t2v(original_t2v, tmp_path_factory):
    """The model of ``original_t2v`` as diffusers saves it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    folder = tmp_path_factory.mktemp("diffusers")
    model = load_video_model(original_t2v)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    WanPipeline(model.tokenizer, model.text_encoder, model.vae, scheduler, model.transformer).save_pretrained(folder)
    (folder / "reward_lora.json").write_text(
        json.dumps({"name": "Tiny", "width": 32, "height": 32, "frames": 9, "lora_targets": ["to_q", "ffn.net.2"]})
    )
    return folder


def sample(model, prompt="a red circle moves right", steps=2):
    texts = model.encode_text([prompt, ""])
    shape = (16, 2, 4, 4)
    branch = model.conditioning(texts[:1], None, shape).positive
    x, sigmas = model.initial_latents(shape, [7]), model.sigmas(steps)
    with torch.no_grad():
        for i in range(steps):
            x = model.step(x, model.predict(x, sigmas[i], branch), sigmas[i], sigmas[i + 1])
        return model.decode(x)


def test_original_layout_loads(original_t2v):
    model = load_video_model(original_t2v)
    assert isinstance(model, VideoModel)
    spec = model.spec
    assert (spec.name, spec.size_multiple, spec.image_to_video) == (original_t2v.name, 16, False)
    assert (spec.width, spec.height, spec.frames, spec.lora_targets) == (832, 480, 81, ("all-linear",))
    assert sample(model).shape == (1, 3, 5, 32, 32)
    assert not any(p.requires_grad for p in model.transformer.parameters())


def test_the_builtin_model_loads_and_paints():
    assets = Path(__file__).parent.parent / "assets" / "tiny_wan"
    if not assets.is_dir():
        pytest.skip("the built-in model has not been made: assets/tiny_wan is missing")
    model = load_video_model("builtin")
    spec = model.spec
    shape = spec.latent_shape(spec.width, spec.height, spec.frames)
    branch = model.conditioning(model.encode_text(["a red circle moves right"]), None, shape).positive
    with torch.no_grad():
        x, sigmas = model.initial_latents(shape, [0]), model.sigmas(1)
        frames = model.decode(model.step(x, model.predict(x, sigmas[0], branch), sigmas[0], sigmas[1]))
    assert frames.shape == (1, 3, spec.frames, spec.height, spec.width)


def test_a_model_loaded_under_inference_mode_can_carry_gradients(original_t2v):
    with torch.inference_mode():  # as ComfyUI runs its nodes
        model = load_video_model(original_t2v)
    parameters = [*model.transformer.parameters(), *model.vae.parameters(), *model.transformer.buffers()]
    assert not any(parameter.is_inference() for parameter in parameters)


def test_both_layouts_give_the_same_model(original_t2v, diffusers_t2v):
    first, second = load_video_model(original_t2v), load_video_model(diffusers_t2v)
    second._shift = first._shift
    assert torch.allclose(sample(first), sample(second), atol=1e-3)  # mapped files lie at other addresses: rounding
    for part in ("transformer", "vae", "text_encoder"):
        ours = getattr(second, part).state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in getattr(first, part).state_dict().items())


def test_diffusers_folder_brings_its_own_defaults(diffusers_t2v):
    model = load_video_model(diffusers_t2v, text=False)
    spec = model.spec
    assert (spec.name, spec.width, spec.height, spec.frames, spec.fps) == ("Tiny", 32, 32, 9, 16)
    assert spec.lora_targets == ("to_q", "ffn.net.2")
    assert math.isclose(float(model.sigmas(2)[1]), 3 * 0.5 / (1 + 2 * 0.5))  # shift 3 of its scheduler


def test_text_matches_diffusers_pipeline(diffusers_t2v):
    from diffusers import WanPipeline

    model, pipeline = load_video_model(diffusers_t2v), WanPipeline.from_pretrained(diffusers_t2v)
    prompts = ["a red  circle &amp; moves", "", "the square"]
    reference = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=512, device="cpu")
    ours = model.conditioning(model.encode_text(prompts), None, (16, 1, 4, 4)).positive["text"]
    assert torch.allclose(ours, reference, atol=1e-5)


def test_prompts_are_cleaned_as_published():
    assert clean_prompt("  a &amp;lt;b&amp;gt;\n\tc ") == "a <b> c"
    pytest.importorskip("ftfy")
    assert clean_prompt("caf\u00c3\u00a9") == "caf\u00e9"


def test_a_prompt_embedding_does_not_depend_on_its_neighbours(original_t2v):
    model = load_video_model(original_t2v)
    together = model.encode_text(["a", "a red circle moves right on the left"])[0]
    assert torch.equal(together, model.encode_text(["a"])[0])
    assert together.shape == (2, 24)  # one word and the end mark


def test_16_bits_keep_in_float32_what_diffusers_keeps(diffusers_t2v):
    from diffusers import WanTransformer3DModel

    reference = WanTransformer3DModel.from_pretrained(diffusers_t2v / "transformer", torch_dtype=torch.bfloat16)
    model = load_video_model(diffusers_t2v, dtype="bfloat16")
    ours = model.transformer.state_dict()
    assert {k: v.dtype for k, v in reference.state_dict().items()} == {k: v.dtype for k, v in ours.items()}
    assert next(model.vae.parameters()).dtype == next(model.text_encoder.parameters()).dtype == torch.bfloat16
    frames = sample(model)
    assert frames.dtype == torch.float32
    assert (frames - sample(load_video_model(diffusers_t2v))).abs().mean() < 0.05


def test_text_encoder_can_stay_on_disk(original_t2v):
    model = load_video_model(original_t2v, text=False)
    with pytest.raises(RuntimeError, match="text=True"):
        model.encode_text(["a"])
    assert model.text_fingerprint() == load_video_model(original_t2v).text_fingerprint()
    other = load_video_model(original_t2v, text=False, dtype="bfloat16")
    assert model.text_fingerprint() != other.text_fingerprint()


def test_the_fingerprint_follows_the_text_encoder(original_t2v, tmp_path):
    family.write(tmp_path, "2.1 original t2v")
    same = load_video_model(tmp_path, text=False).text_fingerprint()
    tensors = fill(shapes.text_shapes(**shapes.TINY_TEXT), 3)
    tensors["norm.weight"] += 1
    torch.save(tensors, tmp_path / (family.TEXT_FILE + ".pth"))
    assert load_video_model(tmp_path, text=False).text_fingerprint() != same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / (family.TEXT_FILE + ".pth")).unlink(), "models_t5_umt5-xxl-enc-bf16.pth or .safetensors"),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "diffusion_pytorch_model"),
        (lambda f: (f / "google" / "umt5-xxl").rename(f / "elsewhere"), "tokenizer's folder .* is missing"),
        (
            lambda f: (f / "config.json").write_text('{"num_heads": 2, "in_dim": 36}'),
            "in_dim is 36, the weights say 16",
        ),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"num_heads": 0}'), "num_heads that divide 48, got 0"),
        (
            lambda f: torch.save(fill(shapes.text_shapes(**shapes.TINY_TEXT), 3), f / (family.VAE_FILE + ".pth")),
            "no Wan VAE",
        ),
        (lambda f: torch.save(fixture("wan_vae").vae, f / (family.TEXT_FILE + ".pth")), "no UMT5 encoder"),
        (lambda f: (f / "reward_lora.json").write_text('{"fsp": 8}'), "unknown option fsp; allowed are boundary, fps"),
        (lambda f: (f / "reward_lora.json").write_text('{"fps": "8"}'), "fps has the wrong type, got '8'"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_a_sentence(tmp_path, change, message):
    family.write(tmp_path, "2.1 original t2v")
    change(tmp_path)
    with pytest.raises(WeightFileError, match=message) as caught:
        load_video_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_image_to_video_folder_of_diffusers_loads(i2v, tmp_path):
    """With the names its publisher's exports carry besides: norm_added_q, a CLIP projection, vision_model."""
    i2v.encode_text(["a"])
    index = {"_class_name": "WanImageToVideoPipeline", "transformer_2": [None, None], "boundary_ratio": None}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"flow_shift": 3.0}')
    i2v.conditioning([torch.zeros(1, 24)], None, (16, 1, 4, 4), start_image=torch.zeros(1, 3, 8, 8))
    for name, part in (("transformer", i2v.transformer), ("vae", i2v.vae), ("text_encoder", i2v.text_encoder)):
        part.save_pretrained(tmp_path / name)
    i2v._image_encoder.save_pretrained(tmp_path / "image_encoder")
    i2v.tokenizer.save_pretrained(tmp_path / "tokenizer")
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"blocks.0.attn2.norm_added_q.weight": torch.zeros(48)}, weights)
    weights = tmp_path / "image_encoder" / "model.safetensors"
    clip = {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in load_file(weights).items()}
    extra = {"visual_projection.weight": torch.zeros(8), "vision_model.embeddings.position_ids": torch.arange(257)}
    save_file(clip | extra, weights)
    model, image = load_video_model(tmp_path), torch.rand(1, 3, 32, 32)
    shape = model.spec.latent_shape(32, 32, 5)
    ours, theirs = (m.conditioning(m.encode_text(["a"]), None, shape, start_image=image).positive for m in (model, i2v))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


def test_variants_we_cannot_run_are_refused(tmp_path):
    family.write(tmp_path, "2.1 original t2v")
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    save_file(whole | {"patch_embedding.weight": torch.zeros(48, 48, 1, 2, 2)}, weights)
    with pytest.raises(WeightFileError, match="takes 48 input channels"):
        load_video_model(tmp_path, text=False)
    save_file(whole | {"ref_conv.weight": torch.zeros(1)}, weights)
    with pytest.raises(WeightFileError, match=r"has unknown ref_conv\.weight; it is probably another variant"):
        load_video_model(tmp_path, text=False)


@pytest.mark.parametrize(("layout", "allowed"), [("2.1 files i2v", 1e-3), ("2.2 files t2v pair", 0.07)])
def test_single_files_give_the_weights_they_were_made_of(tmp_path, layout, allowed):
    """To half precision, or, unpacked from float8 with three bits of mantissa, to a sixteenth."""
    family.write(tmp_path, layout)
    model = load_video_model(family.open_files(tmp_path), dtype="float32", text=False)
    image = {"in_dim": 36, "image_dim": shapes.TINY_CLIP["dim"]} if "i2v" in layout else {}
    named = shapes.transformer_shapes(**shapes.TINY_SINGLE, **image)
    for seed, network in zip((1, 11), model.denoisers.values(), strict=False):
        original = wan_keys.convert_transformer(fill(named, seed))
        for name, tensor in network.state_dict().items():
            assert (tensor - original[name]).abs().max() <= allowed * original[name].abs().max(), name


def test_a_text_encoder_without_its_tokenizer_is_refused_in_a_sentence(tmp_path):
    family.write(tmp_path, "2.1 files i2v")
    files = family.open_files(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(files.text).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name != "spiece_model"}, files.text)
    with pytest.raises(WeightFileError, match=r"has no tokenizer inside \(spiece_model\); take ComfyUI's"):
        load_video_model(files)
    save_file(tensors | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}, files.text)
    with pytest.raises(WeightFileError, match="the tokenizer inside .* is damaged"):
        load_video_model(files)


def test_single_files_without_clip_say_so_when_an_image_comes(tmp_path):
    family.write(tmp_path, "2.1 files i2v")
    model = load_video_model(dataclasses.replace(family.open_files(tmp_path), clip_vision=None), text=False)
    shape = model.spec.latent_shape(32, 32, 5)
    model.conditioning([torch.zeros(1, 24)], None, shape)
    with pytest.raises(WeightFileError, match="give clip_vision_h.safetensors too"):
        model.conditioning([torch.zeros(1, 24)], None, shape, start_image=torch.zeros(1, 3, 32, 32))


# Conditioning and batches


@pytest.fixture(scope="module")
def i2v(original_i2v):
    return load_video_model(original_i2v)


@pytest.mark.parametrize("with_end", [False, True])
def test_image_conditioning_matches_diffusers_pipeline(i2v, with_end):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    pipeline = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=i2v.vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=i2v.transformer,
    )
    start, end = torch.rand(2, 1, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    end = end if with_end else None
    _, reference = pipeline.prepare_latents(
        start * 2 - 1,
        1,
        height=32,
        width=48,
        num_frames=9,
        dtype=torch.float32,
        device="cpu",
        last_image=None if end is None else end * 2 - 1,
    )
    shape = i2v.spec.latent_shape(48, 32, 9)
    branch = i2v.conditioning([torch.zeros(1, 24)], None, shape, start_image=start, end_image=end).positive
    assert torch.allclose(branch["latents"], reference, atol=1e-5)
    assert branch["image"].any()
    assert torch.isfinite(i2v.predict(torch.zeros(1, *shape), torch.tensor(0.5), branch)).all()


def test_the_end_image_alone_marks_the_last_frame(i2v):
    shape = i2v.spec.latent_shape(32, 32, 5)
    branch = i2v.conditioning([torch.zeros(1, 24)], None, shape, end_image=torch.ones(1, 3, 20, 20)).positive
    mask = branch["latents"][:, :4]
    assert mask.mean((0, 3, 4)).tolist() == [[0, 0], [0, 0], [0, 0], [0, 1]]
    assert not branch["image"].any()  # CLIP sees the start image alone


def test_one_image_serves_a_batch_and_a_wrong_number_is_refused(i2v):
    shape, texts = i2v.spec.latent_shape(32, 32, 5), [torch.zeros(1, 24)] * 2
    images = torch.rand(2, 3, 32, 32)
    both = i2v.conditioning(texts, texts, shape, start_image=images, end_image=images[:1])
    assert both.positive["latents"].shape == (2, 20, 2, 4, 4)
    assert both.negative["image"].shape == (2, 257, 160)
    one = i2v.conditioning(texts[:1], None, shape, start_image=images[1:], end_image=images[:1]).positive
    assert torch.allclose(both.positive["latents"][1:], one["latents"], atol=1e-5)
    with pytest.raises(ValueError, match=r"start image must be \[1 or 2, 3, H, W\], got \[3, 3, 32, 32\]"):
        i2v.conditioning(texts, None, shape, start_image=torch.rand(3, 3, 32, 32))


def test_a_text_to_video_model_takes_no_image(t2v):
    with pytest.raises(ValueError, match="text-to-video model"):
        t2v.conditioning([torch.zeros(1, 24)], None, (16, 1, 4, 4), start_image=torch.zeros(1, 3, 32, 32))


def test_the_first_last_frame_model_sees_both_images(i2v):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    flf = WanTransformer3DModel.from_config({**i2v.transformer.config, "pos_embed_seq_len": 514})
    model = WanModel(i2v.spec, flf, i2v.vae, image_encoder=i2v._image_encoder)
    shape, images = i2v.spec.latent_shape(32, 32, 5), torch.rand(2, 1, 3, 32, 32)
    branch = model.conditioning([torch.zeros(1, 24)], None, shape, start_image=images[0], end_image=images[1]).positive
    assert branch["image"].shape == (1, 514, 160)
    assert model.predict(torch.zeros(1, *shape), torch.tensor(0.5), branch).shape == (1, *shape)


def test_a_batch_predicts_what_its_samples_predict_alone(i2v):
    shape = i2v.spec.latent_shape(32, 32, 5)
    texts = i2v.encode_text(["a red circle", "the blue square moves left"])
    image = torch.rand(2, 3, 32, 32)
    x, sigma = i2v.initial_latents(shape, [1, 2]), torch.tensor(0.7)
    together = i2v.predict(x, sigma, i2v.conditioning(texts, None, shape, start_image=image).positive)
    for i in range(2):
        alone = i2v.conditioning(texts[i : i + 1], None, shape, start_image=image[i : i + 1]).positive
        assert torch.allclose(i2v.predict(x[i : i + 1], sigma, alone), together[i : i + 1], atol=1e-5)
    frames = i2v.decode(x)
    assert torch.allclose(i2v.decode(x[1:]), frames[1:], atol=1e-5)


def test_noise_depends_on_its_own_seed_alone(t2v):
    shape = (16, 2, 4, 4)
    assert torch.equal(t2v.initial_latents(shape, [1, 2])[1], t2v.initial_latents(shape, [2])[0])


def test_lora_names_ignore_an_injected_adapter():
    from peft import LoraConfig, inject_adapter_in_model

    wan, vae = fixture("wan_t2v"), fixture("wan_vae")
    model = build_wan(wan.transformer, wan.meta["transformer_config"], vae.vae)
    before = model.lora_names("transformer")
    assert len(before) == 2 * 10 + 6
    assert before["blocks.1.attn2.to_out.0"] == "blocks.1.cross_attn.o"
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "ffn.net.2"]), model.transformer)
    assert model.lora_names("transformer") == before


def test_gradients_are_exact_in_float64(t2v):
    wan, vae = fixture("wan_t2v"), fixture("wan_vae")
    model = build_wan(wan.transformer, wan.meta["transformer_config"], vae.vae, torch.float64)
    shape, sigmas = (16, 2, 4, 4), model.sigmas(2)
    branch = model.conditioning([wan.io["context"][0].double()], None, shape).positive
    noise = model.initial_latents(shape, [3]).double()
    weight = torch.randn(1, 3, 5, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def reward(x):
        for i in range(2):
            x = model.step(x, model.predict(x, sigmas[i], branch), sigmas[i], sigmas[i + 1])
        return (model.decode(x) * weight).sum()

    leaf = noise.clone().requires_grad_()
    total = reward(leaf)
    assert total.dtype == torch.float64
    (gradient,) = torch.autograd.grad(total, leaf)
    direction = torch.randn(noise.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        difference = (reward(noise + 1e-6 * direction) - reward(noise - 1e-6 * direction)) / 2e-6
    expected = (gradient * direction).sum()
    assert abs(difference - expected) < 1e-6 * abs(expected)


def test_everything_stays_on_the_models_device(original_i2v):
    """The meta device stands for a GPU: it too refuses tensors of another device."""
    model = load_video_model(original_i2v)
    shape, texts = model.spec.latent_shape(32, 32, 5), model.encode_text(["a red circle"])
    image = torch.rand(1, 3, 32, 32)
    model.to("meta", "denoiser")
    with_image = model.conditioning(texts, texts, shape, start_image=image)
    model.to("meta")
    without = model.conditioning(texts, texts, shape)
    x, sigmas = model.initial_latents(shape, [1]), model.sigmas(2)
    for branch in (with_image.positive, without.negative):
        x = model.step(x, model.predict(x, sigmas[0], branch), sigmas[0], sigmas[1])
    assert x.is_meta
    assert model.decode(x).is_meta


def test_parts_move_by_name(t2v):
    t2v.to("cpu", "denoiser", "vae", "text")
    with pytest.raises(ValueError, match="unknown parts"):
        t2v.to("cpu", "unet")
