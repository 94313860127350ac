"""The unit file as systemd runs it: a real systemd, the real service, no engine."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.systemd_box import BoxUnavailableError, booted, why_not

UNIT = "edge-agent.service"
FILE = Path(__file__).resolve().parents[2] / "systemd" / UNIT
CONFIG = "/etc/edge-agent/config.yaml"
DROP_IN = f"/etc/systemd/system/{UNIT}.d/test.conf"
READY = '"event":"daemon_ready"'
QUICK = "[Service]\nWatchdogSec=1\nTimeoutAbortSec=1\nRestartSec=100ms\n"

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze"
)


# --- the file ---


@needs_analyze
@pytest.mark.parametrize("with_groups", [False, True], ids=["plain", "with the GPU's groups"])
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path, with_groups):
    shutil.copy(FILE, tmp_path)
    if with_groups:
        shutil.copytree(FILE.with_name(f"{UNIT}.d"), tmp_path / f"{UNIT}.d")
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / UNIT],
        capture_output=True,
        text=True,
        check=False,
    )
    # An unknown key is only a warning, so the exit code says nothing.
    said = [line for line in verified.stderr.splitlines() if " is not executable: " not in line]
    assert said == []


@needs_analyze
def test_the_unit_exposes_little(tmp_path):
    shutil.copy(FILE, tmp_path)
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", tmp_path / UNIT]
    scored = subprocess.run(command, capture_output=True, text=True, check=False)
    assert scored.returncode == 0, scored.stdout[-400:]  # at most 2.0 of 10


def test_stopping_takes_longer_than_the_configured_grace():
    limit = re.search(r"^TimeoutStopSec=(\d+)$", FILE.read_text(), re.MULTILINE)
    example = (FILE.parents[1] / "config.example.yaml").read_text()
    grace = re.search(r"^  grace: (\d+)s", example, re.MULTILINE)
    assert limit is not None
    assert grace is not None
    assert int(limit[1]) > int(grace[1]) + 10


# --- the service ---


@pytest.fixture(scope="module")
def box():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    try:
        with booted() as machine:
            yield machine
    except BoxUnavailableError as error:
        pytest.skip(f"no namespaces, overlay or cgroups to boot systemd in: {error}")


@pytest.fixture
def service(box):
    """The service, stopped, with what the unit file says and no configuration."""
    yield box
    box.run("systemctl", "stop", UNIT)
    box.run("rm", "-rf", CONFIG, DROP_IN, "/var/lib/private/edge-agent")
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "reset-failed", UNIT, check=False)


def start(box):
    """Start the service; returns its main process, as the box numbers it."""
    box.run("systemctl", "start", UNIT)
    return main_pid(box)


def main_pid(box):
    return int(box.show(UNIT, "MainPID"))


@pytest.mark.systemd
def test_the_service_becomes_active_once_it_accepts_runs(service):
    pid = start(service)
    assert service.show(UNIT, "ActiveState") == "active"
    assert service.show(UNIT, "StatusText") == "ready: accepting runs"
    assert "ready: accepting runs" in service.run("systemctl", "status", "--no-pager", UNIT)
    assert service.run("stat", "--format=%U %a %n", "/run/edge-agent/api.sock").split()[:2] == [
        "edge-agent",
        "660",
    ]
    status = service.run("cat", f"/proc/{pid}/status")
    uid = int(status.split("Uid:")[1].split()[0])
    assert 61184 <= uid <= 65519  # made up by systemd
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)


@pytest.mark.systemd
def test_the_service_can_be_called_and_knows_its_directories(service):
    service.write(CONFIG, "runs: {max_steps: 3}\n")
    start(service)
    command = ("/opt/edge-agent/bin/edge-agent", "status", "--json")
    told = json.loads(service.run(*command, "--socket", "/run/edge-agent/api.sock"))
    assert told["status"]["state"] == "READY"
    assert told["status"]["config_path"] == CONFIG
    kept = service.run("ls", "/var/lib/edge-agent").split()
    assert {"config.last-good.yaml", "ledger.db", "ledger.ballast"} <= set(kept)


@pytest.mark.systemd
def test_reload_applies_the_file_or_says_why_not(service):
    pid = start(service)
    service.write(CONFIG, "log: {level: debug}\n")
    reloads = service.logged(UNIT, "config_reloaded")
    service.run("systemctl", "reload", UNIT)
    service.wait_logged(UNIT, "config_reloaded", reloads + 1)
    service.write(CONFIG, "log: {level: loud}\n")
    failures = service.logged(UNIT, "config_reload_failed")
    service.run("systemctl", "reload", UNIT)
    line = json.loads(service.wait_logged(UNIT, "config_reload_failed", failures + 1))
    assert "log.level" in line["error"]
    assert main_pid(service) == pid
    assert service.show(UNIT, "ActiveState") == "active"


@pytest.mark.systemd
def test_a_restart_with_a_broken_file_comes_up_on_the_last_good_one(service):
    service.write(CONFIG, "log: {level: debug}\n")
    start(service)
    service.write(CONFIG, "log: {level: loud}\n")
    service.run("systemctl", "restart", UNIT)
    assert service.show(UNIT, "ActiveState") == "active"
    assert service.show(UNIT, "StatusText").startswith("degraded: running on the last known good")


@pytest.mark.systemd
def test_a_daemon_that_hangs_is_restarted_by_the_watchdog(service):
    service.write(DROP_IN, QUICK)
    service.run("systemctl", "daemon-reload")
    pid = start(service)
    starts = service.logged(UNIT, READY)
    service.run("kill", "-STOP", str(pid))
    service.wait_logged(UNIT, "Watchdog timeout")
    service.wait_logged(UNIT, READY, starts + 1)
    assert main_pid(service) != pid
    assert service.show(UNIT, "NRestarts") == "1"


@pytest.mark.systemd
def test_a_daemon_that_is_killed_is_restarted(service):
    service.write(DROP_IN, QUICK)
    service.run("systemctl", "daemon-reload")
    pid = start(service)
    starts = service.logged(UNIT, READY)
    service.run("kill", "-KILL", str(pid))
    service.wait_logged(UNIT, READY, starts + 1)
    assert main_pid(service) not in {0, pid}


@pytest.mark.systemd
def test_stop_is_clean(service):
    pid = start(service)
    stops = service.logged(UNIT, '"event":"daemon_stopped"')
    service.run("systemctl", "stop", UNIT)
    assert service.show(UNIT, "ActiveState") == "inactive"
    assert service.show(UNIT, "Result") == "success"
    assert service.show(UNIT, "ExecMainStatus") == "0"
    assert service.logged(UNIT, '"event":"daemon_stopped"') == stops + 1
    assert service.run("ls", "/run/edge-agent", check=False).endswith("No such file or directory\n")
    assert not Path(f"/proc/{service.pid}/root/proc/{pid}").exists()


@pytest.mark.systemd
def test_an_existing_user_and_group_are_taken(service):
    service.run("useradd", "--system", "--user-group", "edge-agent")
    try:
        start(service)
        own = service.run("id", "--user", "edge-agent").strip()
        owner = service.run("stat", "--format=%u", "/run/edge-agent/api.sock").strip()
        assert owner == own
        service.run("useradd", "--system", "--groups", "edge-agent", "robot")
        command = (
            "/opt/edge-agent/bin/edge-agent",
            "status",
            "--socket",
            "/run/edge-agent/api.sock",
        )
        assert "READY" in service.run("runuser", "-u", "robot", "--", *command)
        with pytest.raises(AssertionError, match="become a member of the socket's group"):
            service.run("runuser", "-u", "nobody", "--", *command)
    finally:
        service.run("systemctl", "stop", UNIT)
        for user in ("robot", "edge-agent"):
            service.run("userdel", user, check=False)
