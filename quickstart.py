"""From a fresh clone to a trained reward LoRA: sets everything up and runs the demonstration.

    python quickstart.py

Trains on the tiny model that ships with the pack, on a CPU or a GPU, and writes to outputs/quickstart:
the LoRA, the reward curve, and a picture of unseen prompts before and after.
"""

import sys

import bootstrap

if __name__ == "__main__":
    sys.exit(bootstrap.run("reward-lora", ["demo", *sys.argv[1:]]))
