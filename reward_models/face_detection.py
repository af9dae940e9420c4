"""Where the largest face of a picture is: SCRFD (arXiv 2105.04714) through onnxruntime, and its 112x112 crop.

Detection has no gradient. The crop has: it samples the picture at fixed places.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import WeightFileError
from .iresnet import FACE_SIZE, open_session

STRIDES = (8, 16, 32)
# The second size is for pictures in which nothing is found at the first: SCRFD misses faces that fill a large picture.
DETECTION_SIZES = (640, 256)
# Eyes, nose and corners of the mouth in ArcFace's 112x112 crop, (x, y); insightface, utils/face_align.py.
ARCFACE_TEMPLATE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)


class FaceDetector:
    """SCRFD with five landmarks, as in the packs of insightface.

    Args:
        path: ``scrfd_10g_bnkps.onnx``, ``det_10g.onnx`` or a network with the same nine outputs.
        device: ``"cuda"`` is used where the installed onnxruntime can.
        threshold: Least score of a face.
        overlap: Of two boxes that overlap (IoU) by more, the one with the higher score stays.

    Raises:
        WeightFileError: The file is missing, damaged, or no SCRFD with landmarks.
    """

    def __init__(self, path: Path | str, device: str = "cpu", *, threshold: float = 0.5, overlap: float = 0.4) -> None:
        self._session = open_session(Path(path), device)
        self.threshold, self.overlap = threshold, overlap
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 3 * len(STRIDES):
            raise WeightFileError(
                f"{path} is no SCRFD with landmarks: it has {len(outputs)} outputs, not scores, boxes and landmarks "
                f"at strides {STRIDES}; choose scrfd_10g_bnkps.onnx (antelopev2) or det_10g.onnx (buffalo_l)"
            )
        self._path, self._input = path, inputs[0].name
        height, width = inputs[0].shape[2:]
        fixed = isinstance(height, int) and isinstance(width, int)
        self._sizes = ((height, width),) if fixed else tuple((size, size) for size in DETECTION_SIZES)

    @torch.no_grad()
    def landmarks(self, picture: Tensor) -> Tensor | None:
        """``[3, H, W]``, 0..1, to the five landmarks ``[5, 2]`` (x, y; pixels) of its largest face, or None."""
        for height, width in self._sizes:
            scale = min(height / picture.shape[1], width / picture.shape[2])
            inside = [max(1, round(size * scale)) for size in picture.shape[1:]]
            scaled = F.interpolate(picture[None].float(), inside, mode="bilinear", antialias=True)
            padded = F.pad(scaled, (0, width - inside[1], 0, height - inside[0])).clamp(0, 1)
            boxes, points = self._detect((padded * 255 - 127.5) / 128)
            if len(boxes):
                largest = (boxes[:, 2:] - boxes[:, :2]).prod(1).argmax()
                per_pixel = torch.tensor([picture.shape[2] / inside[1], picture.shape[1] / inside[0]])
                return points[largest] * per_pixel
        return None

    def _detect(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes ``[N, 4]`` (x1, y1, x2, y2) and landmarks ``[N, 5, 2]``, in pixels of the input ``[1, 3, H, W]``."""
        outputs = [torch.from_numpy(value) for value in self._session.run(None, {self._input: pixels.cpu().numpy()})]
        scores, boxes, points = [], [], []
        for level, stride in enumerate(STRIDES):
            score, box, point = (outputs[level + kind * len(STRIDES)] for kind in range(3))
            rows, columns = pixels.shape[2] // stride, pixels.shape[3] // stride
            anchors = score.numel() // (rows * columns)
            cells = anchors * rows * columns
            if cells == 0 or (score.numel(), box.numel(), point.numel()) != (cells, cells * 4, cells * 10):
                raise WeightFileError(
                    f"{self._path} is no SCRFD with landmarks: its outputs at stride {stride} have shapes "
                    f"{tuple(score.shape)}, {tuple(box.shape)} and {tuple(point.shape)}"
                )
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            centers = (torch.stack([x, y], -1) * stride).view(-1, 1, 2).repeat(1, anchors, 1).view(-1, 2).float()
            found = score.flatten() >= self.threshold
            centers, box, point = centers[found], box.view(-1, 4)[found] * stride, point.view(-1, 10)[found] * stride
            scores.append(score.flatten()[found])
            boxes.append(torch.cat([centers - box[:, :2], centers + box[:, 2:]], 1))
            points.append(centers[:, None] + point.view(-1, 5, 2))
        score, box, point = torch.cat(scores), torch.cat(boxes), torch.cat(points)
        sound = (box[:, 2:] > box[:, :2]).all(1) & (point.amax(1) > point.amin(1)).all(1)  # what can be aligned
        score, box, point = score[sound], box[sound], point[sound]
        kept = suppress(box, score, self.overlap)
        return box[kept], point[kept]


def suppress(boxes: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """Indices of the boxes ``[N, 4]`` that greedy non-maximum suppression keeps, highest score first."""
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    order, kept = scores.argsort(descending=True, stable=True), []
    while len(order):
        first, order = order[0], order[1:]
        kept.append(first)
        top_left = torch.maximum(boxes[first, :2], boxes[order, :2])
        bottom_right = torch.minimum(boxes[first, 2:], boxes[order, 2:])
        common = (bottom_right - top_left).clamp(min=0).prod(1)
        order = order[common <= overlap * (areas[first] + areas[order] - common)]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.long)


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """The rotation, uniform scale and shift ``[2, 3]`` that brings points nearest to others (least squares).

    Umeyama's estimate (PAMI 1991) without reflection. In the plane a rotation with scale is one complex factor, so
    the minimum has a closed form and needs no singular value decomposition.

    Args:
        source: ``[N, 2]``, not all the same point.
        target: ``[N, 2]``.
    """
    source, target = source.double(), target.double()
    a, b = source - source.mean(0), target - target.mean(0)
    norm = a.square().sum()
    real = (a * b).sum() / norm
    imaginary = (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum() / norm
    linear = torch.stack([torch.stack([real, -imaginary]), torch.stack([imaginary, real])])
    return torch.cat([linear, (target.mean(0) - linear @ source.mean(0))[:, None]], 1)


def crop_face(picture: Tensor, landmarks: Tensor) -> Tensor:
    """The aligned face ``[3, 112, 112]`` of ``[3, H, W]``; differentiable in the pixels.

    The same as ``cv2.warpAffine`` of insightface's ``norm_crop`` (bilinear, black outside), but only the crop is
    sampled. A pixel's centre lies at whole coordinates, as in OpenCV.
    """
    matrix = similarity(landmarks.cpu(), torch.tensor(ARCFACE_TEMPLATE))
    inverse = torch.linalg.inv(matrix[:, :2])
    steps = torch.arange(FACE_SIZE, dtype=torch.float64)
    x, y = torch.meshgrid(steps, steps, indexing="xy")
    places = (torch.stack([x, y], -1) - matrix[:, 2]) @ inverse.T
    height, width = picture.shape[1:]
    grid = (2 * places + 1) / torch.tensor([width, height], dtype=torch.float64) - 1
    return F.grid_sample(picture[None], grid[None].to(picture), mode="bilinear", align_corners=False)[0]
