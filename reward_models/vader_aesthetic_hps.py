"""VADER's mixture (arXiv 2407.08737): ``(aesthetic + 15 * hps) / 2`` of LAION's aesthetic v2 and HPS v2.1; about 5.

Both see the frame squashed to a square with a bilinear filter. Any other mixture is spelled by the user.
"""

from __future__ import annotations

from dataclasses import replace

from . import aesthetic, hps
from .files import Request, RewardEntry
from .mixture import Mixture
from .networks import read_config, read_weights
from .scoring import FrameReward
from .vader_heads import HeadJudge

WEIGHTS = (1 / 2, 15 / 2)
AESTHETIC, HPS = aesthetic.ENTRIES["aesthetic_v2"], hps.ENTRIES["hps_v2.1"]


def _load(request: Request) -> Mixture:
    folder, head = request.files["tower"], request.files["head"]
    weights = folder / "model.safetensors"
    tower = aesthetic.clip_tower(read_weights(weights), read_config(folder), weights, request.dtype)
    judge = HeadJudge(tower, aesthetic.read_head(read_weights(head), head, tower.width, request.dtype))
    beauty = FrameReward(judge.to(request.device), "aesthetic_v2", reads_prompt=False)
    preference = HPS.load(replace(request, name="hps_v2.1", options={"preprocessing": "vader"}))
    mixture = Mixture((beauty, preference), WEIGHTS)
    mixture.name = request.name
    return mixture


ENTRIES = {
    "vader_aesthetic_hps": RewardEntry(
        _load,
        "VADER's mixture, (aesthetic v2 + 15 * HPS v2.1) / 2 (about 5)",
        f"{AESTHETIC.licence}; HPS: {HPS.licence}",
        {**AESTHETIC.parts, **HPS.parts},
    )
}
