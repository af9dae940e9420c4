"""LoRAs inside a model: against the publisher's numbers, at any strength, in a part of the walk, without a trace."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch
from reward_lora.files import WeightFileError
from reward_lora.lora.adapter import LoraUse, applied, at_step, inject_weights, linear_shapes
from reward_lora.lora.files import LoraModule, MatchedLora, Offset, match, read_lora, write_lora
from reward_lora.lora.match import fit
from reward_lora.selfcheck.exactness import LATENT_SHAPE
from reward_lora.selfcheck.wan import build
from reward_lora.training.gradient import Walk, rollout
from reward_lora.training.schedule import Plan
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from .conftest import FIXTURES


@pytest.fixture
def path(wan, filled, tmp_path):
    """The filled LoRA in a file, taken out of the model."""
    written = write_lora(tmp_path / "a.safetensors", filled.weights(), wan.lora_names("transformer"), {})
    filled.remove()
    return written


@pytest.mark.parametrize("layout", ["as published", "dotted", "diffusers", "videox-fun"])
def test_outputs_equal_the_publishers_through_every_layout(tmp_path, layout):
    folder = FIXTURES / "wan_t2v"
    meta, io = json.loads((folder / "meta.json").read_text()), load_file(folder / "io.safetensors")
    model = build(load_file(folder / "transformer.safetensors"), meta["transformer_config"], {}, {})
    file = folder / "lora_videox_fun.safetensors"
    if layout != "as published":
        file = write_lora(tmp_path / "a.safetensors", fit(read_lora(file), model, "transformer").modules,
                          model.lora_names("transformer"), {}, layout=layout)  # fmt: skip

    @torch.no_grad()
    def predict():
        contexts = [model.conditioning([c], None, io["x"].shape[1:]).positive for c in io["context"]]
        steps = zip(io["x"].split(1), io["t"].double() / 1000, contexts, strict=True)
        return torch.cat([model.predict(*step) for step in steps])

    base = predict()
    for strength in (0.5, 0.7, 1.0):
        with applied(model, [LoraUse(read_lora(file), strength)]) as reports:
            assert f"{len(linear_shapes(model.transformer))} modules matched" in reports[0]
            torch.testing.assert_close(predict(), io[f"out_lora_{strength}"], rtol=0, atol=1e-4)
    assert torch.equal(predict(), base)


def test_a_hundred_random_strengths_and_removals_leave_the_base_to_the_bit(wan, predict, path):
    base, lora = predict(), fit(read_lora(path), wan, "transformer")
    layers = {"condition_embedder.time_proj": Offset(bias=torch.ones(144)), "blocks.0.norm2": Offset(torch.ones(24))}
    lora = MatchedLora(lora.modules, (), "a", layers)
    state = {key: value.clone() for key, value in wan.transformer.state_dict().items()}
    rng, adapters = random.Random(0), []
    for turn in range(100):
        if len(adapters) < 3 and rng.random() < 0.3:
            adapters.append(inject_weights(wan.transformer, lora, rng.uniform(-2, 2), f"lora_{turn}"))
        elif adapters and rng.random() < 0.2:
            adapters.pop(rng.randrange(len(adapters))).remove()
        elif adapters:
            rng.choice(adapters).strength = rng.choice([0.0, rng.uniform(-2, 2)])
        if turn % 10 == 0:
            strengths = [adapter.strength for adapter in adapters]
            for adapter in adapters:
                adapter.strength = 0
            assert torch.equal(predict(), base)
            for adapter, strength in zip(adapters, strengths, strict=True):
                adapter.strength = strength
    assert adapters
    assert not torch.equal(predict(), base)
    for adapter in adapters:
        adapter.remove()
    assert torch.equal(predict(), base)
    after = wan.transformer.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)
    assert not any(module._forward_hooks for module in wan.transformer.modules())


# Plain additions to weights and biases


def test_plain_additions_equal_changed_weights(wan, predict):
    g = torch.Generator().manual_seed(0)
    layers = ["blocks.1.attn1.to_q", "blocks.0.attn1.norm_q", "blocks.0.norm2", "patch_embedding", "proj_out"]
    parameters, offsets = dict(wan.transformer.named_parameters()), {}
    for name in layers:
        weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
        offsets[name] = Offset(*(v if v is None else torch.randn(v.shape, generator=g) for v in (weight, bias)))
    offsets["proj_out"] = Offset(bias=offsets["proj_out"].bias)
    adapter = inject_weights(wan.transformer, MatchedLora({}, (), "a", offsets), 0.5)
    added = predict()
    adapter.remove()
    base = predict()
    with torch.no_grad():
        for name, offset in offsets.items():
            for part, value in (("weight", offset.weight), ("bias", offset.bias)):
                if value is not None:
                    parameters[f"{name}.{part}"] += 0.5 * value
    assert float((added - base).abs().max()) > 0.1
    torch.testing.assert_close(added, predict(), rtol=1e-4, atol=1e-5)


def test_a_convolutions_lora_is_added_as_its_product(wan, predict, tmp_path):
    weight = wan.transformer.patch_embedding.weight
    down, up = torch.randn(2, weight[0].numel()), torch.randn(24, 2)
    name = "diffusion_model.patch_embedding"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    tensors |= {f"{name}.diff_b": torch.ones(24), "diffusion_model.blocks.1.self_attn.norm_k.diff": torch.ones(24)}
    save_file(tensors, tmp_path / "core.safetensors")
    with applied(wan, [LoraUse(read_lora(tmp_path / "core.safetensors"), 1.0)]) as reports:
        assert "2 modules matched" in reports[0]
        assert "left out" not in reports[0]
        added = predict()
    with torch.no_grad():
        weight += 0.5 * (up @ down).view(weight.shape)
        wan.transformer.patch_embedding.bias += 1
        wan.transformer.blocks[1].attn1.norm_k.weight += 1
    torch.testing.assert_close(predict(), added, rtol=1e-4, atol=1e-5)


# Another program


@pytest.mark.parametrize("layout", ["dotted", "diffusers"])
def test_diffusers_reads_what_we_write(wan, predict, path, tmp_path, layout):
    from diffusers.loaders import WanLoraLoaderMixin

    lora = fit(read_lora(path), wan, "transformer")
    adapter = inject_weights(wan.transformer, lora, 1.0)
    expected = predict()
    adapter.remove()
    file = write_lora(tmp_path / "x.safetensors", lora.modules, wan.lora_names("transformer"), {}, layout=layout)
    tensors = WanLoraLoaderMixin.lora_state_dict(load_file(file))
    wan.transformer.load_lora_adapter(tensors, prefix="transformer", adapter_name="theirs")
    torch.testing.assert_close(predict(), expected, rtol=1e-4, atol=1e-5)


# A part of the walk


def walked(wan, count=4):
    text = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    walk = Walk(wan, wan.conditioning([text], None, LATENT_SHAPE), 1.0)
    return rollout(walk, wan.initial_latents(LATENT_SHAPE, [3]), Plan(wan.sigmas(count), tuple(range(count))))


def test_a_window_acts_in_its_steps_alone(wan, path):
    lora, base, full = read_lora(path), walked(wan), None
    with applied(wan, [LoraUse(lora, 1.0)]):
        full = walked(wan)
    with applied(wan, [LoraUse(lora, 1.0, start=0.5)]) as reports:
        late = walked(wan)
        again = walked(wan)  # a second walk begins without it again
    assert "steps from 50% to 100%" in reports[0]
    with applied(wan, [LoraUse(lora, 1.0, end=0.5)]):
        early = walked(wan)
    for step in (0, 1, 2):
        assert torch.equal(late[1][step], base[1][step])
        assert torch.equal(early[1][step], full[1][step])
    assert not torch.equal(late[0], base[0])
    assert not torch.equal(early[0], full[0])
    assert torch.equal(late[0], again[0])
    assert not torch.equal(late[0], full[0])
    assert torch.equal(walked(wan)[0], base[0])
    assert "_reward_lora_windows" not in vars(wan.transformer)


def test_two_windows_do_not_disturb_each_other(wan, path):
    lora = read_lora(path)
    with applied(wan, [LoraUse(lora, 1.0, end=0.5), LoraUse(lora, 1.0, start=0.5)]):
        halves = walked(wan)[0]
    with applied(wan, [LoraUse(lora, 1.0)]):
        torch.testing.assert_close(halves, walked(wan)[0], rtol=1e-5, atol=1e-6)


@pytest.fixture
def pair(wan):
    """A Wan of two experts, as Wan2.2 has them."""
    from reward_lora.selfcheck.exactness import tiny_wan
    from reward_lora.video_models.wan import WanModel

    spec = dataclasses.replace(wan.spec, experts=("high", "low"), boundary=0.9)
    return WanModel(spec, {"high": wan.transformer, "low": tiny_wan(1, torch.float32).transformer}, wan.vae)


def test_a_lora_goes_to_the_expert_it_is_for(pair, path, tmp_path):
    def holders(use):
        with applied(pair, [use]) as reports:
            assert all(f" in {name}," in line for name, line in zip(use.experts(pair), reports, strict=True))
            return [name for name, network in pair.denoisers.items() if hasattr(network, "peft_config")]

    def copied(name, **metadata):
        save_file(load_file(path), tmp_path / name, metadata)
        return read_lora(tmp_path / name)

    assert holders(LoraUse(read_lora(path), 1.0)) == ["high", "low"]
    assert holders(LoraUse(read_lora(path), 1.0, "low_noise")) == ["low"]
    assert holders(LoraUse(read_lora(path), 1.0, "low")) == ["low"]
    assert holders(LoraUse(copied("b.safetensors", expert="low"), 1.0)) == ["low"]
    assert holders(LoraUse(copied("b.safetensors", expert="low"), 1.0, "high_noise")) == ["high"]
    assert holders(LoraUse(copied("Wan2.2-low-noise-HPS2.1.safetensors"), 1.0)) == ["low"]
    assert holders(LoraUse(copied("wan_HighNoise.safetensors"), 1.0)) == ["high"]
    assert holders(LoraUse(copied("run_1_low.safetensors"), 1.0)) == ["low"]
    assert holders(LoraUse(copied("slow_highway.safetensors"), 1.0)) == ["high", "low"]
    with pytest.raises(ValueError, match="one of auto, high_noise, low_noise, high, low, got 'loud'"):
        holders(LoraUse(read_lora(path), 1.0, "loud"))


def test_a_lora_for_the_low_noise_expert_leaves_the_first_steps(pair, path):
    base = walked(pair)
    works = [pair.spec.expert_at(sigma) for sigma in pair.sigmas(4)[:-1]]
    first = works.index("low")
    assert 0 < first < 3
    with applied(pair, [LoraUse(read_lora(path), 1.0, "low_noise")]):
        low = walked(pair)
    for step in range(first + 1):
        assert torch.equal(low[1][step], base[1][step])
    assert not torch.equal(low[0], base[0])
    assert torch.equal(walked(pair)[0], base[0])


# Bases in eight bits


class Float8Linear(nn.Linear):
    """Weights at rest in eight bits, cast when used."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def in_float8(network, how):
    if how == "hooks":
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        return
    for block in network.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = Float8Linear
                module.weight.data = module.weight.data.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("how", ["hooks", "subclass"])
def test_a_base_in_eight_bits_takes_a_lora_and_keeps_its_bits(wan, predict, path, how):
    in_float8(wan.transformer, how)
    assert wan.transformer.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    lora, base = fit(read_lora(path), wan, "transformer"), predict()
    bits = {k: v.float().clone() for k, v in wan.transformer.state_dict().items()}
    adapter = inject_weights(wan.transformer, lora, 1.0)
    assert {parameter.dtype for parameter in adapter.parameters().values()} == {torch.float32}
    with_lora = predict()
    adapter.strength = 0
    assert torch.equal(predict(), base)
    adapter.remove()
    assert torch.equal(predict(), base)
    assert all(torch.equal(bits[k], v.float()) for k, v in wan.transformer.state_dict().items())
    merged = {k: v.clone() for k, v in bits.items()}
    from reward_lora.selfcheck.exactness import tiny_wan

    for name, module in lora.modules.items():
        merged[f"{name}.weight"] += module.delta()
    wan.denoisers["transformer"] = tiny_wan(dtype=torch.float32).transformer
    wan.transformer.load_state_dict(merged)
    torch.testing.assert_close(predict(), with_lora, rtol=1e-3, atol=1e-4)


def test_a_base_stored_in_eight_bits_block_by_block_leaves_the_lora_exact(wan, predict, path):
    from reward_lora.block_weights import in_float8

    base = predict()
    with applied(wan, [LoraUse(read_lora(path), 1.0)]):
        exact = predict()
        with in_float8(wan.transformer):
            linear = wan.transformer.blocks[0].attn1.to_q
            assert linear.base_layer.weight.dtype == torch.float8_e4m3fn
            assert {linear.lora_A["lora_0"].weight.dtype, linear.lora_B["lora_0"].weight.dtype} == {torch.float32}
            stored = predict()
    with in_float8(wan.transformer):
        rounded = predict()
        with applied(wan, [LoraUse(read_lora(path), 1.0)]):  # put in after as well as before
            torch.testing.assert_close(predict(), stored, rtol=1e-4, atol=1e-5)
        assert torch.equal(predict(), rounded)
    assert float((stored - exact).norm()) < 0.3 * float((exact - base).norm())
    assert torch.equal(predict(), base)


# CogVideoX's two generations share their names


class Named:
    """A model whose network is a plain stack of linear layers with given names."""

    def __init__(self, *names):
        network = nn.Module()
        for name in names:
            place = network
            *parents, last = name.split(".")
            for parent in parents:
                if parent not in dict(place.named_children()):
                    place.add_module(parent, nn.Module())
                place = getattr(place, parent)
            place.add_module(last, nn.Linear(4, 4))
        self.denoisers, self._names = {"transformer": network}, {name: name for name in names}
        self.spec = type("Spec", (), {"name": "CogVideoX-Fun-V1.5-5b-InP"})

    def lora_names(self, expert):
        return self._names


def test_a_lora_of_another_cogvideox_generation_is_refused(tmp_path):
    old, new = ("patch_embed.text_proj", "proj_out"), ("patch_embed.text_proj", "patch_embed.proj", "proj_out")

    def lora(names):
        modules = {name: LoraModule(torch.ones(2, 4), torch.ones(4, 2), 2.0) for name in names}
        path = write_lora(tmp_path / f"{len(names)}.safetensors", modules, {n: n for n in names}, {},
                          layout="videox-fun")  # fmt: skip
        return read_lora(path)

    assert fit(lora(new), Named(*new), "transformer").count == 3
    with pytest.raises(WeightFileError, match="for CogVideoX V1.1 or older, and CogVideoX-Fun-V1.5-5b-InP is V1.5"):
        fit(lora(old), Named(*new), "transformer")
    with pytest.raises(WeightFileError, match="for CogVideoX V1.5, and"):
        fit(lora(new), Named(*old), "transformer")


def test_at_step_without_a_window_is_nothing(wan, predict, path):
    with applied(wan, [LoraUse(read_lora(path), 0.7)]):
        before = predict()
        at_step(wan, 0, 4)
        assert torch.equal(predict(), before)


def test_applied_blocks_may_be_nested(wan, predict, path):
    lora, base = read_lora(path), predict()
    with applied(wan, [LoraUse(lora, 0.5)]):
        half = predict()
        with applied(wan, [LoraUse(lora, -0.5)]):
            torch.testing.assert_close(predict(), base, rtol=1e-4, atol=1e-5)
        assert torch.equal(predict(), half)
    assert torch.equal(predict(), base)


def test_names_are_the_models_own(wan, path):
    lora = read_lora(path)
    with pytest.raises(WeightFileError, match="none of its"):
        match(lora, {}, {})
