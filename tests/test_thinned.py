"""Tests of the choice of cases that tests/thinned.py makes."""

from __future__ import annotations

import itertools

import thinned

CASES = [dict(zip("abc", values, strict=True)) for values in itertools.product("0123", "01", "01234")]


def combinations(cases: list[dict[str, str]], *names: str) -> set[tuple[str, ...]]:
    return {tuple(case[name] for name in names) for case in cases}


def test_any_two_values_meet() -> None:
    some = [CASES[place] for place in thinned.chosen(CASES)]
    assert 20 <= len(some) < 26
    for pair in itertools.combinations("abc", 2):
        assert combinations(some, *pair) == combinations(CASES, *pair)


def test_what_is_asked_for_meets() -> None:
    some = [CASES[place] for place in thinned.chosen(CASES, ["a b", "c"])]
    assert len(some) == 8
    assert combinations(some, "a", "b") == combinations(CASES, "a", "b")
    assert combinations(some, "c") == combinations(CASES, "c")
