"""Makes the built-in tiny models from nothing but a seed.

    python -m reward_lora.assets.build --out DIR --seed 0

Writes `DIR/tiny_wan` (a diffusers `WanPipeline` folder), `DIR/tiny_clip` (a transformers
`CLIPModel` folder), the two prompt lists and `figures.json`. The stages are vae, blend, clip,
dit, in that order; a stage that `figures.json` has figures of is skipped, so an interrupted
build goes on where it stopped. Each stage has its own random stream.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from . import FRAMES, GUIDANCE, HEIGHT, SHIFT, STEPS, TEXT_LENGTH, WIDTH, clip, dit, measure, tokenizer, vae, world

logger = logging.getLogger(__name__)

STAGES = ("vae", "blend", "clip", "dit")


@dataclass(frozen=True)
class Plan:
    """How long to train. The defaults take about 80 minutes on one core of a server CPU.

    Attributes:
        vae: stages of `vae.fit`.
        blend: steps, clips per step, learning rate of `vae.linearise`.
        clip: optimiser steps, pictures per step, learning rates of AdamW and Muon.
        dit: optimiser steps, clips per step, learning rates of AdamW and Muon.
        clips: clips encoded for the transformer.
        samples: clips per measurement.
    """

    vae: tuple = (
        (300, 32, 1, True, 2e-3),
        (800, 8, 5, True, 2e-3),
        (1000, 8, 9, True, 2e-3),
        (800, 8, 9, False, 2e-3),
    )
    blend: tuple[int, int, float] = (450, 8, 1e-3)
    clip: tuple[int, int, float, float] = (1500, 96, 1e-3, 4e-3)
    dit: tuple[int, int, float, float] = (9000, 32, 2.5e-3, 1e-2)
    clips: int = 8192
    samples: int = 288

    def shortened(self, share: float) -> "Plan":
        """The same plan with `share` of all steps, at least two, to try the script out."""
        few = lambda count: max(2, round(count * share))  # noqa: E731
        return Plan(
            vae=tuple((few(stage[0]), *stage[1:]) for stage in self.vae),
            blend=(few(self.blend[0]), *self.blend[1:]),
            clip=(few(self.clip[0]), *self.clip[1:]),
            dit=(few(self.dit[0]), *self.dit[1:]),
            clips=max(64, few(self.clips)),
            samples=max(16, few(self.samples)),
        )


def _stream(seed: int, stage: str, device: torch.device) -> torch.Generator:
    """The random stream of one stage; also seeds the global one, from which libraries initialise."""
    number = 1000 * seed + {"vae": 0, "clip": 1, "dit": 2, "blend": 3}[stage]
    torch.manual_seed(number)
    return torch.Generator(device).manual_seed(number)


def _load_vae(out: Path, device: torch.device):
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(out / "tiny_wan" / "vae").to(device).requires_grad_(False)


def _anonymous(config: Path) -> None:
    """Take out of a written configuration where it was read from."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build_vae(out: Path, plan: Plan, generator: torch.Generator, precision: Callable) -> dict[str, float]:
    """Train the autoencoder and write `tiny_wan/vae`."""
    device = generator.device
    model = vae.create(torch.Generator().manual_seed(generator.initial_seed())).to(device)
    vae.fit(model, generator, plan.vae, precision)
    latents, _ = vae.dataset(model, min(512, plan.clips), generator, precision)
    vae.write_statistics(model, latents)
    model.cpu().save_pretrained(out / "tiny_wan" / "vae")
    return measure.of_vae(model, plan.samples, torch.Generator().manual_seed(1))


def build_blend(out: Path, plan: Plan, generator: torch.Generator, precision: Callable) -> dict[str, float]:
    """Teach the decoder blended colours and write `tiny_wan/vae` again."""
    model = _load_vae(out, generator.device)
    vae.linearise(model, generator, *plan.blend, precision)
    model.cpu().save_pretrained(out / "tiny_wan" / "vae")
    return measure.of_vae(model, plan.samples, torch.Generator().manual_seed(1))


def build_clip(out: Path, plan: Plan, generator: torch.Generator, precision: Callable) -> dict[str, float]:
    """Train the CLIP and write `tiny_clip`."""
    device = generator.device
    autoencoder = _load_vae(out, device)
    model = clip.create().to(device)
    clip.fit(model, autoencoder, generator, *plan.clip, precision)
    clip.save(model.cpu(), out / "tiny_clip")
    return measure.of_clip(model.eval(), autoencoder.cpu(), plan.samples, torch.Generator().manual_seed(1))


def write_pipeline(folder: Path, transformer, encoder, autoencoder) -> None:
    """Write a `WanPipeline` folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    words = tokenizer.create(TEXT_LENGTH)
    pipeline = WanPipeline(
        tokenizer=words,
        text_encoder=encoder,
        vae=autoencoder,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
    )
    pipeline.save_pretrained(folder)
    _anonymous(folder / "vae" / "config.json")
    tokenizer.save(words, folder / "tokenizer")
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer": ["transformers", tokenizer.CLASS]}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    options = {"name": "tiny-wan", "width": WIDTH, "height": HEIGHT, "frames": FRAMES, "fps": 8}
    options |= {"steps": STEPS, "guidance_scale": GUIDANCE, "text_tokens": TEXT_LENGTH}
    options["recipe"] = "builtin"
    options["lora_targets"] = ["all-linear"]
    (folder / "reward_lora.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def build_dit(out: Path, plan: Plan, generator: torch.Generator, precision: Callable) -> dict[str, float]:
    """Train transformer and text encoder, and write the rest of `tiny_wan`, now and then also on the way."""
    device = generator.device
    autoencoder = _load_vae(out, device)
    latents, captions = vae.dataset(autoencoder, plan.clips, generator, precision)
    mean, std = vae.statistics(autoencoder, device)
    transformer, encoder = (module.to(device) for module in dit.create())
    held_out = world.split_captions()[1][: plan.samples]

    def observe(step: int, transformer, encoder) -> None:
        if step % 500:
            return
        scores = measure.of_samples(transformer, encoder, autoencoder, held_out, 1, STEPS, GUIDANCE)
        logger.info("dit step %d %s", step, {name: round(value, 3) for name, value in scores.items()})
        if step % 1000 == 0:
            write_pipeline(out / "tiny_wan", transformer, encoder, autoencoder)

    dit.fit(transformer, encoder, (latents - mean) / std, captions, generator, *plan.dit, precision, observe=observe)
    transformer, encoder, autoencoder = (module.cpu().eval() for module in (transformer, encoder, autoencoder))
    write_pipeline(out / "tiny_wan", transformer, encoder, autoencoder)
    figures = {}
    for steps, guidance in ((STEPS, 1.0), (STEPS, 2.0), (STEPS, 3.0), (STEPS, 5.0), (5, GUIDANCE), (20, GUIDANCE)):
        scores = measure.of_samples(transformer, encoder, autoencoder, held_out, 1, steps, guidance)
        figures |= {f"steps {steps} guidance {guidance:g} {name}": value for name, value in scores.items()}
    return figures


def build(out: Path, seed: int, device: str, stages: tuple[str, ...], plan: Plan) -> dict[str, dict[str, float]]:
    """Run the stages that are not there yet and return their figures."""
    where = torch.device(device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    out.mkdir(parents=True, exist_ok=True)
    world.write_prompts(out / "prompts_train.txt", out / "prompts_test.txt")
    precision = partial(torch.autocast, where.type, torch.bfloat16)
    path = out / "figures.json"
    figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for stage, run in zip(STAGES, (build_vae, build_blend, build_clip, build_dit), strict=True):
        if stage not in stages or stage in figures:
            continue
        began = time.monotonic()
        found = run(out, plan, _stream(seed, stage, where), precision)
        figures[stage] = {name: round(value, 4) for name, value in found.items()}
        figures[stage]["minutes"] = round((time.monotonic() - began) / 60, 1)
        logger.info("%s done: %s", stage, figures[stage])
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the built-in tiny models.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, for example assets/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--share", type=float, default=1.0, help="of the training steps; 0.01 tries the script out")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    plan = Plan() if options.share == 1.0 else Plan().shortened(options.share)
    stages = STAGES if options.stage == "all" else (options.stage,)
    print(json.dumps(build(options.out, options.seed, options.device, stages, plan), indent=2))


if __name__ == "__main__":
    main()
