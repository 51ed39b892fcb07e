"""Every planted bug must turn the tests red: the table of harness/mutants.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import mutants


@pytest.mark.slow
def test_every_planted_bug_is_seen(capsys):
    """In a process of its own, which has imported nothing of the repository."""
    with capsys.disabled():
        print(flush=True)
        program = Path(mutants.__file__)
        done = subprocess.run([sys.executable, str(program)], timeout=1800)
    assert done.returncode == 0, "a bug was not seen, or could not be planted: the table above"


def test_every_bug_can_be_planted():
    """Its text is in its file exactly once: quick, so that a change that moves it is noticed."""
    for mutant in mutants.MUTANTS:
        text = (mutants.ROOT / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{mutant.what}: {mutant.file}: {mutant.old}"
        assert mutant.old != mutant.new
        tests = (mutants.ROOT / "tests" / mutant.tests).read_text()
        names = re.findall(r"def (test_\w+)", tests)
        first = [choice.split()[0] for choice in mutant.where.split(" or ")]
        assert any(word in name for word in first for name in names), (mutant.what, mutant.where)
