"""How rewards are found, fetched, refused and listed."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import importlib
import logging
import pickle
import re
import shutil
import threading

import pytest
import torch
from reward_lora.cli.shared import find_reward
from reward_lora.files import WeightFileError
from reward_lora.hub import RemoteFile
from reward_lora.reward_models import GROUP, REWARDS, all_rewards, load_reward
from reward_lora.reward_models.files import Part, Repository, RewardEntry
from safetensors.torch import load_file, save_file

from .reward_checkpoints import FILES

PROMPT = ["a red circle moves left"]
FRAMES = torch.linspace(0, 1, 3 * 2 * 9 * 9).view(1, 3, 2, 9, 9)
IMAGE_REWARDS = ("pickscore", "pickscore_scaled", "clip_l14", "hps_v2", "hps_v2.1", "mps", "aesthetic_v2",
                 "aesthetic_v2.5")  # fmt: skip


@pytest.fixture
def copy(reward_files, tmp_path):
    """A models folder of one's own."""
    return shutil.copytree(reward_files, tmp_path / "reward_models")


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_found_by_published_names_below_any_folder(name, reward_files, tmp_path):
    by_search = load_reward(name, search=[tmp_path, reward_files]).score(FRAMES, PROMPT)
    by_path = load_reward(name, reward_files).score(FRAMES, PROMPT)
    assert torch.equal(by_search, by_path)


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_the_first_part_by_its_own_path_under_any_name(name, copy):
    expected = load_reward(name, copy).score(FRAMES, PROMPT)
    part = next(iter(REWARDS[name].parts.values()))
    renamed = (copy / part.name).rename(copy / f"my {part.name}")
    assert torch.equal(load_reward(name, renamed).score(FRAMES, PROMPT), expected)


def test_a_tokenizer_beside_the_weights_is_used(copy):
    """PickScore's own folder is often completed by hand."""
    tokenizer = copy / "CLIP-ViT-H-14-laion2B-s32B-b79K"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).rename(copy / "PickScore_v1" / name)
    load_reward("pickscore", copy / "PickScore_v1")
    load_reward("pickscore", search=[copy])


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_what_is_missing_is_named_with_address_and_place(name, tmp_path):
    for part in REWARDS[name].parts.values():
        with pytest.raises(WeightFileError) as caught:
            load_reward(name, search=[tmp_path])
        sentence = str(caught.value)
        assert part.source.url in sentence
        assert str(tmp_path / part.name) in sentence
        assert "allow the download" in sentence
        assert "\n" not in sentence
    with pytest.raises(WeightFileError, match="download it and give its path"):
        load_reward(name)
    with pytest.raises(WeightFileError, match="nowhere does not exist; correct the path"):
        load_reward(name, tmp_path / "nowhere")


def test_every_entry_says_what_it_is():
    for name, entry in REWARDS.items():
        assert entry.summary, name
        for part in entry.parts.values():
            if isinstance(part.source, RemoteFile | Repository):
                assert entry.licence, name
                assert part.source.url.startswith("https://"), name
        for values in entry.options.values():
            assert len(set(values)) == len(values), name


def test_options_are_checked(reward_files):
    with pytest.raises(ValueError, match="preprocessing of hps_v2.1 must be one of official, videox-fun, .*got 'crop'"):
        load_reward("hps_v2.1", reward_files, options={"preprocessing": "crop"})
    with pytest.raises(ValueError, match="mps has no option 'preprocessing'; its options: none"):
        load_reward("mps", reward_files, options={"preprocessing": "official"})
    with pytest.raises(ValueError, match="unknown reward 'beauty'; known are tiny_clip, pickscore"):
        load_reward("beauty")


def weights_of(name, folder):
    part = next(iter(REWARDS[name].parts.values()))
    path = folder / part.name
    return path / "model.safetensors" if path.is_dir() else path


def change(path, edit):
    """Rewrite a weight file with its tensors edited."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)
        return
    content = torch.load(path, weights_only=True)
    edit(next((content[key] for key in ("state_dict", "model_state_dict") if key in content), content))
    torch.save(content, path)


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_wrong_weights_are_one_sentence(name, copy):
    path = weights_of(name, copy)
    original = path.read_bytes()

    def drop(tensors):
        del tensors[sorted(tensors)[0]]

    def narrow(tensors):
        key = next(key for key in sorted(tensors) if tensors[key].ndim == 2)
        tensors[key] = tensors[key][:, :-1].contiguous()

    def add(tensors):
        tensors["vision_model.surplus.weight" if path.suffix == ".safetensors" else "surplus.weight"] = torch.zeros(1)

    for edit in (drop, narrow, add)[: 2 if name == "mps" else 3]:  # MPS's publisher left other networks in
        change(path, edit)
        with pytest.raises(WeightFileError, match=re.escape(path.name)) as caught:
            load_reward(name, copy)
        assert "\n" not in str(caught.value)
        path.write_bytes(original)
    path.write_bytes(original[: len(original) // 2])
    with pytest.raises(WeightFileError, match=f"{re.escape(path.name)} .*(damaged|truncated)"):
        load_reward(name, copy)
    path.write_bytes(original)
    load_reward(name, copy)


@pytest.mark.parametrize("file", FILES)
def test_a_pickle_that_runs_code_is_refused(file, copy, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (name,) = [n for n in IMAGE_REWARDS if next(iter(REWARDS[n].parts.values())).name == file]
    for bomb in (lambda path: path.write_bytes(pickle.dumps(Bomb())), lambda path: torch.save({"a": Bomb()}, path)):
        bomb(copy / file)
        with pytest.raises(WeightFileError, match=f"{re.escape(file)} .*(could run code|damaged)"):
            load_reward(name, copy)
    assert not (tmp_path / "exploded").exists()


def test_damaged_configuration_and_tokenizer_are_one_sentence(copy):
    folder = copy / "clip-vit-large-patch14"
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(WeightFileError, match="holds no usable tokenizer"):
        load_reward("clip_l14", folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(WeightFileError, match="config.json is not the configuration of a model"):
        load_reward("clip_l14", folder)


@pytest.fixture
def hub(monkeypatch, reward_files):
    """The tiny models folder, served as the hub serves its repositories."""
    paths = {}
    for entry in REWARDS.values():
        for part in entry.parts.values():
            if isinstance(part.source, Repository):
                paths[part.source.name] = reward_files / part.name
    paths["xswu/HPSv2"] = reward_files

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            if self.path.startswith("/api/models/"):
                folder = paths[self.path.removeprefix("/api/models/").partition("?")[0]]
                names = [path.name for path in folder.iterdir()]
                body = str([{"rfilename": name} for name in names]).replace("'", '"')
                return self.answer(f'{{"siblings": {body}}}'.encode())
            owner, name, _, _, file = self.path.strip("/").split("/", 4)
            return self.answer((paths[f"{owner}/{name}"] / file).read_bytes())

        def answer(self, content):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Linked-Etag", hashlib.sha256(content).hexdigest())
            self.end_headers()
            self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("name", ["pickscore", "hps_v2.1", "clip_l14"])
def test_fetched_into_the_first_folder_on_request(name, hub, reward_files, tmp_path):
    seen = []
    home, second = tmp_path / "models", tmp_path / "second"
    fetched = load_reward(
        name, search=[home, second], download=True, progress=lambda *numbers: seen.append(numbers)
    ).score(FRAMES, PROMPT)
    assert torch.equal(fetched, load_reward(name, reward_files).score(FRAMES, PROMPT))
    assert {path.name for path in home.iterdir()} == {part.name for part in REWARDS[name].parts.values()}
    assert seen
    hub.shutdown()
    load_reward(name, search=[home])


def test_the_command_line_keeps_rewards_in_their_folder(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightFileError, match="clip_l14 lacks .*: allow the download, or put"):
        find_reward("clip_l14", None, "cpu")
    find_reward("clip_l14", None, "cpu", download=True)
    assert (tmp_path / "models" / "reward_models" / "clip-vit-large-patch14").is_dir()
    hub.shutdown()
    find_reward("clip_l14", None, "cpu")


def test_a_wrong_checksum_is_one_sentence(hub, tmp_path, monkeypatch):
    entry = REWARDS["hps_v2.1"]
    (part,) = entry.parts.values()
    wrong = dataclasses.replace(part, source=dataclasses.replace(part.source, sha256="0" * 64))
    monkeypatch.setitem(REWARDS, "hps_v2.1", dataclasses.replace(entry, parts={"weights": wrong}))
    with pytest.raises(WeightFileError, match=r"HPS_v2.1_compressed.pt: sha256 is [0-9a-f]{64}, 0{64} was published"):
        load_reward("hps_v2.1", search=[tmp_path], download=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("extra", "needed"), [("special", r'"\S+\[special\]"'), ("", r"-r \S+requirements.txt")])
def test_a_missing_package_is_one_sentence(extra, needed, monkeypatch):
    def load(request):
        import no_such_package  # noqa: F401

    monkeypatch.setitem(REWARDS, "special", RewardEntry(load, "needs more", extra=extra))
    with pytest.raises(ValueError, match=rf"no_such_package, which is not installed: \S+ -m pip install {needed}"):
        load_reward("special")


def test_a_broken_package_is_said_with_its_reason(monkeypatch):
    def load(request):  # as transformers does it
        raise ModuleNotFoundError("Could not import module") from RuntimeError("audio and torch\ndo not match")

    monkeypatch.setitem(REWARDS, "special", RewardEntry(load, "needs more"))
    with pytest.raises(ValueError, match=r"there but cannot be imported \(audio and torch do not match\)"):
        load_reward("special")


def test_a_file_in_the_models_folder_is_never_executed(tmp_path):
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="unknown reward 'mine'"):
        load_reward("mine", search=[tmp_path])
    assert "mine" not in all_rewards()
    assert not (tmp_path / "ran").exists()


MINE = """
class Mine:
    name, differentiable, needs = "mine", True, frozenset()
    def __init__(self, path, device):
        self.path, self.device = path, device
    def score(self, frames, prompts, *, reference=None):
        return frames.flatten(1).mean(1)

def not_one(path, device):
    return 5

def broken(path, device):
    raise RuntimeError("no luck")
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with rewards of its own, good and bad."""
    (tmp_path / "mine_of_a_user.py").write_text(MINE)
    info = tmp_path / "mine_of_a_user-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-of-a-user\nVersion: 1.0\n")
    lines = ["mine = mine_of_a_user:Mine", "not_one = mine_of_a_user:not_one", "broken = mine_of_a_user:broken",
             "gone = a_module_that_is_gone:Reward", "odd = .:Reward", "absent = mine_of_a_user:Absent",
             "pickscore = mine_of_a_user:Mine"]  # fmt: skip
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n" + "\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


def test_rewards_of_other_packages(package, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        listed = all_rewards()
    assert list(listed)[: len(REWARDS)] == list(REWARDS)
    assert {"mine", "not_one", "broken", "absent"} <= listed.keys()
    assert "mine-of-a-user" in listed["mine"].summary
    assert "gone" not in listed
    assert "a_module_that_is_gone" in caplog.text
    assert "the name is taken" in caplog.text
    assert listed["pickscore"] is REWARDS["pickscore"]
    mine = load_reward("mine", tmp_path, "cpu")
    assert (mine.path, mine.device) == (tmp_path, "cpu")
    assert float(mine.score(FRAMES, PROMPT)) == pytest.approx(0.5)
    for name, sentence in {
        "not_one": "not_one of the package mine-of-a-user is no reward",
        "broken": r"broken of the package mine-of-a-user cannot be loaded \(RuntimeError: no luck\)",
        "absent": r"absent of the package mine-of-a-user cannot be loaded \(AttributeError",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            load_reward(name)


def test_a_part_knows_when_it_is_whole(tmp_path):
    part = Part("name", Repository("owner/name", ("config.json", "model.safetensors")))
    (tmp_path / "config.json").touch()
    assert not part.at(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert part.at(tmp_path)
