"""Chooses few of a test's cases, so that every combination of values that matter together still occurs."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence

import pytest
import torch


def chosen(cases: Sequence[Mapping[str, Hashable]], groups: Sequence[str] = ()) -> list[int]:
    """Indices of cases, as few as a greedy search finds, in which each combination asked for still occurs.

    A case is the value of each parameter. A group is names of parameters, separated by spaces: every combination of
    their values that occurs in ``cases`` is kept. Without groups, every combination of two parameters is kept.
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
    """The items that remain after the marker ``thinned`` of their tests is applied."""
    left, tests = set(items), {}
    for item in items:
        if marker := item.get_closest_marker("thinned"):
            params = item.callspec.params
            interpreted = params.get("backend") == "triton" and not torch.cuda.is_available()
            if interpreted and torch.float64 in params.values():
                left.discard(item)  # the test would skip it
            elif interpreted or marker.kwargs.get("everywhere"):
                tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        parameters = [{name: repr(value) for name, value in case.callspec.params.items()} for case in cases]
        places = chosen(parameters, cases[0].get_closest_marker("thinned").args)
        left -= set(cases) - {cases[place] for place in places}
    return left
