"""ComfyUI's two workflow formats: what the browser draws, and what the API runs.

    python -m reward_lora.tests.comfyui.workflow_format http://127.0.0.1:8188 [FILE ...]

brings the shipped workflows up to date with the nodes of a running server, and writes their API twins.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
AFTER_GENERATE = "control_after_generate"


def fields(definition: dict) -> Iterator[tuple[str, Any, dict, bool]]:
    """Every input of a node's ``object_info`` entry: name, type (of a choice, ``COMBO``), options, optional or not."""
    for group in ("required", "optional"):
        for name, spec in definition["input"].get(group, {}).items():
            options = dict(spec[1]) if len(spec) > 1 else {}
            if isinstance(spec[0], list):
                options["options"] = spec[0]
            yield name, "COMBO" if isinstance(spec[0], list) else spec[0], options, group == "optional"


def is_widget(kind: str, options: Mapping) -> bool:
    return kind in WIDGETS and not options.get("forceInput")


def slots(definition: dict) -> list[str]:
    """Whose values ``widgets_values`` holds, in order; a seed is followed by what the browser does to it."""
    names = []
    for name, kind, options, _ in fields(definition):
        if is_widget(kind, options):
            names.append(name)
            if options.get(AFTER_GENERATE, kind == "INT" and name in ("seed", "noise_seed")):
                names.append(AFTER_GENERATE)
            if options.get("image_upload"):
                names.append("upload")
    return names


def values(node: dict, definition: dict) -> dict[str, Any]:
    """A drawn node's widgets by name. What a node keeps beyond its inputs, such as a preview's text, is left out."""
    return dict(zip(slots(definition), node.get("widgets_values") or (), strict=False))


def to_api(drawn: dict, info: Mapping[str, dict]) -> dict[str, dict]:
    """The graph that the browser would send, without notes."""
    links = {link[0]: [str(link[1]), link[2]] for link in drawn["links"]}
    graph = {}
    for node in drawn["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs = {k: v for k, v in values(node, info[node["type"]]).items() if k not in (AFTER_GENERATE, "upload")}
        for entry in node.get("inputs", ()):
            if entry.get("link") is not None:
                inputs[entry["name"]] = links[entry["link"]]
        title = node.get("title") or info[node["type"]]["display_name"] or node["type"]
        graph[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    return graph


def wrong_values(graph: Mapping[str, dict], info: Mapping[str, dict], files: Mapping[str, list[str]]) -> list[str]:
    """What of a graph its nodes would not take: unknown nodes and inputs, missing ones, values that are not allowed.

    Args:
        graph: In the API's format.
        info: A server's ``object_info``.
        files: Model files a user is to have, by folder: choices that this server may lack.
    """
    there = {name for names in files.values() for name in names}
    found = []
    for key, node in graph.items():
        kind = node["class_type"]
        if kind not in info:
            found.append(f"{key}: there is no node {kind}")
            continue
        known = {name: spec for name, *spec in fields(info[kind])}
        found += [f"{key} {kind}: no input {name}" for name in node["inputs"].keys() - known.keys()]
        for name, (type_, options, optional) in known.items():
            value = node["inputs"].get(name)
            if value is None:
                if not optional:
                    found.append(f"{key} {kind}: {name} is missing")
            elif isinstance(value, list):
                source = graph[value[0]]["class_type"]
                made = info[source]["output"][value[1]]
                if "*" not in (type_, made) and made not in type_.split(","):
                    found.append(f"{key} {kind}: {name} wants {type_}, and {source} gives {made}")
            elif not _allowed(value, type_, options) and value not in there:
                found.append(f"{key} {kind}: {name} cannot be {value!r}")
    return found


def _allowed(value: Any, kind: str, options: Mapping) -> bool:
    if kind == "COMBO":
        return value in options.get("options", ())
    if kind in ("INT", "FLOAT"):
        numbers = int if kind == "INT" else (int, float)
        inside = options.get("min", value) <= value <= options.get("max", value)
        return isinstance(value, numbers) and not isinstance(value, bool) and inside
    return isinstance(value, {"STRING": str, "BOOLEAN": bool}.get(kind, ()))


def refreshed(drawn: dict, info: Mapping[str, dict]) -> dict:
    """The same workflow, drawn for the nodes as they are now: values and links keep their names, new inputs get their
    defaults. Raises ``ValueError`` if a link has lost its input or output."""
    drawn = json.loads(json.dumps(drawn))
    links = {link[0]: link for link in drawn["links"]}
    for node in drawn["nodes"]:
        if node["type"] in NOTES:
            continue
        definition, old = info[node["type"]], {entry["name"]: entry for entry in node["inputs"]}
        held = _old_values(node, definition)
        sockets, widgets, order = [], [], slots(definition)
        for name, kind, options, optional in fields(definition):
            entry = {"localized_name": name, "name": name, "type": kind, "link": old.pop(name, {}).get("link")}
            entry |= {"shape": 7} if optional else {}
            if is_widget(kind, options):
                widgets.append(entry | {"widget": {"name": name}})
                held.setdefault(name, options.get("default", (options.get("options") or [None])[0]))
            else:
                sockets.append(entry)
        held.setdefault(AFTER_GENERATE, "fixed")
        held.setdefault("upload", "image")
        lost = [name for name, entry in old.items() if entry.get("link") is not None]
        if lost:
            raise ValueError(f"{node['type']} has no input {', '.join(lost)} any more")
        node["inputs"] = sockets + widgets
        node["widgets_values"] = [held[name] for name in order]
        for index, entry in enumerate(node["inputs"]):
            if entry["link"] is not None:
                links[entry["link"]][4] = index
        names = definition["output_name"]
        if any(link[1] == node["id"] and link[2] >= len(names) for link in links.values()):
            raise ValueError(f"an output of {node['type']} that is used is gone")
        node["outputs"] = [
            {
                "localized_name": name,
                "name": name,
                "type": kind,
                "links": [i for i, link in links.items() if link[1] == node["id"] and link[2] == index] or None,
            }
            for index, (name, kind) in enumerate(zip(names, definition["output"], strict=True))
        ]
    return drawn


def _old_values(node: dict, definition: dict) -> dict[str, Any]:
    """Widgets by the names the node itself lists, which are those of the day it was drawn."""
    order, names = slots(definition), []
    for name in (entry["name"] for entry in node["inputs"] if "widget" in entry):
        names.append(name)
        after = order[order.index(name) + 1 :][:1] if name in order else []
        names += [each for each in after if each in (AFTER_GENERATE, "upload")]
    return dict(zip(names, node.get("widgets_values") or (), strict=False))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(url: str, *files: str) -> None:
    with urllib.request.urlopen(f"{url}/object_info", timeout=60) as answer:
        info = json.load(answer)
    for path in map(Path, files) if files else sorted(WORKFLOWS.glob("*.json")):
        drawn = refreshed(read(path), info)
        write(path, drawn)
        write(path.parent / "api" / path.name, to_api(drawn, info))


if __name__ == "__main__":
    main(*sys.argv[1:])
