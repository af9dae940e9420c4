"""The README's commands do what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from reward_lora import cli, files

README = (Path(files.__file__).parent / "README.md").read_text(encoding="utf-8")


def commands():
    """Those of the command line, which ``test_builtin`` runs."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.splitlines():
            if line.startswith("reward-lora"):
                yield shlex.split(line)[1:]


def test_a_reward_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    Path("redness.py").write_text(code, encoding="utf-8")
    (line,) = re.findall(r"`(reward-lora train --reward redness.py:Redness[^`]*)`", README)
    assert cli.main([*shlex.split(line)[1:], "--steps", "2", "--sample-every", "0"]) == 0, capsys.readouterr().err
    assert Path("outputs/red/red.safetensors").exists()
    assert cli.main(["train", "--reward", "redness.py:Blueness", "--name", "x"]) == 2
    assert "defines no Blueness" in capsys.readouterr().err
