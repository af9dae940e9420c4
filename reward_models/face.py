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
from .preprocess import unit_range
from .scoring import CHUNK, check_clips, score_images

log = logging.getLogger(__name__)

LICENCE = "insightface's weights may be used for non-commercial research only"
DETECTORS = ("scrfd_10g_bnkps.onnx", "det_10g.onnx", "det_2.5g.onnx")
RECOGNIZERS = ("glintr100.onnx", "w600k_r50.onnx")
PACKS = ("antelopev2", "buffalo_l", "buffalo_m")


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


@dataclass(frozen=True)
class _Pool:
    """The faces of a reference: mean unit embedding ``[D]``, or one zero if there is no face; frames; faces."""

    mean: Tensor
    frames: int
    faces: int


class FaceIdentity:
    """Mean cosine, -1..1, between the faces of a clip and those of a reference picture or clip.

    The largest face of a frame counts. Frames without a face are left out; a clip in which no face is found (or whose
    reference shows none) scores 0, passes no gradient, and is reported in the log. Detection and alignment have no
    gradient; the aligned pixels have.

    Args:
        detector: Finds landmarks.
        network: Embeds aligned faces.
        chunk: Frames at once.

    Attributes:
        counts: Per sample of the last call to :meth:`score`, what was found.
    """

    name = "face"
    differentiable = True
    needs = frozenset({"reference"})

    def __init__(self, detector: FaceDetector, network: FaceNetwork, *, chunk: int = CHUNK) -> None:
        self.detector, self.network, self.chunk = detector, network.eval().requires_grad_(False), chunk
        self.counts: tuple[FaceCounts, ...] = ()
        self._pools: dict[str, _Pool] = {}

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
            prompts: Not read.
            reference: ``[B, 3, T, H, W]`` of any size and length, or ``[1, 3, T, H, W]`` for all samples; a picture
                is a clip of one frame.
        """
        check_clips(frames, prompts)
        if reference is None:
            raise ValueError("the face reward needs a reference: a picture or clip of the person")
        batch, _, count = frames.shape[:3]
        if reference.ndim != 5 or reference.shape[0] not in (1, batch):
            raise ValueError(
                f"the reference of {batch} videos must be [{batch} or 1, 3, T, H, W], got {list(reference.shape)}"
            )
        pools = [self._pool(clip) for clip in reference] * (batch // len(reference))
        seen: list[bool] = []

        def judge(images: Tensor, clips: list[int]) -> Tensor:
            embeddings, rows = self._embed(images)
            seen.extend(row in rows for row in range(len(images)))
            cosines = images.flatten(1)[:, 0] * 0
            if not rows:
                return cosines
            wanted = torch.stack([pools[clips[row]].mean.to(embeddings).expand(embeddings.shape[1]) for row in rows])
            return cosines.index_put(
                (torch.tensor(rows).to(cosines.device),), (embeddings * wanted).sum(-1).to(cosines)
            )

        cosines = score_images(frames, judge, self.device, self.chunk)
        valid = torch.tensor(seen).view(batch, count)
        self.counts = tuple(
            FaceCounts(count, int(faces), pool.frames, pool.faces)
            for faces, pool in zip(valid.sum(1), pools, strict=True)
        )
        for sample, found in enumerate(self.counts):
            if not (found.faces and found.reference_faces):
                what = "the clip" if found.reference_faces else "its reference"
                log.warning("sample %d: no face was found in %s, so it scores 0 without a gradient", sample, what)
        return cosines.sum(1) / valid.sum(1).clamp(min=1).to(cosines)

    @property
    def device(self) -> torch.device:
        return next(self.network.buffers()).device

    def to(self, device: torch.device | str) -> FaceIdentity:
        """Move the embedding network; returns itself."""
        self.network.to(device)
        self._pools.clear()
        return self

    def _embed(self, images: Tensor) -> tuple[Tensor, list[int]]:
        """Unit embeddings ``[n, D]`` of the faces in images ``[N, 3, H, W]``, and in which of them there is one."""
        landmarks = [self.detector.landmarks(image.detach()) for image in images]
        rows = [row for row, points in enumerate(landmarks) if points is not None]
        if not rows:
            return images.new_zeros(0), rows
        faces = torch.stack([crop_face(images[row], landmarks[row]) for row in rows])
        embeddings = self.network(faces.to(next(self.network.buffers()).dtype))
        return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1), rows

    @torch.inference_mode(False)  # what is kept may be needed by a graph later
    @torch.no_grad()
    def _pool(self, clip: Tensor) -> _Pool:
        """Of a reference ``[3, T, H, W]``; computed once, however often it is scored against."""
        content = hashlib.sha256(repr((clip.shape, clip.dtype)).encode())
        content.update(clip.detach().cpu().contiguous().view(torch.uint8).numpy())
        key = content.hexdigest()
        if key not in self._pools:
            parts = clip.transpose(0, 1).split(self.chunk)
            embedded = [self._embed(unit_range(part).to(self.device))[0] for part in parts]
            faces = [embedding for part in embedded for embedding in part]
            mean = torch.stack(faces).mean(0) if faces else torch.zeros((), device=self.device)
            self._pools[key] = _Pool(mean, clip.shape[1], len(faces))
        return self._pools[key]


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
