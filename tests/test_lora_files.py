"""LoRA files: every published spelling, lossless ways back, and a sentence for whatever cannot be meant."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reward_lora.files import WeightFileError, write_safetensors
from reward_lora.lora.adapter import LoraUse, applied
from reward_lora.lora.files import LoraModule, match, read_lora, write_lora
from reward_lora.lora.guess import guess_base
from reward_lora.lora.write import rounding
from safetensors.torch import load_file, save, save_file

NAMES = {"blocks.0.attn1.to_q": "blocks.0.self_attn.q", "ffn.net.0.proj": "ffn.0"}
SHAPES = {"blocks.0.attn1.to_q": (6, 4), "ffn.net.0.proj": (8, 6)}
Q = "diffusion_model.blocks.0.self_attn.q"


def modules(alpha=2.0, rank=4, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        name: LoraModule(
            torch.randn(rank, size[1], generator=g).to(dtype), torch.randn(size[0], rank, generator=g).to(dtype), alpha
        )
        for name, size in SHAPES.items()
    }


def read(path):
    return match(read_lora(path), NAMES, SHAPES)


def pair(name=Q, out=6, inside=4, rank=2, down="lora_A.weight", up="lora_B.weight"):
    return {f"{name}.{down}": torch.ones(rank, inside), f"{name}.{up}": torch.ones(out, rank)}


# Round trips


@pytest.mark.parametrize("layout", ["dotted", "diffusers", "videox-fun"])
@pytest.mark.parametrize(("alpha", "exact"), [(4.0, True), (2.0, True), (3.0, False)])
def test_every_layout_and_back_keeps_the_change_of_the_weights(tmp_path, layout, alpha, exact):
    before = modules(alpha)
    matched = read(write_lora(tmp_path / "a.safetensors", before, NAMES, {}, layout=layout))
    assert matched.unmatched == ()
    again = read(write_lora(tmp_path / "b.safetensors", matched.modules, NAMES, {}, layout="dotted"))
    for name, module in before.items():
        if exact:
            assert torch.equal(again.modules[name].delta(), module.delta())
        else:  # one rounding of float32
            torch.testing.assert_close(again.modules[name].delta(), module.delta(), rtol=1e-6, atol=1e-6)
    assert (rounding(before, "dotted", torch.float32) == 0) is exact
    assert rounding(before, "videox-fun", torch.float32) == 0


def test_bfloat16_is_kept_and_its_rounding_told(tmp_path):
    before = modules(2.0, dtype=torch.bfloat16)
    path = write_lora(tmp_path / "a.safetensors", before, NAMES, {}, None)
    assert {t.dtype for t in load_file(path).values()} == {torch.bfloat16}
    assert rounding(before, "dotted", None) == 0
    assert 1e-4 < rounding(modules(3.0, dtype=torch.bfloat16), "dotted", None) < 1e-2


def test_the_layouts_are_spelled_as_their_readers_expect(tmp_path):
    def keys(layout):
        return sorted(load_file(write_lora(tmp_path / "a.safetensors", modules(), NAMES, {}, layout=layout)))

    assert f"{Q}.lora_A.weight" in keys("dotted")
    assert "transformer.blocks.0.attn1.to_q.lora_B.weight" in keys("diffusers")
    assert {"lora_unet__blocks_0_self_attn_q.alpha", "lora_unet__ffn_0.lora_down.weight"} < set(keys("videox-fun"))


# Alpha


def test_vader_pickles_have_alpha_8_and_run_nothing(tmp_path):
    spelled = "base_model.model.model.diffusion_model.blocks.0.attn1.to_q"
    torch.save(pair(spelled, rank=4), tmp_path / "vader.pt")
    lora = read_lora(tmp_path / "vader.pt")
    assert lora.format == "VADER (peft)"
    assert lora.modules[spelled].scale == 2.0
    assert any("VADER" in note for note in lora.notes)
    assert set(match(lora, NAMES, SHAPES).modules) == {"blocks.0.attn1.to_q"}
    assert read_lora(tmp_path / "vader.pt", alpha=4.0).modules[spelled].scale == 1.0
    torch.save(pair("base_model.model.spatial_blocks.0.attn.qkv", rank=16), tmp_path / "open_sora.pt")
    assert next(iter(read_lora(tmp_path / "open_sora.pt").modules.values())).scale == 0.5


def test_alpha_comes_from_peft_beside_and_from_diffusers_metadata(tmp_path):
    spelled = "base_model.model.blocks.0.attn1.to_q"
    save_file(pair(spelled, rank=4), tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 2, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert read_lora(tmp_path / "adapter_model.safetensors").modules[spelled].scale == 0.5
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    assert read_lora(tmp_path / "adapter_model.safetensors").modules[spelled].scale == 1.0  # 2 / sqrt(4)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"attn1.to_q": 8}}))
    assert read_lora(tmp_path / "adapter_model.safetensors").modules[spelled].scale == 2.0
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": []}')
    with pytest.raises(WeightFileError, match="settings .* damaged"):
        read_lora(tmp_path / "adapter_model.safetensors")
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 1})}
    save_file(pair("transformer.blocks.0.attn1.to_q", rank=4), tmp_path / "d.safetensors", metadata)
    assert next(iter(read_lora(tmp_path / "d.safetensors").modules.values())).scale == 0.25


def test_plain_additions_are_read_and_written(tmp_path):
    tensors = pair() | {f"{Q}.diff_b": torch.ones(6), "diffusion_model.ffn.0.diff": torch.ones(8, 6)}
    save_file(tensors, tmp_path / "core.safetensors")
    matched = read(tmp_path / "core.safetensors")
    assert matched.count == 2
    assert torch.equal(matched.offsets["ffn.net.0.proj"].weight, torch.ones(8, 6))
    path = write_lora(tmp_path / "b.safetensors", matched.modules, NAMES, {}, offsets=matched.offsets)
    assert load_file(path).keys() == tensors.keys()
    save_file(tensors | {"diffusion_model.blocks.0.diff_m": torch.ones(3)}, tmp_path / "more.safetensors")
    assert read_lora(tmp_path / "more.safetensors").notes == (
        "left out, for they are no weights of a LoRA: diffusion_model.blocks.0.diff_m",
    )
    save_file({f"{Q}.diff": torch.ones(3, 3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(WeightFileError, match="diff is 3x3 in it and 6x4 here"):
        read(tmp_path / "wrong.safetensors")


# What the base model was


def keys_of(*names, width):
    return {k: v for name in names for k, v in pair(name, width, width).items()}


@pytest.mark.parametrize(
    ("names", "width", "file", "expected"),
    [
        (("lora_unet__blocks_0_self_attn_q", "lora_unet__blocks_0_cross_attn_k_img"), 1536, "a", "Wan2.1-Fun-1.3B-InP"),
        (("transformer.blocks.0.attn1.to_q",), 1536, "a", "Wan2.1 T2V-1.3B"),
        (("lora_unet_blocks_0_self_attn_q",), 5120, "x_high_noise", "Wan2.2 A14B, high-noise expert"),
        (("lora_unet__transformer_blocks_0_attn1_to_q", "lora_unet__patch_embed_text_proj"), 3072, "a",
         "CogVideoX V1.1 or older 5b"),
        (("lora_unet__transformer_blocks_0_attn2_to_q",), 3072, "a", "EasyAnimate"),
        (("base_model.model.model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",), 320, "a",
         "VideoCrafter2"),
        (("base_model.model.spatial_blocks.0.attn.qkv",), 8, "a", "Open-Sora 1.2"),
        (("something.else",), 8, "a", ""),
        (("something.else",), 8, "EasyAnimateV5-7b-zh-InP-MPS", "alibaba-pai/EasyAnimateV5-7b-zh-InP"),
    ],
)  # fmt: skip
def test_the_base_is_guessed_with_a_reason(tmp_path, names, width, file, expected):
    save_file(keys_of(*names, width=width), tmp_path / f"{file}.safetensors")
    guess = guess_base(read_lora(tmp_path / f"{file}.safetensors"))
    assert guess.base == expected
    assert guess.reason


def test_the_error_says_which_base_a_lora_seems_to_be_for(tmp_path):
    save_file(keys_of("lora_unet__transformer_blocks_0_attn1_to_q", width=1920), tmp_path / "a.safetensors")
    with pytest.raises(WeightFileError, match="none of its 1 modules .*it seems to be for CogVideoX 2b"):
        read(tmp_path / "a.safetensors")


# Files that cannot be meant

BAD = {
    "half": ({f"{Q}.lora_A.weight": torch.ones(2, 4)}, "lacks its lora_up"),
    "other half": ({f"{Q}.lora_up.weight": torch.ones(6, 2)}, "lacks its lora_down"),
    "not a number": (pair() | {f"{Q}.lora_A.weight": torch.full((2, 4), float("nan"))}, "not finite"),
    "infinite": (pair() | {f"{Q}.alpha": torch.tensor(float("inf"))}, "not finite"),
    "ranks": (pair() | {f"{Q}.lora_A.weight": torch.ones(3, 4)}, "do not fit each other"),
    "flat": (pair() | {f"{Q}.lora_A.weight": torch.ones(4)}, "no matrix"),
    "empty": (pair() | {f"{Q}.lora_A.weight": torch.ones(0, 4)}, "no matrix"),
    "whole numbers": (pair() | {f"{Q}.lora_A.weight": torch.ones(2, 4, dtype=torch.int32)}, "not fractions"),
    "many alphas": (pair() | {f"{Q}.alpha": torch.ones(3)}, "must be one number"),
    "half twice": (pair() | {f"{Q}.lora_down.weight": torch.ones(2, 4)}, "gives the down weights of .* twice"),
    "two adapters": (pair() | pair(down="lora_A.b.weight", up="lora_B.b.weight"), "twice"),
    "module twice": (pair() | pair("lora_unet_blocks_0_self_attn_q"), "speaks twice of one module"),
    "another kind": (pair() | {f"{Q}.dora_scale": torch.ones(6, 1)}, "no plain LoRA .*dora_scale"),
    "no LoRA": ({"weight": torch.ones(2)}, "no LoRA matrices"),
    "alphas alone": ({f"{Q}.alpha": torch.ones(1)}, "no LoRA matrices"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_that_cannot_be_meant_is_answered_in_a_sentence(tmp_path, case, suffix):
    tensors, expected = BAD[case]
    path = tmp_path / f"bad.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(tensors, path)
    with pytest.raises(WeightFileError, match=expected) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def peak():
    """The most memory this process has held, in MiB."""
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def bomb(entries, compression):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def deep(depth=100_000):
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


def stretched():
    buffer = io.BytesIO()
    torch.save({f"{Q}.lora_A.weight": torch.ones(1).expand(1 << 20, 1 << 20)}, buffer)
    return buffer.getvalue()


HOSTILE = {
    "gigabyte header.safetensors": lambda: struct.pack("<Q", 1 << 30) + b"{" + b" " * 4096,
    "deep header.safetensors": lambda: struct.pack("<Q", len(deep())) + deep(),
    "endless tensor.safetensors": lambda: header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 62]}}),
    "words for offsets.safetensors": lambda: header({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["", "z"]}}),
    "list for a tensor.safetensors": lambda: header({"a": [1, 2]}),
    "a tensor named twice.safetensors": lambda: twice(save(pair())),
    "zip bomb.pt": lambda: bomb({"a/data.pkl": bytes(1 << 28), "a/version": b"3"}, zipfile.ZIP_DEFLATED),
    "no torch zip.pt": lambda: bomb({"a.txt": b"x"}, zipfile.ZIP_STORED),
    "stretched view.pt": stretched,
    "pickle.pt": lambda: pickle.dumps(print),
    "text.pt": lambda: b"hello",
    "nothing.pt": lambda: b"",
}


def header(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def twice(content):
    """A sound file whose header gives its first tensor two times."""
    length = struct.unpack("<Q", content[:8])[0]
    text = content[8 : 8 + length].decode().strip()
    first = text[1:].partition("},")[0] + "}"
    text = f"{text[:-1]},{first}}}".encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_bounded_memory(tmp_path, case):
    path = tmp_path / case
    path.write_bytes(HOSTILE[case]())
    before = peak()
    with pytest.raises(WeightFileError):
        read_lora(path)
    assert peak() - before < 64, "MiB more than before"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_or_refused_and_never_crash(tmp_path, data):
    zipped = data.draw(st.booleans())
    buffer = io.BytesIO()
    torch.save(pair(), buffer)
    content = bytearray(buffer.getvalue() if zipped else save(pair() | {f"{Q}.alpha": torch.tensor(2.0)}))
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    if data.draw(st.booleans()):
        content = content[:cut] + data.draw(st.binary(max_size=16)) + content[cut + 8 :]
    path = tmp_path / ("fuzz.pt" if zipped else "fuzz.safetensors")
    path.write_bytes(bytes(content))
    with suppress(WeightFileError):
        read(path)


def test_reading_leaves_nothing_open_and_memory_its_own(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", pair(), {})
    lora = read_lora(path).in_memory()
    save_file(pair() | {f"{Q}.lora_A.weight": torch.zeros(2, 4)}, path)
    assert float(lora.modules[Q].down.sum()) == 8


@pytest.mark.parametrize("window", [(-0.1, 1), (0.5, 0.5), (0.8, 0.2), (0, 1.1)])
def test_a_window_out_of_range(tmp_path, window):
    save_file(pair(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="0 <= start < end <= 1"):
        LoraUse(read_lora(tmp_path / "a.safetensors"), 1.0, start=window[0], end=window[1])


def test_an_unknown_expert_is_refused(wan, tmp_path):
    save_file(pair(), tmp_path / "a.safetensors")
    use = LoraUse(read_lora(tmp_path / "a.safetensors"), 1.0, expert="loud")
    with pytest.raises(ValueError, match="expert must be one of auto, transformer"), applied(wan, [use]):
        pass
