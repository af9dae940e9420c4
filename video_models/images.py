"""Start and end images as the families' conditioning wants them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def fit_image(name: str, image: Tensor | None, batch: int, size: tuple[int, int]) -> Tensor | None:
    """An image ``[1 or batch, 3, H, W]`` in 0..1 at the size of the video, on the CPU.

    Raises:
        ValueError: Another shape.
    """
    if image is None:
        return None
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[0] not in (1, batch):
        raise ValueError(f"the {name} image must be [1 or {batch}, 3, H, W], got {list(image.shape)}")
    image = image.detach().float().cpu()
    if image.shape[-2:] != size:
        image = F.interpolate(image, size, mode="bicubic", antialias=True)
    return image.clamp(0, 1)
