"""The pack as it is shipped: what it asks of an environment, and what it must not do to one."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from reward_lora import files

ROOT = Path(files.__file__).parent
TRACKED = [path for path in ROOT.rglob("*.py") if not {".venv", "outputs", "build"} & set(path.relative_to(ROOT).parts)]


def project() -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = pytest.importorskip("tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_are_those_of_the_project():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == project()["project"]["dependencies"]


def test_nothing_users_share_is_pinned():
    for requirement in project()["project"]["dependencies"]:
        assert not re.search(r"==|<|~=", requirement), requirement
        assert not re.match(r"(protobuf|onnxruntime|hpsv2)", requirement), requirement
    assert "numpy" in project()["project"]["dependencies"]


def test_registry_data():
    data = project()
    assert "comfyui" not in data["project"]["name"].lower()
    assert data["tool"]["comfy"]["requires-comfyui"] == ">=0.3.64"
    packages = set(data["tool"]["setuptools"]["packages"])
    found = {
        ".".join(["reward_lora", *path.parent.relative_to(ROOT).parts])
        for path in TRACKED
        if path.name == "__init__.py"
    }
    assert {p for p in found if not p.startswith("reward_lora.tests")} == packages


def test_the_icon_suits_the_registry():
    with Image.open(ROOT / "web" / "icon.png") as icon:
        assert icon.size[0] == icon.size[1] <= 400


def test_nodes_start_no_installation_and_evaluate_no_text():
    """The registry's security rules, in all that it ships."""
    left_out = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    shipped = [p for p in TRACKED if not {f"{p.relative_to(ROOT).parts[0]}/", p.name} & set(left_out)]
    assert ROOT / "nodes" / "train.py" in shipped
    for path in shipped:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id in ("eval", "exec", "compile", "__import__")), path
            assert not (isinstance(node, ast.Constant) and node.value in ("pip", "uv")), path


def test_imports_inside_the_pack_are_relative():
    ours = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} | {"files", "demo", "reward_lora"}
    for path in TRACKED:
        if path.parent == ROOT and path.stem in ("quickstart", "run_tests") or "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert not {name.partition(".")[0] for name in names} & ours, (path, names)


def test_importing_the_pack_is_cheap():
    """ComfyUI has torch already; nothing else that is heavy may come with the registry modules."""
    code = (
        "import torch, sys; before = set(sys.modules); import reward_lora, reward_lora.video_models, "
        "reward_lora.reward_models, reward_lora.training.config, reward_lora.lora.adapter; "
        "heavy = {'diffusers', 'transformers', 'peft', 'matplotlib', 'av', 'safetensors', 'accelerate'}; "
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_the_built_in_model_is_small():
    weights = [p.stat().st_size for p in (ROOT / "assets").rglob("*.safetensors") if "lora" not in p.name]
    assert weights
    assert sum(weights) < 12e6
    assert sum(p.stat().st_size for p in (ROOT / "tests" / "fixtures").rglob("*") if p.is_file()) < 10e6


def test_workflows_have_api_twins_and_thumbnails():
    names = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert len(names) >= 11
    assert {path.stem for path in (ROOT / "workflows" / "api").glob("*.json")} == names
    assert {path.stem for path in (ROOT / "workflows").glob("*.jpg")} == names


def test_every_help_page_shows_its_node():
    pages = list((ROOT / "web" / "docs").glob("*.md"))
    assert len(pages) >= 24
    for page in pages:
        assert f"]({page.stem}.webp)" in page.read_text(encoding="utf-8")
        assert page.with_suffix(".webp").stat().st_size < 40_000


def test_files_that_are_not_code_are_installed_too():
    data = project()["tool"]["setuptools"]["package-data"]["reward_lora"]
    shown = [*ROOT.glob("workflows/**/*.j*"), *ROOT.glob("web/docs/*"), *ROOT.glob("locales/*/*.json")]
    assert shown
    assert [p for p in shown if not any(p.relative_to(ROOT).match(pattern) for pattern in data)] == []
