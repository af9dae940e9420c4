"""Reading weight files and finding models: what is right loads without a copy, what is wrong is said in a sentence."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from reward_lora.video_models import BASE_MODELS, WeightFileError, load_video_model
from reward_lora.video_models.files import fingerprint, load_weights, parse_dtype, read_json, read_weights
from safetensors.torch import save_file
from torch import nn

TENSORS = {"linear.weight": torch.arange(6.0).view(2, 3), "linear.bias": torch.ones(2)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)


def meta_net():
    with torch.device("meta"):
        return Net()


class Trap:
    """Creates a file if unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_weights_come_back_as_they_were_saved(tmp_path, name):
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(TENSORS, path)
    net = meta_net()
    load_weights(net, read_weights(path), path, dtype=torch.float32)
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, TENSORS[key])


def test_shards_are_joined_by_their_index(tmp_path):
    for number, name in enumerate(TENSORS):
        save_file({name: TENSORS[name]}, tmp_path / f"part{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"part{n}.safetensors" for n, name in enumerate(TENSORS)}}))
    assert read_weights(index).keys() == TENSORS.keys()
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(WeightFileError, match="part1.safetensors is missing"):
        read_weights(index)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(WeightFileError, match="its own folder"):
        read_weights(index)


def test_weights_of_the_wished_dtype_stay_on_disk_until_used(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.zeros(8)}, path)
    tensors = read_weights(path)
    assert tensors["b"].data_ptr() - tensors["a"].data_ptr() == 4 * 4 * 4  # neighbours in one map of the file
    with torch.device("meta"):
        net = nn.ParameterDict({"a": torch.empty(4, 4), "b": torch.empty(8)})
    load_weights(net, tensors, path, dtype=torch.float32)
    assert net["a"].data_ptr() == tensors["a"].data_ptr()


def test_16_bits_keep_the_named_parts_in_float32(tmp_path):
    net = meta_net()
    load_weights(net, TENSORS, tmp_path, dtype=torch.bfloat16, keep_float32=("bias",))
    assert (net.linear.weight.dtype, net.linear.bias.dtype) == (torch.bfloat16, torch.float32)


def test_buffers_that_no_file_holds_follow_to_the_device(tmp_path):
    net = meta_net()
    net.register_buffer("table", torch.ones(1), persistent=False)
    with pytest.raises(WeightFileError, match="without a value"):  # the meta device stands for a GPU
        load_weights(net, TENSORS, tmp_path, dtype=torch.float32, device="meta")
    assert net.table.is_meta


def test_a_pickle_called_safetensors_is_refused_and_runs_nothing(tmp_path):
    path, trace = tmp_path / "model.safetensors", tmp_path / "executed"
    path.write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(WeightFileError, match="is a pickle"):
        read_weights(path)
    torch.save({"a": Trap(trace)}, path)
    with pytest.raises(WeightFileError, match="is a pickle"):
        read_weights(path)
    assert not trace.exists()


@pytest.mark.parametrize("length", [0x80, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, length):
    path = tmp_path / "model.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(4))
    assert read_weights(path)["a"].tolist() == [0]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pth_with_code_is_refused_and_runs_nothing(tmp_path, zipped):
    path, trace = tmp_path / "model.pth", tmp_path / "executed"
    torch.save({"a": Trap(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightFileError, match="could run code"):
        read_weights(path)
    assert not trace.exists()


def bad_files(folder):
    whole = folder / "whole.safetensors"
    save_file(TENSORS, whole)
    content = whole.read_bytes()
    size = int.from_bytes(content[:8], "little")
    with zipfile.ZipFile(folder / "zip.pth", "w") as archive:
        archive.writestr("a", "b")
    torch.save([1, 2], folder / "list.pth")
    files = {
        "cut.safetensors": (content[:-4], "truncated"),
        "cut_header.safetensors": (content[: 8 + size // 2], "truncated"),
        "tiny.safetensors": (b"\x08", "not a safetensors file"),
        "empty.safetensors": (b"", "not a safetensors file"),
        "html.safetensors": (b"<!DOCTYPE html><html>not found</html>", "not a safetensors file"),
        "header.safetensors": (content[:8] + b"{" + b"x" * (size - 1) + content[8 + size :], "damaged header"),
        "text.pth": (b"hello", "could run code|damaged"),
        "empty.pth": (b"", "damaged"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    messages = {name: message for name, (_, message) in files.items()}
    return messages | {"absent.pth": "is missing", "zip.pth": "damaged", "list.pth": "one tensor a name"}


def test_every_bad_file_gives_one_sentence_that_names_it(tmp_path):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(WeightFileError, match=message) as caught:
            read_weights(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("names", [("scale_weight", "scale_input", "scaled_fp8"), ("weight_scale", "input_scale", "")])
def test_float8_weights_are_multiplied_by_their_scales(tmp_path, names):
    """As ComfyUI's two spellings store them: a plain tensor, and one with a factor beside it."""
    path, (factor, ours, mark) = tmp_path / "model.safetensors", names
    tensors = {"linear.weight": (TENSORS["linear.weight"] / 0.25).to(torch.float8_e4m3fn)}
    tensors |= {"linear.bias": TENSORS["linear.bias"].to(torch.float8_e4m3fn)}
    tensors |= {f"linear.{factor}": torch.tensor(0.25), f"linear.{ours}": torch.tensor(1.0)}
    tensors |= {mark or "linear.comfy_quant": torch.zeros(2, dtype=torch.uint8)}
    save_file(tensors, path)
    net = meta_net()
    load_weights(net, read_weights(path), path, dtype=torch.bfloat16)
    assert net.linear.weight.dtype == torch.bfloat16
    assert net.linear.weight.tolist() == TENSORS["linear.weight"].tolist()
    assert net.linear.bias.tolist() == [1, 1]


def test_integers_in_place_of_weights_are_refused(tmp_path):
    tensors = TENSORS | {"linear.weight": torch.zeros(2, 2, dtype=torch.int8)}
    with pytest.raises(WeightFileError, match=r"is quantised \(linear.weight is int8\); take a file of 16 or 32 bits"):
        load_weights(meta_net(), tensors, tmp_path / "x.safetensors", dtype=torch.float32)


MEMORY = """
import os, re, sys, torch
from pathlib import Path
from reward_lora.video_models.files import load_weights, read_weights
def high(): return int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
class Net(torch.nn.Module):
    def __init__(self, count, size):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(size, size, bias=False) for _ in range(count))
def measure(path, dtype, count, size):
    with torch.device("meta"):
        net = Net(count, size)
    torch.ones(4, 4).to(torch.bfloat16) @ torch.ones(4, 4).to(torch.bfloat16)
    before = high()
    load_weights(net, read_weights(path), path, dtype=dtype)
    total = sum(float(p.detach()[::64, ::64].float().sum()) for p in net.parameters())
    print(high() - before, total, flush=True)
count, size, *cases = sys.argv[1:]
for path, dtype in zip(cases[::2], cases[1::2]):
    child = os.fork()  # a peak of its own
    if child == 0:
        measure(Path(path), getattr(torch, dtype), int(count), int(size))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
LOADS = [(suffix, *dtypes) for suffix in (".safetensors", ".pth")
         for dtypes in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"))]  # fmt: skip
"""Kind of file, how it is stored, and what is wanted."""


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    """Of every one of ``LOADS``: the peak of a process that loads and touches the weights, their sum, the sum that is
    right, and the file's size."""
    count, size, folder = 24, 1024, tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(size, size, generator=generator) for i in range(count)}
    command, expected = [sys.executable, "-c", MEMORY, str(count), str(size)], []
    for suffix, stored, wanted in LOADS:
        path, kept = folder / f"{stored}{suffix}", {k: t.to(getattr(torch, stored)) for k, t in tensors.items()}
        if not path.exists():
            (save_file if suffix == ".safetensors" else torch.save)(kept, path)
        total = sum(float(t.to(getattr(torch, wanted))[::64, ::64].float().sum()) for t in kept.values())
        expected.append((total, path.stat().st_size))
        command += [str(path), wanted]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found = [(*map(float, line.split()), *rest) for line, rest in zip(lines, expected, strict=True)]
    return dict(zip(LOADS, found, strict=True))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell which pages are a file's")
@pytest.mark.parametrize("case", LOADS, ids=" ".join)
def test_loading_needs_no_second_copy(loads, case):
    """The file's size and a quarter are allowed."""
    peak, total, expected, size = loads[case]
    assert peak <= 1.25 * size
    assert total == pytest.approx(expected, rel=1e-6)


def test_weights_of_another_model_are_named(tmp_path):
    def load(**changes):
        tensors = {name: value for name, value in (TENSORS | changes).items() if value is not None}
        load_weights(meta_net(), tensors, tmp_path / "x.safetensors", dtype=torch.float32)

    with pytest.raises(WeightFileError, match=r"lacks linear\.bias; it is probably an incomplete download"):
        load(**{"linear.bias": None})
    with pytest.raises(WeightFileError, match=r"has unknown extra; it is probably another variant"):
        load(extra=torch.ones(1))
    with pytest.raises(WeightFileError, match="another kind of model"):
        load_weights(meta_net(), {"a": torch.ones(1)}, tmp_path, dtype=torch.float32)
    with pytest.raises(WeightFileError, match=r"linear\.bias is \[3\] where the config says \[2\]"):
        load(**{"linear.bias": torch.ones(3)})


def test_json_errors_are_sentences(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(WeightFileError, match="not valid JSON"):
        read_json(path)
    path.write_text("[]")
    with pytest.raises(WeightFileError, match="got list"):
        read_json(path)


def test_dtype_names():
    assert parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype("auto") is None
    with pytest.raises(ValueError, match="got 'int8'"):
        parse_dtype("int8")


def test_a_fingerprint_changes_with_the_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(200_000))
    before = fingerprint([path])
    assert fingerprint([path]) == before
    path.write_bytes(bytes(199_999) + b"\x01")
    assert fingerprint([path]) != before


def test_an_unknown_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(WeightFileError, match="looked for model_index.json"):
        load_video_model(tmp_path)


def test_a_name_of_nothing_lists_what_is_known(tmp_path):
    with pytest.raises(WeightFileError, match="there is no folder nowhere; .*builtin.*Wan2.1-Fun-1.3B-InP"):
        load_video_model("nowhere")
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(WeightFileError, match="is a file; give the folder"):
        load_video_model(file)


@pytest.mark.parametrize("name", ["Wan2.1-Fun-1.3B-InP", "alibaba-pai/Wan2.1-Fun-1.3B-InP"])
def test_a_known_model_that_is_absent_says_where_to_put_it(tmp_path, name):
    with pytest.raises(WeightFileError, match="alibaba-pai/Wan2.1-Fun-1.3B-InP") as caught:
        load_video_model(name, search=[tmp_path])
    assert str(tmp_path / "Wan2.1-Fun-1.3B-InP") in str(caught.value)
    assert "19 GB" in str(caught.value)


def test_base_models_are_listed_by_the_name_of_their_folder():
    assert all(model.repository.endswith(f"/{name}") for name, model in BASE_MODELS.items())
    assert all(model.disk >= 1 and model.memory >= 1 and model.files for model in BASE_MODELS.values())
