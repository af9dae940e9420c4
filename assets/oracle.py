"""Reads a clip of the tiny world without learning: what is its shape, colour, direction, background?

It is the truth against which a learned reward is measured. Every reading may be -1,
undecidable: there is no object, no motion, or nothing that resembles a shape of the world.
Rules and thresholds were set on clips that went through the tiny autoencoder, which softens
corners; sharp clips are easier.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import world

MIN_CONTRAST = 0.25  # RGB distance between object and background
AREA = (0.02, 0.45)  # share of the frame an object may cover
MIN_MOTION = 3.0  # pixels between the first and the last frame
MIN_OVERLAP = 0.60  # with the best fitting shape, intersection over union
MAX_COLOUR_DISTANCE = 0.45  # RGB distance to the nearest palette colour

# area and height of the centroid above the centre, both for radius 1, of coverage()'s shapes
_AREA = {"circle": 3.1416, "square": 3.1400, "triangle": 2.3981}
_CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 0.21}


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in a batch of clips.

    Attributes:
        colour: `[B]`, index into `world.BACKGROUNDS` (an object may be gray), -1 undecidable.
        shape: `[B]`, index into `world.SHAPES`, -1 undecidable.
        direction: `[B]`, index into `world.DIRECTIONS`, -1 when the object hardly moves.
        background: `[B]`, index into `world.BACKGROUNDS`, -1 when no palette colour is near.
        motion: `[B]`, pixels from the first to the last centroid, 0 without an object.
        undecidable: `[B]`, bool, no object in half of the frames or in the first or last one.
    """

    colour: Tensor
    shape: Tensor
    direction: Tensor
    background: Tensor
    motion: Tensor
    undecidable: Tensor


def _nearest(colours: Tensor) -> Tensor:
    """The index of the nearest palette colour of `[B, 3]`, -1 when none is near."""
    palette = torch.tensor(list(world.PALETTE.values()), device=colours.device)
    distance, index = torch.cdist(colours, palette).min(1)
    return torch.where(distance <= MAX_COLOUR_DISTANCE, index, -1)


def _border(frames: Tensor) -> Tensor:
    """The two outer rings of pixels: `[B, 3, N]`."""
    rings = torch.ones(frames.shape[-2:], dtype=torch.bool, device=frames.device)
    rings[2:-2, 2:-2] = False
    return frames[..., rings].flatten(2)


def _overlaps(mask: Tensor, area: Tensor, centre: Tensor) -> Tensor:
    """Intersection over union of masks `[N, S, S]` with each shape of equal area and centroid: `[N, 3]`."""
    columns = []
    for index, name in enumerate(world.SHAPES):
        radius = (area / _AREA[name]).sqrt()
        middle = torch.stack([centre[:, 0], centre[:, 1] - _CENTROID[name] * radius], 1)
        ideal = world.coverage(torch.full_like(radius, index, dtype=torch.long), middle, radius, mask.shape[-1])
        columns.append(torch.minimum(mask, ideal).sum((1, 2)) / torch.maximum(mask, ideal).sum((1, 2)).clamp(min=1e-6))
    return torch.stack(columns, 1)


@torch.no_grad()
def read(frames: Tensor) -> Reading:
    """Read clips.

    Args:
        frames: `[B, 3, T, 32, 32]`, 0..1, on any device.

    Returns:
        One reading per clip.
    """
    frames = frames.detach().float().clamp(0.0, 1.0)
    count, _, length, size, _ = frames.shape
    background = _border(frames).median(-1).values
    distance = (frames - background[:, :, None, None, None]).square().sum(1).sqrt()
    # the object's own contrast: the level that the 4 % most different pixels exceed
    peak = distance.flatten(1).quantile(0.96, dim=1).clamp(min=1e-6)
    soft = (distance / peak[:, None, None, None]).clamp(max=1.0)
    hard = soft > 0.5
    share = hard.float().mean((2, 3))
    present = (share >= AREA[0]) & (share <= AREA[1]) & (peak >= MIN_CONTRAST)[:, None]
    undecidable = (present.float().mean(1) < 0.5) | ~present[:, 0] | ~present[:, -1]

    inside = torch.where(hard[:, None], frames, torch.nan).flatten(2)
    colour = _nearest(inside.nanmedian(-1).values.nan_to_num(-9.0))

    weight = hard.float()
    grid = torch.arange(size, device=frames.device) + 0.5
    total = weight.sum((2, 3)).clamp(min=1.0)
    centre = torch.stack([(weight.sum(2) * grid).sum(-1) / total, (weight.sum(3) * grid).sum(-1) / total], -1)
    path = centre[:, -1] - centre[:, 0]
    motion = torch.where(undecidable, 0.0, path.norm(dim=1))
    axes = torch.tensor([world.STEPS_OF[name] for name in world.DIRECTIONS], device=frames.device)
    direction = torch.where(motion > MIN_MOTION, (path @ axes.T).argmax(1), -1)

    # near its border a soft mask follows the exact outline better than a hard one
    outline = ((soft - 0.25) / 0.5).clamp(0.0, 1.0)
    area = outline.sum((2, 3)).clamp(min=1e-6)
    middle = torch.stack([(outline.sum(2) * grid).sum(-1) / area, (outline.sum(3) * grid).sum(-1) / area], -1)
    overlap = _overlaps(outline.flatten(0, 1), area.flatten(), middle.flatten(0, 1)).view(count, length, -1)
    seen = present.float()[..., None]
    overlap = (overlap * seen).sum(1) / seen.sum(1).clamp(min=1.0)
    best, shape = overlap.max(1)
    shape = torch.where((best >= MIN_OVERLAP) & ~undecidable, shape, -1)

    return Reading(
        colour=torch.where(undecidable, -1, colour),
        shape=shape,
        direction=direction,
        background=_nearest(background),
        motion=motion,
        undecidable=undecidable,
    )


def judge(frames: Tensor, captions: list[str]) -> dict[str, Tensor]:
    """Compare clips with their captions.

    Args:
        frames: `[B, 3, T, 32, 32]`, 0..1.
        captions: B captions of the world.

    Returns:
        Float tensors `[B]`: `colour`, `shape`, `direction`, `background` (1 right, 0 wrong or
        undecidable), `all` (their product), `undecidable` (1 no object) and `motion` (pixels).

    Raises:
        ValueError: the numbers of clips and captions differ, or a caption is not of this world.
    """
    if len(captions) != frames.shape[0]:
        raise ValueError(f"{frames.shape[0]} clips but {len(captions)} captions; give one caption per clip")
    wanted = [world.parse(caption) for caption in captions]
    found = read(frames)

    def right(seen: Tensor, names: tuple[str, ...], values: list[str]) -> Tensor:
        return (seen == torch.tensor([names.index(v) for v in values], device=seen.device)).float()

    scores = {
        "colour": right(found.colour, world.BACKGROUNDS, [w.colour for w in wanted]),
        "shape": right(found.shape, world.SHAPES, [w.shape for w in wanted]),
        "direction": right(found.direction, world.DIRECTIONS, [w.direction for w in wanted]),
        "background": right(found.background, world.BACKGROUNDS, [w.background for w in wanted]),
    }
    scores["all"] = torch.stack(list(scores.values())).prod(0)
    scores["undecidable"] = found.undecidable.float()
    scores["motion"] = found.motion
    return scores


def mean_scores(scores: dict[str, Tensor]) -> dict[str, float]:
    """Average `judge`'s tensors over the clips."""
    return {name: value.float().mean().item() for name, value in scores.items()}
