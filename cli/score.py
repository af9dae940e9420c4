"""Scoring videos and pictures from the command line: a table, a CSV file, and comparisons of two sets."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tyro.conf import Positional, UseAppendAction

from ..files import write_text
from ..reward_models.judging import Scored, best_first, score_clip, table
from ..reward_models.protocol import Reward
from .clips import FILE_NAME, Clip, gather, pair, prompts_for
from .shared import find_reward, pick_device


@dataclass
class Score:
    """Score videos and pictures with rewards: prints a table and writes a CSV file.

    Attributes:
        files: Videos, pictures, folders of them, and patterns such as "clips/*.mp4"; ** reaches into folders.
        prompt: What they should show: one for all, or one a file in their order; may be repeated.
        prompts: Where the prompts are instead: a text or .jsonl file with one a file; a .csv with columns `file` and
            `prompt`; or `filename`, which reads them from the files' names (a_red_circle-003.mp4).
        reward: A name, your own as `file.py:NAME`, or a mixture such as `hps_v2.1*0.5+aesthetic_v2*0.1`; may be
            repeated; tiny_clip if not given.
        reward_path: The reward's file or folder; for several rewards, the folder that holds the files of all.
            Without it they are looked for by their names in `models/reward_models`.
        download: Fetch weights that are missing into that folder, or into `models/reward_models`.
        reference: Picture or video of what the clips should match, for rewards that need one.
        per_frame: Also score every frame as a picture of its own.
        rank: Best first, by the first reward, instead of in the order given.
        as_clip: The pictures of a folder are the frames of one clip, in the order of their names.
        compare: Two folders or patterns, A and B, with videos of the same prompts: how much better is B? They are
            paired by their names, or, where no name is shared, in their order.
        output: CSV file for the scores; a comparison's pictures lie beside it.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
    """

    files: Positional[tuple[str, ...]] = ()
    prompt: UseAppendAction[tuple[str, ...]] = ()
    prompts: str = ""
    reward: UseAppendAction[tuple[str, ...]] = ()
    reward_path: Path | None = None
    download: bool = False
    reference: Path | None = None
    per_frame: bool = False
    rank: bool = False
    as_clip: bool = False
    compare: tuple[str, str] | None = None
    output: Path = Path("outputs/scores.csv")
    device: str = "auto"

    def run(self) -> int:
        if bool(self.files) == bool(self.compare):
            raise ValueError("give videos, pictures, folders or patterns to score, or else --compare A B")
        if self.compare:
            sides = pair(*(gather([side], self.as_clip) for side in self.compare))
        else:
            sides = (gather(self.files, self.as_clip),)
        prompts = prompts_for(sides[0], self.prompt, self.prompts) * len(sides)
        clips = [clip for side in sides for clip in side]
        reference, scored = self._reference(), []
        for name in self.reward or ("tiny_clip",):
            reward = find_reward(name, self.reward_path, pick_device(self.device), download=self.download)
            scored.append(self._score(reward, clips, prompts, reference))
            if self.per_frame and not getattr(reward, "per_frame", True):
                print(f"{reward.name} judges what happens between frames: it has no score of a single one")
        order = best_first(scored[0]) if self.rank else list(range(len(clips)))
        header, *rows = _rows(clips, prompts, scored, order, self.per_frame)
        print(table([*header[2:], "file"], [[*map(_short, row[2:]), row[0]] for row in rows]))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        print("CSV:", write_text(self.output, text.getvalue()))
        if self.compare:
            self._compare(scored)
        return 0

    def _reference(self) -> Tensor | None:
        from ..training.media import read_video

        return read_video(self.reference)[None] if self.reference else None

    def _score(
        self, reward: Reward, clips: Sequence[Clip], prompts: Sequence[str], reference: Tensor | None
    ) -> list[Scored]:
        from tqdm import tqdm

        if "prompt" in reward.needs and not all(prompts):
            raise ValueError(f'the reward {reward.name} needs --prompt "...", --prompts FILE or --prompts {FILE_NAME}')
        if "reference" in reward.needs and reference is None:
            raise ValueError(f"the reward {reward.name} needs --reference FILE: a picture or video to match")
        pairs = tqdm(zip(clips, prompts, strict=True), reward.name, len(clips), leave=False, disable=None)
        return [
            score_clip(reward, clip.read(), prompt, reference=reference, every_frame=self.per_frame)
            for clip, prompt in pairs
        ]

    def _compare(self, scored: Sequence[Sequence[Scored]]) -> None:
        from ..training.compare import difference_picture, paired_difference
        from ..training.media import write_png

        for both in scored:
            name, values = next(iter(both[0].clip)), [clip.score for clip in both]
            result = paired_difference(values[: len(values) // 2], values[len(values) // 2 :])
            print(result.describe(name))
            plain = re.sub(r"[^\w.+-]+", "_", name)[:80]
            path = self.output.with_name(f"compare-{plain}.png")
            print("picture:", write_png(path, difference_picture(result, name)))


def _rows(
    clips: Sequence[Clip],
    prompts: Sequence[str],
    scored: Sequence[Sequence[Scored]],
    order: Sequence[int],
    per_frame: bool,
) -> Iterator[list]:
    """The header, then a row a clip, followed, where asked, by one for each of its frames, counted from 1."""
    yield ["file", "prompt", *(["frame"] if per_frame else []), *(name for judged in scored for name in judged[0].clip)]
    for index in order:
        here = [judged[index] for judged in scored]
        start = [str(clips[index].path), prompts[index]]
        yield [*start, *([""] if per_frame else []), *(value for each in here for value in each.clip.values())]
        columns = [each.frames.get(name, ()) for each in here for name in each.clip]
        for frame in range(max(map(len, columns))):
            yield [*start, frame + 1, *(column[frame] if column else "" for column in columns)]


def _short(value: float | int | str) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
