"""Between ComfyUI and the engine: tensors, autograd, devices, progress, cancelling and errors."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..files import not_importable
from ..reward_models.protocol import Reward
from ..training.events import TrainingStopped
from ..training.memory import Placement, plan_for
from ..video_models.protocol import Tick, VideoModel

log = logging.getLogger(__name__)

PACK = __package__.rpartition(".")[0]
HEARTBEAT = 0.5
"""Seconds between signs of life; ``comfy run`` gives up after 120 seconds without one."""
LONG = 3.0
"""Seconds after which a call that has not come back shows how long it takes."""


class RewardLoraError(Exception):
    """What the user gave cannot be used; the message is one sentence that says why and what to do."""

    __module__ = "reward_lora"  # ComfyUI shows it to the user, and ours is a path


@contextmanager
def engine() -> Iterator[None]:
    """Run engine code inside a node.

    ComfyUI calls nodes under ``torch.inference_mode``, in which nothing made can ever carry a gradient: it
    is off inside. A refusal raised by the engine leaves as one sentence instead of a chain of tracebacks;
    anything else leaves as it is.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    except ModuleNotFoundError as error:
        sentence = (
            f"Reward LoRA {not_importable(error)} where ComfyUI runs; install what it needs: "
            f"{sys.executable} -m pip install -r {Path(__file__).resolve().parents[1] / 'requirements.txt'}"
        )
    except (ValueError, TrainingStopped) as error:
        if not _is_ours(error.__traceback__):
            raise
        log.debug("refused", exc_info=True)
        sentence = str(error)
    else:
        return
    raise RewardLoraError(sentence)


def _is_ours(traceback: TracebackType | None) -> bool:
    """Whether a line of this pack, not of a library it calls, raised the error."""
    module = ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return module.startswith(f"{PACK}.")


def to_frames(images: Tensor) -> Tensor:
    """IMAGE ``[T, H, W, C]`` to our ``[1, 3, T, H, W]``: a fresh tensor that gradients may pass."""
    return images[..., :3].float().clone().permute(3, 0, 1, 2)[None].contiguous()


def to_still(images: Tensor | None) -> Tensor | None:
    """The first picture of an IMAGE as ``[1, 3, H, W]``."""
    return None if images is None else to_frames(images[:1])[:, :, 0]


def to_images(clips: Tensor) -> Tensor:
    """Ours ``[N, 3, T, H, W]`` to an IMAGE ``[T, H, N * W, 3]``: clips side by side."""
    side_by_side = torch.cat(list(clips.detach().float().cpu()), dim=-1)
    return side_by_side.permute(1, 2, 3, 0).contiguous()


def picture_to_image(picture: np.ndarray) -> Tensor:
    """``[H, W, 3]`` uint8 to an IMAGE of one."""
    return torch.from_numpy(picture).float()[None] / 255


def make_room() -> None:
    """Have ComfyUI bring its own models off the device.

    As it does that itself, in inference mode: quantised weights that were moved outside of it cannot be used in it.
    """
    with torch.inference_mode():
        comfy.model_management.unload_all_models()


@contextmanager
def on_device(model: VideoModel | None = None, reward: Reward | None = None) -> Iterator[None]:
    """Bring what works to ComfyUI's device for the length of a block, and back to where it rests."""
    device = comfy.model_management.get_torch_device()
    rest = comfy.model_management.unet_offload_device()
    movable = [part for part in (model, reward) if hasattr(part, "to")]
    if device.type != "cpu":
        make_room()
    try:
        for part in movable:
            part.to(device)
        yield
    finally:
        for part in movable:
            part.to(rest)
        give_back()


@contextmanager
def placed(model: VideoModel, tick: Tick) -> Iterator[Tick]:
    """A tick that brings to ComfyUI's device what each phase needs; at the end everything is back where it rests."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        yield tick
        return
    make_room()
    placement = Placement(model, None, tick, plan_for("auto", model), device)
    try:
        yield placement
    finally:
        placement.clear()
        give_back()


@contextmanager
def lent(*parts: VideoModel | Reward) -> Iterator[torch.device]:
    """Clear ComfyUI's device for somebody who places ``parts`` there himself; they come back at the end."""
    device = comfy.model_management.get_torch_device()
    if device.type != "cpu":
        make_room()
    try:
        yield device
    finally:
        for part in parts:
            if hasattr(part, "to") and device.type != "cpu":
                part.to(comfy.model_management.unet_offload_device())
        gc.collect()  # a training leaves rings of objects behind
        give_back()


def give_back() -> None:
    """Return memory that nobody uses any more to GPU and system.

    glibc keeps what was freed in blocks of up to 32 MB, such as a LoRA's gradients, until it is asked for it.
    """
    comfy.model_management.soft_empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


class Progress:
    """The engine's tick: cancel point and sign of life; also the node's progress bar, text and live preview.

    As a context manager it shows signs of life by itself while a single call takes long.

    Args:
        total: What makes a whole.
        node_id: Of the node that shows it.
    """

    def __init__(self, total: int, node_id: str | None) -> None:
        self._bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self._total, self._done, self._node_id, self._sent = total, 0, node_id, 0.0
        self._phase, self._since, self._text = "starting", time.monotonic(), ""
        self._over = threading.Event()

    def __enter__(self) -> Progress:
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            seconds = time.monotonic() - self._since
            if seconds > LONG:
                say(f"{self._text or self._phase} ({seconds:.0f} s)", self._node_id)

    def __call__(self, phase: str) -> None:
        """Raise ``InterruptProcessingException`` if the user has cancelled."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        due = HEARTBEAT if phase == self._phase else HEARTBEAT / 5
        self._phase, self._since = phase, time.monotonic()
        if self._since - self._sent > due:
            self.show(*self._now())

    def _now(self) -> tuple[int, None, str]:
        """What a sign of life shows: how much is done, no picture, and a text or none."""
        return self._done, None, ""

    def show(self, done: int, picture: np.ndarray | None = None, text: str = "") -> None:
        """Move the bar, and show a picture ``[H, W, 3]`` uint8 and a text on the node. A cancel point too."""
        self._done, self._sent = done, time.monotonic()
        self._since = self._sent
        if text:
            self.say(text)
        preview = None if picture is None else ("JPEG", Image.fromarray(picture), max(picture.shape[:2]))
        self._bar.update_absolute(done, self._total, preview)

    def say(self, text: str) -> None:
        """Show a text on the node."""
        self._text = text
        say(text, self._node_id)


def downloading(node_id: str | None, *, megabytes: bool = False) -> Callable[[int, int], None]:
    """The bar of a download in percent, on request with megabytes in words; a cancel point too."""
    progress, shown = Progress(100, node_id), -1

    def report(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // total if total else 0
        if percent == shown:
            progress("download")
        else:
            progress.show(percent, text=f"{done >> 20} of {total >> 20} MiB" if megabytes else "")
            shown = percent

    return report


@contextmanager
def patience(text: str, node_id: str | None) -> Iterator[None]:
    """Show a text and the seconds gone while a long call, such as loading a model, reports nothing itself."""
    progress = Progress(1, node_id)
    progress.say(text)
    with progress:
        yield


def say(text: str, node_id: str | None) -> None:
    """Show a text on a node."""
    if node_id is not None:
        PromptServer.instance.send_progress_text(text, node_id)
