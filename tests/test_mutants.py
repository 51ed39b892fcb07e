"""Every planted bug must turn the tests red: the table of mutants.py."""

import mutants
import pytest


@pytest.mark.slow
def test_every_planted_bug_is_seen(capsys):
    with capsys.disabled():
        print()
        assert mutants.main(), "see the table above"


def test_every_bug_can_be_planted(tmp_path):
    """Its text is in its file exactly once. Quick, so that a change that moves it is noticed."""
    for mutant in mutants.MUTANTS:
        text = (mutants.ROOT / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{mutant.what}: {mutant.file}: {mutant.old}"
        assert mutant.old != mutant.new
        assert (mutants.ROOT / "tests" / mutant.tests).is_file()
