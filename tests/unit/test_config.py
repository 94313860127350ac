"""The configuration: strict, complete in its errors, and equal to its example file."""

import math
import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edge_agent import paths
from edge_agent.config import (
    RESTART_KEYS,
    Config,
    known_keys,
    load_config,
    needs_restart,
    parse_config,
)
from edge_agent.errors import ConfigError
from edge_agent.units import (
    DURATION_RULE,
    MAX_DURATION_S,
    MAX_SIZE_BYTES,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)
from tests.conftest import REPOSITORY

EXAMPLE = REPOSITORY / "config.example.yaml"


def violations(text: str) -> dict[str, str]:
    """What is wrong with a configuration, by key path."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "test.yaml")
    found = {violation.field: violation.description for violation in caught.value.violations}
    assert len(found) == len(caught.value.violations)
    for violation in caught.value.violations:
        assert violation.description in caught.value.message
    return found


class TestExample:
    def test_equals_the_defaults_in_code(self):
        text = EXAMPLE.read_text()
        assert parse_config(text, "example") == Config()

    def test_holds_every_key_and_no_other(self):
        data = yaml.safe_load(EXAMPLE.read_text())
        held = set()
        for key, value in data.items():
            is_section = isinstance(value, dict) and key != "engines"
            held |= {f"{key}.{inner}" for inner in value} if is_section else {key}
        assert held == set(known_keys())

    def test_its_commented_examples_are_valid(self):
        text = EXAMPLE.read_text()
        text = text.replace("engines: {}", "engines:").replace("python: {}", "python:")
        text = text.replace("client_weights: {}", "client_weights:")
        text = text.replace("servers: {}", "servers:").replace("allow: {}", "allow:")
        text = re.sub(r"^( *)#   (\S+:( .*)?)$", r"\1    \2", text, flags=re.MULTILINE)
        text = re.sub(
            r"^( *)#     (slots|context_tokens|threads|pinned)",
            r"\1      \2",
            text,
            flags=re.MULTILINE,
        )
        # examples stand before their key: move them behind it
        for key in ("engines", "  python", "  client_weights", "  servers", "  allow"):
            examples = rf"((?:^    .*\n|^      .*\n)+)(^{key}:\n)"
            text = re.sub(examples, r"\2\1", text, flags=re.MULTILINE)
        config = parse_config(text, "example with its examples")
        assert config.engines["smollm2-135m-instruct"].slots == 2
        assert config.engines["smollm2-135m-instruct"].context_tokens == 2048
        assert config.worker.python["llama_cpp"].name == "python"
        assert config.tools.servers["stock"].command == ("/usr/bin/stock-server", "--quiet")
        assert config.tools.servers["maps"].url == "http://127.0.0.1:8000/mcp"
        assert config.tools.allow["order_part"].side_effect == "NON_IDEMPOTENT"
        assert config.tools.allow["find_part"].rate_limit is None

    def test_each_stated_range_is_the_one_in_code(self):
        """`8 to 2048` in the comment above a key is what the code refuses just outside of."""
        text = EXAMPLE.read_text()
        pattern = r"# .*?\b(\d+) to (\d+)[^\n]*\n(?: +#[^\n]*\n)*  (\w+): (?:\d+|null)\n"
        stated = {match[3]: (int(match[1]), int(match[2])) for match in re.finditer(pattern, text)}
        assert len(stated) >= 8
        known = {key.rpartition(".")[2]: key for key in known_keys()}
        for name, (low, high) in stated.items():
            section, _, leaf = known[name].partition(".")
            for value, rule in ((low - 1, f"at least {low}"), (high + 1, f"at most {high}")):
                found = violations(f"{section}: {{{leaf}: {value}}}")
                assert rule in found[known[name]]


class TestErrors:
    def test_five_errors_come_in_one_report_in_the_order_of_the_file(self):
        text = """\
log: {level: trace}
runs:
  max_steps: 500
  timeout: 30
  max_timeout: forever
shutdown: {grace: 0s}
"""
        with pytest.raises(ConfigError) as caught:
            parse_config(text, "robot.yaml")
        assert caught.value.message.splitlines() == [
            "robot.yaml: 5 errors in the configuration",
            "  log.level (line 1): 'trace', must be one of 'debug', 'info', 'warning' or 'error'",
            "  runs.max_steps (line 3): 500, must be at most 100",
            f"  runs.timeout (line 4): 30, {DURATION_RULE}",
            f"  runs.max_timeout (line 5): 'forever', {DURATION_RULE}",
            "  shutdown.grace (line 6): '0s', must be above 0",
        ]
        assert [violation.field for violation in caught.value.violations] == [
            "log.level",
            "runs.max_steps",
            "runs.timeout",
            "runs.max_timeout",
            "shutdown.grace",
        ]
        assert caught.value.metadata == {"source": "robot.yaml", "errors": "5"}

    def test_an_error_in_a_section_hides_no_rule_between_its_other_keys(self):
        found = violations("runs: {max_steps: 0, timeout: 2h, max_timeout: 1h}")
        assert found == {
            "runs.max_steps": "0, must be at least 1",
            "runs.max_timeout": "1h, must be at least runs.timeout (2h)",
        }

    def test_a_rule_between_keys_says_nothing_where_one_of_them_is_wrong_by_itself(self):
        assert set(violations("runs: {timeout: 30h, max_timeout: 5}")) == {"runs.max_timeout"}
        assert set(violations("runs: {timeout: 9, max_timeout: 1s}")) == {"runs.timeout"}

    @pytest.mark.parametrize(
        ("text", "field", "description"),
        [
            ("7", "document", "7, must be a mapping"),
            ("[]", "document", "[], must be a mapping"),
            ("runs: 7", "runs", "7, must be a mapping"),
            ("engines: [a]", "engines", "['a'], must be a mapping"),
            ("preload: smol", "preload", "'smol', must be a list"),
            ("preload: [Bad!]", "preload[0]", "'Bad!', must match [a-z0-9]"),
            ("preload: [7]", "preload[0]", "7, must be text: put it in quotes"),
            (
                "preload: [a, b]\nscheduling: {max_resident_engines: 1}",
                "preload",
                "2 engines, must be at most scheduling.max_res",
            ),
            ("preload: [a, a]\nscheduling: {max_resident_engines: 2}", "preload", "'a' is named"),
            ("runs: {default_engine: No}", "runs.default_engine", "false, must be text"),
            ("runs: {default_engine: ../x}", "runs.default_engine", "'../x', must match"),
            ("engines: {'a/b': {}}", "engines.a/b", "'a/b', must match"),
            ("engines: {a: {threads: 0}}", "engines.a.threads", "0, must be at least 1"),
            ("engines: {a: {slots: 65}}", "engines.a.slots", "65, must be at most 64"),
            (
                "engines: {a: {context_tokens: 255}}",
                "engines.a.context_tokens",
                "255, must be at least 256",
            ),
            ("runs: {max_steps: 8.0}", "runs.max_steps", "8.0, must be a whole number"),
            ("runs: {max_steps: '8'}", "runs.max_steps", "'8', must be a whole number"),
            ("runs: {max_steps: true}", "runs.max_steps", "true, must be a whole number"),
            ("runs: {max_steps: null}", "runs.max_steps", "null, must be a whole number"),
            ("runs: {max_request_size: 4MB}", "runs.max_request_size", "'4MB', must be a size"),
            (
                "runs: {max_request_size: 1GiB}",
                "runs.max_request_size",
                "1GiB, must be at most 32MiB",
            ),
            ("runs: {timeout: 1:30}", "runs.timeout", "90, must be a duration with a unit"),
            ("runs: {timeout: 9000h}", "runs.timeout", "'9000h', must be at most 8760h"),
            ("engines_dir: engines", "engines_dir", "'engines', must be an absolute path"),
            ("worker: {python: {llama_cpp: py}}", "worker.python.llama_cpp", "'py', must be an a"),
            (
                "worker: {heartbeat_timeout: 1s}",
                "worker.heartbeat_timeout",
                "1s, must be above worker.heartbeat_interval (1s)",
            ),
            (
                "runs: {max_tool_result_size: 5MiB}",
                "runs.max_tool_result_size",
                "5MiB, must be at most runs.max_request_size (4MiB)",
            ),
        ],
    )
    def test_names_value_and_limit(self, text: str, field: str, description: str):
        found = violations(text)
        assert list(found) == [field]
        assert found[field].startswith(description)

    def test_a_limit_of_a_duration_is_shown_as_a_duration(self):
        assert violations("telemetry: {interval: 10ms}") == {
            "telemetry.interval": "10ms, must be at least 50ms"
        }
        assert violations("telemetry: {interval: 2s}") == {
            "telemetry.interval": "2s, must be at most 1s"
        }

    def test_a_limit_of_a_size_is_shown_as_a_size(self):
        assert violations("runs: {max_request_size: 1B}") == {
            "runs.max_request_size": "1B, must be at least 64KiB"
        }

    @pytest.mark.parametrize(
        ("text", "field", "hint"),
        [
            ("prelod: []", "prelod", "did you mean preload?"),
            ("run: {}", "run", "did you mean runs?"),
            ("runs: {max_stepps: 3}", "runs.max_stepps", "did you mean runs.max_steps?"),
            ("max_steps: 3", "max_steps", "did you mean runs.max_steps?"),
            ("runs: {level: info}", "runs.level", "did you mean log.level?"),
            ("runs: {timeout_s: 3}", "runs.timeout_s", "did you mean runs.timeout?"),
            ("engines: {a: {slotss: 1}}", "engines.a.slotss", "did you mean slots?"),
            ("log: {zzzz: 1}", "log.zzzz", "known here: format, level"),
            (
                "worker: {python: {llama_cp: /p}}",
                "worker.python.llama_cp",
                "did you mean llama_cpp?",
            ),
        ],
    )
    def test_an_unknown_key_names_the_nearest(self, text: str, field: str, hint: str):
        found = violations(text)
        assert list(found) == [field]
        assert "unknown" in found[field]
        assert found[field].endswith(hint)

    @pytest.mark.parametrize("key", known_keys())
    def test_every_key_is_the_nearest_to_its_own_misspelling(self, key: str):
        *above, last = key.split(".")
        wrong = last + "x"
        text = f"{above[0]}: {{{wrong}: 1}}" if above else f"{wrong}: 1"
        assert violations(text)[".".join([*above, wrong])].endswith(f"did you mean {key}?")

    def test_a_key_written_twice_is_an_error_beside_the_others(self):
        found = violations("runs:\n  timeout: 1m\n  timeout: 2m\nlog: {level: no}\nruns: {}\n")
        assert found == {
            "runs": "written twice (lines 1 and 5)",
            "runs.timeout": "written twice (lines 2 and 3)",
            "log.level": "false, must be one of 'debug', 'info', 'warning' or 'error'",
        }

    @pytest.mark.parametrize(
        ("text", "place"),
        [
            ("runs:\n  max_steps: [1", "line 3, column 1"),
            ("a: b: c", "line 1, column 5"),
            ("runs:\n\t- 1", "line 2, column 1"),
            ("log: \x01", "line 1, column 6"),
            ("---\na: 1\n---\nb: 1", "line 3, column 1"),
            ("log: !!python/object:os.system {}", "line 1, column 6"),
            ("? [a]\n: 1", "line 1, column 3"),
            ("log: *nowhere", "line 1, column 6"),
        ],
    )
    def test_a_syntax_error_says_line_and_column(self, text: str, place: str):
        assert list(violations(text)) == [place]

    @pytest.mark.parametrize(
        "text",
        [
            "[" * 100_000,
            "preload: " + "[" * 990 + "]" * 990,
            "preload: " + "[" * 600 + "]" * 600,
            "a: " * 20,
            "x: 2026-02-30",
            "#" * (1 << 20) + "\n",
        ],
    )
    def test_hostile_text_is_an_error_and_no_crash(self, text: str):
        assert violations(text)

    def test_an_alias_to_what_is_above_it_is_not_followed(self):
        assert list(violations("a: &a [*a]")) == ["a"]

    @pytest.mark.timeout(5)
    def test_a_bomb_of_aliases_does_not_go_off(self):
        levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
        text = "\n".join(["a0: &a0 [x]", *levels, "preload: *a29", "log: {level: *a29}"])
        assert {"preload[0]", "log.level", "a29"} <= set(violations(text))

    def test_an_item_of_a_list_has_its_own_line(self):
        with pytest.raises(ConfigError, match=r"preload\[1\] \(line 3\)"):
            parse_config("preload:\n- a\n- B\n", "test")

    def test_the_report_of_a_broken_file_names_the_file(self, tmp_path: Path):
        with pytest.raises(ConfigError, match=r"no-such.yaml: 1 error.*\n.*No such file"):
            load_config(tmp_path / "no-such.yaml", {"HOME": "/home/x"})
        latin = tmp_path / "latin.yaml"
        latin.write_bytes(b"log:\n  level: \xe9\n")
        with pytest.raises(ConfigError, match="line 2: not UTF-8"):
            load_config(latin, {"HOME": "/home/x"})
        long = tmp_path / "long.yaml"
        long.write_bytes(b"#" * (1 << 20) + b"\n")
        with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
            load_config(long, {"HOME": "/home/x"})


class TestValues:
    def test_the_unit_moves_from_the_value_into_the_name(self):
        config = parse_config("runs: {timeout: 500ms, max_request_size: 1MiB}", "test")
        assert config.runs.timeout_s == 0.5
        assert config.runs.max_request_bytes == 1_048_576

    def test_empty_sections_and_an_empty_file_are_the_defaults(self):
        assert parse_config("", "test") == Config()
        assert parse_config("runs:\nengines:\npreload:\nworker: {python: }\n", "test") == Config()

    def test_a_byte_order_mark_is_no_part_of_the_first_key(self, tmp_path: Path):
        path = tmp_path / "config.yaml"
        path.write_bytes(b"\xef\xbb\xbfpreload: [a]\n")
        assert load_config(path, {"HOME": "/home/x"}).preload == ("a",)

    def test_anchors_and_merges_work(self):
        config = parse_config("engines: {a: &a {slots: 2}, b: {<<: *a, threads: 1}}", "test")
        assert config.engines["b"].slots == 2

    def test_is_frozen(self):
        with pytest.raises(ValidationError, match="frozen"):
            Config().runs.max_steps = 9

    def test_the_engine_store_is_filled_in(self):
        environ = {"STATE_DIRECTORY": "/var/lib/edge-agent"}
        assert load_config(None, environ).engines_dir == Path("/var/lib/edge-agent/engines")

    def test_a_configured_engine_store_stays(self, tmp_path: Path):
        path = tmp_path / "config.yaml"
        path.write_text("engines_dir: /data/engines\n")
        assert load_config(path, {}).engines_dir == Path("/data/engines")


class TestRestart:
    def test_the_keys_are_real(self):
        assert set(RESTART_KEYS) <= set(known_keys())

    def test_the_example_marks_just_these(self):
        text = EXAMPLE.read_text()
        marked = re.findall(r"At the next start\.[^\n]*\n(?: *#[^\n]*\n)* *(\w+):", text)
        assert marked == [key.rpartition(".")[2] for key in RESTART_KEYS]

    def test_names_what_changed_and_waits(self):
        old = parse_config("", "old")
        new = parse_config("log: {format: json, level: debug}\nengines_dir: /e\n", "new")
        assert needs_restart(old, new) == ("engines_dir", "log.format")
        assert needs_restart(old, old) == ()
        assert needs_restart(old, parse_config("runs: {max_steps: 3}", "new")) == ()


class TestUnits:
    @given(st.floats(min_value=1e-9, max_value=MAX_DURATION_S))
    def test_a_duration_survives_the_round_trip(self, seconds: float):
        assert parse_duration(format_duration(seconds)) == seconds

    @given(st.integers(min_value=1, max_value=MAX_SIZE_BYTES))
    def test_a_size_survives_the_round_trip(self, size_bytes: int):
        assert parse_size(format_size(size_bytes)) == size_bytes

    @given(st.text(max_size=12) | st.integers() | st.floats() | st.none() | st.booleans())
    def test_whatever_is_accepted_is_finite_and_in_range(self, value: object):
        for parse, limit in ((parse_duration, MAX_DURATION_S), (parse_size, MAX_SIZE_BYTES)):
            try:
                number = parse(value)
            except ValueError:
                continue
            assert isinstance(value, str)
            assert math.isfinite(number)
            assert 0 < number <= limit

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [("500ms", 0.5), ("30s", 30), ("2m", 120), ("1h", 3600), ("1.5h", 5400), ("2 m", 120)],
    )
    def test_reads_durations(self, text: str, seconds: float):
        assert parse_duration(text) == seconds

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "30",
            "s",
            "-1s",
            "0s",
            "0ms",
            "1e3s",
            "nan s",
            "infs",
            "1S",
            "1 sec",
            "1m30s",
            "٣s",
            "9999999999999999s",
            "8761h",
            "1s\n",
        ],
    )
    def test_refuses_durations(self, text: str):
        with pytest.raises(ValueError, match=r"^must be"):
            parse_duration(text)

    @pytest.mark.parametrize(
        ("text", "size_bytes"),
        [
            ("512B", 512),
            ("64KiB", 65536),
            ("1.5MiB", 1_572_864),
            ("2GiB", 2 << 30),
            ("1TiB", 1 << 40),
        ],
    )
    def test_reads_sizes(self, text: str, size_bytes: int):
        assert parse_size(text) == size_bytes

    @pytest.mark.parametrize(
        "text", ["", "512", "2GB", "2gib", "-1B", "0B", "0.5B", "1.0001KiB", "1025TiB", "2G"]
    )
    def test_refuses_sizes(self, text: str):
        with pytest.raises(ValueError, match=r"^must be"):
            parse_size(text)

    def test_the_shortest_exact_text(self):
        assert format_duration(600.0) == "10m"
        assert format_duration(0.25) == "250ms"
        assert format_duration(0.0001) == "0.0001s"
        assert format_duration(86_400.0) == "24h"
        assert format_size(1_536) == "1536B"
        assert format_size(262_144) == "256KiB"


class TestPaths:
    def test_systemd_decides_before_xdg_and_its_first_entry_counts(self):
        environ = {
            "RUNTIME_DIRECTORY": "/run/edge-agent:/run/other",
            "XDG_RUNTIME_DIR": "/run/user/7",
            "STATE_DIRECTORY": "/var/lib/edge-agent:/x",
            "XDG_STATE_HOME": "/s",
        }
        assert paths.runtime_dir(environ) == Path("/run/edge-agent")
        assert paths.state_dir(environ) == Path("/var/lib/edge-agent")

    def test_xdg_then_the_home_directory(self):
        environ = {"XDG_RUNTIME_DIR": "/run/user/7", "XDG_STATE_HOME": "/s", "HOME": "/home/x"}
        assert paths.runtime_dir(environ) == Path("/run/user/7/edge-agent")
        assert paths.state_dir(environ) == Path("/s/edge-agent")
        assert paths.state_dir({"HOME": "/home/x"}) == Path("/home/x/.local/state/edge-agent")
        assert paths.state_dir({}).parts[-3:] == (".local", "state", "edge-agent")

    def test_no_runtime_directory_is_a_clear_error(self):
        with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR: not set, nor is RUNTIME_DIRECTORY"):
            paths.runtime_dir({"HOME": "/home/x", "XDG_RUNTIME_DIR": ""})

    @pytest.mark.parametrize("variable", ["RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"])
    def test_a_relative_directory_is_refused(self, variable: str):
        with pytest.raises(ConfigError, match=f"{variable}: 'run', must be an absolute path"):
            paths.runtime_dir({variable: "run"})

    def test_the_first_configuration_file_that_exists(self, tmp_path: Path):
        unit, xdg, home = tmp_path / "unit", tmp_path / "xdg", tmp_path / "home"
        environ = {"HOME": str(home)}
        service = environ | {"CONFIGURATION_DIRECTORY": str(unit)}
        if not paths.SYSTEM_CONFIG.exists():
            assert paths.default_config_path(environ) is None
        in_home = home / ".config/edge-agent/config.yaml"
        in_home.parent.mkdir(parents=True)
        in_home.touch()
        assert paths.default_config_path(environ) == in_home
        in_xdg = xdg / "edge-agent/config.yaml"
        in_xdg.parent.mkdir(parents=True)
        in_xdg.touch()
        assert paths.default_config_path(environ | {"XDG_CONFIG_HOME": str(xdg)}) == in_xdg
        assert paths.default_config_path(service) not in {in_home, in_xdg}
        unit.mkdir()
        (unit / "config.yaml").touch()
        assert paths.default_config_path(service) == unit / "config.yaml"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may search every directory")
    def test_a_directory_that_cannot_be_searched_is_not_taken_for_an_absent_file(
        self, tmp_path: Path
    ):
        (tmp_path / "edge-agent").mkdir(mode=0o000)
        with pytest.raises(ConfigError, match="Permission denied"):
            paths.default_config_path({"XDG_CONFIG_HOME": str(tmp_path)})

    def test_the_checkout_has_recipes(self):
        assert list(paths.recipes_dir().glob("*.yaml"))
