"""Score Frames, Pick Best of N, Compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from comfy_api.latest import io, ui
from torch import Tensor

from ..reward_models.judging import Scored, best_first, score_clip, table
from ..training.compare import difference_picture, frame_picture, paired_difference, ranking_picture
from .bridge import Progress, engine, on_device, picture_to_image, say, to_frames
from .types import LoadedReward, RewardType

SLOTS = 6
REFERENCE = io.Image.Input(
    "reference", optional=True, tooltip="A picture or clip of what the frames should match, for rewards that need one."
)
PER_CLIP = io.Int.Input(
    "frames_per_clip",
    default=0,
    min=0,
    max=10_000,
    tooltip="Frames in a clip, 0 to 10000: a batch is cut into clips of so many frames, 1 makes every picture a clip. "
    "0 takes every batch, and every entry of a list, as one clip.",
)


class ScoreFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardLoraScoreFrames",
            display_name="Score Frames",
            category="Reward LoRA/reward",
            description="Asks a reward how good a clip or a picture is. Higher is better; the scale is the "
            "reward's own.",
            inputs=[
                RewardType.Input("reward", tooltip="From Load Reward or Combine Rewards."),
                io.Image.Input("images", tooltip="The frames of one clip, or one picture."),
                io.String.Input("prompt", multiline=True, default="", tooltip="The text the frames should match."),
                io.Boolean.Input(
                    "every_frame",
                    default=True,
                    tooltip="Also score every frame as a picture of its own; takes as long again.",
                ),
                REFERENCE,
            ],
            outputs=[
                io.Float.Output("score", display_name="score", tooltip="Of the whole clip."),
                io.String.Output("table", display_name="table", tooltip="The scores as text, a line a frame."),
                io.Image.Output("plot", display_name="plot", tooltip="The score of every frame as a curve."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        reward: LoadedReward,
        images: Tensor,
        prompt: str,
        every_frame: bool = True,
        reference: Tensor | None = None,
    ) -> io.NodeOutput:
        judge, tick = reward.reward, Progress(1, cls.hidden.unique_id)
        with engine(), tick, on_device(reward=judge):
            scored = score_clip(
                judge, to_frames(images), prompt, reference=_frames(reference), every_frame=every_frame, tick=tick
            )
        summary = f"{judge.name}: {scored.score:.4f} for {prompt.strip()!r} over {_count(len(images), 'frame')}"
        header = ["frame", *scored.clip]
        rows = [["all", *_numbers(scored.clip.values())]]
        rows += [[str(n), *_numbers(row)] for n, row in enumerate(zip(*scored.frames.values(), strict=True), 1)]
        text = f"{summary}\n\n{table(header, rows)}"
        plot = picture_to_image(frame_picture(scored.frames or dict.fromkeys(scored.clip, ()), scored.clip))
        say(summary, cls.hidden.unique_id)
        tick.show(1)
        shown = ui.PreviewImage(plot, cls=cls).as_dict() | {"text": [text], "score": [scored.score]}
        return io.NodeOutput(scored.score, text, plot, ui=shown)


class PickBest(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        slots = [
            io.Image.Input(
                f"images_{number}",
                optional=number > 1,
                tooltip="A clip, a batch of pictures, or a list of either; frames_per_clip says how it is cut.",
            )
            for number in range(1, SLOTS + 1)
        ]
        return io.Schema(
            node_id="RewardLoraPickBest",
            display_name="Pick Best of N",
            category="Reward LoRA/reward",
            description="Scores clips or pictures of the same prompt with a reward and ranks them, for example one "
            "prompt at several seeds. Gives the best one and the order.",
            inputs=[
                RewardType.Input("reward", tooltip="From Load Reward or Combine Rewards."),
                *slots,
                io.String.Input("prompt", multiline=True, default="", tooltip="The text all of them should match."),
                PER_CLIP,
                REFERENCE,
            ],
            outputs=[
                io.Image.Output("best", display_name="best", tooltip="The frames of the best clip."),
                io.Int.Output("number", display_name="number", tooltip="Which clip it was, counted from 1."),
                io.String.Output("order", display_name="order", tooltip="Numbers of all clips, best first: 3, 1, 2."),
                io.String.Output("table", display_name="table", tooltip="The scores as text, best first."),
                io.Image.Output("picture", display_name="picture", tooltip="All clips, best first, with their scores."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls,
        reward: list[LoadedReward],
        prompt: list[str],
        frames_per_clip: list[int],
        reference: Sequence[Tensor] = (),
        **slots: list[Tensor],
    ) -> io.NodeOutput:
        node, judge = cls.hidden.unique_id, reward[0].reward
        batches = [batch for number in range(1, SLOTS + 1) for batch in slots.get(f"images_{number}") or ()]
        with engine():
            clips = _cut(batches, frames_per_clip[0])
            scored = _score_all(reward[0], clips, prompt[:1] * len(clips), reference, node)
        names = list(scored[0].clip)
        order = best_first(scored)
        rows = [[str(p), str(i + 1), *_numbers(scored[i].clip.values())] for p, i in enumerate(order, 1)]
        text, numbers = table(["place", "clip", *names], rows), ", ".join(str(i + 1) for i in order)
        strips = [to_frames(clip)[0] for clip in clips]
        picture = picture_to_image(ranking_picture(strips, [each.score for each in scored], order, judge.name))
        summary = f"clip {order[0] + 1} of {len(clips)} is best: {judge.name} {scored[order[0]].score:.4f}"
        say(summary, node)
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | {"text": [f"{summary}\n\n{text}"]}
        return io.NodeOutput(clips[order[0]], order[0] + 1, numbers, text, picture, ui=shown)


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        cut = "Clips or pictures, as a list or in a batch that frames_per_clip cuts."
        return io.Schema(
            node_id="RewardLoraCompare",
            display_name="Compare",
            category="Reward LoRA/reward",
            description="Is B better than A? Scores two sets made from the same prompts and seeds, pair by pair, and "
            "says how sure the difference is (bootstrap, 95 %).",
            inputs=[
                RewardType.Input("reward", tooltip="From Load Reward or Combine Rewards."),
                io.Image.Input("images_a", tooltip=f"Set A, for example without the LoRA. {cut}"),
                io.Image.Input("images_b", tooltip=f"Set B, in the order of A. {cut}"),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One for all pairs, or one a line for each pair.",
                ),
                PER_CLIP,
                REFERENCE,
            ],
            outputs=[
                io.Float.Output("difference", display_name="difference", tooltip="Mean of B minus A."),
                io.String.Output("summary", display_name="summary", tooltip="The verdict, and a line a pair."),
                io.Image.Output("picture", display_name="picture", tooltip="Every pair's difference and their mean."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls,
        reward: list[LoadedReward],
        images_a: list[Tensor],
        images_b: list[Tensor],
        prompts: list[str],
        frames_per_clip: list[int],
        reference: Sequence[Tensor] = (),
    ) -> io.NodeOutput:
        node, judge = cls.hidden.unique_id, reward[0].reward
        with engine():
            a, b = (_cut(batches, frames_per_clip[0]) for batches in (images_a, images_b))
            if len(a) != len(b) or len(a) < 2:
                raise ValueError(
                    f"a comparison needs at least 2 pairs, and A holds {_count(len(a), 'clip')}, B {len(b)}; connect "
                    "lists, or set frames_per_clip so that the batches are cut into clips"
                )
            texts = [line.strip() for text in prompts for line in text.splitlines() if line.strip()] or [""]
            if len(texts) not in (1, len(a)):
                raise ValueError(f"give one prompt, or one a line for each of the {len(a)} pairs; got {len(texts)}")
            texts = texts * len(a) if len(texts) == 1 else texts
            scored = _score_all(reward[0], [*a, *b], texts * 2, reference, node)
            values = [each.score for each in scored]
            result = paired_difference(values[: len(a)], values[len(a) :])
        rows = [
            [str(n), *_numbers((x, y, y - x)), text]
            for n, (x, y, text) in enumerate(zip(result.a, result.b, texts, strict=True), 1)
        ]
        summary = result.describe(judge.name)
        text = f"{summary}\n\n{table(['pair', 'A', 'B', 'B - A', 'prompt'], rows)}"
        picture = picture_to_image(difference_picture(result, judge.name))
        say(summary, node)
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | {"text": [text]}
        return io.NodeOutput(result.mean, text, picture, ui=shown)


def _score_all(
    reward: LoadedReward, clips: Sequence[Tensor], prompts: Sequence[str], reference: Sequence[Tensor], node: str | None
) -> list[Scored]:
    """Every clip by itself: their sizes and lengths may differ."""
    progress, shown = Progress(len(clips), node), _frames(reference[0] if reference else None)
    scored = []
    with progress, on_device(reward=reward.reward):
        for clip, prompt in zip(clips, prompts, strict=True):
            scored.append(score_clip(reward.reward, to_frames(clip), prompt, reference=shown, tick=progress))
            progress.show(len(scored))
    return scored


def _cut(batches: Sequence[Tensor], frames_per_clip: int) -> list[Tensor]:
    """IMAGEs into clips, each ``[T, H, W, C]``."""
    clips: list[Tensor] = []
    for batch in batches:
        if frames_per_clip and len(batch) % frames_per_clip:
            raise ValueError(
                f"a batch of {len(batch)} pictures cannot be cut into clips of {frames_per_clip}; set frames_per_clip "
                "to a number that divides it, or to 0"
            )
        clips += batch.split(frames_per_clip or len(batch))
    return clips


def _frames(reference: Tensor | None) -> Tensor | None:
    return None if reference is None else to_frames(reference)


def _numbers(values: Iterable[float]) -> list[str]:
    return [f"{value:.4f}" for value in values]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
