"""From a fresh clone to a trained reward LoRA: sets everything up and runs the demonstration.

    python quickstart.py            without ComfyUI
    python quickstart.py --comfyui  in the ComfyUI at COMFYUI_PATH or ~/ComfyUI, which is installed if need be

Trains on the tiny model that ships with the pack, on a CPU or a GPU. The first writes to outputs/quickstart the LoRA,
the reward curve, and a picture of unseen prompts before and after. The second links the pack into ComfyUI, starts it,
runs a workflow through comfy-cli, and leaves the server running for your browser.
"""

import argparse
import sys
from pathlib import Path

import bootstrap
import bootstrap_comfyui

WORKFLOWS = Path(__file__).resolve().parent / "workflows"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", action="store_true", help="run in ComfyUI")
    group = parser.add_argument_group("with --comfyui; all other arguments are handed to ComfyUI's main.py")
    group.add_argument("--workflow", default="train_reward_lora", metavar="NAME", help="default: %(default)s")
    group.add_argument("--base-directory", type=Path, metavar="DIR", help="with models, output, custom_nodes")
    group.add_argument("--port", type=int, default=0, help="default: 8188, or a free one")
    group.add_argument("--once", action="store_true", help="stop the server after the run")
    chosen, others = parser.parse_known_args()
    if not chosen.comfyui:
        return bootstrap.run("reward-lora", ["demo", *sys.argv[1:]])
    workflow = WORKFLOWS / f"{chosen.workflow}.json"
    if not workflow.is_file():
        names = ", ".join(sorted(path.stem for path in WORKFLOWS.glob("*.json")))
        sys.exit(f"there is no workflow {chosen.workflow!r}; choose one of {names}")
    return bootstrap_comfyui.run(
        bootstrap.comfy_cli(),
        workflow,
        base=chosen.base_directory,
        port=chosen.port,
        once=chosen.once,
        arguments=others,
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
