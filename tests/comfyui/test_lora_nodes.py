"""LoRAs in a real ComfyUI: every format on its native Wan, as strong as on ours, and what core's own loader takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from reward_lora.lora.adapter import inject_weights, linear_shapes
from reward_lora.lora.files import LoraModule, MatchedLora, Offset, write_lora
from reward_lora.selfcheck.wan import build
from reward_lora.video_models.wan import WanModel
from reward_lora.video_models.wan_keys import original_module_name
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import graphs

pytestmark = pytest.mark.comfyui

BUILTIN = "builtin: colour fix"
SEED, STRENGTH, RANK, ALPHA = 7, 0.8, 4, 2.0
LATENTS = (1, 16, 2, 4, 4)
MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]  # fmt: skip
STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]  # fmt: skip


@dataclass
class Native:
    """A tiny random Wan in ComfyUI's model folder, the same in our class, and a LoRA for all its linear layers."""

    model: WanModel
    lora: dict[str, LoraModule]
    names: dict[str, str]


@pytest.fixture(scope="module")
def native(comfyui) -> Native:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096,
        freq_dim=256, ffn_dim=64, num_layers=2, cross_attn_norm=True,
    )  # fmt: skip
    weights = {original_module_name(name): value.detach() for name, value in network.state_dict().items()}
    folder = comfyui.base / "models" / "diffusion_models"
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "tiny_wan.safetensors")
    model = build(weights, {"num_heads": 1}, {}, {})
    lora = {
        name: LoraModule(torch.randn(RANK, inside) * inside**-0.5, torch.randn(out, RANK) * 0.5, ALPHA)
        for name, (out, inside) in linear_shapes(model.transformer).items()
    }
    return Native(model, lora, model.lora_names("transformer"))


def sampled(node: dict | None = None) -> dict:
    """One solver step from noise, through a LoRA node called 2 if one is given."""
    graph = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "tiny_wan.safetensors", "weight_dtype": "default"}},
        "3": {"class_type": "TestConditioning", "inputs": {"seed": 1, "width": 4096}},
        "4": {"class_type": "EmptyHunyuanLatentVideo",
              "inputs": {"width": 32, "height": 32, "length": 5, "batch_size": 1}},
        "5": {"class_type": "KSampler",
              "inputs": {"model": ["2" if node else "1", 0], "seed": SEED, "steps": 1, "cfg": 1.0, "denoise": 1.0,
                         "sampler_name": "euler", "scheduler": "simple", "positive": ["3", 0], "negative": ["3", 0],
                         "latent_image": ["4", 0]}},
        "6": {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": "latents/x"}},
    }  # fmt: skip
    return graph | ({"2": node} if node else {})


def to_model(file: str, strength: float = STRENGTH) -> dict:
    return graphs.node("ApplyRewardLoraToModel", model=["1", 0], lora_file=file, strength=strength)


def noise() -> Tensor:
    return torch.randn(LATENTS, generator=torch.manual_seed(SEED))


def velocity(comfyui, node: dict | None = None) -> tuple[Tensor, str]:
    """What the native model predicts at pure noise, and what node 2 reported."""
    outcome = comfyui.run(sampled(node))
    assert outcome.status == "success", outcome.message
    (file,) = comfyui.files(outcome)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (MEAN, STD))
    clean = (load_file(file)["latent_tensor"] - mean) / std
    return noise() - clean, "".join(outcome.outputs.get("2", {}).get("text", []))


@torch.no_grad()
def ours(native: Native, lora: MatchedLora | None = None) -> Tensor:
    """What our own class predicts for the same."""
    text = torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(1))[0]
    branch = native.model.conditioning([text], None, LATENTS[1:]).positive
    adapter = inject_weights(native.model.transformer, lora, STRENGTH) if lora else None
    prediction = native.model.predict(noise(), torch.tensor(1.0, dtype=torch.float64), branch)
    if adapter:
        adapter.remove()
    return prediction


@pytest.fixture(scope="module")
def base(comfyui, native) -> Tensor:
    return velocity(comfyui)[0]


@pytest.fixture(scope="module")
def change(native) -> Tensor:
    """What the LoRA changes in our own class."""
    return ours(native, MatchedLora(native.lora, (), "own")) - ours(native)


def test_the_native_model_is_ours(native, base):
    torch.testing.assert_close(base, ours(native), rtol=0, atol=1e-3)


def spelled(native: Native, prefix: str, diffusers: bool, down: str, up: str, alpha: bool = True, dots: bool = True):
    """The LoRA's tensors in a spelling; without alphas they are folded."""
    tensors = {}
    for name, module in native.lora.items():
        plain = name if diffusers else native.names[name]
        key = prefix + (plain if dots else plain.replace(".", "_"))
        tensors[f"{key}.{down}"] = module.down if alpha else module.down * module.scale
        tensors[f"{key}.{up}"] = module.up
        if alpha:
            tensors[f"{key}.alpha"] = torch.tensor(module.alpha)
    return tensors


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
FORMATS = {
    "VideoX-Fun": ("lora_unet__", False, *DOWN_UP, True, False),
    "kohya": ("lora_unet_", False, *DOWN_UP, True, False),
    "dotted A B": ("diffusion_model.", False, *AB),
    "dotted down up": ("diffusion_model.", False, *DOWN_UP),
    "dotted default": ("diffusion_model.", False, *DEFAULT, False),
    "diffusers": ("transformer.", True, *AB, False),
    "transformer": ("transformer.", False, *AB, False),
    "peft": ("base_model.model.", False, *AB, False),
    "peft diffusers": ("base_model.model.transformer.", True, *AB, False),
    "bare": ("", False, *AB),
    "pipe.dit": ("pipe.dit.", False, *DEFAULT, False),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_changes_the_native_model_as_ours(comfyui, native, base, change, name):
    file = f"{name.replace(' ', '_')}.safetensors"
    save_file(spelled(native, *FORMATS[name]), comfyui.base / "models" / "loras" / file)
    predicted, report = velocity(comfyui, to_model(file))
    assert f"{len(native.lora)} modules matched" in report
    assert "left out" not in report
    assert "not taken" not in report
    assert float(change.abs().max()) > 0.1
    torch.testing.assert_close(predicted - base, change, rtol=0, atol=1e-3)


def test_a_pickle_of_vader_has_its_alpha(comfyui, native, base, change):
    tensors = spelled(native, "base_model.model.", False, *AB, alpha=False)
    # Alpha 8 at rank 4 doubles: halve one of the matrices.
    halved = {key: value / 2 if "lora_A" in key else value for key, value in tensors.items()}
    torch.save(halved, comfyui.base / "models" / "loras" / "vader.pt")
    predicted, report = velocity(comfyui, to_model("vader.pt"))
    assert "alpha 8, as VADER trains" in report
    torch.testing.assert_close(predicted - base, change, rtol=0, atol=1e-3)


def test_plain_additions_of_cores_own_training(comfyui, native, base):
    bias, norm = torch.full((128,), 0.5), torch.full((128,), 0.3)
    tensors = {
        "diffusion_model.blocks.0.self_attn.q.diff_b": bias,
        "diffusion_model.blocks.1.self_attn.norm_k.diff": norm,
    }
    save_file(tensors, comfyui.base / "models" / "loras" / "core.safetensors")
    offsets = {"blocks.0.attn1.to_q": Offset(bias=bias), "blocks.1.attn1.norm_k": Offset(norm)}
    expected = ours(native, MatchedLora({}, (), "own", offsets)) - ours(native)
    predicted, report = velocity(comfyui, to_model("core.safetensors"))
    assert "2 modules matched" in report
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(predicted - base, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["dotted", "videox-fun"])
def test_cores_own_loader_takes_what_we_write(comfyui, native, base, change, layout):
    file = comfyui.base / "models" / "loras" / f"{layout}.safetensors"
    write_lora(file, native.lora, native.names, {}, layout=layout)
    read = len(comfyui.log.read_text())
    inputs = {"model": ["1", 0], "lora_name": file.name, "strength_model": STRENGTH}
    predicted, _ = velocity(comfyui, {"class_type": "LoraLoaderModelOnly", "inputs": inputs})
    log = comfyui.log.read_text()[read:]
    assert "not loaded" not in log.lower()
    torch.testing.assert_close(predicted - base, change, rtol=0, atol=1e-3)


def test_modules_for_images_are_left_out_with_a_note(comfyui, native, base, change):
    tensors = spelled(native, *FORMATS["VideoX-Fun"])
    for extra in ("blocks_0_cross_attn_k_img", "blocks_0_cross_attn_v_img", "img_emb_proj_1"):
        tensors |= {f"lora_unet__{extra}.{part}": torch.ones(128, 4).T.contiguous() if "down" in part else
                    torch.ones(128, 4) for part in DOWN_UP}  # fmt: skip
    save_file(tensors, comfyui.base / "models" / "loras" / "inp.safetensors")
    predicted, report = velocity(comfyui, to_model("inp.safetensors"))
    assert "3 for image input left out" in report
    torch.testing.assert_close(predicted - base, change, rtol=0, atol=1e-3)


def test_nothing_matched_is_an_error(comfyui, native):
    save_file({f"lora_unet__transformer_blocks_0_attn1_to_q.{part}": torch.ones(4, 4) for part in DOWN_UP},
              comfyui.base / "models" / "loras" / "cog.safetensors")  # fmt: skip
    outcome = comfyui.run(sampled(to_model("cog.safetensors")))
    assert outcome.status == "error"
    assert "was made for another model" in outcome.message
    assert "CogVideoX" in outcome.message


def test_strength_zero_and_the_opposite(comfyui, native, base):
    save_file(spelled(native, *FORMATS["bare"]), comfyui.base / "models" / "loras" / "bare.safetensors")
    assert torch.equal(velocity(comfyui, to_model("bare.safetensors", 0.0))[0], base)
    opposite = velocity(comfyui, to_model("bare.safetensors", -0.01))[0] - base
    little = velocity(comfyui, to_model("bare.safetensors", 0.01))[0] - base
    cosine = torch.nn.functional.cosine_similarity(opposite.flatten(), little.flatten(), dim=0)
    assert float(cosine) < -0.95
    again = velocity(comfyui)[0]
    assert torch.equal(again, base)


def test_our_own_nodes_take_a_window_and_an_expert(comfyui):
    graph = graphs.apply("builtin: colour fix", 1.0, steps=4)
    graph["2"]["inputs"] |= {"expert": "auto", "start": 0.5, "end": 1.0}
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    assert "steps from 50% to 100%" in outcome.outputs["2"]["text"][0]
    graph["2"]["inputs"]["expert"] = "low_noise"
    assert "expert must be one of auto, transformer" in comfyui.run(graph).message
    graph["2"]["inputs"] |= {"expert": "auto", "start": 1.0}
    assert "0 <= start < end <= 1" in comfyui.run(graph).message


def test_the_catalogue_needs_no_network_to_say_what_to_do(comfyui):
    info = comfyui.ask("/object_info/RewardLoraFetchPublishedLora")[1]["RewardLoraFetchPublishedLora"]
    assert len(info["input"]["required"]["name"][1]["options"]) == 14
    target = comfyui.base / "models" / "loras" / "Wan2.1-Fun-1.3B-InP-MPS.safetensors"
    target.write_bytes((graphs.WORKFLOWS.parent / "assets" / "tiny_reward_lora.safetensors").read_bytes())
    graph = {"1": graphs.node("FetchPublishedLora", name="Wan2.1-Fun-1.3B-InP-MPS")}
    outcome = comfyui.run(graph)
    assert outcome.status == "success", outcome.message
    assert "shown at strength 0.7" in outcome.outputs["1"]["text"][0]


def merged(rank: int = 0, **slots) -> dict:
    """Merge LoRAs as node 7, every place that is not given empty."""
    empty = {f"lora_file_{n}": "the connected LoRA" for n in range(1, 5)} | {f"weight_{n}": 1.0 for n in range(1, 5)}
    return {"7": graphs.node("MergeLoras", rank=rank, **empty | slots)}


def test_a_merged_lora_is_its_parts_together_in_every_node(comfyui, native, base):
    """One part in VideoX-Fun's spelling, one of diffusers' that comes over a wire; exact, at a lower rank nearly so."""
    loras, parts = comfyui.base / "models" / "loras", (0.5, -0.25)
    other = {name: LoraModule(m.down.flip(0).roll(1, 1), m.up.roll(2, 0), 1.0) for name, m in native.lora.items()}
    save_file(spelled(native, *FORMATS["VideoX-Fun"]), loras / "part_one.safetensors")
    write_lora(loras / "part_two.safetensors", other, native.names, {"base_model": "tiny"}, layout="diffusers")
    both = {
        name: LoraModule(torch.cat([native.lora[name].down * native.lora[name].scale * parts[0],
                                    other[name].down * other[name].scale * parts[1]]),
                         torch.cat([native.lora[name].up, other[name].up], dim=1), 2.0 * RANK)
        for name in native.lora
    }  # fmt: skip
    expected = ours(native, MatchedLora(both, (), "both")) - ours(native)
    graph = merged(lora_file_1="part_one.safetensors", weight_1=parts[0], lora_2=["8", 0], weight_2=parts[1])
    graph |= {"8": merged(lora_file_3="part_two.safetensors")["7"]}  # a chain of two
    graph |= sampled(graphs.node("ApplyRewardLoraToModel", model=["1", 0], strength=STRENGTH, lora=["7", 0],
                                 lora_file="the connected LoRA"))  # fmt: skip
    graph["9"] = graphs.node("SaveRewardLora", lora=["7", 0], prefix="loras/merged", copy_to_models_loras=False)
    for rank in (0, 2 * RANK - 1):
        graph["7"]["inputs"]["rank"] = rank
        outcome = comfyui.run(graph)
        assert outcome.status == "success", outcome.message
        report = outcome.outputs["7"]["text"][0]
        assert report.startswith("part_one.safetensors at 0.5, (part_two.safetensors at 1) at -0.25: ")
        assert ("of the energy" in report) == bool(rank)
        saved, latent = sorted(comfyui.files(outcome), key=lambda file: file.suffix, reverse=True)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (MEAN, STD))
        change = noise() - (load_file(latent)["latent_tensor"] - mean) / std - base
        assert float(expected.abs().max()) > 0.1
        off = float((change - expected).abs().max() / expected.abs().max())
        assert off < 1e-3 if not rank else 1e-3 < off < 0.5
        matrices = load_file(saved)
        ranks = {matrix.shape[0] for name, matrix in matrices.items() if "lora_A" in name}
        assert ranks == {rank or 2 * RANK}
        delta = matrices["diffusion_model.blocks.0.ffn.0.lora_B.weight"] @ matrices[
            "diffusion_model.blocks.0.ffn.0.lora_A.weight"]  # fmt: skip
        whole = both["blocks.0.ffn.net.0.proj"].delta()
        lost = float((delta - whole).square().sum() / whole.square().sum())
        assert lost < 1e-10 if not rank else 1e-10 < lost < 0.2


def test_our_own_model_and_the_sweep_take_a_merged_lora(comfyui):
    """The built-in one at two halves is the built-in one; merging says its rank and its base model."""
    whole = graphs.apply(BUILTIN, 1.0, steps=2)
    halves = graphs.apply("the connected LoRA", 1.0, steps=2)
    halves["2"]["inputs"]["lora"] = ["7", 0]
    halves |= merged(lora_file_1=BUILTIN, weight_1=0.5, lora_file_4=BUILTIN, weight_4=0.5)
    painted = []
    for graph in (whole, halves):
        outcome = comfyui.run(graph)
        assert outcome.status == "success", outcome.message
        painted.append(np.stack([np.asarray(Image.open(file)).astype(int) for file in comfyui.files(outcome)]))
    assert "rank 16" in outcome.outputs["7"]["text"][0]
    assert np.abs(painted[0] - painted[1]).max() <= 1
    graph = sweep_graph(strengths="1", lora_file="the connected LoRA", lora=["71", 0])
    outcome = comfyui.run(graph | {"71": halves["7"]})
    assert outcome.status == "success", outcome.message


def test_what_cannot_be_merged_is_answered_in_a_sentence(comfyui, native):
    loras = comfyui.base / "models" / "loras"
    query = "blocks.0.attn1.to_q"
    for name, size in (("of_high_noise", 128), ("of_low_noise", 128), ("of_64", 64)):
        half = LoraModule(torch.ones(1, size), torch.ones(size, 1), 1.0)
        write_lora(loras / f"{name}.safetensors", {query: half}, native.names, {})
    write_lora(loras / "cog.safetensors", {"x": half}, {"x": "transformer_blocks.0.attn1.to_q"}, {})
    for slots, message in (
        ({}, "nothing is left to merge"),
        ({"lora_file_1": "of_64.safetensors", "weight_1": 0.0}, "nothing is left to merge"),
        ({"lora_file_1": "of_high_noise.safetensors", "lora_file_2": "of_low_noise.safetensors"}, "the expert high"),
        ({"lora_file_2": "of_high_noise.safetensors", "lora_file_4": "of_64.safetensors"}, "for different models"),
        ({"lora_file_1": "of_64.safetensors", "lora_file_2": "cog.safetensors"}, "is for Wan and cog.safetensors for"),
    ):
        graph = merged(**slots) | {"9": graphs.node("SaveRewardLora", lora=["7", 0], prefix="loras/none",
                                                    copy_to_models_loras=False)}  # fmt: skip
        outcome = comfyui.run(graph)
        assert (outcome.status, message in outcome.message) == ("error", True), outcome.message
        assert "Traceback" not in outcome.message


def sweep_graph(**changes) -> dict:
    graph = graphs.workflow("sweep_lora_strength")
    graph["4"]["inputs"] |= changes
    graph["8"]["inputs"] |= {"steps": 2}
    return graph


def test_the_sweep_recommends_and_its_strength_is_used(comfyui):
    outcome = comfyui.run(sweep_graph())
    assert outcome.status == "success", outcome.message
    files = comfyui.files(outcome)
    (table,) = (file for file in files if file.suffix == ".csv")
    rows = [line.split(",") for line in table.read_text().splitlines()]
    assert [row[0] for row in rows] == ["strength", "0", "0.5", "1"]
    (best,) = (row[0] for row in rows if row[-1] == "recommended")
    assert {file.name for file in files} >= {f"{table.stem}{end}" for end in (".csv", "plot.png", "videos.png")}
    text = outcome.outputs["4"]["text"][0]
    assert text.startswith("Use no LoRA" if best == "0" else f"Use strength {best}")
    assert f"strength {best}" in outcome.outputs.get("7", {"text": [f"strength {best}"]})["text"][0]
    assert "Use strength" in str(outcome.outputs["6"]) or "Use no LoRA" in str(outcome.outputs["6"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strengths": "0.5, strong"}, "strengths must be numbers"),
        ({"strengths": "0.5, 7"}, "strength must lie in -2..2"),
        ({"prompt_file": "", "prompts": ""}, "at least two videos"),
        ({"prefix": "../x"}, "leads out of the output folder"),
    ],
)
def test_a_sweep_that_cannot_be_is_answered_in_a_sentence(comfyui, change, message):
    outcome = comfyui.run(sweep_graph(**change))
    if outcome.status == "success":  # the other outputs of the graph ran
        assert message in comfyui.log.read_text()
    else:
        assert message in outcome.message
