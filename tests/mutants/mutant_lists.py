"""All mutants. Those of one file follow each other, so that each build compiles few files."""

from __future__ import annotations

import mutants_of_adapters
import mutants_of_csrc
import mutants_of_kernels
import mutants_of_package
import mutants_of_prefixes
import mutants_of_rules
from mutant import Mutant

MUTANTS: list[Mutant] = [
    *mutants_of_csrc.MUTANTS,
    *mutants_of_rules.MUTANTS,
    *mutants_of_prefixes.MUTANTS,
    *mutants_of_kernels.MUTANTS,
    *mutants_of_package.MUTANTS,
    *mutants_of_adapters.MUTANTS,
]
