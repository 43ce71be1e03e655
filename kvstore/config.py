"""Settings out of defaults < TOML file < environment < flags, each remembering where it came from.

Unknown names are errors that name the nearest known one; every other error names setting, value, origin and rule.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvstore import machine
from kvstore.errors import ConfigError
from kvstore.rules import Secret, is_loopback, show, show_size, split_address
from kvstore.settings import ENV_PREFIX, GROUPS, RULES, Env, Settings, Values, env_names, flag_names

__all__ = ["Loaded", "Row", "Secret", "Settings", "find_file", "load", "split_address"]

_FOREIGN_ENV = re.compile(r"KVSTORE_(CONFIG|(CLIENT|VLLM|TRANSFORMERS|SGLANG|BENCH|TEST|SERVICE)_.*|PORT(_.*)?)")
"""Names that are not settings of the daemon: the client's and the connectors' own, and what Kubernetes sets in every
container for a Service called kvstore."""

_REMEDY = "`kvstore serve --help` lists every setting, how it is written and its default."


class Row(NamedTuple):
    """One line of `kvstore config show`; secrets are masked in `value`."""

    key: str
    value: str
    origin: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and where each came from.

    Attributes
    ----------
    settings : Settings
        The settings.
    origins : dict of str to str
        For each dotted key: ``default``, ``default (auto)``, a file's path, an environment name or a flag.
    file : Path or None
        The file that was read.
    """

    settings: Settings
    origins: dict[str, str]
    file: Path | None

    def rows(self) -> list[Row]:
        """Every setting as text, in order."""
        return [Row(key, _show(key, self.value(key)), self.origins[key]) for key in RULES]

    def value(self, key: str) -> Any:
        """Value of a setting by its dotted key."""
        value: Any = self.settings
        for name in key.split("."):
            value = getattr(value, name)
        return value


def _show(key: str, value: object) -> str:
    """A value as a user would write it; the unit is in the setting's name."""
    if key.endswith("bytes") and isinstance(value, int):
        return show_size(value)
    if isinstance(value, float):
        return f"{value:g}s" if key.endswith("_s") else f"{value:g}"
    return show(value)


def find_file(flag: str | None, env: Env) -> Path | None:
    """The TOML file to read: `flag` (--config), else KVSTORE_CONFIG, else the user's own if there is one."""
    named = flag or env.get("KVSTORE_CONFIG")
    if named:
        return Path(named).expanduser()
    own = machine.xdg_dir(env, "XDG_CONFIG_HOME", ".config") / "kvstore" / "kvstore.toml"
    return own if own.is_file() else None


def load(flags: Mapping[str, str] | None = None, env: Env | None = None, file: Path | None = None) -> Loaded:
    """Make the settings.

    Parameters
    ----------
    flags : mapping of str to str, optional
        Values given on the command line, by dotted key.
    env : mapping of str to str, optional
        The environment; ``os.environ`` if not given.
    file : Path, optional
        TOML file to read (see `find_file`).

    Raises
    ------
    ConfigError
        With the setting, the value, where it came from and the rule it breaks.
    """
    env = os.environ if env is None else env
    written: dict[str, tuple[object, str]] = {}
    if file is not None:
        written |= _from_file(file)
    written |= _from_env(env)
    for key, value in (flags or {}).items():
        if key not in RULES:
            raise ConfigError(f"flag {key!r} is not a setting{_nearest(key, RULES)}", _REMEDY)
        written[key] = (value, flag_names(key)[0])

    values: Values = {}
    origins: dict[str, str] = {}
    for key, rule in RULES.items():
        raw, origin = written.get(key, (rule.default, "default"))
        if raw == "auto" and rule.auto is not None:
            values[key], origins[key] = rule.auto(env, values), f"{origin} (auto)"
            continue
        try:
            values[key], origins[key] = rule.parse(raw), origin
        except ValueError as error:
            what = "the given value" if key in ("listen.token", "redis.url") else repr(raw)[:200]
            raise ConfigError(f"{key}: {what} ({origin}) {error}.", _REMEDY) from None
    _read_token(values, origins)
    settings = _build(values)
    _check(settings, origins)
    return Loaded(settings, origins, file)


def _from_file(file: Path) -> dict[str, tuple[object, str]]:
    try:
        tree = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}.", "Name a readable file with --config.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not TOML: {error}.", "docs/settings.md has an example to start from.") from None
    found: dict[str, tuple[object, str]] = {}
    for name, value in tree.items():
        if name in GROUPS and not isinstance(value, dict):
            raise ConfigError(f"{file}: {name} is a group: write [{name}] and its settings below it.", _REMEDY)
        inner = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        if not inner and name not in GROUPS:
            inner = {name: value}
        for key, item in inner.items():
            if key not in RULES:
                raise ConfigError(f"{file}: {key!r} is not a setting{_nearest(key, RULES)}", _REMEDY)
            found[key] = (item, str(file))
    return found


def _from_env(env: Env) -> dict[str, tuple[object, str]]:
    known: dict[str, str] = {}
    for key in RULES:
        for name in env_names(key):
            known.setdefault(name, key)
    found: dict[str, tuple[object, str]] = {}
    for name in sorted(env):
        if not name.startswith(ENV_PREFIX) or (name not in known and _FOREIGN_ENV.fullmatch(name)):
            continue
        if name not in known:
            raise ConfigError(f"{name} in the environment is not a setting{_nearest(name, known, ENV_PREFIX)}", _REMEDY)
        key = known[name]
        if key not in found or name == env_names(key)[0]:
            found[key] = (env[name], name)
    return found


def _nearest(word: str, known: Mapping[str, object], prefix: str = "") -> str:
    """The known name that is most like `word`, as the end of a sentence; a prefix that all share does not count."""
    close = difflib.get_close_matches(word.removeprefix(prefix), [each.removeprefix(prefix) for each in known], n=1)
    return f"; did you mean {prefix + close[0]!r}?" if close else "."


def _read_token(values: Values, origins: dict[str, str]) -> None:
    """Put the content of the token file where the token is looked for."""
    file: Path | None = values["listen.token_file"]
    if file is None:
        return
    if values["listen.token"]:
        raise ConfigError(
            f"listen.token_file: {file} ({origins['listen.token_file']}) and listen.token "
            f"({origins['listen.token']}) are both given; give one."
        )
    try:
        values["listen.token"] = RULES["listen.token"].parse(file.read_text("utf-8").strip())
        origins["listen.token"] = str(file)
    except OSError as error:
        raise ConfigError(f"listen.token_file: {file}: {error.strerror or error}.") from None
    except ValueError as error:
        raise ConfigError(f"listen.token_file: the token in {file} {error}.") from None
    if not values["listen.token"]:
        raise ConfigError(f"listen.token_file: {file} is empty.")


def _build(values: Values) -> Settings:
    parts = {
        name: kind(**{field: values[f"{name}.{field}"] for field in kind.__struct_fields__})
        for name, kind in GROUPS.items()
    }
    return Settings(**parts, **{key: value for key, value in values.items() if "." not in key})


def _check(settings: Settings, origins: dict[str, str]) -> None:
    """Rules that concern more than one setting."""
    listen, host = settings.listen, settings.host
    if listen.tcp and not listen.token:  # on loopback too: other users of the machine reach that as well
        raise ConfigError(
            f"listen.tcp: {listen.tcp!r} ({origins['listen.tcp']}) is given and there is no token.",
            "Make one with `openssl rand -hex 32` and give it with --listen-token-file or KVSTORE_TOKEN.",
        )
    if settings.http.address and not is_loopback(settings.http.address) and not listen.token:
        raise ConfigError(
            f"http.address: {settings.http.address!r} ({origins['http.address']}) is beyond loopback, where anybody "
            "could read it, and there is no token.",
            "Give one with --listen-token-file or KVSTORE_TOKEN, or use 127.0.0.1, ::1 or localhost.",
        )
    if host.slab_bytes > host.bytes:
        raise ConfigError(
            f"host.slab_bytes: {show_size(host.slab_bytes)} ({origins['host.slab_bytes']}) is more than "
            f"host.bytes, {show_size(host.bytes)} ({origins['host.bytes']})."
        )
