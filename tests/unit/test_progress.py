"""The progress bar, on a terminal and elsewhere."""

import io

from edge_agent.cli.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestElsewhere:
    def test_a_line_for_each_further_10_percent(self):
        stream = io.StringIO()
        with ProgressBar("load", stream) as bar:
            for percent in range(101):
                bar.update(percent / 100, "reading")
        lines = stream.getvalue().splitlines()
        assert lines == [f"load: {percent} %, reading" for percent in range(0, 101, 10)]

    def test_a_jump_is_one_line_and_nothing_is_said_twice(self):
        stream = io.StringIO()
        bar = ProgressBar("load", stream)
        for fraction in (0.0, 0.47, 0.49, 0.5, 1.0, 1.0):
            bar.update(fraction)
        bar.close()
        percents = [line.partition(": ")[2] for line in stream.getvalue().splitlines()]
        assert percents == ["0 %", "47 %", "50 %", "100 %"]


class TestOnATerminal:
    def test_one_line_redrawn_at_most_ten_times_a_second_and_ended(self):
        stream, now_s = Terminal(), 0.0
        bar = ProgressBar("load", stream, clock=lambda: now_s)
        for step in range(100):
            now_s = step / 100
            bar.update(step / 99, "reading a file")
        bar.close()
        bar.close()
        text = stream.getvalue()
        assert 10 <= text.count("\r") <= 12
        assert text.count("\n") == 1
        last = text.split("\r")[-1]
        assert last == "load [########################] 100 % reading a file\n"

    def test_a_shorter_line_leaves_nothing_of_the_longer_one(self):
        stream, now_s = Terminal(), 0.0
        bar = ProgressBar("load", stream, clock=lambda: now_s)
        bar.update(0.5, "a long note")
        now_s = 1.0
        bar.update(0.6, "short")
        first, second = stream.getvalue().split("\r")[1:]
        assert len(first) == len(second)

    def test_a_line_never_wraps(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "40")
        stream = Terminal()
        ProgressBar("load", stream, clock=lambda: 0.0).update(0.5, "x" * 100)
        assert len(stream.getvalue().removeprefix("\r")) == 39

    def test_without_an_update_nothing_is_written(self):
        stream = Terminal()
        ProgressBar("load", stream).close()
        assert stream.getvalue() == ""
