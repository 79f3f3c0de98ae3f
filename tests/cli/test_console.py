from __future__ import annotations

import io
import json
import re

import pytest

from dinocli.cli import console
from dinocli.core.resources import format_bytes


def test_tables_go_to_stdout_and_messages_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(["name", "score"], [["[x]", "1.5"]], title="what")
    console.say("a [word]")
    captured = capsys.readouterr()
    assert "what" in captured.out
    assert "[x]" in captured.out
    assert captured.err == "a [word]\n"


def test_each_skipped_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.skipped({"a.jpg": "damaged", "b.jpg": "[empty]"})
    assert capsys.readouterr().err == "note: skipped a.jpg: damaged\nnote: skipped b.jpg: [empty]\n"
    console.skipped({})
    assert not capsys.readouterr().err


def test_the_last_lines_name_the_written_files_and_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    console.saved(["a", "b c", "a"], "dino knn")
    assert capsys.readouterr().err == "results saved to a, b c\nnext: dino knn\n"
    console.saved(range(10))
    assert capsys.readouterr().err == "results saved to 0, 1, 2, 3, 4, 5, 6, 7 and 2 more\n"
    console.saved([])
    assert capsys.readouterr() == ("", "")


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress("work", 100, "steps") as advance:
        for done in range(1, 101):
            now[0] = done * 0.5
            advance(done, f"loss {done}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0] == "work 20/100 steps  loss 20  40 s left"
    assert lines[-1] == "work 100/100 steps  loss 100"


@pytest.mark.parametrize(("seconds", "said"), [(7, "7 s"), (61, "1 min 1 s"), (5400, "1.5 h"), (86400 * 3, "3.0 days")])
def test_durations(seconds: float, said: str) -> None:
    assert console.duration(seconds) == said


def test_sizes() -> None:
    assert [format_bytes(n) for n in (5e6, 2.5e9)] == ["5 MB", "2.5 GB"]


NAME = "a\x1b[31mred\n\u202egnp[bold]\x9b\x7f.jpg"
SHOWN = r"a\x1b[31mred\n\u202egnp[bold]\x9b\x7f.jpg"


def test_control_characters_in_names_are_escaped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    console.say(f"note: {NAME}")
    console.skipped({NAME: "damaged"})
    console.error(f"no {NAME}", f"take {NAME}")
    with console.progress(f"work {NAME}", 1, "steps") as advance:
        advance(1, NAME)
    console.out(NAME)
    console.table([NAME, "x"], [[NAME, "1"]], title=NAME)
    console.out_json({NAME: [NAME]})
    captured = capsys.readouterr()
    assert captured.err.count(SHOWN) == 6
    assert captured.out.count(SHOWN) == 4
    assert json.loads(captured.out[captured.out.index("{") :]) == {NAME: [NAME]}
    for text in (captured.out, captured.err):
        assert all(sign.isprintable() or sign == "\n" for sign in text)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_escapes_control_characters_of_names(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    written = io.StringIO()
    monkeypatch.setattr(console, "_words", console.Console(file=written, force_terminal=terminal, width=200))
    with console.progress(NAME, 2, "steps") as advance:
        advance(1, NAME)
        advance(2, NAME)
    assert SHOWN in written.getvalue()
    assert "\u202e" not in written.getvalue()
    assert "\x1b[31mred" not in written.getvalue()


@pytest.mark.parametrize("width", [200, 80, 60])
@pytest.mark.parametrize("what", ["pretrain", "compare with a folder of features that has a long name"])
def test_a_narrow_terminal_shows_the_remaining_time_completely(
    width: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    terminal = type(console._words)(file=out, force_terminal=True, width=width, color_system=None, soft_wrap=True)
    monkeypatch.setattr(console, "_words", terminal)
    with console.progress(what, 125_000, "steps") as advance:
        for step in range(1, 4):
            advance(step, "loss 4.032  k-NN 45.1 %")
    drawn = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip() for line in re.split(r"[\r\n]", out.getvalue())]
    *_, last = (line for line in drawn if line)
    assert len(last) <= width
    assert "3/125000 steps" in last
    assert re.search(r" (\d+:\d\d:\d\d|-:--:--) left$", last)
    assert ("loss 4.032" in last) == (what == "pretrain" or width == 200), (
        "a part of a note is shown completely or dropped"
    )
    assert ("45.1 %" in last) == (width == 200 or (width == 80 and what == "pretrain"))
