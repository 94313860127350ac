"""The section `tools` of the configuration, and what the daemon makes of it."""

import pytest

from edge_agent.config import Config, needs_restart, parse_config
from edge_agent.core import SideEffect
from edge_agent.errors import ConfigError
from edge_agent.settings import tools_settings
from edge_agent.tools.settings import (
    AllowedTool,
    Builtin,
    CommandServer,
    HttpServer,
    ServerTool,
    ToolsSettings,
)
from tests.conftest import REPOSITORY

SERVERS = """
    stock: {command: [/usr/bin/stock, --quiet], environment: {LANG: C}, directory: /var/lib}
    maps: {url: "https://maps.example:8443/mcp", headers_file: /etc/maps.headers}
"""
WHOLE = f"""
runs: {{max_tool_result_size: 10KiB}}
worker: {{oom_score_adj: 700}}
tools:
  servers: {SERVERS}
  allow:
    now: {{builtin: clock, side_effect: NONE}}
    order: {{server: stock, tool: place-order, side_effect: NON_IDEMPOTENT, timeout: 5s,
             rate_limit: 2, needs_approval: true, resources: [till], verify: now}}
    route: {{server: maps, tool: route, side_effect: IDEMPOTENT, rate_limit: null}}
"""


def violations(text: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "test.yaml")
    return {violation.field: violation.description for violation in caught.value.violations}


def test_becomes_the_settings_of_the_tools():
    assert tools_settings(parse_config(WHOLE, "test")) == ToolsSettings(
        servers={
            "stock": CommandServer(("/usr/bin/stock", "--quiet"), {"LANG": "C"}, "/var/lib"),
            "maps": HttpServer("https://maps.example:8443/mcp", "/etc/maps.headers"),
        },
        allow={
            "now": AllowedTool(Builtin("clock"), SideEffect.NONE, 30.0, rate_limit=60),
            "order": AllowedTool(
                ServerTool("stock", "place-order"),
                SideEffect.NON_IDEMPOTENT,
                5.0,
                rate_limit=2,
                needs_approval=True,
                resources=("till",),
                verify="now",
            ),
            "route": AllowedTool(ServerTool("maps", "route"), SideEffect.IDEMPOTENT, 30.0),
        },
        max_result_bytes=10 * 1024,
        oom_score_adj=700,
    )


def test_the_default_is_no_tool_at_all():
    settings = tools_settings(Config())
    assert (settings.servers, settings.allow) == ({}, {})


def test_what_is_left_out_of_a_server_is_left_to_it():
    config = parse_config("tools: {servers: {s: {command: [/bin/s]}}}", "test")
    assert tools_settings(config).servers == {"s": CommandServer(("/bin/s",))}


@pytest.mark.parametrize(
    ("server", "key", "description"),
    [
        ("{}", "", "exactly one of command and url"),
        ("{command: [/bin/s], url: 'http://h/'}", "", "exactly one of command and url"),
        ("{command: []}", "", "exactly one of command and url"),
        ("{command: [s]}", ".command", "'s' must be the absolute path of a program"),
        ("{command: /bin/s}", ".command", "must be a list"),
        ("{command: [1]}", ".command[0]", "1, must be text"),
        ("{command: [/bin/s], headers_file: /h}", ".headers_file", "goes with url"),
        ("{url: 'http://h/', directory: /d}", ".directory", "goes with command"),
        ("{url: 'http://h/', environment: {A: b}}", ".environment", "goes with command"),
        ("{url: 'ftp://h/'}", ".url", "must be http:// or https:// and a host"),
        ("{url: 'http:///mcp'}", ".url", "must be http:// or https:// and a host"),
        ("{url: 'http://me:secret@h/'}", ".url", "keys belong into headers_file"),
        ("{url: 'http://h/', headers_file: h}", ".headers_file", "'h', must be an absolute path"),
        ("{command: [/bin/s], directory: d}", ".directory", "'d', must be an absolute path"),
        ("{comand: [/bin/s]}", ".comand", "did you mean command?"),
        ("{commands: {}, x: 1}", ".x", "known here: command, environment, directory, url"),
    ],
)
def test_a_server_that_can_not_be_is_named(server: str, key: str, description: str):
    found = violations(f"tools: {{servers: {{s: {server}}}}}")
    assert description in found[f"tools.servers.s{key}"]


def test_a_key_in_a_url_is_not_repeated():
    with pytest.raises(ConfigError) as caught:
        parse_config("tools: {servers: {s: {url: 'http://me:secret@h/'}}}", "test")
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("allowed", "key", "description"),
    [
        ("{builtin: clock}", ".side_effect", "is missing, must be one of NONE, IDEMPOTENT, NON_ID"),
        ("{builtin: clock, side_effect: SOME}", ".side_effect", "'SOME', must be one of 'NONE'"),
        ("{side_effect: NONE}", "", "must have either builtin, or server and tool"),
        ("{builtin: clock, tool: t, side_effect: NONE}", "", "either builtin, or server and tool"),
        ("{server: stock, side_effect: NONE}", "", "must have both server and tool"),
        ("{tool: t, side_effect: NONE}", "", "must have both server and tool"),
        ("{builtin: clok, side_effect: NONE}", ".builtin", "'clok', must be one of clock, device"),
        ("{server: x, tool: t, side_effect: NONE}", ".server", "'x', must be one of tools.servers"),
        ("{builtin: clock, rate_limit: 0}", ".rate_limit", "0, must be at least 1"),
        ("{builtin: clock, rate_limit: 100001}", ".rate_limit", "100001, must be at most 100000"),
        ("{builtin: clock, timeout: 30}", ".timeout", "must be a duration with a unit"),
        ("{builtin: clock, needs_approval: 1}", ".needs_approval", "must be true or false"),
        ("{builtin: clock, side_effect: NONE, resources: [Arm]}", ".resources[0]", "Arm"),
        ("{builtin: clock, side_effect: NONE, resources: [a, a]}", ".resources", "one twice"),
        ("{builtin: clock, side_effect: NONE, verify: nobody}", ".verify", "nobody"),
        ("{builtin: clock, side_efect: NONE}", ".side_efect", "did you mean side_effect?"),
    ],
)
def test_an_entry_of_the_allow_list_that_can_not_be_is_named(
    allowed: str, key: str, description: str
):
    found = violations(f"tools: {{allow: {{t: {allowed}}}}}")
    assert description in found[f"tools.allow.t{key}"]


def test_each_entry_is_judged_by_itself():
    found = violations("tools: {servers: {a: {url: 5}, b: {}}, allow: {t: {}}}")
    assert set(found) == {
        "tools.servers.a.url",
        "tools.servers.b",
        "tools.allow.t",
        "tools.allow.t.side_effect",
    }


def test_names_that_no_model_can_write_are_refused():
    found = violations("tools: {allow: {'a b': {builtin: clock, side_effect: NONE}}}")
    assert "must match [A-Za-z0-9_]" in found["tools.allow.a b"]
    found = violations("tools: {allow: {answer: {builtin: clock, side_effect: NONE}}}")
    assert "taken by the branch" in found["tools.allow.answer"]


def test_a_reload_waits_for_the_next_start():
    old, new = parse_config("", "old"), parse_config(WHOLE, "new")
    assert set(needs_restart(old, new)) == {"tools.servers", "tools.allow"}


def test_the_example_of_the_page_about_tools_is_valid():
    page = (REPOSITORY / "docs" / "tools.md").read_text()
    example = page.partition("```yaml\n")[2].partition("```")[0]
    assert set(tools_settings(parse_config(example, "docs/tools.md")).allow) == {
        "clock",
        "device_status",
        "find_part",
        "order_part",
    }
