"""The package without ComfyUI."""

import subprocess
import sys


def test_import_needs_no_comfyui_and_costs_nothing():
    code = "import sys, reward_lora; print(reward_lora.WEB_DIRECTORY, *{'torch', 'comfy_api'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "./web"
