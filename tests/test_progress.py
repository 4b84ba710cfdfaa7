"""How far the work is, where there is no terminal: plain lines, every so often and at the end."""

import io

import pytest

from tinydance.run.cli import Progress, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by 8 seconds whenever somebody looks."""
    now = iter(range(0, 10**6, 8))
    monkeypatch.setattr("tqdm.std.time", lambda: next(now))


def test_a_plain_line_at_most_every_20_seconds_and_at_the_end(clock, capsys):
    with Progress("training", 9, "step", done=2, leave=True) as bar:
        for loss in range(7):
            bar.update(loss=loss)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and 2 < len(lines) < 6 and "\r" not in err
    assert lines[0].startswith("training: 2 of 9,")
    assert lines[1].startswith("training: 5 of 9,") and lines[1].endswith("loss 2")
    assert lines[-1].startswith("training: 9 of 9,") and lines[-1].endswith("loss 6")


def test_what_is_quick_or_not_to_be_shown_says_nothing(capsys):
    assert list(progress(range(5), "reading", "clip")) == [0, 1, 2, 3, 4]
    with Progress("training", 5, "step", leave=True, shown=False) as bar:
        bar.update(5)
    assert capsys.readouterr() == ("", "")


def test_items_of_unknown_number_are_counted(clock, capsys):
    assert list(progress(iter("abcdefg"), "indexing", "shard")) == list("abcdefg")
    assert "indexing: 3 of ?," in capsys.readouterr().err


def test_on_a_terminal_one_line_is_drawn_again_and_again(clock):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    with Progress("training", 3, "step", leave=True, file=file) as bar:
        for loss in range(3):
            bar.update(loss=loss)
    assert file.getvalue().count("\r") > 3 and file.getvalue().count("\n") == 1
    assert "100%" in file.getvalue() and "loss 2" in file.getvalue()
