"""Where ComfyUI keeps models and results; nothing is ever written outside its output folder by accident."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import folder_paths

from ..training.run_loras import is_run
from ..video_models import BASE_MODELS, BUILTIN, WeightFileError, detect

VIDEO_MODELS, REWARD_MODELS = "video_models", "reward_models"
BUILTIN_LORA = "builtin: colour fix"
CONNECTED = "the connected LoRA"
OUTPUT = "output/"
ASSETS = Path(__file__).resolve().parent.parent / "assets"


def register() -> None:
    """Make ComfyUI know ``models/video_models`` and ``models/reward_models``, besides what
    ``extra_model_paths.yaml`` says of these keys."""
    for key in (VIDEO_MODELS, REWARD_MODELS):
        folder_paths.add_model_folder_path(key, os.path.join(folder_paths.models_dir, key))


def video_model_roots() -> list[Path]:
    """Folders in which video models are looked for."""
    return [Path(p) for key in (VIDEO_MODELS, "diffusion_models") for p in folder_paths.get_folder_paths(key)]


def list_video_models() -> dict[str, str]:
    """What can be loaded, with a word about each: the built-in model, the folders with a model of any family, and,
    grouped by their family, the published ones that are not here yet."""
    here: list[tuple[str, str, str]] = []
    for root in video_model_roots():
        here += [(family, folder.relative_to(root).as_posix(), _size(folder)) for family, folder in _models_in(root)]
    listed = {BUILTIN: "tiny"} | {name: f"{family}, {size}" for family, name, size in sorted(here)}
    names = {name.rpartition("/")[2] for name in listed}
    absent = {name: model for name, model in BASE_MODELS.items() if name not in names}
    for name, model in sorted(absent.items(), key=lambda item: (item[1].family, item[0])):
        listed[name] = f"{model.family}, to download: {model.disk} GB, memory from {model.memory} GB, {model.licence}"
    return listed


def _models_in(folder: Path, depth: int = 2) -> list[tuple[str, Path]]:
    """Models with their families in a folder and the folders below; what lies inside of a model is a part of it."""
    try:
        children = sorted(child for child in folder.iterdir() if child.is_dir())
    except OSError:  # it is not there, or not ours to read
        return []
    found = []
    for child in children:
        try:
            family = detect(child)
        except WeightFileError:  # listed, so that loading it says what is wrong
            family = "unreadable"
        if family is not None:
            found.append((family.removesuffix("_files"), child))
        elif depth > 1:
            found += _models_in(child, depth - 1)
    return found


def _size(folder: Path) -> str:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return f"{total / 1e9:.1f} GB"


def model_file(folder: str, name: str) -> Path:
    """A file of one of ComfyUI's model folders. Raises ``ValueError`` if it is not there."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(f"there is no {name!r} in models/{folder}; choose a file from the list")
    return Path(path)


def reward_roots() -> list[Path]:
    """Folders in which the files of rewards are looked for; downloads go into the first."""
    return [Path(root) for root in folder_paths.get_folder_paths(REWARD_MODELS)]


def list_loras() -> list[str]:
    """LoRA files: the built-in one, those every LoRA loader lists, and those elsewhere in the output folder."""
    output = folder_paths.get_output_directory()
    known = {os.path.realpath(folder) for folder in folder_paths.get_folder_paths("loras")}  # output/loras is one
    made = [OUTPUT + Path(path).relative_to(output).as_posix() for path in _newest_loras(output, known)]
    return [CONNECTED, BUILTIN_LORA, *folder_paths.get_filename_list("loras"), *made]


def _newest_loras(output: str, known: Collection[str], depth: int = 2) -> list[str]:
    """Safetensors files down to a depth, newest first, without checkpoints and without known folders."""
    found = []
    folders = [(output, depth)]
    while folders:
        folder, below = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:  # it went away, or is not ours to read
            continue
        for entry in entries:
            if entry.is_dir():
                if below and os.path.realpath(entry.path) not in known:
                    folders.append((entry.path, below - 1))
            elif entry.name.endswith(".safetensors") and not entry.name.startswith(("checkpoint-", ".")):
                with suppress(OSError):  # a link to nothing
                    found.append((-entry.stat().st_mtime, entry.path))
    return [path for _, path in sorted(found)]


def lora_path(entry: str) -> Path:
    """The file behind an entry of :func:`list_loras`.

    Raises:
        ValueError: There is no such file in ``models/loras`` or the output folder.
    """
    if entry == BUILTIN_LORA:
        return ASSETS / "tiny_reward_lora.safetensors"
    if entry.startswith(OUTPUT):
        path = _inside_output(entry.removeprefix(OUTPUT))
        if path.is_file():
            return path
    elif entry in folder_paths.get_filename_list("loras"):
        return Path(folder_paths.get_full_path_or_raise("loras", entry))
    raise ValueError(f"there is no LoRA {entry!r} in models/loras or in the output folder; choose one from the list")


def list_runs() -> list[str]:
    """Folders of trainings in the output folder, down to a depth, newest first."""
    output = Path(folder_paths.get_output_directory())
    logs = [log for depth in ("*", "*/*", "*/*/*") for log in output.glob(f"{depth}/log.jsonl") if is_run(log.parent)]
    return [log.parent.relative_to(output).as_posix() for log in sorted(logs, key=_changed, reverse=True)]


def _changed(path: Path) -> float:
    with suppress(OSError):  # it went away
        return path.stat().st_mtime
    return 0.0


def run_folder(entry: str) -> Path:
    """The folder of a training by its entry in :func:`list_runs`.

    Raises:
        ValueError: There is no training in that folder of the output folder.
    """
    path = _inside_output(entry.strip())
    if not entry.strip() or not is_run(path):
        raise ValueError(f"there is no training in output/{entry.strip()}; choose one from the list")
    return path


def prompt_path(name: str) -> Path:
    """A prompt file: ``builtin`` or ``builtin_test``, its name in ComfyUI's input folder, or its whole path."""
    name = name.strip().strip('"')
    ours = {BUILTIN: "prompts_train.txt", f"{BUILTIN}_test": "prompts_test.txt"}
    return ASSETS / ours[name] if name in ours else Path(folder_paths.get_input_directory(), name)


def fingerprint(path: Path) -> str:
    """Changes when a file, or one in a folder, is edited."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = sorted((str(file), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest() if files else ""


def check_prefix(prefix: str) -> Path:
    """The path a prefix stands for.

    Raises:
        ValueError: It is empty or leads out of the output folder.
    """
    if not prefix.strip() or prefix.endswith(("/", "\\")) or any(ord(c) < 32 for c in prefix):
        raise ValueError(f"the prefix must be a name such as loras/colour, got {prefix!r}")
    return _inside_output(prefix)


def _inside_output(relative: str) -> Path:
    output = os.path.abspath(folder_paths.get_output_directory())
    path = os.path.abspath(os.path.join(output, relative))
    if not path.startswith(os.path.join(output, "")):
        raise ValueError(f"{relative!r} leads out of the output folder; use a name such as loras/colour")
    return Path(path)


def complaint(check: Callable[[str], object], value: str | None) -> bool | str:
    """For ``validate_inputs``: True, or the sentence of the ``ValueError`` the check raised. A link passes."""
    try:
        if value is not None:
            check(value)
    except ValueError as error:
        return str(error)
    return True


def next_file(prefix: str) -> Path:
    """``<prefix>_00001_.safetensors`` in the output folder, with the next free number."""
    check_prefix(prefix)
    folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    return Path(folder, f"{name}_{counter:05}_.safetensors")


def listed(*paths: Path) -> list[dict[str, str]]:
    """Files of the output folder as ComfyUI's history and ``comfy run`` list them."""
    output = Path(folder_paths.get_output_directory()).resolve()
    found = []
    for path in paths:
        subfolder = path.resolve().parent.relative_to(output).as_posix()
        found.append({"filename": path.name, "subfolder": "" if subfolder == "." else subfolder, "type": "output"})
    return found
