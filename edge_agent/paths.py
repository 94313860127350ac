"""Where the daemon finds and keeps its files.

Only says where: creates nothing and reads nothing beyond whether a configuration file is there.
Every function takes the environment as a parameter. systemd sets `RUNTIME_DIRECTORY`,
`STATE_DIRECTORY` and `CONFIGURATION_DIRECTORY` (systemd.exec(5)); elsewhere the XDG base directory
specification holds.
"""

import os
import pwd
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from edge_agent.errors import ConfigError, FieldViolation

APP: Final = "edge-agent"
CONFIG_NAME: Final = "config.yaml"
MAX_SOCKET_PATH_BYTES: Final = 107
"""sun_path of unix(7), without the NUL at its end."""
SYSTEM_CONFIG: Final = Path("/etc") / APP / CONFIG_NAME

_PACKAGE: Final = Path(__file__).resolve().parent


def runtime_dir(environ: Mapping[str, str]) -> Path:
    """Where the sockets and locks are: `$RUNTIME_DIRECTORY`, else below `$XDG_RUNTIME_DIR`.

    Raises:
        ConfigError: neither is set, or one is not absolute.
    """
    systemd = _first_of(environ, "RUNTIME_DIRECTORY")
    if systemd is not None:
        return systemd
    session = _absolute(environ, "XDG_RUNTIME_DIR")
    if session is not None:
        return session / APP
    raise _error(
        "XDG_RUNTIME_DIR",
        "not set, nor is RUNTIME_DIRECTORY; set one of them to a directory of your own (mode 0700)",
    )


def state_dir(environ: Mapping[str, str]) -> Path:
    """What outlives a restart: `$STATE_DIRECTORY`, else below `$XDG_STATE_HOME` or the home.

    Raises:
        ConfigError: a variable is not absolute, or there is no home directory.
    """
    systemd = _first_of(environ, "STATE_DIRECTORY")
    if systemd is not None:
        return systemd
    xdg = _absolute(environ, "XDG_STATE_HOME")
    return (xdg or _home(environ) / ".local" / "state") / APP


def engines_dir(configured: Path | None, environ: Mapping[str, str]) -> Path:
    """The engine store: as configured, else below the state directory.

    Raises:
        ConfigError: see `state_dir`.
    """
    return configured or state_dir(environ) / "engines"


def default_config_path(environ: Mapping[str, str]) -> Path | None:
    """The first configuration file that exists; None means: run with the defaults.

    Looks into `$CONFIGURATION_DIRECTORY`, where that is not set into `$XDG_CONFIG_HOME/edge-agent`
    (unset: `~/.config/edge-agent`), then into /etc/edge-agent. A service has no business in a home,
    and may not be able to look into one.

    Raises:
        ConfigError: a variable is not absolute, or a directory can't be searched.
    """
    first = _first_of(environ, "CONFIGURATION_DIRECTORY")
    if first is None:
        xdg = _absolute(environ, "XDG_CONFIG_HOME")
        first = (xdg or _home(environ) / ".config") / APP
    for path in (first / CONFIG_NAME, SYSTEM_CONFIG):
        try:
            if path.exists():
                return path
        except OSError as error:
            raise _error(str(path), f"{error.strerror}") from error
    return None


def recipes_dir() -> Path:
    """The recipes that come with edge-agent: in the wheel, else in the checkout."""
    packed = _PACKAGE / "recipes"
    return packed if packed.is_dir() else _PACKAGE.parent / "engines"


def _first_of(environ: Mapping[str, str], variable: str) -> Path | None:
    """One of systemd's variables: a colon-separated list whose first entry is ours."""
    first = environ.get(variable, "").partition(":")[0]
    return _checked(variable, first) if first else None


def _absolute(environ: Mapping[str, str], variable: str) -> Path | None:
    value = environ.get(variable, "")
    return _checked(variable, value) if value else None


def _checked(variable: str, value: str) -> Path:
    path = Path(value)
    if not path.is_absolute():
        raise _error(variable, f"{value!r}, must be an absolute path")
    return path


def _home(environ: Mapping[str, str]) -> Path:
    home = _absolute(environ, "HOME")
    if home is not None:
        return home
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError as error:
        raise _error("HOME", "not set, and the user has no home directory") from error


def _error(field: str, description: str) -> ConfigError:
    return ConfigError(
        f"{field}: {description}",
        metadata={"field": field},
        violations=[FieldViolation(field, description)],
    )
