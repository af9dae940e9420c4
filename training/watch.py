"""The eyes of a run: its evaluations, shown to the guards and in its folder, and the LoRA files that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..lora.adapter import Adapter
from .adapters import at_strength, without, write
from .checkpoint import Progress
from .events import Evaluation
from .guards import Guards, Reading
from .run_folder import best_path

if TYPE_CHECKING:
    from .trainer import Trainer


class Watch:
    """Looks at a run's LoRAs on its evaluation prompts, and writes the newest and the best.

    Args:
        trainer: Whose run it is.
        adapters: The LoRAs, by network.
        progress: Has the guards as a checkpoint left them; what they learn goes into the next one.

    Attributes:
        guards: What they say of the evaluations so far.
        adapters: The LoRAs.
    """

    def __init__(self, trainer: Trainer, adapters: Mapping[str, Adapter], progress: Progress) -> None:
        c, judges = trainer.config, [judge.name for judge in trainer.heldout]
        of = [*(sample.identity for sample in trainer.samples), *judges]
        self.guards = Guards(c.patience, c.motion_floor, trainer.reward.name, of, progress.guards)
        self.adapters, self._trainer = adapters, trainer
        progress.guards = self.guards.state

    def evaluate(self, step: int) -> Evaluation | None:
        """Only the leading process evaluates; the others wait for what its guards say, or lend it their shards."""
        trainer, guards, evaluation = self._trainer, self.guards, None
        c, group = trainer.config, trainer.group
        base_is_new = (step or trainer.start) and guards.base is None  # to this run, or its prompts are
        if group.leads:
            if base_is_new:
                with without(self.adapters.values()):
                    guards.observe(Reading.of(0, trainer.evaluate()))
            evaluation = trainer.evaluate()
            trainer.files.write_samples(step, evaluation.frames, trainer.model.spec.fps)
            gentler = self._gentler(step) if c.keep_best and not c.shard else None
            finding = guards.observe(Reading.of(step, evaluation), gentler)
            evaluation = replace(evaluation, findings=asdict(finding))
            if finding.best and c.keep_best:
                self._write(best_path, step, finding.strength)
        elif c.shard:
            if base_is_new:
                with without(self.adapters.values()):
                    trainer.evaluate()
            trainer.evaluate()
        guards.state.update(group.gather(guards.state)[0])
        return evaluation

    def save(self, step: int) -> None:
        """Write the newest LoRAs."""
        self._write(lambda path: path, step)

    def _gentler(self, step: int) -> Callable[[float], Reading]:
        def measured(strength: float) -> Reading:
            with at_strength(self.adapters.values(), strength):
                found = self._trainer.evaluate()
            self._trainer.files.write_previews(step, found.frames, self._trainer.model.spec.fps, strength)
            return Reading.of(step, found, strength)

        return measured

    def _write(self, place: Callable[[Path], Path], step: int, strength: float = 1.0) -> None:
        trainer = self._trainer
        about = {"reward": trainer.reward.name, "step": str(step), **trainer.metadata}
        for expert, adapter in self.adapters.items():
            path = place(trainer.lora_paths[expert])
            write(path, trainer.model, expert, adapter, trainer.config, about, strength)
