"""Commands that run others: what those get of the environment."""

import pytest

from lab import commands as steps


@pytest.mark.parametrize("own", [None, "glibc.malloc.hugetlb=0"])
def test_a_step_gets_huge_pages_unless_the_user_says_otherwise(own, tmp_path, monkeypatch):
    if own is None:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    else:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    (tmp_path / "shows.py").write_text("import os; print(os.environ['GLIBC_TUNABLES'], 'PATH' in os.environ)")
    monkeypatch.chdir(tmp_path)
    with steps.logged(tmp_path / "log"):
        steps.run_step("shows")
    assert (tmp_path / "log").read_text().splitlines()[-1] == f"{own or 'glibc.malloc.hugetlb=1'} True"
