"""The random seed of this run, printed by pytest's header; the environment repeats one."""

from __future__ import annotations

import os
import random

SEED = int(os.environ.get("FUSED_CONTRASTIVE_TEST_SEED", random.randrange(2**31)))
