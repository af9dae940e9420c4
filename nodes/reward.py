"""Load Reward, Combine Rewards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import comfy.model_management
import torch
from comfy_api.latest import io

from ..reward_models import all_rewards, load_reward
from ..reward_models.mixture import Combination, Mixture, MixtureSettings
from ..reward_models.protocol import Reward
from ..reward_models.spelling import Term, parse
from ..training.job import RewardSource
from . import folders
from .bridge import downloading, engine, patience, say
from .types import LoadedReward, RewardType

DEFAULT = "default"
TERMS = 4


class LoadReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        rewards = all_rewards()
        known = "; ".join(f"{name}: {entry.summary}" for name, entry in rewards.items())
        return io.Schema(
            node_id="RewardLoraLoadReward",
            display_name="Load Reward",
            category="Reward LoRA/reward",
            description="Loads a reward: a model that looks at frames and a prompt and says how good they are. Mind "
            "the licence of its weights, which the node shows once they are loaded.",
            inputs=[
                io.Combo.Input("name", options=list(rewards), default=next(iter(rewards)), tooltip=known),
                io.String.Input(
                    "path",
                    default="",
                    optional=True,
                    tooltip="The reward's file or folder. Empty looks in models/reward_models, or takes what comes "
                    "with the pack.",
                ),
                io.Boolean.Input(
                    "download",
                    default=False,
                    optional=True,
                    tooltip="Fetch files that are missing into models/reward_models: some hundred megabytes to some "
                    "gigabytes, once. HF_ENDPOINT and HF_HUB_OFFLINE are honoured.",
                ),
                io.Combo.Input(
                    "device",
                    options=_devices(),
                    default=DEFAULT,
                    optional=True,
                    tooltip="Where it judges: 'default' comes to ComfyUI's device to work and goes again; any other "
                    "it stays on, for example a second GPU.",
                ),
                io.String.Input(
                    "mixture",
                    default="",
                    optional=True,
                    placeholder="hps_v2.1*0.5+aesthetic_v2*0.1",
                    tooltip="Instead of 'name': several rewards with weights, as on the command line, such as "
                    "hps_v2.1*0.5+aesthetic_v2*0.1 or min(a+b[option=value]). Empty takes 'name'.",
                ),
                *_option_inputs(),
            ],
            outputs=[
                RewardType.Output(
                    "reward", display_name="reward", tooltip="For Train Reward LoRA and for all nodes that score."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, name: str | None = None, device: str | None = None, mixture: str | None = None
    ) -> bool | str:
        if name is not None and name not in all_rewards():
            return f"unknown reward {name!r}; known are {', '.join(all_rewards())}"
        if device is not None and device not in _devices():
            return f"there is no device {device!r} here; choose one of {', '.join(_devices())}"
        return folders.complaint(parse, mixture or None)

    @classmethod
    def execute(
        cls,
        name: str,
        path: str = "",
        download: bool = False,
        device: str = DEFAULT,
        mixture: str = "",
        **options: str,
    ) -> io.NodeOutput:
        node, path = cls.hidden.unique_id, path.strip().strip('"')
        given = {key: value for key, value in options.items() if value not in ("", DEFAULT)}
        rest = str(comfy.model_management.unet_offload_device()) if device == DEFAULT else device
        search = [*([Path(path)] if path else []), *folders.reward_roots()]

        def load(name: str, options: Mapping[str, str]) -> Reward:
            own = dict(options)
            where = own.pop("path", "" if mixture else path)
            with patience(f"loading {name}", node):
                return load_reward(
                    name, where, rest, options=own, search=search, download=download, progress=downloading(node)
                )

        with engine():
            spelling = parse(mixture) if mixture.strip() else None
            if spelling and given:
                raise ValueError(f"write the option {next(iter(given))} into the mixture, as NAME[option=value]")
            reward = spelling.load(load) if spelling else load(name, given)
        terms = spelling.terms if spelling else (Term(name),)
        say(_about(terms), node)
        what = [mixture.strip() or name, path or "builtin", *(f"{key}={value}" for key, value in given.items())]
        if device != DEFAULT:
            return io.NodeOutput(LoadedReward(Pinned(reward), " ".join(what)))
        options = ({"path": path} if path else {}) | given
        text = mixture.strip() or f"{name}[{', '.join(f'{key}={value}' for key, value in options.items())}]"
        again = RewardSource(text if mixture.strip() or options else name, search=tuple(map(str, search)))
        readable = bool(mixture.strip()) or _reads(again.text, name, options)
        return io.NodeOutput(LoadedReward(reward, " ".join(what), again if readable else None))


def _reads(text: str, name: str, options: Mapping[str, str]) -> bool:
    """Whether a spelling is read as what was meant; a path with a comma in it is not."""
    try:
        terms = parse(text).terms
    except ValueError:
        return False
    return len(terms) == 1 and (terms[0].name, dict(terms[0].options)) == (name, dict(options))


def _devices() -> list[str]:
    return [DEFAULT, "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _option_inputs() -> list[io.Input]:
    """One widget an option of any reward."""
    users: dict[str, list[str]] = {}
    values: dict[str, tuple[str, ...]] = {}
    for name, entry in all_rewards().items():
        for key, allowed in entry.options.items():
            users.setdefault(key, []).append(name)
            values[key] = tuple(dict.fromkeys((*values.get(key, ()), *allowed)))
    made: list[io.Input] = []
    for key, allowed in values.items():
        about = f"Option of {', '.join(users[key])}; leave it as it is for any other reward."
        if allowed:
            made.append(io.Combo.Input(key, options=[DEFAULT, *allowed], default=DEFAULT, optional=True, tooltip=about))
        else:
            made.append(io.String.Input(key, default="", optional=True, tooltip=about))
    return made


def _about(terms: tuple[Term, ...]) -> str:
    entries = {term.name: all_rewards()[term.name] for term in terms}
    return "\n".join(
        f"{name}: {entry.summary}" + (f" (weights: {entry.licence})" if entry.licence else "")
        for name, entry in entries.items()
    )


class Pinned:
    """A reward that stays where it is: it has everything but ``to``.

    Args:
        reward: Loaded on its device.
    """

    def __init__(self, reward: Reward) -> None:
        self._reward = reward

    def __getattr__(self, name: str) -> Any:
        if name == "to" or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._reward, name)


class CombineRewards(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs: list[io.Input] = []
        for number in range(1, TERMS + 1):
            inputs.append(
                RewardType.Input(f"reward_{number}", optional=number > 1, tooltip="From Load Reward; one term.")
            )
        for number in range(1, TERMS + 1):
            inputs.append(
                io.Float.Input(
                    f"weight_{number}",
                    default=1.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.01,
                    tooltip=f"How much reward_{number} counts, -1000 to 1000; below 0 it is pushed down.",
                )
            )
        return io.Schema(
            node_id="RewardLoraCombineRewards",
            display_name="Combine Rewards",
            category="Reward LoRA/reward",
            description="Makes one reward of up to four. Rewards live on different scales (HPS about 0.3, aesthetic "
            "about 5), so choose weights, or let each be normalised while training.",
            inputs=[
                *inputs,
                io.Combo.Input(
                    "combine",
                    options=list(get_args(Combination)),
                    default="sum",
                    tooltip="sum of weight times reward; mean: that over the sum of the weights' sizes; min: only the "
                    "worst weighted term counts; softmin: smooth between min and the plain mean.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.5,
                    min=0.001,
                    max=100.0,
                    step=0.001,
                    tooltip="Of softmin, 0.001 to 100 in the unit of the terms: small is like min, large like mean.",
                ),
                io.Boolean.Input(
                    "normalised",
                    default=False,
                    tooltip="While training, count each term in standard deviations from its mean over all steps so "
                    "far. Elsewhere the terms count raw.",
                ),
                io.Boolean.Input(
                    "balanced",
                    default=False,
                    tooltip="While training, scale the gradients of all terms at the frames to the same norm, so that "
                    "none drowns the others; the weights then say who counts more.",
                ),
            ],
            outputs=[RewardType.Output("reward", display_name="reward", tooltip="All of them as one.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, combine: str, temperature: float, normalised: bool, balanced: bool, **terms: LoadedReward | float | None
    ) -> io.NodeOutput:
        numbers = [n for n in range(1, TERMS + 1) if terms.get(f"reward_{n}") is not None]
        loaded = [terms[f"reward_{n}"] for n in numbers]
        weights = [terms[f"weight_{n}"] for n in numbers]
        with engine():
            settings = MixtureSettings(combine, temperature, normalised, balanced)
            mixture = Mixture([each.reward for each in loaded], weights, settings)
        say(mixture.name, cls.hidden.unique_id)
        pairs = list(zip(loaded, weights, strict=True))
        identity = settings.spell("+".join(f"{each.identity}*{weight:g}" for each, weight in pairs))
        source = None
        if all(each.source for each in loaded):
            text = settings.spell("+".join(f"{each.source.text}*{weight!r}" for each, weight in pairs))
            source = RewardSource(text, search=tuple(dict.fromkeys(p for each in loaded for p in each.source.search)))
        return io.NodeOutput(LoadedReward(mixture, identity, source))
