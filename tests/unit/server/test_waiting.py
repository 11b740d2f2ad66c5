"""Standstills: told once, after a while, and again when something has changed in between."""

from __future__ import annotations

from server_model.waiting import Standstill


def test_standstill_is_news_once_and_after_a_while() -> None:
    still = Standstill(after_s=10.0)
    assert [still.is_news("a", now) for now in (0.0, 9.9, 10.0, 11.0, 99.0)] == [False, False, True, False, False]


def test_progress_begins_the_wait_anew() -> None:
    still = Standstill(after_s=10.0)
    assert [still.is_news(*told) for told in (("a", 0.0), ("b", 9.0), ("b", 18.0), ("b", 19.0))] == [
        *[False, False, False],
        True,
    ]
    assert not still.is_news("a", 20.0)
    assert still.is_news("a", 30.0)
