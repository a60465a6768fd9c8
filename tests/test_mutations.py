"""The list of mistakes fits the code and the tests; and the tool tells caught mistakes from others, on a small project.

The mistakes themselves are applied by `python -m benchmarks.mutations`.
"""

from pathlib import Path

import pytest

from benchmarks.mutations import CAUGHT, DOES_NOT_RUN, SURVIVED, Mutation, outcomes, problems_of, read_table

MOST_SURVIVORS = 3


def test_every_entry_fits_the_code_and_names_tests_that_exist() -> None:
    """When you change a line that is listed, or rename a test: change benchmarks/mutations.toml too."""
    assert [problem for mutation in read_table() for problem in problems_of(mutation)] == []


def test_there_are_many_and_few_may_survive() -> None:
    table = read_table()
    assert len({mutation.name for mutation in table}) == len(table) >= 60
    assert all(mutation.tests for mutation in table)
    assert sum(bool(mutation.reason) for mutation in table) <= MOST_SURVIVORS


def mistake(old: str, new: str, **changes: object) -> Mutation:
    given = {"row": "a", "what": new, "file": "code.py", "tests": ("test_code.py::test_one",)}
    return Mutation(old=old, new=new, **given | changes)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text("one = 2 - 1\ntwo = 2\n", encoding="utf-8")
    test = "import code\n\n\ndef test_one():\n    assert code.one == 1\n"
    (tmp_path / "test_code.py").write_text(test, encoding="utf-8")
    (tmp_path / "conftest.py").write_text("import sys\nsys.modules.pop('code', None)\nsys.path.insert(0, '.')\n")
    return tmp_path


def test_caught_survived_and_does_not_run(project: Path) -> None:
    mistakes = [mistake("2 - 1", "2 + 1"), mistake("two = 2", "two = 3"), mistake("two = 2", "two = (")]
    assert outcomes(mistakes, project, workers=1) == [CAUGHT, SURVIVED, DOES_NOT_RUN]
    assert (project / "code.py").read_text(encoding="utf-8") == "one = 2 - 1\ntwo = 2\n"


def test_tests_that_fail_without_a_mistake_prove_nothing(project: Path) -> None:
    (project / "code.py").write_text("one = 0\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="fail without a mistake"):
        outcomes([mistake("one = 0", "one = 2")], project, workers=1)


def test_stale_entries_are_named(project: Path) -> None:
    assert problems_of(mistake("2 - 1", "2 + 1"), project) == []
    assert problems_of(mistake("2", "3"), project) == ["a: 3: the old text is 2 times in code.py"]
    assert problems_of(mistake("three", "3"), project) == ["a: 3: the old text is 0 times in code.py"]
    gone = mistake("2 - 1", "x", tests=("test_code.py::test_two", "test_none.py::test_one"))
    assert problems_of(gone, project) == [f"a: x: there is no test {test}" for test in gone.tests]
