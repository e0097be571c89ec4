"""Rows and settings that nobody would write; `python -m tests.any_rows 10000` tries many more of them."""

import pytest
from hypothesis import strategies as st

from lm_jax.errors import UserError
from tests import any_rows


@pytest.mark.parametrize("kind", any_rows.KINDS)
def test_an_error_of_ours_or_a_right_result(kind):
    counts = any_rows.attempt(kind, 40)
    assert counts["taken"]  # else nothing was looked at
    assert counts["refused"] or kind in any_rows.NEVER_REFUSED


def test_another_error_is_seen(monkeypatch):
    def check(number):
        raise KeyError("zz") if number > 3 else UserError("too small")

    monkeypatch.setitem(any_rows.KINDS, "preference", (st.integers(), check))
    with pytest.raises(KeyError):
        any_rows.attempt("preference", 100)
