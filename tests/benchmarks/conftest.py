"""The benchmarks are imported from the root of the clone: no installed package has them."""

from __future__ import annotations

import sys

from snippets import ROOT

sys.path.append(str(ROOT))
