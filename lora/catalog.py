"""The published reward LoRAs: what each was made for, how to use it, and where it lies."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from ..hub import Progress, RemoteFile, fetch


@dataclass(frozen=True)
class PublishedLora:
    """One published reward LoRA.

    Attributes:
        file: Its name.
        repository: On the hub, ``owner/name``.
        base_model: On the hub, ``owner/name``: the model it was trained on and fits.
        reward: What it was trained towards.
        rank, alpha: Of every module.
        batch_size, steps: Of the training; 0 where the publisher does not say.
        strength: At which the publisher shows it.
        licence: Of the file.
        sha256: Where the publisher announces it outside of the hub; else the download is held to the hub's own.
    """

    file: str
    repository: str
    base_model: str
    reward: str
    rank: int
    alpha: float
    batch_size: int
    steps: int
    strength: float
    licence: str
    sha256: str = ""

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return Path(self.file).stem

    @property
    def address(self) -> str:
        return f"hf:{self.repository}/{self.file}"

    def summary(self) -> str:
        """One line."""
        trained = f", {self.steps:,} steps of {self.batch_size}" if self.steps else ""
        return (
            f"{self.reward} for {self.base_model}: rank {self.rank}, alpha {self.alpha:g}{trained}; "
            f"shown at strength {self.strength:g}; {self.licence}"
        )


_ROWS = """
Wan2.1-Fun-Reward-LoRAs           Wan2.1-Fun-1.3B-InP         HPS2.1  8   5000 0.5
Wan2.1-Fun-Reward-LoRAs           Wan2.1-Fun-1.3B-InP         MPS     8   7500 0.7
Wan2.1-Fun-Reward-LoRAs           Wan2.1-Fun-14B-InP          HPS2.1 32   3000 0.7
Wan2.1-Fun-Reward-LoRAs           Wan2.1-Fun-14B-InP          MPS     8   4500 0.7
CogVideoX-Fun-V1.1-Reward-LoRAs   CogVideoX-Fun-V1.1-5b-InP   HPS2.1  8   1500 0.7
CogVideoX-Fun-V1.1-Reward-LoRAs   CogVideoX-Fun-V1.1-2b-InP   HPS2.1  8   3000 0.7
CogVideoX-Fun-V1.1-Reward-LoRAs   CogVideoX-Fun-V1.1-5b-InP   MPS     8   5500 0.7
CogVideoX-Fun-V1.1-Reward-LoRAs   CogVideoX-Fun-V1.1-2b-InP   MPS     8  16000 0.7
EasyAnimateV5-Reward-LoRAs        EasyAnimateV5-12b-zh-InP    HPS2.1  8   2500 0.7
EasyAnimateV5-Reward-LoRAs        EasyAnimateV5-7b-zh-InP     HPS2.1  8   3500 0.7
EasyAnimateV5-Reward-LoRAs        EasyAnimateV5-12b-zh-InP    MPS     8   2500 0.7
EasyAnimateV5-Reward-LoRAs        EasyAnimateV5-7b-zh-InP     MPS     8   2000 0.7
"""
"""Alibaba's: repository, base model, reward, batch size, steps, strength. All have rank 128 and alpha 64."""


def _alibaba(row: str) -> PublishedLora:
    repository, base, reward, batch, steps, strength = row.split()
    return PublishedLora(
        file=f"{base}-{reward}.safetensors",
        repository=f"alibaba-pai/{repository}",
        base_model=f"alibaba-pai/{base}",
        reward={"HPS2.1": "HPS v2.1"}.get(reward, reward),
        rank=128,
        alpha=64,
        batch_size=int(batch),
        steps=int(steps),
        strength=float(strength),
        licence="Apache-2.0",
    )


def _vader(name: str, reward: str, rank: int) -> PublishedLora:
    file, repository = f"vader_videocrafter_{name.lower()}.pt", f"zheyangqin/VADER_VideoCrafter_{name}"
    return PublishedLora(file, repository, "VideoCrafter/VideoCrafter2", reward, rank, 8, 0, 0, 1.0, "MIT")


CATALOG: dict[str, PublishedLora] = {
    entry.name: entry
    for entry in (
        *map(_alibaba, _ROWS.strip().splitlines()),
        _vader("PickScore", "PickScore", 16),
        _vader("HPS_Aesthetic", "HPS v2.1 + Aesthetic", 8),
    )
}
"""By name. EasyAnimate V5.1 has none: its reward LoRAs are merged into the published base."""


def find(name: str) -> PublishedLora:
    """An entry by its name or file name. Raises ``ValueError`` that names the nearest."""
    found = next((entry for entry in CATALOG.values() if name in (entry.name, entry.file)), None)
    if found is None:
        near = ", ".join(difflib.get_close_matches(name, CATALOG, 3, 0.0))
        raise ValueError(f"no published LoRA is called {name!r}; the nearest are {near}")
    return found


def download(entry: PublishedLora, folder: Path | str, progress: Progress | None = None) -> Path:
    """Fetch one into a folder, with resume and checksum; a file that is there already is taken as it is.

    Raises:
        WeightFileError: Offline, refused or cut off, a wrong checksum, or no room on the disk.
    """
    return fetch(RemoteFile(entry.address, entry.sha256), Path(folder) / entry.file, progress=progress)
