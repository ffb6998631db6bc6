"""The README is a front door: short, and its two commands are true."""

from pairs import ROOT

README = (ROOT / "README.md").read_text()


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_its_test_command_is_the_one_that_ci_runs() -> None:
    command = 'pip install -e ".[test]" && pytest'
    assert command in README
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet -e ".[test]"\npytest\n' in ci
