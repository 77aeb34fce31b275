import io
import os
import pty

from report_fakes import HOSTILE, fake_report, hostile_report

from tutelage.report import screen, tables


def _terminal_output(act) -> str:
    """What `act(stream)` writes to a real pseudo-terminal."""
    parent, child = pty.openpty()
    with os.fdopen(child, "w", encoding="utf-8") as stream:
        act(stream)
        stream.flush()
        out = b""
        os.set_blocking(parent, False)
        try:
            while chunk := os.read(parent, 1 << 16):
                out += chunk
        except BlockingIOError:
            pass
    os.close(parent)
    return out.decode()


def _ascii_console() -> tuple[io.BytesIO, object]:
    raw = io.BytesIO()
    return raw, screen.make_console(io.TextIOWrapper(raw, encoding="ascii", write_through=True), width=160)


def test_tables_and_examples_can_be_printed_where_there_is_only_ascii():
    """Kills: a minus sign or a box line that ends the command with UnicodeEncodeError."""
    raw, console = _ascii_console()
    data = fake_report()
    screen.print_table(tables.change_table(data.changes), console)
    screen.print_examples(data.examples, console)
    text = raw.getvalue().decode("ascii")
    assert "-0.276" in text and "[assistant]" in text


def test_no_control_sequence_of_the_data_reaches_the_terminal():
    """Kills: a record that moves the cursor, rings the bell or turns the line around."""
    stream = io.StringIO()
    console = screen.make_console(stream, width=400)
    screen.print_examples(hostile_report().examples, console)
    screen.print_table(tables.accounting_table(hostile_report().accounts), console)
    assert not {"\x00", "\x07", "\x1b", "\u202e", "\u200f"} & set(stream.getvalue())
    assert "[bold]" in _printed("[bold]x") and HOSTILE.split("<")[0] in stream.getvalue()


def _printed(text: str) -> str:
    stream = io.StringIO()
    screen.print_table(tables.Table("c", (tables.Column("a", "a"),), ((text,),)), screen.make_console(stream))
    return stream.getvalue()


def test_kinds_are_named_where_colour_is_missing():
    """Kills: an example whose kinds show by colour alone."""
    stream = io.StringIO()
    screen.print_examples(fake_report().examples[:1], screen.make_console(stream))
    assert stream.getvalue().index("[user]") < stream.getvalue().index("[assistant]") < stream.getvalue().index("[stop]")


def test_a_log_gets_few_lines_and_a_terminal_a_bar():
    """Kills: thousands of carriage returns in a log file; no bar for the person who waits."""
    stream = io.StringIO()
    assert isinstance(screen.make_progress(stream), screen.LineProgress)

    def act(stream):
        with screen.make_progress(stream) as progress:
            assert isinstance(progress, screen.BarProgress)
            progress.start("train", 10, "steps")
            progress.advance(10, text="loss 1.5, 8,000 tokens/s")
            progress.note("a note")

    before = os.environ.get("TERM")
    os.environ["TERM"] = "xterm"
    try:
        shown = _terminal_output(act)
    finally:
        os.environ["TERM"] = before or ""
    assert "10 of 10 steps" in shown and "loss 1.5" in shown and "a note" in shown


def test_lines_are_spaced_and_tell_what_is_left(monkeypatch):
    """Kills: a line per step; an estimate that counts from the start of the program."""
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with screen.LineProgress(stream) as progress:
        progress.start("train", 100, "steps")
        for step in range(50):
            now[0] += 0.2
            progress.advance(1, text=f"loss {step}")
    lines = stream.getvalue().splitlines()
    assert lines == ["train: 25 of 100 steps, loss 24, 15.0 s left", "train: 50 of 100 steps, loss 49, 10.0 s left"]


def test_something_quick_leaves_no_line():
    """Kills: a log filled with stages that took no time."""
    stream = io.StringIO()
    with screen.LineProgress(stream) as progress:
        progress.start("read", 5)
        progress.advance(5)
    assert stream.getvalue() == ""
