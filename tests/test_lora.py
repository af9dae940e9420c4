"""LoRA files in every spelling; adapters that change nothing at strength 0 and leave no trace."""

from __future__ import annotations

import pickle

import pytest
import torch
from reward_lora.files import WeightFileError, read_safetensors, write_safetensors
from reward_lora.lora.adapter import LoraUse, applied, inject_weights, linear_shapes, select_modules
from reward_lora.lora.files import match, read_lora, write_lora
from safetensors.torch import load_file, save_file


@pytest.fixture
def saved(wan, filled, predict, tmp_path):
    """The filled LoRA in a file, taken out of the model, with the outputs it gave and the base's."""
    path = write_lora(tmp_path / "a.safetensors", filled.weights(), wan.lora_names("transformer"), {"step": "3"})
    with_lora = predict()
    filled.remove()
    return path, with_lora, predict()


def matched(wan, path):
    return match(read_lora(path), wan.lora_names("transformer"), linear_shapes(wan.transformer))


def test_saved_lora_gives_the_trained_outputs(wan, predict, saved):
    path, with_lora, base = saved
    lora = matched(wan, path)
    assert len(lora.modules) == len(linear_shapes(wan.transformer))
    assert lora.unmatched == ()
    inject_weights(wan.transformer, lora)
    torch.testing.assert_close(predict(), with_lora, rtol=1e-5, atol=1e-6)
    assert float((with_lora - base).abs().max()) > 0.05


def test_strength_scales_and_zero_is_the_base_to_the_bit(wan, predict, saved):
    path, with_lora, base = saved
    adapter = inject_weights(wan.transformer, matched(wan, path), 0.0)
    assert torch.equal(predict(), base)
    outputs = {}
    for strength in (-1.0, 0.5, 1.0):
        adapter.strength = strength
        outputs[strength] = predict()
    distance = {s: float((o - base).norm()) for s, o in outputs.items()}
    assert 0 < distance[0.5] < distance[1.0]
    torch.testing.assert_close(outputs[1.0], with_lora, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs[-1.0], outputs[1.0], atol=1e-3)
    with adapter.at_strength(0.0):
        assert torch.equal(predict(), base)
    assert torch.equal(predict(), outputs[1.0])


def test_removing_restores_the_very_modules(wan, predict, saved):
    path, _, base = saved
    before = dict(wan.transformer.named_modules())
    state = {k: v.clone() for k, v in wan.transformer.state_dict().items()}
    uses = [LoraUse(read_lora(path), 0.7), LoraUse(read_lora(path), -0.2)]
    with applied(wan, uses) as reports:
        assert len(reports) == 2
        both = predict()
    after = dict(wan.transformer.named_modules())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert all(torch.equal(state[k], v) for k, v in wan.transformer.state_dict().items())
    assert not hasattr(wan.transformer, "peft_config")
    assert torch.equal(predict(), base)
    with applied(wan, [LoraUse(read_lora(path), 0.5)]):
        torch.testing.assert_close(predict(), both, rtol=1e-4, atol=1e-5)  # 0.7 - 0.2


def test_removing_one_of_two_keeps_the_other(wan, predict, saved):
    path, with_lora, base = saved
    first = inject_weights(wan.transformer, matched(wan, path), 1.0, "first")
    second = inject_weights(wan.transformer, matched(wan, path), 0.5, "second")
    first.remove()
    halved = predict()
    second.strength = 1.0
    torch.testing.assert_close(predict(), with_lora, rtol=1e-5, atol=1e-6)
    assert float((halved - base).norm()) < float((with_lora - base).norm())
    second.remove()
    assert torch.equal(predict(), base)


def test_a_low_precision_base_keeps_its_bits(wan, saved):
    path, _, _ = saved
    transformer = wan.transformer.to(torch.bfloat16)
    state = {k: v.clone() for k, v in transformer.state_dict().items()}
    adapter = inject_weights(transformer, matched(wan, path), 1.0)
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}
    adapter.remove()
    assert all(torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in transformer.state_dict().items())


SPELLINGS = {
    "VideoX-Fun": lambda ours, original: (f"lora_unet__{original.replace('.', '_')}", "lora_down", "lora_up"),
    "kohya": lambda ours, original: (f"lora_unet_{original.replace('.', '_')}", "lora_down", "lora_up"),
    "core": lambda ours, original: (f"diffusion_model.{original}", "lora_down", "lora_up"),
    "diffusers": lambda ours, original: (f"transformer.{ours}", "lora_A", "lora_B"),
    "peft": lambda ours, original: (f"base_model.model.{original}", "lora_A.default", "lora_B.default"),
    "DiffSynth": lambda ours, original: (f"pipe.dit.{original}", "lora_A.default", "lora_B.default"),
    "bare": lambda ours, original: (original, "lora_A", "lora_B"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(wan, predict, saved, tmp_path, spelling):
    path, with_lora, _ = saved
    originals, tensors = wan.lora_names("transformer"), {}
    for ours, module in matched(wan, path).modules.items():
        name, down, up = SPELLINGS[spelling](ours, originals[ours])
        # Alpha 1 at rank 2: halve, and put the other half into the matrices.
        tensors[f"{name}.{down}.weight"] = module.down * 2
        tensors[f"{name}.{up}.weight"] = module.up.clone()
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "other.safetensors")
    lora = matched(wan, tmp_path / "other.safetensors")
    assert lora.unmatched == ()
    inject_weights(wan.transformer, lora)
    torch.testing.assert_close(predict(), with_lora, rtol=1e-4, atol=1e-5)


def test_modules_of_another_variant_are_reported_and_left_out(wan, saved, tmp_path):
    path, _, _ = saved
    lora = read_lora(path)
    tensors = {}
    for name, module in lora.modules.items():
        tensors |= {f"{name}.lora_A.weight": module.down.clone(), f"{name}.lora_B.weight": module.up.clone()}
    extra = "diffusion_model.blocks.0.cross_attn.k_img"
    tensors |= {f"{extra}.lora_A.weight": torch.zeros(2, 24), f"{extra}.lora_B.weight": torch.zeros(24, 2)}
    save_file(tensors, tmp_path / "i2v.safetensors")
    lora = matched(wan, tmp_path / "i2v.safetensors")
    assert lora.unmatched == (extra,)
    assert "1 for image input left out" in lora.report()


def test_a_lora_for_another_model_is_an_error(wan, tmp_path):
    def lora(name, size):
        tensors = {f"{name}.lora_A.weight": torch.zeros(2, size), f"{name}.lora_B.weight": torch.zeros(size, 2)}
        return write_safetensors(tmp_path / f"{size}.safetensors", tensors, {"base_model": "Big One"})

    with pytest.raises(WeightFileError, match="made for another model.*1536x1536 in it and 24x24 here.*Big One"):
        matched(wan, lora("diffusion_model.blocks.0.self_attn.q", 1536))
    with pytest.raises(WeightFileError, match="made for another model: none of its 1 modules.*Big One"):
        matched(wan, lora("diffusion_model.double_blocks.0.q", 24))


def test_bad_files_each_give_a_sentence_and_run_nothing(saved, tmp_path):
    path, _, _ = saved
    truncated = tmp_path / "short.safetensors"
    truncated.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightFileError, match="short.safetensors is truncated .*; download it again"):
        read_lora(truncated)

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    for data in (pickle.dumps(Bomb()), b""):
        (tmp_path / "bomb.safetensors").write_bytes(data)
        with pytest.raises(WeightFileError):
            read_lora(tmp_path / "bomb.safetensors")
    torch.save({"a": Bomb()}, tmp_path / "zip.safetensors")
    with pytest.raises(WeightFileError, match="pickle"):
        read_lora(tmp_path / "zip.safetensors")
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(WeightFileError, match="absent.safetensors is missing"):
        read_lora(tmp_path / "absent.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightFileError, match="no LoRA matrices"):
        read_lora(tmp_path / "model.safetensors")


def test_equal_content_gives_equal_bytes(tmp_path):
    metadata = {f"key{i}": "ü" * i for i in range(8)}
    tensors = {f"t{i}": torch.arange(float(i + 1)) for i in range(5)}
    written = {write_safetensors(tmp_path / str(i), tensors, metadata).read_bytes() for i in range(4)}
    assert len(written) == 1
    (tmp_path / "plain").touch()
    assert (tmp_path / "0").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("tensors", "metadata"), [({}, {}), ({}, {"a": "b"}), ({"a": torch.ones(2)}, {})])
def test_little_or_nothing_is_written_and_read(tmp_path, tensors, metadata):
    path = write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    found, told = read_safetensors(path)
    assert found.keys() == tensors.keys() == load_file(path).keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert told == metadata


def test_select_modules(wan):
    assert len(select_modules(wan.transformer, ("to_q", "to_out.0"))) == 8
    assert len(select_modules(wan.transformer, ("all-linear",))) == len(linear_shapes(wan.transformer))
    with pytest.raises(ValueError, match="no linear layer of this model is called 'qkv'"):
        select_modules(wan.transformer, ("to_q", "qkv"))


@pytest.mark.parametrize("strength", [7.0, -2.1, float("nan")])
def test_a_strength_out_of_range(saved, strength):
    with pytest.raises(ValueError, match=r"strength must lie in -2..2, got"):
        LoraUse(read_lora(saved[0]), strength)
