"""A video world small enough to train on two CPU cores, and known completely.

One coloured shape moves in a straight line over a plain background; the caption says all
there is to know: "a red circle moves right on a blue background". 288 captions exist.
Geometry is drawn from a `torch.Generator`, so a seed repeats a clip exactly.

Frames are `[B, 3, T, H, W]`, RGB, float32, 0..1. Colours keep away from 0 and 1, so that a
decoder that clamps still passes gradients.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

SIZE = 32
FRAMES = 9

PALETTE = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.12, 0.72, 0.20),
    "blue": (0.12, 0.20, 0.90),
    "yellow": (0.92, 0.85, 0.12),
    "black": (0.07, 0.07, 0.07),
    "white": (0.93, 0.93, 0.93),
    "gray": (0.50, 0.50, 0.50),
}
COLOURS = ("red", "green", "blue", "yellow")
BACKGROUNDS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("right", "left", "up", "down")
STEPS_OF = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

RADIUS = (5.5, 7.5)  # pixels
TRAVEL = (8.0, 13.0)  # pixels between first and last frame
JITTER = 0.03  # of every colour channel


@dataclass(frozen=True)
class Attributes:
    """What a caption says.

    Attributes:
        colour: one of `COLOURS`.
        shape: one of `SHAPES`.
        direction: one of `DIRECTIONS`.
        background: one of `BACKGROUNDS`, never equal to `colour`.
    """

    colour: str
    shape: str
    direction: str
    background: str

    def __post_init__(self):
        for value, allowed in (
            (self.colour, COLOURS),
            (self.shape, SHAPES),
            (self.direction, DIRECTIONS),
            (self.background, BACKGROUNDS),
        ):
            if value not in allowed:
                raise ValueError(f"{value!r} is not of this world; allowed: {', '.join(allowed)}")
        if self.colour == self.background:
            raise ValueError(f"colour and background are both {self.colour!r}; they must differ")

    @property
    def caption(self) -> str:
        """The sentence that `parse` reads back."""
        return f"a {self.colour} {self.shape} moves {self.direction} on a {self.background} background"


def parse(caption: str) -> Attributes:
    """Read the attributes from a caption.

    Raises:
        ValueError: the sentence is not one of the world's captions.
    """
    words = caption.lower().split()
    if len(words) != 9:
        raise ValueError(
            f"not a caption of this world: {caption!r}; try 'a red circle moves right on a blue background'"
        )
    found = Attributes(colour=words[1], shape=words[2], direction=words[4], background=words[7])
    if found.caption.split() != words:
        raise ValueError(f"not a caption of this world: {caption!r}; the nearest is {found.caption!r}")
    return found


def _all_attributes() -> list[tuple[Attributes, int]]:
    rows = []
    for (c, colour), (s, shape), (d, direction) in product(
        enumerate(COLOURS), enumerate(SHAPES), enumerate(DIRECTIONS)
    ):
        backgrounds = [name for name in BACKGROUNDS if name != colour]
        rows += [
            (Attributes(colour, shape, direction, background), (c + s + d + b) % 2)
            for b, background in enumerate(backgrounds)
        ]
    return rows


def all_captions() -> list[str]:
    """All 288 captions, in a fixed order."""
    return [attributes.caption for attributes, _ in _all_attributes()]


def split_captions() -> tuple[list[str], list[str]]:
    """Captions for reward training and held-out captions, 144 each.

    The parity of the attribute indices decides, as on a chessboard: the halves are disjoint and
    every value of every attribute is equally frequent in both.
    """
    rows = _all_attributes()
    return [a.caption for a, p in rows if p == 0], [a.caption for a, p in rows if p == 1]


def write_prompts(train: Path, test: Path) -> None:
    """Write the two halves of `split_captions`, one caption per line."""
    for path, captions in zip((train, test), split_captions(), strict=True):
        path.write_text("\n".join(captions) + "\n", encoding="utf-8")


def coverage(shape: Tensor, centre: Tensor, radius: Tensor, size: int = SIZE) -> Tensor:
    """How much of each pixel a shape covers, with soft edges one pixel wide.

    Args:
        shape: `[N]` indices into `SHAPES`.
        centre: `[N, 2]` x and y in pixels.
        radius: `[N]` pixels; the three shapes of one radius are about equally large.
        size: frame height and width.

    Returns:
        `[N, size, size]`, 0..1.
    """
    grid = torch.arange(size, device=centre.device, dtype=torch.float32) + 0.5
    x = grid[None, None, :] - centre[:, 0, None, None]
    y = grid[None, :, None] - centre[:, 1, None, None]
    r = radius[:, None, None]
    circle = torch.sqrt(x * x + y * y) - r
    square = torch.maximum(x.abs(), y.abs()) - 0.886 * r
    # an upright triangle: the base below, two sides with slope 2
    base = y - 0.94 * r
    sides = (2.0 * x.abs() - y - 1.25 * r) / 5.0**0.5
    triangle = torch.maximum(base, sides)
    signed = torch.stack([circle, square, triangle])
    index = shape[None, :, None, None].expand(1, -1, size, size)
    return (0.5 - signed.gather(0, index)[0]).clamp(0.0, 1.0)


def layout(captions: list[str], generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the geometry and the exact colours of clips, on the generator's device.

    Returns:
        shape `[B]`, radius `[B]`, start and end `[B, 2]` (centres, pixels), foreground and
        background `[B, 3]`.
    """
    attributes = [parse(caption) for caption in captions]
    count, device = len(captions), generator.device
    uniform = torch.rand(count, 10, generator=generator, device=device)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * uniform[:, 0]
    travel = TRAVEL[0] + (TRAVEL[1] - TRAVEL[0]) * uniform[:, 1]
    step = torch.tensor([STEPS_OF[a.direction] for a in attributes], device=device)
    path = step * travel[:, None]
    # the whole path stays a pixel inside the frame
    margin = radius[:, None] + 1.0 + 0.5 * path.abs()
    middle = margin + (SIZE - 2.0 * margin).clamp(min=0.0) * uniform[:, 2:4]
    jitter = JITTER * (2.0 * uniform[:, 4:10] - 1.0)
    colour = torch.tensor([PALETTE[a.colour] for a in attributes], device=device)
    background = torch.tensor([PALETTE[a.background] for a in attributes], device=device)
    return {
        "shape": torch.tensor([SHAPES.index(a.shape) for a in attributes], device=device),
        "radius": radius,
        "start": middle - 0.5 * path,
        "end": middle + 0.5 * path,
        "foreground": colour + jitter[:, :3],
        "background": background + jitter[:, 3:],
    }


def render_with_mask(captions: list[str], generator: torch.Generator, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    """Render clips and say where the object is.

    Returns:
        Frames `[B, 3, frames, 32, 32]` and coverage `[B, 1, frames, 32, 32]`, both 0..1.
    """
    clip = layout(captions, generator)
    count = len(captions)
    when = torch.linspace(0.0, 1.0, frames, device=generator.device)[None, :, None]
    centre = clip["start"][:, None] * (1.0 - when) + clip["end"][:, None] * when
    repeat = lambda value: value.repeat_interleave(frames, 0)  # noqa: E731
    mask = coverage(repeat(clip["shape"]), centre.reshape(-1, 2), repeat(clip["radius"]))
    mask = mask.reshape(count, 1, frames, SIZE, SIZE)
    foreground = clip["foreground"][:, :, None, None, None]
    background = clip["background"][:, :, None, None, None]
    return background + mask * (foreground - background), mask


def render(captions: list[str], generator: torch.Generator) -> Tensor:
    """Render one clip per caption: `[B, 3, 9, 32, 32]`, 0..1."""
    return render_with_mask(captions, generator)[0]


def draw_captions(count: int, generator: torch.Generator) -> list[str]:
    """Draw captions uniformly, with replacement."""
    captions = all_captions()
    index = torch.randint(len(captions), (count,), generator=generator, device=generator.device)
    return [captions[i] for i in index.tolist()]
