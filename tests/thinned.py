"""A choice of a test's cases in which every combination of the values that matter together is still met."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence

import pytest
import torch


def chosen(cases: Sequence[Mapping[str, Hashable]], groups: Sequence[str] = ()) -> list[int]:
    """The places of as few of ``cases`` as a greedy search finds that still have each of the combinations asked for.

    A case is the value of each parameter. A group is the names of parameters, with spaces between them: all
    combinations of their values that the cases have are kept. Without groups, those of any two parameters.
    """
    names = sorted(set().union(*cases))
    asked = [tuple(group.split()) for group in groups] or list(itertools.combinations(names, min(2, len(names))))
    covers = [{(group, tuple(case.get(name) for name in group)) for group in asked} for case in cases]
    left, places = set().union(*covers), []
    while left:
        best = max(range(len(cases)), key=lambda place: len(covers[place] & left))  # the first of equal ones
        places.append(best)
        left -= covers[best]
    return sorted(places)


def kept(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """The items without what the marker ``thinned`` of their test leaves out."""
    left, tests = set(items), {}
    for item in items:
        if marker := item.get_closest_marker("thinned"):
            params = item.callspec.params
            interpreted = params.get("backend") == "triton" and not torch.cuda.is_available()
            if interpreted and torch.float64 in params.values():
                left.discard(item)  # would be skipped
            elif interpreted or marker.kwargs.get("everywhere"):
                tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        parameters = [{name: repr(value) for name, value in case.callspec.params.items()} for case in cases]
        places = chosen(parameters, cases[0].get_closest_marker("thinned").args)
        left -= set(cases) - {cases[place] for place in places}
    return left
