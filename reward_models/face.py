"""Face identity: is the person of the reference in the clip? Cosine between ArcFace embeddings of faces.

As Reward FL (ROLL) and IPRO score faces: the largest face of each frame is aligned by its five landmarks and embedded
by glintr100; a clip's score is the mean over its frames of the mean cosine to all faces of the reference. Other than
there, colours are RGB as the network was trained on, and the crop's pixels lie where OpenCV's would.

The weights are insightface's packs. **Their licence allows non-commercial research only**, however they were obtained;
none are shipped here.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import WeightFileError, write_atomically
from ..hub import Progress, RemoteFile, fetch
from .face_detection import FaceDetector, crop_face
from .files import Part, Request, RewardEntry
from .iresnet import FaceNetwork

log = logging.getLogger(__name__)

LICENCE = "insightface's weights may be used for non-commercial research only"
DETECTORS = ("scrfd_10g_bnkps.onnx", "det_10g.onnx", "det_2.5g.onnx")
RECOGNIZERS = ("glintr100.onnx", "w600k_r50.onnx")
PACKS = ("antelopev2", "buffalo_l", "buffalo_m")
MAX_FACES_AT_ONCE = 16


@dataclass(frozen=True)
class FaceCounts:
    """In how many frames of a sample a face was found; the others were masked.

    Attributes:
        frames: Frames of the clip.
        faces: Those with a face.
        reference_frames: Frames of the reference.
        reference_faces: Those with a face.
    """

    frames: int
    faces: int
    reference_frames: int
    reference_faces: int


class FaceIdentity:
    """Mean cosine, -1..1, between the faces of a clip and those of a reference picture or clip.

    The largest face of a frame counts. Frames without a face are left out; a clip in which no face is found (or whose
    reference shows none) scores 0, passes no gradient, and is reported in the log. Detection and alignment have no
    gradient; the aligned pixels have.

    Args:
        detector: Finds landmarks.
        network: Embeds aligned faces.

    Attributes:
        counts: Per sample of the last call to :meth:`score`, what was found.
    """

    name = "face"
    differentiable = True
    needs = frozenset({"reference"})

    def __init__(self, detector: FaceDetector, network: FaceNetwork) -> None:
        self.detector, self.network = detector, network.eval().requires_grad_(False)
        self.counts: tuple[FaceCounts, ...] = ()
        self._references: dict[str, tuple[Tensor | None, int]] = {}

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> FaceIdentity:
        """Read a pack of insightface: ``antelopev2`` or ``buffalo_l``, also where its zip nested it in itself.

        Raises:
            WeightFileError: The folder lacks a file, or one is damaged or another network.
        """
        detector, network = (_find(Path(folder), names) for names in (DETECTORS, RECOGNIZERS))
        if not detector or not network:
            names = " or ".join(RECOGNIZERS if detector else DETECTORS)
            raise WeightFileError(
                f"{folder} holds no {names}; unpack antelopev2.zip or buffalo_l.zip there ({LICENCE})"
            )
        return cls(FaceDetector(detector, device), FaceNetwork.load(network).to(device))

    def score(self, frames: Tensor, prompts: Sequence[str], *, reference: Tensor | None = None) -> Tensor:
        """See :class:`.protocol.Reward`.

        Args:
            frames: ``[B, 3, T, H, W]``.
            prompts: Not looked at.
            reference: ``[B, 3, T, H, W]`` of any size and length, or ``[1, 3, T, H, W]`` for all samples; a picture
                is a clip of one frame.
        """
        if reference is None:
            raise ValueError("the face reward needs a reference: a picture or clip of the person")
        if reference.dim() != 5 or reference.shape[0] not in (1, len(frames)):
            raise ValueError(
                f"the reference of {len(frames)} videos must be [{len(frames)} or 1, 3, T, H, W], "
                f"got {list(reference.shape)}"
            )
        reference = reference.expand(len(frames), *reference.shape[1:])
        scores, counts = [], []
        for index, (clip, shown) in enumerate(zip(frames, reference, strict=True)):
            wanted, reference_faces = self._reference(shown)
            mean, faces = self._mean_embedding(clip) if wanted is not None else (None, 0)
            if mean is None:
                what = "the clip" if wanted is not None else "its reference"
                log.warning("sample %d: no face was found in %s, so it scores 0 without a gradient", index, what)
                scores.append(clip[:, 0, 0, 0].sum() * 0)
            else:
                scores.append((mean * wanted).sum())
            counts.append(FaceCounts(clip.shape[1], faces, shown.shape[1], reference_faces))
        self.counts = tuple(counts)
        return torch.stack([score.to(self.device) for score in scores]).float()

    @property
    def device(self) -> torch.device:
        return next(self.network.buffers()).device

    def to(self, device: torch.device | str) -> FaceIdentity:
        """Move the embedding network; returns itself."""
        self.network.to(device)
        self._references.clear()
        return self

    def _mean_embedding(self, clip: Tensor) -> tuple[Tensor | None, int]:
        """Mean unit embedding ``[D]`` of the faces of a clip ``[3, T, H, W]``, and in how many frames there is one."""
        dtype = next(self.network.buffers()).dtype
        faces = []
        for frame in clip.unbind(1):
            landmarks = self.detector.landmarks(frame.detach())
            if landmarks is not None:
                faces.append(crop_face(frame.to(dtype), landmarks))
        if not faces:
            return None, 0
        parts = torch.stack(faces).to(self.device).split(MAX_FACES_AT_ONCE)
        embeddings = torch.cat([F.normalize(self.network(part), dim=-1) for part in parts])
        return embeddings.mean(0), len(faces)

    @torch.inference_mode(False)  # what is kept may be needed by a graph later
    @torch.no_grad()
    def _reference(self, clip: Tensor) -> tuple[Tensor | None, int]:
        """As :meth:`_mean_embedding`; once per reference, however often it is scored against."""
        content = hashlib.sha256(repr((clip.shape, clip.dtype)).encode())
        content.update(clip.detach().cpu().contiguous().view(torch.uint8).numpy())
        key = content.hexdigest()
        if key not in self._references:
            self._references[key] = self._mean_embedding(clip)
        return self._references[key]


@dataclass(frozen=True)
class Pack(Part):
    """A published zip of insightface, unpacked: its folder, or the folder around it."""

    def at(self, path: Path) -> bool:
        return bool(_find(path, DETECTORS) and _find(path, RECOGNIZERS))

    def fetch(self, target: Path, progress: Progress | None) -> Path:
        archive = fetch(self.source, target / f"{self.name}.zip", progress=progress)
        try:
            with zipfile.ZipFile(archive) as packed:
                for member in packed.namelist():
                    if Path(member).name in DETECTORS + RECOGNIZERS:
                        write_atomically(target / Path(member).name, partial(_unpack, packed, member))
        except zipfile.BadZipFile:
            raise WeightFileError(f"{archive} is damaged; delete it and load again") from None
        archive.unlink()
        return target

    def __str__(self) -> str:
        return f"{self.source.url}, unpacked ({LICENCE}),"


def _unpack(packed: zipfile.ZipFile, member: str, target: Path) -> None:
    with packed.open(member) as source, target.open("wb") as output:
        shutil.copyfileobj(source, output)


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of these files in a pack, in the same pack nested in itself, or in a pack inside the folder."""
    places = (folder, *(folder / pack for pack in PACKS))
    return next((place / name for place in places for name in names if (place / name).is_file()), None)


def _load(request: Request) -> FaceIdentity:
    log.warning("%s", LICENCE)
    return FaceIdentity.load(request.files["pack"], request.device)


ENTRIES = {
    "face": RewardEntry(
        _load,
        "Face identity: cosine to the faces of a reference (-1..1)",
        LICENCE,
        {
            "pack": Pack(
                "antelopev2",
                RemoteFile(
                    "https://github.com/deepinsight/insightface/releases/download/v0.7/antelopev2.zip",
                    sha256="8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5",
                    size=360662982,
                ),
            )
        },
        extra="face",
    )
}
