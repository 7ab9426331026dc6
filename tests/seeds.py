"""The random seed of this run, which pytest's header prints; an environment variable sets it."""

from __future__ import annotations

import os
import random

SEED = int(os.environ.get("FUSED_CONTRASTIVE_TEST_SEED", random.randrange(2**31)))
