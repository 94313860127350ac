"""The configuration in force: the file's, else the last known good one, and why."""

import dataclasses
from pathlib import Path

import pytest

from edge_agent.daemon import LAST_GOOD_CONFIG, ConfigFile, Locations
from edge_agent.errors import ConfigError

GOOD = "log: {level: debug}\n"
OTHER = "log: {level: error}\n"
BROKEN = "log: {level: shrill}\n"


def config_file(directory: Path, content: str | None = GOOD) -> ConfigFile:
    """One that has not been started; None: there is no file."""
    path = directory / "config.yaml"
    if content is not None:
        path.write_text(content)
    state = directory / "state"
    state.mkdir(exist_ok=True)
    locations = Locations(path if content is not None else None, directory, state)
    return ConfigFile(locations, {"HOME": str(directory)})


class TestStart:
    def test_takes_the_file_and_keeps_a_copy_of_it(self, tmp_path: Path):
        file = config_file(tmp_path)
        file.start()
        assert file.config.log.level == "debug"
        assert file.problem == ""
        assert (tmp_path / "state" / LAST_GOOD_CONFIG).read_text() == GOOD

    def test_needs_no_file(self, tmp_path: Path):
        file = config_file(tmp_path, None)
        file.start()
        assert file.config.log.level == "info"
        assert list((tmp_path / "state").iterdir()) == []

    def test_a_broken_file_means_the_last_good_one_and_says_why(self, tmp_path: Path):
        config_file(tmp_path, OTHER).start()
        file = config_file(tmp_path, BROKEN)
        file.start()
        assert file.config.log.level == "error"
        assert "last known good" in file.problem
        assert "log.level" in file.problem
        assert (tmp_path / "state" / LAST_GOOD_CONFIG).read_text() == OTHER

    def test_a_broken_file_without_a_good_one_is_refused(self, tmp_path: Path):
        with pytest.raises(ConfigError, match=r"log\.level"):
            config_file(tmp_path, BROKEN).start()

    def test_with_a_good_one_that_is_broken_itself_the_files_errors_are_told(self, tmp_path: Path):
        file = config_file(tmp_path, BROKEN)
        (tmp_path / "state" / LAST_GOOD_CONFIG).write_text("log: {level: 7}\n")
        with pytest.raises(ConfigError, match="shrill"):
            file.start()

    def test_a_copy_that_cannot_be_kept_does_not_stop_the_start(self, tmp_path: Path):
        file = config_file(tmp_path)
        (tmp_path / "state" / f"{LAST_GOOD_CONFIG}.partial").mkdir()  # in its way
        file.start()
        assert (file.config.log.level, file.problem) == ("debug", "")


class TestReload:
    def test_takes_the_new_content_and_names_what_needs_a_restart(self, tmp_path: Path):
        file = config_file(tmp_path)
        file.start()
        file.locations.config.write_text(f"engines_dir: {tmp_path}\n{OTHER}")  # type: ignore[union-attr]
        assert file.reload() == ("engines_dir",)
        assert file.config.log.level == "error"

    def test_keeps_the_old_one_where_the_new_is_broken_and_says_why(self, tmp_path: Path):
        file = config_file(tmp_path)
        file.start()
        old = file.config
        config_file(tmp_path, BROKEN)
        with pytest.raises(ConfigError, match=r"log\.level"):
            file.reload()
        assert file.config is old
        assert "not reloaded" in file.problem
        assert "log.level" in file.problem
        assert (tmp_path / "state" / LAST_GOOD_CONFIG).read_text() == GOOD

    def test_the_problem_is_over_with_the_next_good_content(self, tmp_path: Path):
        config_file(tmp_path, GOOD).start()
        file = config_file(tmp_path, BROKEN)
        file.start()
        config_file(tmp_path, OTHER)
        file.reload()
        assert (file.problem, file.config.log.level) == ("", "error")

    def test_the_engines_directory_of_the_command_line_outlives_it(self, tmp_path: Path):
        file = config_file(tmp_path)
        file.locations = dataclasses.replace(file.locations, engines_dir=tmp_path / "mine")
        file.start()
        file.reload()
        assert file.config.engines_dir == tmp_path / "mine"
