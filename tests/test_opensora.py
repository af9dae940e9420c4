"""Open-Sora 1.2: published names, clean captions, the empty caption, frames in chunks, its walk, what is refused."""

import json
import math
import shutil
from fnmatch import fnmatch

import pytest
import torch
from reward_lora.selfcheck.exactness import ToyReward
from reward_lora.tests.families import opensora as tiny
from reward_lora.training.prompts import EmbeddingStore
from reward_lora.video_models import WeightFileError, load_video_model, opensora_vae
from reward_lora.video_models.opensora import flow_step, time_ratio, transformed
from reward_lora.video_models.opensora_files import describe, network_config
from reward_lora.video_models.opensora_text import clean_caption, with_score
from reward_lora.video_models.opensora_transformer import STDiT3, STDiT3Config
from reward_lora.video_models.opensora_vae import OpenSoraVae, TemporalConfig, frames_of, latents_of

PROMPT = "a red circle moves right"
SHAPE = (4, 6, 4, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("Open-Sora")
    tiny.write(where, tiny.LAYOUTS[0])
    return where


@pytest.fixture(scope="module")
def model(folder):
    return load_video_model(folder, dtype="float32")


def noise(seed=0, shape=SHAPE):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_the_real_denoisers_names_and_sizes():
    shapes = tiny.network_shapes(**tiny.NETWORK)
    assert len(shapes) == 973
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_208_872_772  # 4.84 GB in float32
    assert shapes["temporal_blocks.27.cross_attn.kv_linear.weight"] == (2304, 1152)
    assert shapes["spatial_blocks.0.attn.q_norm.weight"] == (72,)
    assert shapes["y_embedder.y_embedding"] == (300, 4096)
    with torch.device("meta"):
        network = STDiT3(STDiT3Config())
    assert shapes_of(network) == shapes


def test_the_real_vaes_names_and_sizes():
    from diffusers import AutoencoderKL

    shapes = tiny.vae_shapes(tiny.temporal_shapes(**tiny.TEMPORAL), tiny.SPATIAL)
    assert len(shapes) == 517
    assert sum(math.prod(shape) for shape in shapes.values()) == 393_341_015
    assert shapes["temporal_vae.decoder.conv_blocks.2.conv.weight"] == (1024, 512, 3, 3, 3)
    assert "temporal_vae.encoder.conv_blocks.0.conv.weight" not in shapes  # time does not halve there
    published = on_meta(shapes)
    assert opensora_vae.temporal_config(published) == TemporalConfig()
    with torch.device("meta"):
        vae = OpenSoraVae(AutoencoderKL(**opensora_vae.spatial_config(published)), TemporalConfig())
    assert shapes_of(vae) == shapes
    with torch.device("meta"):
        spec = describe("Open-Sora", STDiT3(STDiT3Config(depth=0)), vae)
    assert (spec.temporal_stride, spec.spatial_stride, spec.latent_channels) == (4, 8, 4)
    assert spec.latent_shape(368, 272, 51) == (4, 15, 34, 46)


def test_frames_come_in_chunks_of_seventeen():
    published = {1: 1, 16: 4, 17: 5, 18: 6, 34: 10, 51: 15, 68: 20, 102: 30}
    assert {frames: latents_of(frames) for frames in published} == published
    assert [frames_of(latents) for latents in range(1, 8)] == [1, 5, 9, 13, 17, 18, 22]
    assert all(latents_of(frames_of(latents)) == latents for latents in range(1, 40))


def test_the_nearest_frame_counts(model):
    spec = model.spec
    assert [spec.nearest_frames(frames) for frames in (0, 1, 2, 3, 4, 15, 16, 17, 18, 50, 51, 52)] == [
        1, 1, 1, 1, 5, 13, 17, 17, 18, 51, 51, 52,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="whole chunks of 17 and a rest of 0, 1, 5, 9 or 13 .*got 49; the nearest is"):
        spec.check_size(spec.width, spec.height, 49)


def test_larger_videos_are_noisier_in_the_middle_of_the_walk():
    even = torch.tensor([1.0, 2 / 3, 1 / 3, 0.0], dtype=torch.float64)
    published = [1000, 807.42, 511.76, 0]
    assert (1000 * transformed(even, time_ratio(240, 320, 51))).tolist() == pytest.approx(published, abs=0.01)
    assert time_ratio(240, 320, 50) == pytest.approx(time_ratio(240, 320, 51) * math.sqrt(10 / 15))
    assert time_ratio(512, 512, 1) == 1
    assert time_ratio(240, 320, 13) > 0  # the publisher's formula knows whole chunks only and gives 0


def test_a_walk_knows_the_size_of_its_video(model):
    sigmas = model.sigmas(3)
    assert sigmas.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    x, velocity = noise(1), noise(2)
    ratio = time_ratio(SHAPE[2] * 2, SHAPE[3] * 2, 18)  # the tiny VAE halves once
    parts = transformed(sigmas, ratio)
    assert not torch.allclose(parts, sigmas)
    stepped = model.step(x, velocity, sigmas[1], sigmas[2])
    assert torch.equal(stepped, flow_step(x, velocity, parts[1], parts[2]))
    clean = model.step(x, velocity, sigmas[1], sigmas[3])
    assert torch.allclose(clean, x + parts[1].float() * velocity)


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Cat, running. aesthetic score: 6.5.", "a cat, running. aesthetic score: 6.5."),
        ("see www.foo.com/bar <b>now</b> &amp; then", "see now then"),
        ("jc6640 at 30x40 — “nice” #123 @bob 10.0.0.1 今天", 'at - "nice"'),
        ("a_name_made_of_words", "a name made of words"),
        ("one\\ntwo (three) x,y", "one two three x, y"),
        ("<script>alert(1)</script>free shipping page 12 &eacute;", "é"),
        ("the cafÃ©", "the cafã"),
        ("1 &lt; 2 &#39;q&#39; a.png at 100%25+speed", "1 < 2 'q' at 100% speed"),
    ],
)
def test_captions_are_cleaned_as_the_training_captions_were(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_a_prompt_asks_for_a_score_once():
    assert with_score("a cat") == "a cat aesthetic score: 6.5."
    assert with_score("a cat aesthetic score: 4.0.") == "a cat aesthetic score: 4.0."


def test_an_empty_prompt_is_no_token_and_survives_the_cache(model, tmp_path):
    empty, spaces, text = model.encode_text(["", "  ", PROMPT])
    assert empty.shape == spaces.shape == (0, tiny.TINY_NETWORK["caption"])
    assert len(text) > 5
    for _ in range(2):  # made, and read again
        store = EmbeddingStore(model, tmp_path)
        store.prepare(["", PROMPT], lambda phase: None)
        assert store[""].shape == empty.shape
        assert torch.equal(store[PROMPT], text)


def test_the_empty_caption_is_cut_to_the_tokens_of_the_prompt(model):
    empty, short, long = torch.zeros(0, 24), torch.ones(3, 24), torch.ones(5, 24)
    learned = model.transformer.y_embedder.y_embedding
    both = model.conditioning([short, long], [empty, empty], SHAPE)
    assert both.positive["mask"].sum(1).tolist() == both.negative["mask"].sum(1).tolist() == [3, 5]
    assert torch.equal(both.negative["text"][1], learned[:5])
    assert torch.equal(both.negative["text"][0, :3], learned[:3])
    assert not both.positive["text"][0, 3:].any()
    own = model.conditioning([short], [long], SHAPE)  # a negative prompt keeps its own length
    assert own.negative["mask"].sum().item() == 5
    nothing = model.conditioning([empty], None, SHAPE)
    assert torch.equal(nothing.positive["text"][0], learned)
    assert nothing.negative is None


def test_text_that_is_no_text_is_not_seen(model):
    (text,) = model.encode_text([PROMPT])
    alone = model.conditioning([text], None, SHAPE).positive
    beside = model.conditioning([text, torch.cat([text] * 2)], None, SHAPE).positive
    assert beside["text"].shape[1] == 2 * alone["text"].shape[1]
    sigma = model.sigmas(3)[1]
    with torch.no_grad():
        one = model.predict(noise(), sigma, alone)
        two = model.predict(torch.cat([noise(), noise(1)]), sigma, beside)
        other = model.predict(noise(), sigma, {**alone, "text": -alone["text"]})
    assert torch.allclose(one, two[:1], atol=1e-5)
    assert not torch.allclose(one, other, atol=1e-3)


def test_the_network_is_told_time_rate_and_size(model):
    branch = model.conditioning(model.encode_text([PROMPT]), None, SHAPE).positive
    assert branch["fps"].tolist() == [24]
    assert model.conditioning(model.encode_text([PROMPT]), None, (4, 1, 4, 6)).positive["fps"].tolist() == [120]
    network, x, time = model.transformer, noise(), torch.tensor([500.0])
    arguments = (branch["text"], branch["mask"])
    with torch.no_grad():
        base = network(x, time, *arguments, branch["fps"], (8, 12))
        assert base.shape == (1, 8, *SHAPE[1:])
        for changed in (
            network(x, time + 100, *arguments, branch["fps"], (8, 12)),
            network(x, time, *arguments, branch["fps"] + 1, (8, 12)),
            network(x, time, *arguments, branch["fps"], (800, 1200)),
            network(x.flip(2), time, *arguments, branch["fps"], (8, 12)).flip(2),
            network(x, time, *arguments, branch["fps"], (8, 12), clean=torch.arange(6)[None] == 0),
        ):
            assert not torch.allclose(base, changed, atol=1e-4)
        odd = network(x[..., :3, :5], time, *arguments, branch["fps"], (8, 12))
    assert odd.shape == (1, 8, 6, 3, 5)


def test_checkpointing_gives_the_same_gradient_and_keeps_less(model):
    branch = model.conditioning(model.encode_text([PROMPT]), None, SHAPE).positive

    def gradient():
        x, kept = noise().requires_grad_(), {}

        def keep(tensor):
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.predict(x, model.sigmas(3)[1], branch).square().sum()
        loss.backward()
        weights = {p.data_ptr() for p in model.transformer.parameters()}
        return x.grad, sum(numel for pointer, numel in kept.items() if pointer not in weights)

    plain, much = gradient()
    model.transformer.enable_gradient_checkpointing()
    try:
        checkpointed, little = gradient()
    finally:
        model.transformer.disable_gradient_checkpointing()
    assert plain.abs().max() > 0
    assert torch.equal(plain, checkpointed)
    assert little < 0.5 * much


def test_chunks_know_nothing_of_each_other_and_frames_of_one_know_all(model):
    latents = noise(3)
    assert model.chunks(6) == [5, 1]
    assert model.chunks(5) == [5]
    with torch.no_grad():
        frames = model.decode(latents)
        assert frames.shape == (1, 3, 18, 8, 12)
        parts = [model.decode_chunk(part)[0] for part in latents.split([5, 1], dim=2)]
        assert torch.equal(frames, torch.cat(parts, dim=2))
        moved = latents.clone()
        moved[:, :, 4] += 1
        changed = (model.decode(moved) - frames).abs().amax((0, 1, 3, 4))
    assert (changed[:17] > 0).all()
    assert changed[17] == 0


def test_saving_memory_changes_no_gradient(model):
    def gradient(save_memory):
        leaf = noise(3)[:, :, :2].requires_grad_()
        frames, _ = model.decode_chunk(leaf, save_memory=save_memory)
        ToyReward().score(frames, [""]).sum().backward()
        return leaf.grad

    plain = gradient(save_memory=False)
    assert plain.abs().max() > 0
    assert torch.equal(plain, gradient(save_memory=True))


def test_what_is_encoded_is_decoded_to_as_many_frames(model):
    pixels = torch.rand(1, 3, 22, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = model.vae.encode(pixels)
        assert latents.shape == (1, 4, 7, 4, 6)
        assert model.vae.decode(latents).shape == pixels.shape
        assert model.vae.decode(latents, 24).shape[2] == 24  # the same latents may stand for up to three frames more


def test_the_rotary_table_stays_float32(folder):
    half = load_video_model(folder, dtype="bfloat16", text=False)
    assert half.transformer.rope.freqs.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    assert half.vae.scale.dtype == torch.float32


def test_a_missing_folder_is_named_with_its_address(folder, tmp_path):
    denoiser = shutil.copytree(folder / tiny.DENOISER, tmp_path / tiny.DENOISER)
    with pytest.raises(WeightFileError, match="OpenSora-VAE-v1.2, .* download https://huggingface.co/hpcai-tech/"):
        load_video_model(denoiser)
    shutil.copytree(folder / tiny.VAE, tmp_path / tiny.VAE)
    with pytest.raises(WeightFileError, match="t5-v1_1-xxl, .* https://huggingface.co/DeepFloyd/t5-v1_1-xxl into"):
        load_video_model(denoiser)
    assert load_video_model(denoiser, text=False).text_encoder is None


def test_a_download_brings_all_three_repositories(folder, tmp_path, monkeypatch):
    def fetch(repository, target, *, patterns, progress):
        found = folder / repository.rpartition("/")[2]
        names = [path.name for path in found.iterdir() if any(fnmatch(path.name, pattern) for pattern in patterns)]
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(found / name, target / name)

    monkeypatch.setattr("reward_lora.hub.fetch_repository", fetch)
    model = load_video_model("hpcai-tech/OpenSora-STDiT-v3", search=[tmp_path], download=True, dtype="float32")
    assert model.spec.name == tiny.DENOISER
    assert len(model.encode_text([PROMPT])[0]) > 5
    assert {path.name for path in (tmp_path / tiny.DENOISER).iterdir() if path.is_dir()} == {tiny.VAE, tiny.TEXT}


def test_a_network_of_another_kind_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="qk_norm must be True"):
        network_config({"qk_norm": False})
    where = shutil.copytree(folder, tmp_path / "copy")
    path = where / tiny.DENOISER / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 64}))
    with pytest.raises(WeightFileError, match="does not fit STDiT3: .* shapes differ"):
        load_video_model(where, text=False)
    path.write_text(json.dumps({"model_type": "STDiT2"}))
    with pytest.raises(WeightFileError, match="is no model we know: .*Open-Sora 1.2"):
        load_video_model(where)


def test_images_are_refused(model):
    with pytest.raises(ValueError, match="takes no start or end image"):
        model.conditioning(model.encode_text([PROMPT]), None, SHAPE, end_image=torch.zeros(1, 3, 8, 8))
