"""A run's report: one HTML file that opens anywhere, with what the run gained, what it cost, and what to use."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .guards import FLAT, PRESETS, ratio
from .media import png_bytes
from .run_log import RunLog, advice, deeds
from .sweep_report import sweep_plot

PREVIEWS = 4
"""How many clips of an evaluation the report shows."""


def page(
    name: str,
    reward: str,
    records: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    prompts: Sequence[str],
    picture: Path,
) -> str:
    """The report as HTML that needs nothing else.

    Args:
        name: Of the run.
        reward: That is trained on.
        records: Of the log.
        config: All settings of the run.
        prompts: Of the evaluations.
        picture: The curve; previews lie in ``samples`` beside it.
    """
    log = RunLog.of(records)
    step = records[-1]["step"] if records else 0
    warns, said = advice(log, name, bool(config.get("keep_best")))
    parts = [
        f"<h1>{escape(name)}</h1><p class=sub>{escape(reward)}, step {step} of {config.get('steps', step)}</p>",
        f"<div class='{'warn' if warns else 'good'}'>{escape(said[0])}</div>",
        "".join(f"<p>{escape(text)}</p>" for text in said[1:]),
        "<h2>Curves</h2>",
        f"<img class=curve alt='reward over the steps' src='{_embedded(picture, 'png')}'>",
        "<p class=sub>Bands are 95 % intervals of the mean over the fixed prompts.</p>",
        _videos(log, prompts, picture.parent / "samples"),
        _strengths(log, prompts, picture.parent / "samples"),
        _evaluations(log, reward),
        "<h2>What the guards did</h2><ul>" + "".join(f"<li>{escape(t)}</li>" for t in deeds(log, config)) + "</ul>",
        _settings(config),
    ]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(name)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{margin-bottom:0}h2{margin-top:1.6em;border-bottom:1px solid #ddd}
.sub{color:#666;margin-top:.2em}.warn,.good{padding:.8em 1em;border-left:5px solid;font-size:1.1em;margin:1em 0}
.warn{border-color:#d1603d;background:#fdf1ec}.good{border-color:#3a9a5b;background:#eef8f1}
.curve{max-width:100%}.scroll{overflow-x:auto}table{border-collapse:collapse}
th,td{padding:.3em .7em;text-align:right;border-bottom:1px solid #eee;vertical-align:top}
th:first-child,td:first-child,td.text{text-align:left}
.clips td,.clips th{text-align:center;border:0;padding:.2em}.clips td:first-child{max-width:13em}
.clips img{width:160px;display:block}.best{background:#eef8f1}.bad{background:#fdf1ec}
"""


def step_preview(index: int, step: int, strength: float = 1.0) -> str:
    """Name of the preview of an evaluation's clip, with the LoRA at a strength, in ``samples``."""
    return f"{index:02d}-step-{step:06d}{'' if strength == 1 else f'-at-{strength:g}'}.webp"


def sweep_preview(index: int, strength: float) -> str:
    """Name of the preview of a clip at a strength, in ``samples``."""
    return f"{index:02d}-strength-{strength:g}.webp"


def _strengths(log: RunLog, prompts: Sequence[str], folder: Path) -> str:
    """The sweep of the run's LoRA: a table, a curve with intervals, and videos."""
    sweep, record = log.sweep, log.sweep_record
    if sweep is None or record is None:
        return ""
    names = [f"{name} ({'held out' if name in sweep.held_out and i else 'trained'})"
             for i, name in enumerate(sweep.base.scores)]  # fmt: skip
    head = "".join(f"<th>{escape(name)}<br>gain, 95 % interval</th>" for name in names)
    sharp = {point["strength"]: point["sharpness"] for point in record["points"]}
    rows = []
    for point in sweep.points:
        gains = [sweep.gain(point, name) for name in sweep.base.scores]
        cells = [_gain((point.strength, gain.mean, gain.low, gain.high)) for gain in gains]
        cells += [f"{sweep.motion_ratio(point):.2f}", f"{ratio(sharp[point.strength], sharp[0], FLAT):.2f}"]
        note = "use this" if point is sweep.best else ""
        rows.append(
            f"<tr class='{'best' if note else ''}'><td>{point.strength:g}</td>"
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}<td class=text>{note}</td></tr>"
        )
    titles = [
        f"{'without' if p.strength == 0 else f'strength {p.strength:g}'}{', use this' if p is sweep.best else ''}"
        for p in sweep.points
    ]

    def file(index: int, column: int) -> Path:
        strength = sweep.points[column].strength
        if strength == 1:
            return folder / _preview(log, index, record["step"])
        return folder / (sweep_preview(index, strength) if strength else step_preview(index, 0))

    clips = _clips(prompts, titles, file)
    return (
        f"<h2>The LoRA of {log.swept} at several strengths</h2><div class=scroll><table>"
        f"<tr><th>strength</th>{head}<th>motion<br>/ base</th><th>sharpness<br>/ base</th><th></th></tr>"
        f"{''.join(rows)}</table></div>"
        f"<img class=curve alt='gain over the strength' src='{_data(png_bytes(sweep_plot(sweep)), 'png')}'>{clips}"
    )


def _clips(prompts: Sequence[str], titles: Sequence[str], path: Callable[[int, int], Path]) -> str:
    """A table of previews: a row a prompt, a column a title; ``path`` is given both indices."""
    rows = []
    for index, prompt in enumerate(prompts[:PREVIEWS]):
        cells = []
        for column, title in enumerate(titles):
            file, label = path(index, column), escape(f"{title}: {prompt}", quote=True)
            cells.append(f"<img alt='{label}' src='{_embedded(file, 'webp')}'>" if file.is_file() else "")
        rows.append(f"<tr><td>{escape(prompt)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return f"<div class=scroll><table class=clips><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"


def _videos(log: RunLog, prompts: Sequence[str], folder: Path) -> str:
    steps = log.columns()
    if not steps:
        return ""
    best = ", best" if log.strength == 1 else f" at {log.strength:g}, best"
    titles = [("before" if s == 0 else f"step {s}") + (best if s == log.best else "") for s in steps]
    clips = _clips(prompts, titles, lambda index, column: folder / _preview(log, index, steps[column]))
    return f"<h2>The same prompts and seeds, before and after</h2>{clips}"


def _preview(log: RunLog, index: int, step: int) -> str:
    """Of a clip with the LoRA of a step, the best one at the strength it was kept at."""
    return step_preview(index, step, log.strength if step == log.best else 1.0)


def _evaluations(log: RunLog, reward: str) -> str:
    if not log.evaluations:
        return ""
    names = [f"{reward} (trained)", *(f"{name} (held out)" for name in log.heldout)]
    head = "".join(f"<th>{escape(name)}<br>gain, 95 % interval</th>" for name in names)
    curves = [log.gains(name) for name in ("", *log.heldout)]
    best = "best" if log.strength == 1 else f"best at strength {log.strength:g}"
    rows = []
    for index, record in enumerate(log.evaluations):
        guards = record["guards"]
        cells = [_gain(curve[index]) if curve else "" for curve in curves]
        cells += [f"{guards['motion']:.2f}", f"{guards['sharpness']:.2f}"]
        kind = "best" if record["step"] == log.best else "bad" if guards["words"] else ""
        note = best if kind == "best" else kind
        rows.append(
            f"<tr class='{kind}'><td>{record['step']}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}"
            f"<td class=text>{note}</td></tr>"
        )
    return (
        f"<h2>Evaluations</h2><div class=scroll><table><tr><th>step</th>{head}<th>motion<br>/ base</th>"
        f"<th>sharpness<br>/ base</th><th></th></tr>{''.join(rows)}</table></div>"
    )


def _settings(config: Mapping[str, Any]) -> str:
    guards = {*PRESETS["off"], "guards"}
    flat = {}
    for name, value in config.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
    ordered = sorted(flat, key=lambda name: name not in guards)
    rows = "".join(f"<tr><td>{escape(name)}</td><td class=text>{escape(str(flat[name]))}</td></tr>" for name in ordered)
    return f"<h2>Settings</h2><details><summary>All {len(flat)} of them</summary><table>{rows}</table></details>"


def _embedded(path: Path, kind: str) -> str:
    return _data(path.read_bytes(), kind)


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _gain(point: Sequence[float]) -> str:
    _, mean, low, high = point
    return f"{mean:+.4f}<br><span class=sub>{low:+.4f} to {high:+.4f}</span>"
