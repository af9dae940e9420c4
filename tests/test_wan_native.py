"""Wan from another program's tensors: the same model as from files, and nothing of the other program is touched."""

from __future__ import annotations

import pytest
import torch
from reward_lora.tests.families import Case
from reward_lora.video_models import ModelFiles, WeightFileError, load_video_model
from reward_lora.video_models.files import read_weights
from reward_lora.video_models.wan_native import NativeText, NativeTransformer, Weights, digest, load_native

PROMPT = "a red circle moves"
SHAPE = (16, 2, 4, 4)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    folder = tmp_path_factory.mktemp("native")
    case = Case("wan", "2.1 files i2v")
    case.write(folder)
    return case.source(folder)


class Program:
    """Holds weights in inference mode, as ComfyUI does."""

    def __init__(self, files: ModelFiles) -> None:
        with torch.inference_mode():
            self.held = {
                name: {key: tensor.clone() for key, tensor in read_weights(path).items()}
                for name, path in vars(files).items()
                if path
            }
        self.pieces = self.held["text"].pop("spiece_model").numpy().tobytes()
        self.reads = []

    def read(self, name: str):
        def read() -> Weights:
            self.reads.append(name)
            places = ((key, torch.empty(0, dtype=t.dtype), t) for key, t in self.held[name].items())
            return Weights({key: e.set_(t.untyped_storage(), 0, t.size(), t.stride()) for key, e, t in places})

        return read

    def load(self, **changes):
        transformer = NativeTransformer(self.read("diffusion"), 1, 1e-6)
        text = NativeText(self.read("text"), self.pieces, "text")
        return load_native([transformer], self.read("vae"), text, self.read("clip_vision"), **changes)


@torch.no_grad()
def painted(model) -> torch.Tensor:
    text = model.encode_text([PROMPT])
    branch = model.conditioning(text, None, SHAPE, start_image=torch.full((1, 3, 32, 32), 0.3)).positive
    latents = model.initial_latents(SHAPE, [1])
    return model.decode(model.predict(latents, model.sigmas(2)[0], branch))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_is_the_model_of_the_files(files, dtype):
    native, _ = Program(files).load(dtype=dtype)
    assert torch.equal(painted(native), painted(load_video_model(files, dtype="auto" if dtype is None else "bfloat16")))


def test_nothing_is_shared(files):
    """Float16 of float16 needs no conversion, and is copied all the same; gradients may pass."""
    program = Program(files)
    model, _ = program.load(dtype=torch.float16)
    before = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    with torch.inference_mode():
        for tensors in program.held.values():
            for tensor in tensors.values():
                tensor.zero_()
    after = model.transformer.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(tensor.is_inference() for part in (model.transformer, model.vae) for tensor in part.parameters())


def test_the_text_encoder_is_forgotten_when_it_leaves(files):
    program = Program(files)
    model, _ = program.load()
    assert "text" not in program.reads
    first = model.encode_text([PROMPT])[0]
    model.encode_text([PROMPT])
    assert program.reads.count("text") == 1
    model.to("cpu", "text")
    assert sum(parameter.numel() for parameter in model.text_encoder.parameters()) == 0
    assert torch.equal(model.encode_text([PROMPT])[0], first)
    assert program.reads.count("text") == 2


def test_what_decides_is_in_the_digest(files):
    def load(program: Program, **changes) -> tuple[str, str]:
        model, seen = program.load(**changes)
        return seen, model.text_fingerprint()

    seen, text = load(Program(files))
    assert load(Program(files)) == (seen, text)
    assert load(Program(files), shift=3.0)[0] != seen
    half = load(Program(files), dtype=torch.bfloat16)
    assert half[0] != seen
    assert half[1] != text
    changed = Program(files)
    with torch.inference_mode():
        changed.held["diffusion"]["blocks.1.ffn.0.weight"] += 1e-3
    assert load(changed)[0] != seen


def test_digest_sees_names_shapes_types_and_values():
    tensor = torch.arange(10_000.0)
    seen = digest({"a": tensor})
    assert seen == digest({"a": tensor.clone()})
    for other in ({"b": tensor}, {"a": tensor.view(100, 100)}, {"a": tensor.double()}, {"a": tensor * 1.001}):
        assert digest(other) != seen


def test_what_is_no_wan_is_said(files):
    program = Program(files)
    del program.held["diffusion"]["time_embedding.0.weight"]
    with pytest.raises(WeightFileError, match=r"the MODEL cannot be used: no Wan transformer: time_embedding.0.weight"):
        program.load()
    program = Program(files)
    program.held["vae"] = program.held["clip_vision"]
    with pytest.raises(WeightFileError, match="the VAE cannot be used: no Wan VAE"):
        program.load()
    program = Program(files)
    program.held["vae"]["encoder.more"] = program.held["vae"]["conv1.bias"]
    with pytest.raises(WeightFileError, match="the VAE does not fit AutoencoderKLWan"):
        program.load()
