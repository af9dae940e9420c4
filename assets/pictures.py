"""Graded pictures that teach the tiny CLIP: good frames, wrong colours, and every kind of wreck.

A CLIP that saw only good frames rewards erasing the object. So half of the pictures here are
spoiled on purpose, and each carries exact attribute scores, from which the similarity it
deserves to any caption follows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import world

WEIGHTS = {"colour": 0.55, "shape": 0.20, "background": 0.10, "object": 0.15}  # sum 1
WRECK = -0.10  # similarity of a frame without an intact object, whatever the caption
CLOSE, FAR = 0.05, 1.35  # RGB distances that score 1 and 0, linear between: no two colours are without a slope


@dataclass(frozen=True)
class Pictures:
    """Frames and what they show.

    Attributes:
        frames: `[N, 3, 32, 32]`, 0..1.
        colour: `[N, 4]`, how much the object has each of `world.COLOURS`, 0..1.
        shape: `[N, 3]`, one-hot over `world.SHAPES`.
        background: `[N, 7]`, likewise over `world.BACKGROUNDS`.
        integrity: `[N]`, overlap of the object with the ideal one, 0..1.
        intact: `[N]`, bool: a true frame of the world.
        label: `[N]`, index of the right caption in `captions()`, meaningful where intact.
    """

    frames: Tensor
    colour: Tensor
    shape: Tensor
    background: Tensor
    integrity: Tensor
    intact: Tensor
    label: Tensor

    def similarity(self) -> Tensor:
        """The cosine each picture deserves to each caption of `captions()`: `[N, 72]`."""
        device = self.frames.device
        index = torch.tensor([indices for _, indices in _captions()], device=device)
        graded = WEIGHTS["object"] + (
            WEIGHTS["colour"] * self.colour[:, index[:, 0]]
            + WEIGHTS["shape"] * self.shape[:, index[:, 1]]
            + WEIGHTS["background"] * self.background[:, index[:, 2]]
        )
        whole = self.integrity[:, None]
        return whole * graded + (1.0 - whole) * WRECK


def _captions() -> list[tuple[tuple[str, str, str], tuple[int, int, int]]]:
    rows = []
    for c, colour in enumerate(world.COLOURS):
        for s, shape in enumerate(world.SHAPES):
            for b, background in enumerate(world.BACKGROUNDS):
                if background != colour:
                    rows.append(((colour, shape, background), (c, s, b)))
    return rows


def captions(generator: torch.Generator) -> list[str]:
    """The 72 captions that one frame can tell apart, each with a random direction."""
    rows = _captions()
    drawn = torch.randint(len(world.DIRECTIONS), (len(rows),), generator=generator, device=generator.device)
    return [
        world.Attributes(colour, shape, world.DIRECTIONS[d], background).caption
        for ((colour, shape, background), _), d in zip(rows, drawn.tolist(), strict=True)
    ]


def colour_score(rgb: Tensor, names: tuple[str, ...]) -> Tensor:
    """How much `[N, 3]` looks like each named colour: `[N, len(names)]`, 1 right, 0 wrong."""
    palette = torch.tensor([world.PALETTE[name] for name in names], device=rgb.device)
    distance = torch.cdist(rgb, palette)
    return (1.0 - (distance - CLOSE) / (FAR - CLOSE)).clamp(0.0, 1.0)


def _blocks(count: int, cell: int, generator: torch.Generator) -> Tensor:
    """Random uniform values, constant on cells of `cell` pixels: `[count, 32, 32]`."""
    side = world.SIZE // cell
    coarse = torch.rand(count, 1, side, side, generator=generator, device=generator.device)
    return F.interpolate(coarse, size=world.SIZE, mode="nearest")[:, 0]


def _sides(count: int, generator: torch.Generator, centre: Tensor, spread: float) -> Tensor:
    """Half planes at random angles and offsets around `centre`: bool `[count, 32, 32]`."""
    device = generator.device
    angle = 6.2832 * torch.rand(count, generator=generator, device=device)
    offset = spread * (2.0 * torch.rand(count, generator=generator, device=device) - 1.0)
    grid = torch.arange(world.SIZE, device=device) + 0.5
    x = grid[None, None, :] - centre[:, 0, None, None]
    y = grid[None, :, None] - centre[:, 1, None, None]
    return x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None] > offset[:, None, None]


def draw(count: int, generator: torch.Generator) -> Pictures:
    """Draw pictures: two fifths true frames, a fifth with other colours, the rest spoiled."""
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    names = world.draw_captions(count, generator)
    wanted = [world.parse(name) for name in names]
    clip = world.layout(names, generator)
    when = uniform(count, 1)
    centre = clip["start"] * (1.0 - when) + clip["end"] * when
    radius, shape = clip["radius"], clip["shape"]
    foreground, background = clip["foreground"], clip["background"]
    ideal = world.coverage(shape, centre, radius)

    kind = uniform(count)
    intact = kind < 0.40
    recoloured = (kind >= 0.40) & (kind < 0.62)
    # a blend with another palette colour, or (every fourth) any colour at all
    palette = torch.tensor([world.PALETTE[name] for name in world.BACKGROUNDS], device=device)
    other = palette[torch.randint(len(palette), (count,), generator=generator, device=device)]
    other = torch.where(uniform(count, 1) < 0.25, uniform(count, 3), other)
    share = uniform(count, 1)
    second = torch.where(recoloured[:, None], foreground + share * (other - foreground), foreground)
    # half of the recoloured objects are of two colours, split along a line
    halves = _sides(count, generator, centre, 5.0) & (uniform(count) < 0.5)[:, None, None]
    first_colour = torch.where((halves.flatten(1).any(1) & recoloured)[:, None], foreground, second)
    object_rgb = torch.where(halves[:, None], first_colour[:, :, None, None], second[:, :, None, None])

    mask = ideal.clone()
    # spoiled: 0 empty, 1 partly erased, 2 torn in blocks, 3 wrong size, 4 clutter, 5 noise
    spoil = torch.where(kind < 0.62, -1, ((kind - 0.62) / 0.38 * 6.0).long().clamp(max=5))
    pick = lambda number: (spoil == number)[:, None, None]  # noqa: E731
    cell = 2 if uniform(1).item() < 0.5 else 4
    erased = mask * _sides(count, generator, centre, 6.0)
    torn = (mask + (_blocks(count, cell, generator) < uniform(count, 1, 1)) * 1.0) % 2.0
    torn = torch.where((uniform(count) < 0.5)[:, None, None], torn, mask * (_blocks(count, cell, generator) < 0.6))
    factor = torch.where(uniform(count) < 0.5, 0.2 + 0.6 * uniform(count), 1.3 + 1.2 * uniform(count))
    sized = world.coverage(shape, centre, radius * factor)
    mask = torch.where(pick(0), 0.0, mask)
    mask = torch.where(pick(1), erased, mask)
    mask = torch.where(pick(2), torn.clamp(0.0, 1.0), mask)
    mask = torch.where(pick(3), sized, mask)
    frames = background[:, :, None, None] + mask[:, None] * (object_rgb - background[:, :, None, None])

    amount = 0.5 * uniform(count, 1, 1) * pick(4)
    clutter = (_blocks(count, cell, generator) < amount) & (ideal < 0.5)
    frames = torch.where(clutter[:, None], other[:, :, None, None], frames)
    texture = torch.stack([_blocks(count, cell, generator) for _ in range(3)], 1)
    frames = torch.where(pick(5)[:, None], texture, frames)

    overlap = torch.minimum(mask, ideal).sum((1, 2)) / torch.maximum(mask, ideal).sum((1, 2))
    integrity = ((overlap - 0.2) / 0.8).clamp(0.0, 1.0)
    integrity = integrity * (1.0 - clutter.float().mean((1, 2)) / 0.12).clamp(0.0, 1.0)
    integrity = torch.where(spoil == 5, 0.0, integrity)

    part = ((halves * ideal).sum((1, 2)) / ideal.sum((1, 2)))[:, None]
    colour = part * colour_score(first_colour, world.COLOURS) + (1.0 - part) * colour_score(second, world.COLOURS)
    table = {names: i for i, (names, _) in enumerate(_captions())}
    return Pictures(
        frames=frames,
        colour=colour,
        shape=F.one_hot(shape, len(world.SHAPES)).float(),
        background=colour_score(background, world.BACKGROUNDS),
        integrity=integrity,
        intact=intact,
        label=torch.tensor([table[w.colour, w.shape, w.background] for w in wanted], device=device),
    )


def weather(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Light noise and blur on `[N, 3, 32, 32]`, different for every frame, so that a score is smooth."""
    count, device = len(frames), generator.device
    soft = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(count, 1, 1, 1, generator=generator, device=device)
    strength = 0.06 * torch.rand(count, 1, 1, 1, generator=generator, device=device).square()
    noise = torch.randn(frames.shape, generator=generator, device=device)
    return frames + share.square() * (soft - frames) + strength * noise
