"""``python -m reward_lora.cli``, which is what torchrun can start."""

import sys

from . import main

sys.exit(main())
