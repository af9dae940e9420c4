"""VADER's rewards on tiny random checkpoints with the published names and configurations."""

from __future__ import annotations

import json

import pytest
import torch
from reward_lora.files import WeightFileError
from reward_lora.reward_models import load_reward
from reward_lora.reward_models.action import KEYWORDS, find_action
from reward_lora.reward_models.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, normalize
from reward_lora.reward_models.protocol import Reward
from safetensors.torch import save_file
from torch.nn import functional as F

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
OBJECTS = {0: "N/A", 1: "book", 2: "dog"}
ACTIONS = {0: "jogging", 1: "playing piano", 2: "playing guitar", 3: "playing bass guitar", 4: "eating doughnuts"}
OPTIONS = {"object_removal": {"target": "dog"}, "action": {"action": "Jogging"}}
NAMES = ("jpeg_compressibility", "rainy", "snowy", "object_removal", "action", "vader_aesthetic_hps")


def rename_back(tensors, pairs):
    """To the names under which the weights were published, whatever this version of transformers calls them."""
    for now, published in pairs:
        tensors = {name.replace(now, published): tensor for name, tensor in tensors.items()}
    return tensors


def write_model(folder, model, config, pairs):
    folder.mkdir()
    tensors = rename_back(dict(model.state_dict()), pairs)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))


def randomize(model, *, gain=1.0):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 0.1) * gain
        parameter.data.copy_(value + 1 if "norm" in name and name.endswith("weight") else value)
    return model


@pytest.fixture(scope="module")
def folder(reward_files, tmp_path_factory):
    """A models folder: CLIP, LAION's head and HPS of the other tests, and VADER's own."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification, YolosConfig, YolosForObjectDetection

    root = tmp_path_factory.mktemp("vader")
    for path in reward_files.iterdir():
        (root / path.name).symlink_to(path)
    generator = torch.Generator().manual_seed(0)
    heads = {
        "compression_reward.pt": (0, 3, 6, 9),
        "rainy_reward.pt": (0, 2, 4, 6, 7),
        "snowy_reward.pt": (0, 2, 4, 6, 7),
    }
    for file, numbers in heads.items():
        widths, tensors = [8, 12, 10, 6, 4][: len(numbers)] + [1], {}
        for number, inputs, outputs in zip(numbers, widths, widths[1:], strict=False):
            tensors[f"layers.{number}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
            tensors[f"layers.{number}.bias"] = torch.randn(outputs, generator=generator) * 0.3
        torch.save(tensors, root / file)
    yolos = {**SIZES, "model_type": "yolos", "image_size": [64, 96], "patch_size": 16, "num_detection_tokens": 12}
    yolos |= {"use_mid_position_embeddings": True, "id2label": OBJECTS, "label2id": {"book": 1, "dog": 2}}
    detector = randomize(YolosForObjectDetection(YolosConfig.from_dict(yolos)), gain=2)
    detector.class_labels_classifier.layers[-1].bias.data.copy_(torch.tensor([-9.0, 0.0, 1.8, 1.0]))
    write_model(root / "yolos-base", detector, yolos, [("interpolation.mid_position", "mid_position")])
    videomae = {**SIZES, "model_type": "videomae", "image_size": 32, "patch_size": 16, "num_frames": 4}
    videomae |= {"id2label": ACTIONS, "label2id": {name: number for number, name in ACTIONS.items()}}
    classifier = randomize(VideoMAEForVideoClassification(VideoMAEConfig.from_dict(videomae)))
    pairs = [("attention.query.bias", "attention.q_bias"), ("attention.value.bias", "attention.v_bias")]
    write_model(root / "videomae-base-finetuned-kinetics", classifier, videomae, pairs)
    return root


def load(name, folder, **settings):
    return load_reward(name, search=[folder], options=OPTIONS.get(name), **settings)


def clips(count, frames=4, *, height=40, width=20, seed=0):
    """Coloured noise of a few pixels' size, so that resizing does not flatten it."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count * frames, 3, 6, 3, generator=generator)
    large = F.interpolate(small, (height, width), mode="bilinear")
    return large.view(count, frames, 3, height, width).transpose(1, 2).contiguous()


def images_of(frames):
    return frames.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize(
    ("name", "file", "activation", "behind"),
    [
        ("jpeg_compressibility", "compression_reward.pt", torch.relu, torch.neg),
        ("rainy", "rainy_reward.pt", lambda x: x, torch.sigmoid),
        ("snowy", "snowy_reward.pt", lambda x: x, torch.sigmoid),
    ],
)
def test_heads_by_vaders_formula(folder, name, file, activation, behind):
    from transformers import CLIPModel

    transforms = pytest.importorskip("torchvision", reason="VADER's heads are NOT compared").transforms
    frames = clips(2)
    clip = CLIPModel.from_pretrained(folder / "clip-vit-large-patch14")
    size = clip.config.vision_config.image_size
    pixels = normalize(transforms.Resize((size, size))(images_of(frames)), CLIP_MEAN, CLIP_STD)
    embedding = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    x, tensors = F.normalize(embedding, dim=-1), torch.load(folder / file)
    layers = sorted({int(key.split(".")[1]) for key in tensors})
    for layer in layers:
        x = F.linear(x, tensors[f"layers.{layer}.weight"], tensors[f"layers.{layer}.bias"])
        x = activation(x) if layer != layers[-1] else x
    expected = behind(x).view(2, -1).mean(1)
    torch.testing.assert_close(load(name, folder).score(frames, [""] * 2), expected.detach(), rtol=1e-5, atol=1e-5)


def test_mixture_by_vaders_formula(folder):
    frames, prompts = clips(2), ["a dog", "a red circle"]
    mixture = load("vader_aesthetic_hps", folder)
    scores = mixture.score(frames, prompts)
    hps = load_reward("hps_v2.1", search=[folder], options={"preprocessing": "vader"}).score(frames, prompts)
    squashed = load_reward("hps_v2.1", search=[folder], options={"preprocessing": "videox-fun"}).score(frames, prompts)
    assert set(mixture.terms) == {"aesthetic_v2", "hps_v2.1"}
    torch.testing.assert_close(mixture.terms["hps_v2.1"], hps)
    assert float((squashed - hps).abs().max()) > 1e-6  # another filter
    torch.testing.assert_close(scores, (mixture.terms["aesthetic_v2"] + 15 * hps) / 2)
    square = clips(1, height=16, width=16)  # nothing is resized: the filter does not matter
    mixture.score(square, [""])
    aesthetic = load_reward("aesthetic_v2", search=[folder]).score(square, [""])
    torch.testing.assert_close(mixture.terms["aesthetic_v2"], aesthetic)


def test_object_removal_by_transformers_own_post_processing(folder):
    from transformers import YolosForObjectDetection

    processors = pytest.importorskip("transformers.models.yolos", reason="YOLOS is NOT compared")
    frames = torch.cat([clips(2), torch.zeros(1, 3, 4, 40, 20)])
    detector = YolosForObjectDetection.from_pretrained(folder / "yolos-base").eval()
    pixels = F.interpolate(images_of(frames), (512, 256), mode="bilinear")
    with torch.no_grad():
        outputs = detector(pixel_values=normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))
    processor = (getattr(processors, "YolosImageProcessorPil", None) or processors.YolosImageProcessor)()
    results = processor.post_process_object_detection(outputs, threshold=0.2)
    means = []
    for result in results:
        scores = result["scores"][result["labels"] == 2]
        means.append(float(scores.mean()) if len(scores) else 0.0)
    assert any(means), "no frame shows a dog: choose other weights"
    expected = 1 - torch.tensor(means).view(3, -1).mean(1)
    torch.testing.assert_close(load("object_removal", folder).score(frames, [""] * 3), expected, rtol=0, atol=1e-5)


def test_a_frame_without_the_object_has_reward_one_and_no_gradient(folder):
    reward = load("object_removal", folder)
    frames = clips(1, 6)
    singles = reward.score(frames.transpose(0, 2), [""] * 6)
    shown, gone = int(singles.argmin()), int(singles.argmax())
    reward.judge.label = 0  # what no box of these weights is taken for
    frames = frames[:, :, [gone]].requires_grad_()
    score = reward.score(frames, [""])
    (gradient,) = torch.autograd.grad(score.sum(), frames)
    assert singles[shown] < 1
    assert score.item() == 1
    assert not gradient.any()


def test_action_is_the_softmax_of_the_classifier(folder):
    from transformers import VideoMAEForVideoClassification

    frames = clips(2, 4)
    classifier = VideoMAEForVideoClassification.from_pretrained(folder / "videomae-base-finetuned-kinetics").eval()
    resized = F.interpolate(images_of(frames), (32, 32), mode="bilinear", antialias=True)
    pixels = normalize(resized, IMAGENET_MEAN, IMAGENET_STD).view(2, 4, 3, 32, 32)
    shares = classifier(pixel_values=pixels).logits.softmax(-1).detach()
    torch.testing.assert_close(load("action", folder).score(frames, [""] * 2), shares[:, 0], rtol=1e-5, atol=1e-6)
    named = load_reward("action", search=[folder])
    scores = named.score(frames, ["A raccoon plays the piano", "someone playing a bass guitar"])
    torch.testing.assert_close(scores, torch.stack([shares[0, 1], shares[1, 3]]), rtol=1e-5, atol=1e-6)
    assert (named.needs, load("action", folder).needs) == ({"prompt"}, set())
    longer = frames.repeat_interleave(3, 2)  # twelve frames: the evenly spread four are the same
    torch.testing.assert_close(named.score(longer, ["jogging"] * 2), shares[:, 0], rtol=1e-5, atol=1e-6)
    still = frames[:, :, :1]
    torch.testing.assert_close(
        named.score(still, ["jogging"] * 2), named.score(still.repeat(1, 1, 4, 1, 1), ["jogging"] * 2)
    )


@pytest.mark.parametrize(
    ("prompt", "action"),
    [
        ("a bear playing the guitar in a band", "playing guitar"),
        ("playing his bass guitar", "playing bass guitar"),
        ("A cat with a guitar", "playing guitar"),
        ("two dogs, eating a doughnut", "eating doughnuts"),
        ("Jogging!", "jogging"),
    ],
)
def test_the_action_is_found_in_the_prompt(prompt, action):
    labels = {label: number for number, label in ACTIONS.items()}
    assert find_action(prompt, labels) == action


def test_an_action_that_is_not_named_gets_a_sentence(folder):
    with pytest.raises(ValueError, match="no action of the classifier is named in the prompt 'a cello'"):
        load_reward("action", search=[folder]).score(clips(1), ["a cello"])
    with pytest.raises(ValueError, match="option action must be one of jogging, playing piano.*got 'flying'"):
        load_reward("action", search=[folder], options={"action": "flying"})
    assert len(KEYWORDS) == 12


@pytest.mark.parametrize("target", ["", "cat"])
def test_an_object_that_is_not_known_gets_a_sentence(folder, target):
    with pytest.raises(ValueError, match="needs the option target.*choose from book, dog"):
        load_reward("object_removal", search=[folder], options={"target": target})


@pytest.mark.parametrize("name", NAMES)
def test_a_score_depends_on_its_own_clip_alone(folder, name):
    reward, frames, prompts = load(name, folder), clips(3), ["a dog", "a cat", "a red circle"]
    together = reward.score(frames, prompts)
    alone = [reward.score(frames[i : i + 1], prompts[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert isinstance(reward, Reward)
    assert together.dtype == torch.float32
    assert len(set(together.tolist())) == 3
    if hasattr(reward, "chunk"):
        reward.chunk = 5
        torch.testing.assert_close(reward.score(frames, prompts), together, rtol=1e-4, atol=1e-5)
    as_bytes = (frames * 255).round().byte()
    torch.testing.assert_close(reward.score(as_bytes, prompts), reward.score(as_bytes.float() / 255, prompts))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_check_and_ascent(folder, name):
    reward = load(name, folder, dtype=torch.float64)
    frames = clips(2)[1:].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward.score(x, ["a dog"]), frames, fast_mode=True)
    assert torch.autograd.grad(reward.score(frames, ["a dog"]).sum(), frames)[0].any()
    before = reward.score(frames, ["a dog"]).item()
    for _ in range(4):
        frames.requires_grad_()
        (gradient,) = torch.autograd.grad(reward.score(frames, ["a dog"]).sum(), frames)
        frames = (frames + 0.005 * gradient.sign()).clamp(0, 1).detach()
    assert reward.score(frames, ["a dog"]).item() > before + 1e-4


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("jpeg_compressibility", "rainy_reward.pt", "no head for compressibility; get compression_reward.pt"),
        ("rainy", "compression_reward.pt", "no head for rain or snow"),
        ("snowy", "yolos-base/model.safetensors", "no head for rain or snow"),
    ],
)
def test_a_wrong_head_gets_a_sentence(folder, name, given, message):
    with pytest.raises(WeightFileError, match=message):
        load_reward(name, folder / given, search=[folder])


@pytest.mark.parametrize("name", ["object_removal", "action"])
def test_wrong_networks_get_a_sentence(folder, tmp_path, name):
    mine, other = ("yolos-base", "videomae-base-finetuned-kinetics")[:: 1 if name == "object_removal" else -1]
    wrong = tmp_path / mine
    wrong.mkdir()
    (wrong / "config.json").write_text((folder / mine / "config.json").read_text())
    (wrong / "model.safetensors").write_bytes((folder / other / "model.safetensors").read_bytes())
    with pytest.raises(WeightFileError, match="is of another model|it is of another model or damaged"):
        load_reward(name, wrong, options=OPTIONS[name])
    (wrong / "model.safetensors").write_bytes((folder / mine / "model.safetensors").read_bytes()[:999])
    with pytest.raises(WeightFileError, match="truncated|damaged"):
        load_reward(name, wrong, options=OPTIONS[name])
    with pytest.raises(WeightFileError, match="allow the download, or put https://huggingface.co"):
        load_reward(name, search=[tmp_path / "none"], options=OPTIONS[name])
