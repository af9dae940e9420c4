"""Every hyper-parameter of a run, documented and checked in one place."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from ..files import canonical_json
from ..video_models.protocol import ModelSpec
from .gradient import check_interval
from .guards import PRESETS, Preset
from .judge import Objective
from .memory import MemoryChoice
from .schedule import BackpropSchedule
from .seeds import seed_for
from .view import FrameChoice, LatentChoice, View

Schedule = Literal["constant", "linear", "cosine"]
SaveType = Literal["bfloat16", "float16", "float32"]
TrackerName = Literal["tensorboard", "wandb"]

FREE_TO_CHANGE = (
    "steps",
    "save_every",
    "keep_checkpoints",
    "sample_every",
    "sample_count",
    "max_skipped",
    "save_dtype",
    "trackers",
    "memory",
    "compile",
    "shard",
    "guards",
    "keep_best",
    "patience",
    "motion_floor",
    "sweep",
)
"""Fields that may differ when a run is resumed: they do not touch the steps already made."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    Node widgets, command-line flags and recipes are made from these fields.

    Attributes:
        steps: Optimiser steps to make.
        batch_size: Videos sampled and judged at once.
        accumulation: Batches whose gradients are averaged into one step; costs time, not memory.
        reuse: Optimiser steps made from one rollout. The solver steps before the first trained one are walked once;
            every update walks on from there with the LoRA as it has become, and is judged and replayed anew. Changes
            the algorithm: after the first update the walk begins at latents of an older LoRA. 1 is off.
        learning_rate: Of AdamW. The publishers use 1e-5 for models of 1.3B and more.
        warmup_steps: Steps over which the learning rate rises from 0.
        lr_schedule: After the warm-up: constant, or linear or cosine to 0 at the last step.
        weight_decay: Of AdamW.
        beta1: Of AdamW.
        beta2: Of AdamW.
        epsilon: Of AdamW; small, because reward gradients are small.
        max_grad_norm: Gradients are scaled down to this norm.
        ema: Share that stays of the LoRA's moving average at every step, such as 0.99; what is evaluated and saved is
            then the average. 0 is off.
        rank: Rank of the LoRA.
        network_alpha: The LoRA is scaled by alpha / rank.
        lora_targets: Modules to adapt; empty takes the model's own list.
        experts: Networks that get a LoRA, of a model with several (Wan2.2: high, low); empty is all.
        width: Pixels; 0 takes the model's default.
        height: Pixels; 0 takes the model's default.
        frames: Frames of the sampled video; 0 takes the model's default.
        sampler_steps: Solver steps of the rollout; 0 takes the model's default.
        guidance_scale: Classifier-free guidance of the rollout; 0 takes the model's default, 1 turns it off.
        guidance_interval: Noise levels, above the first and up to the second of 0..1, at which guidance works; at the
            others the prompt's branch walks alone, for half the time. Kynkäänniemi et al. (arXiv 2404.07724) leave it
            out at the highest and lowest levels. 0 1 is everywhere.
        negative_prompt: What guidance leads away from.
        backprop: Which solver steps are trained.
        judged_latents: How many latent frames are judged; 0 is all.
        judged_from: Which latent frames these are: first takes them from the first on; random draws them anew at every
            step, and decodes the video up to the last one drawn.
        judged_frames: How many of the decoded frames the reward sees; 0 is all.
        judged_choice: Which frames these are: even spreads them, first and last included; random draws them anew
            at every step.
        judged_weights: How much the judged frames count along the video, from its first frame to its last: 0, 1 rises,
            1, 0 falls, 0, 1, 0 favours the middle; any number of them, with straight lines between. They scale the
            frames' gradients; the reward that is reported stays the plain mean. Empty weighs all alike.
        objective: From rewards to a loss.
        guards: Against a reward that rises while the videos get worse. standard watches the evaluations (keep_best,
            patience) and changes no step; careful also keeps motion and shows the judge several views, for about 1.4
            times the time; off only reports. The next seven settings and anchor are the preset's unless given.
        keep_best: Save the LoRA of the best evaluation as NAME_best: the highest held-out score (without held-out
            rewards, the highest trained reward) among those whose motion and sharpness are sound. One that scores
            higher without being sound is tried at strength 0.7 too, and kept at that if it is the best then.
        patience: The run stops after this many bad evaluations in a row: motion or sharpness is not sound, or the
            held-out score is lower than at the best step although the trained reward is higher; 0 never stops.
        motion_floor: Motion below this share of the base model's, on the same prompts and seeds, is not sound.
        sweep: When the run ends, paint the evaluation prompts with its LoRA (the best one, if there is one) at strength
            0.25, 0.5 and 0.7 too, so that the report can say at which to use it: the time of three evaluations.
        motion_guard: Weight of a penalty on every sample that moves less than motion_floor says: between the judged
            frames, or between latents when one frame is judged. 0 is off; one more rollout a step.
        augment: How many random views of the judged frames (crop, rotation, colours, noise, missing patches) the
            judge's gradient is averaged over, at the memory of as many judgements; 0 shows it the frames themselves.
        anchor_target: Distance at which the anchor holds the LoRA, by changing its weight from step to step; 0 leaves
            the weight alone.
        anchor: Weight of the mean squared distance, at the trained steps, between the prompt branch's predictions
            with and without the LoRA: keeps the LoRA near the base model. 0 is off; one more forward pass a step.
        anchor_by_sigma: Divide that distance by twice the squared noise level, as ROLL does.
        memory: How a step is fitted into memory. fast keeps all it needs; balanced checkpoints the denoiser's blocks;
            small does so with the VAE too, takes guidance branches one by one, and has only the phase's networks on
            the GPU; offload keeps the denoiser's blocks in main memory too, where they visit the GPU one by one. auto
            is fast for a small model and balanced for a large one. A step that runs out of GPU memory is made again
            under the next smaller one.
        compile: Run the denoiser's blocks through torch.compile: the first step takes minutes longer, the others run
            faster. Takes Triton on a GPU, a C++ compiler on a CPU, and weights that stay where they are: not float8,
            shard or memory: offload.
        float8: Store the frozen denoiser's matrices in float8 while training: half the memory of 16 bits, and a base
            that is off by up to 6 % a weight; the LoRA is trained on that.
        shard: With several devices, divide the blocks' frozen weights among them, for a base model that does not fit
            on one: each keeps its part, and gets a block's others while it works. Every evaluation is then made by all
            of them, a device that runs out of memory ends the run, and there is no sweep at its end.
        seed: Source of all chance.
        save_every: Steps between checkpoints.
        keep_checkpoints: How many of the newest checkpoints stay.
        sample_every: Steps between evaluations on fixed prompts and seeds; 0 turns them off.
        sample_count: How many fixed prompts an evaluation samples.
        max_skipped: The run stops after this many steps in a row without a finite reward and gradient.
        save_dtype: Number type of the saved LoRA.
        trackers: Where curves and sampled clips go besides the run's own log and report: tensorboard (event files in
            the run's folder), wandb (Weights & Biases; offline with WANDB_MODE=offline), or both. Their packages must
            be installed.

    Raises:
        ValueError: A value outside its range, with the range.
    """

    steps: int = 300
    batch_size: int = 1
    accumulation: int = 1
    reuse: int = 1
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    lr_schedule: Schedule = "constant"
    weight_decay: float = 0.03
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-10
    max_grad_norm: float = 0.3
    ema: float = 0.0
    rank: int = 32
    network_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    width: int = 0
    height: int = 0
    frames: int = 0
    sampler_steps: int = 0
    guidance_scale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    negative_prompt: str = ""
    backprop: BackpropSchedule = field(default_factory=BackpropSchedule)
    judged_latents: int = 1
    judged_from: LatentChoice = "first"
    judged_frames: int = 0
    judged_choice: FrameChoice = "even"
    judged_weights: tuple[float, ...] = ()
    objective: Objective = field(default_factory=Objective)
    guards: Preset = "standard"
    keep_best: bool | None = None
    patience: int | None = None
    motion_floor: float | None = None
    sweep: bool | None = None
    motion_guard: float | None = None
    augment: int | None = None
    anchor_target: float | None = None
    anchor: float | None = None
    anchor_by_sigma: bool = False
    memory: MemoryChoice = "auto"
    compile: bool = False
    float8: bool = False
    shard: bool = False
    seed: int = 42
    save_every: int = 25
    keep_checkpoints: int = 2
    sample_every: int = 25
    sample_count: int = 4
    max_skipped: int = 10
    save_dtype: SaveType = "bfloat16"
    trackers: tuple[TrackerName, ...] = ()

    def __post_init__(self) -> None:
        at_least = {
            1: ("steps", "batch_size", "accumulation", "reuse", "rank", "save_every", "keep_checkpoints")
            + ("max_skipped",),
            0: ("warmup_steps", "width", "height", "frames", "sampler_steps", "guidance_scale", "weight_decay")
            + ("anchor", "judged_latents", "judged_frames", "seed", "sample_every", "sample_count")
            + ("patience", "motion_floor", "motion_guard", "augment", "anchor_target"),
        }
        for low, names in at_least.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not value >= low:
                    raise ValueError(f"{name} must be at least {low}, got {value}")
        check_interval(self.guidance_interval)
        if self.motion_floor is not None and self.motion_floor > 1:
            raise ValueError(f"motion_floor must lie in 0..1, got {self.motion_floor}")
        for name in ("learning_rate", "epsilon", "max_grad_norm", "network_alpha"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in 0..1 without 1, got {getattr(self, name)}")
        choices = {
            "lr_schedule": Schedule,
            "save_dtype": SaveType,
            "judged_from": LatentChoice,
            "judged_choice": FrameChoice,
            "memory": MemoryChoice,
            "guards": Preset,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if unknown := set(self.trackers) - set(get_args(TrackerName)):
            raise ValueError(f"trackers must be among {', '.join(get_args(TrackerName))}, got {min(unknown)!r}")
        moving = {"float8": self.float8, "shard": self.shard, "memory: offload": self.memory == "offload"}
        for name, on in moving.items():
            if on and self.compile:
                raise ValueError(f"compile takes weights that stay as and where they are; leave out compile or {name}")
        if self.shard and (self.float8 or self.memory == "offload"):
            other = "float8" if self.float8 else "memory: offload"
            raise ValueError(f"shard and {other} are two ways to store the base model; choose one")
        weights = tuple(map(float, self.judged_weights))
        if weights and not (all(0 <= w < math.inf for w in weights) and any(weights)):
            raise ValueError(f"judged_weights must be 0 or more each, and not all 0, got {list(weights)}")
        if weights and (self.judged_latents, self.judged_from) == (1, "first"):
            raise ValueError("judged_weights weigh frames against each other, and only the first is judged; raise "
                             "judged_latents, or 0 for all")  # fmt: skip
        if weights and self.judged_frames == 1:
            raise ValueError("judged_weights weigh frames against each other; judged_frames must not be 1")
        object.__setattr__(self, "judged_weights", weights)  # as written in YAML, 0 and 1 are 0.0 and 1.0

    def for_model(self, spec: ModelSpec) -> TrainConfig:
        """The same settings with every default of the model and of the guards' preset filled in, checked.

        Raises:
            ValueError: A size, frame count or backprop step the model or its solver does not have.
        """
        filled = dataclasses.replace(
            self,
            lora_targets=self.lora_targets or spec.lora_targets,
            experts=self.experts or spec.experts,
            width=self.width or spec.width,
            height=self.height or spec.height,
            frames=self.frames or spec.frames,
            sampler_steps=self.sampler_steps or spec.steps,
            guidance_scale=self.guidance_scale or spec.guidance_scale,
            **{name: value for name, value in PRESETS[self.guards].items() if getattr(self, name) is None},
        )
        unknown = sorted(set(filled.experts) - set(spec.experts))
        if unknown:
            raise ValueError(f"experts must be among {', '.join(spec.experts)} for {spec.name}, got {unknown[0]}")
        latent_frames = spec.latent_shape(filled.width, filled.height, filled.frames)[1]
        if filled.judged_latents > latent_frames:
            raise ValueError(
                f"judged_latents must be at most {latent_frames} for {filled.frames} frames, "
                f"got {filled.judged_latents}"
            )
        filled.backprop.check(filled.sampler_steps)
        return filled

    def view_at(self, draw: int, save_memory: bool) -> View:
        """What the reward sees at a draw of a batch, counted from 0."""
        seed = seed_for("frames", self.seed, draw)
        return View(self.judged_latents, self.judged_frames, self.judged_choice, save_memory, seed, self.augment or 0,
                    self.judged_from, self.judged_weights)  # fmt: skip

    def trainable_steps(self, spec: ModelSpec, sigmas: Tensor) -> tuple[int, ...]:
        """The solver steps at which a network with a LoRA works, of a walk along ``sigmas``.

        Raises:
            ValueError: The schedule finds none, or an expert has none.
        """
        works = [spec.expert_at(sigma) for sigma in sigmas[:-1]]
        steps = tuple(i for i, expert in enumerate(works) if expert in self.experts)
        self.backprop.check(len(works), steps)
        for expert in self.experts:
            if expert not in works:
                raise ValueError(
                    f"none of the {len(works)} solver steps falls to the expert {expert}, so it cannot be trained; "
                    "take more steps or train the other"
                )
        return steps

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows so many steps."""
        return bool(self.sample_every) and (step % self.sample_every == 0 or step == self.steps)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return self.learning_rate * decay[self.lr_schedule]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, nested like the dataclasses."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainConfig:
        """Inverse of :meth:`to_dict`; missing fields take their defaults.

        Raises:
            ValueError: An unknown field, or a value out of range.
        """
        return _build(cls, data)

    def decisive(self) -> dict[str, Any]:
        """The fields that decide what a run learns; two runs with equal ones make equal steps."""
        decisive = {key: value for key, value in self.to_dict().items() if key not in FREE_TO_CHANGE}
        if self.lr_schedule != "constant":
            decisive["steps"] = self.steps
        if self.motion_guard:
            decisive["motion_floor"] = self.motion_floor
        return decisive

    def fingerprint(self) -> str:
        """Eight hexadecimal digits over :meth:`decisive`."""
        return hashlib.sha256(canonical_json(self.decisive()).encode()).hexdigest()[:8]


PLAIN = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "text"),
}
"""Types of single values, and what they are called."""


def _build(cls: type, data: Any, place: str = "the settings") -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{place} must be written as `name: value`, got {data!r:.60}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(known), key=str)
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}; known are {', '.join(known)}")
    nested = {"backprop": BackpropSchedule, "objective": Objective}
    values = {}
    for name, value in data.items():
        if name in nested:
            values[name] = value if isinstance(value, nested[name]) else _build(nested[name], value, name)
        else:
            values[name] = _value(name, str(known[name].type), value)
    return cls(**values)


def _value(name: str, kind: str, value: Any) -> Any:
    """What a field of a type may hold, from what YAML, JSON or a widget gives. Raises ``ValueError``: another type."""
    wanted = kind.removesuffix(" | None")
    if value is None and wanted != kind:
        return None
    if wanted.startswith("tuple["):
        entry, _, more = wanted.removeprefix("tuple[").removesuffix("]").partition(", ")
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)) or (more != "..." and len(value) != wanted.count(",") + 1):
            raise ValueError(f"{name} must be a list{'' if more == '...' else ' of 2'}, got {value!r:.60}")
        return tuple(_value(f"an entry of {name}", entry, part) for part in value)
    if wanted not in PLAIN:
        return value  # a choice, which the dataclass checks
    plain, called = PLAIN[wanted]
    if plain is float and isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5 as text, and 8 must give the fingerprint of 8.0
        except (ValueError, OverflowError):
            pass
    if type(value) is not plain:
        raise ValueError(f"{name} must be {called}, got {value!r:.60}")
    return value
