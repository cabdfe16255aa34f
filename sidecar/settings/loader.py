"""Reading the configuration: environment first, then the TOML file that `SIDECAR_CONFIG` names, then defaults.

`load` looks at everything before it says anything, so that one run shows every problem, each by the name of its
variable. A name that starts with `SIDECAR_` and is no setting is a problem too: a limit that was misspelt and
therefore never held is worse than a refusal to start. No secret appears in a message.
"""

from __future__ import annotations

import errno
import io
import os
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from sidecar.model.grammar import Unfit, UnfitSecret
from sidecar.model.path_pattern import check_pattern
from sidecar.settings.given_file import read_given
from sidecar.settings.schema import (
    PREFIX,
    Effective,
    OnDisconnect,
    Route,
    Setting,
    Settings,
    core_settings,
    settings_from,
)
from sidecar.settings.types import Many, duration, every
from sidecar.settings.upstreams import UpstreamSettings, from_tables

CONFIG: Final = PREFIX + "CONFIG"
SHOWN_CHARS: Final = 80  # of a value in a message: a certificate pasted by mistake is not repeated whole
NAMES_SHOWN: Final = 20  # of what a table defines, in a line of `check`
NAME: Final = "name"  # in [subscribers.ID]: what people call it, beside the backends' ids
NAME_CHARS_MAX: Final = 200
CONFIG_BYTES_MAX: Final = 64 << 20  # a million subscribers; more is a wrong path
SECRET_FILE_BYTES: Final = 65_536  # a key or a token; more is a wrong path
PRICES_BYTES_MAX: Final = 64 << 20  # LiteLLM's is 2 MB; more is a wrong path
PRICE_WORDS: Final = ("builtin", "none")  # that stand for no file
STRUCTURED: Final = ("meters", "prices", "subscribers")  # tables of the TOML file that no variable can hold

# Kubernetes puts the addresses of every Service of the namespace into the environment; one that is called
# `sidecar` or `sidecar-…` would otherwise keep us from starting.
_SERVICE_LINK: Final = re.compile(
    r"_SERVICE_HOST$|_SERVICE_PORT(_[A-Z0-9_]+)?$|_PORT$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$"
)

_USER: Final = re.compile(r"//\S*@")
_QUERY: Final = re.compile(r"(://[^\s?]*)\?[^\s']*")
_LONG: Final = re.compile(rf"\S{{{SHOWN_CHARS + 1},}}")
_PEM: Final = re.compile(r"(-----BEGIN [^-]*-----).*", re.DOTALL)

BackendSettings = Mapping[str, Sequence[Setting]]
Row = tuple[str | None, Setting]  # the backend's name (None: the core) and the setting


class SettingsError(Exception):
    """The configuration cannot be used. Its text is the whole list of problems."""

    def __init__(self, problems: Sequence[str], effective: Sequence[Effective] = ()) -> None:
        self.problems = tuple(problems)
        self.effective = tuple(effective)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"the configuration has {count}:", *problems]))


def load(
    environ: Mapping[str, str],
    *,
    backend_settings: BackendSettings,
    serving: bool = True,
    judge: Callable[[Settings], Sequence[str]] | None = None,
) -> Settings:
    """Read the configuration; raises `SettingsError` with every problem at once.

    `serving=False`, for commands that only read the data directory: nothing has to be set. `judge` says what only the
    parts can see (what could not be read stands at its default then), so that it is told together with the rest.
    """
    return _Loading(environ, backend_settings, all_settings(backend_settings)).run(serving, judge)


def all_settings(backend_settings: BackendSettings) -> list[Row]:
    """The whole table: the core's settings, then each backend's with its name."""
    rows: list[Row] = [(None, setting) for setting in core_settings()]
    rows += [(backend, setting) for backend, settings in backend_settings.items() for setting in settings]
    seen = {CONFIG}
    for backend, setting in rows:
        for name in _variables(backend, setting):
            if name in seen:  # a fault of ours, not of the configuration
                raise ValueError(f"{name} would stand for two settings")
            seen.add(name)
    return rows


def _variables(backend: str | None, setting: Setting) -> tuple[str, ...]:
    variable = setting.variable(backend)
    return (variable, variable + "_FILE") if setting.secret else (variable,)


@dataclass(slots=True)
class _Found:
    """What was said of one setting, and where."""

    value: Any
    origin: str
    problem: str | None = None  # why there is no value after all


@dataclass(slots=True)
class _Loading:
    """One run of `load`: the sources, and what has been noticed so far."""

    environ: Mapping[str, str]
    backend_settings: BackendSettings
    rows: list[Row]
    toml: dict[str, Any] = field(default_factory=dict)  # keys that no one has asked for yet
    toml_name: str = ""
    toml_read: bool = True  # else nobody knows what was said there
    problems: list[str] = field(default_factory=list)
    effective: list[Effective] = field(default_factory=list)

    def run(self, serving: bool, judge: Callable[[Settings], Sequence[str]] | None = None) -> Settings:
        self._read_toml()
        prices = self._prices()
        limits = self._limits()
        upstreams = self._upstreams()
        core: dict[str, Any] = {}
        own: dict[str, dict[str, Any]] = {name: {} for name in self.backend_settings}
        for backend, setting in self.rows:
            (core if backend is None else own[backend])[setting.name] = self._value(backend, setting)
        names: dict[str, str] = {}
        core["upstreams"] = upstreams or core["upstreams"]
        settings = settings_from(
            core,
            subscribers=self._subscribers(names),
            subscriber_names=names,
            meters=self._meters(),
            price_tables=prices,
            limits=limits,
            backend_values=own,
        )
        public_key = settings.asked.gate_revenium_public_key_file
        settings = replace(
            settings,
            price_file=_price_file(settings.prices.prices),
            gate_public_key=None if public_key is None else _content(public_key, SECRET_FILE_BYTES),
        )
        self._refuse_unknown_variables()
        self._refuse_unknown_keys()
        self._check_together(settings)
        if serving:
            self._check_needed(settings)
        if judge is not None:
            # Of what was said in the wrong place the parts may quote anything.
            self.problems += map(without_secrets, judge(settings))
        if self.problems:
            raise SettingsError(self.problems, self.effective)
        return replace(settings, effective=tuple(self.effective))

    # Each setting by itself

    def _value(self, backend: str | None, setting: Setting) -> Any:
        """The value, or the default where there is none or it cannot be read."""
        variable = setting.variable(backend)
        value, shown, origin = setting.default_value(), setting.default or "", "default"
        found = self._find(backend, setting)
        if found is not None:
            shown, origin = "(hidden)" if setting.secret else without_secrets(_as_text(found.value)), found.origin
            try:
                value = setting.value(_parse(setting, found))
            except ValueError as error:
                # What a reader says may quote the value: of a secret only the kind is named.
                hides = setting.secret or shown != _as_text(found.value)
                says = isinstance(error, UnfitSecret if hides and not found.problem else Unfit)
                password = ", and no password in it" if hides and not setting.secret else ""
                why = _LONG.sub(_cut, str(error)) if says else f"expected {setting.kind.expected}{password}"
                quoted = "" if found.problem else " (hidden)" if setting.secret else f"={_quote(shown)}"
                source = origin.removeprefix("environment").removeprefix(", ")
                where = f" (in {source})" if source else ""
                self.problems.append(f"{variable}{quoted}{where}: {why}")
        self.effective.append(Effective(variable, shown, origin, setting.help))
        return value

    def _find(self, backend: str | None, setting: Setting) -> _Found | None:
        """The environment wins over the file; an empty variable counts as not set."""
        variable = setting.variable(backend)
        in_file = self._take(backend, setting.name)
        in_named_file = self._take(backend, setting.name + "_file") if setting.secret else None
        text, named = self.environ.get(variable, ""), self.environ.get(variable + "_FILE", "")
        if setting.secret and text and named:
            return _Found(None, "environment", f"{variable}_FILE is set as well: keep one of the two")
        if text:
            return _Found(text, "environment")
        if setting.secret and named:
            return _secret_file(named, f"environment, {variable}_FILE")
        for other in setting.also:
            if self.environ.get(other):
                return _Found(self.environ[other], f"environment, {other}")
        if in_file is not None and in_named_file is not None:
            return _Found(None, self.toml_name, f"{setting.name}_file is set as well: keep one of the two")
        if in_file is not None:
            return _Found(in_file, self.toml_name)
        if in_named_file is not None:
            return _secret_file(str(in_named_file), self.toml_name)
        return None

    def _take(self, backend: str | None, name: str) -> Any:
        """A key of the TOML file: at its top, or in the backend's table. Taken out, so that the unknown remain."""
        if backend is None:
            return self.toml.pop(name, None)
        table = self.toml.get(backend)
        if isinstance(table, dict) and name in table:
            return table.pop(name)
        return self.toml.pop(f"{backend}_{name}", None)

    # The file, and what only it can hold

    def _read_toml(self) -> None:
        name = self.environ.get(CONFIG, "")
        origin = "environment" if name else "default"
        self.effective.append(
            Effective(CONFIG, without_secrets(name), origin, "a TOML file that may hold the settings")
        )
        if not name:
            return
        self.toml_name, self.toml_read = name, False
        try:
            self.toml = read_toml(name)
            self.toml_read = True
        except OSError as error:
            self.problems.append(f"{CONFIG}={_quote(without_secrets(name))}: cannot be read: {error.strerror}")
        except UnicodeDecodeError:
            self.problems.append(f"{CONFIG}={_quote(name)}: is not UTF-8")
        except tomllib.TOMLDecodeError as error:
            # Its message names line and column, and at most one character of the text.
            self.problems.append(f"{CONFIG}={_quote(name)}: is no TOML: {error}")
        except (ValueError, RuntimeError):  # a zero byte, a home directory of nobody; of others the system says itself
            self.problems.append(f"{CONFIG}={_quote(name)}: is no path")

    def _subscribers(self, names: dict[str, str]) -> dict[str, dict[str, str]]:
        """Our ids with the backends' own; what people call them is put into `names`."""
        table = self.toml.pop("subscribers", {})
        found: dict[str, dict[str, str]] = {}
        if not isinstance(table, dict):
            self._wrong("subscribers", 'expected tables such as [subscribers.acme] with backend = "its id there"')
            return found
        for ours, theirs in table.items():
            if not isinstance(theirs, dict) or not all(isinstance(v, str) and v for v in theirs.values()):
                self._wrong(f"subscribers.{ours}", 'expected backend = "its id there" pairs, and name = "Acme Inc."')
                continue
            ids = dict(theirs)
            if (name := ids.pop(NAME, None)) is not None:
                if len(name) > NAME_CHARS_MAX or not name.strip():
                    self._wrong(f"subscribers.{ours}.{NAME}", f"expected 1 to {NAME_CHARS_MAX} characters")
                else:
                    names[ours] = name
            for backend in ids.keys() - self.backend_settings.keys():
                guess = _suggestion(backend, [*self.backend_settings, NAME])
                self._wrong(f"subscribers.{ours}", f"{backend} is no backend{guess}")
            found[ours] = ids
        if found:
            self.effective.append(Effective("[subscribers]", named(found), self.toml_name, ""))
        return found

    def _meters(self) -> tuple[Mapping[str, Any], ...]:
        return self._tables("meters")

    def _prices(self) -> tuple[Mapping[str, Any], ...]:
        """`prices = "…"` is the setting of that name, and left to it."""
        return () if isinstance(self.toml.get("prices"), str) else self._tables("prices")

    def _tables(self, key: str) -> tuple[Mapping[str, Any], ...]:
        tables = self.toml.pop(key, [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self._wrong(key, f"expected [[{key}]] tables")
            return ()
        if tables:
            self.effective.append(Effective(f"[[{key}]]", named(map(_called, tables)), self.toml_name, ""))
        return tuple(tables)

    def _limits(self) -> tuple[Mapping[str, Any], ...]:
        """`[[limits]]`; what is no table is the short form, as in the environment."""
        tables = self.toml.get("limits")
        rows = (
            tables if isinstance(tables, list) else [tables]
        )  # in one pair of brackets its fields were taken for units
        if not any(isinstance(table, dict) for table in rows):
            return ()
        del self.toml["limits"]
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self._wrong("limits", "expected [[limits]] tables")
            return ()
        self.effective.append(Effective("[[limits]]", named(map(_called, tables)), self.toml_name, ""))
        return tuple(tables)

    def _upstreams(self) -> tuple[UpstreamSettings, ...]:
        """`[[upstreams]]`; what is no table is the short form, as in the environment, which wins."""
        tables = self.toml.get("upstreams")
        if isinstance(tables, dict) and "url" in tables:  # in one pair of brackets its fields were taken for prefixes
            del self.toml["upstreams"]
            self._wrong("upstreams", "expected [[upstreams]] tables")
            return ()
        if not isinstance(tables, list) or not any(isinstance(table, dict) for table in tables):
            return ()
        del self.toml["upstreams"]
        if not all(isinstance(table, dict) for table in tables):
            self._wrong("upstreams", "expected [[upstreams]] tables")
            return ()
        if self.environ.get("SIDECAR_UPSTREAMS"):
            return ()
        found, problems = from_tables(tables)
        for problem in problems:
            self._wrong("upstreams", without_secrets(problem))
        for one in found:
            self.effective.append(Effective("[[upstreams]]", f"{one.name}: {one}", self.toml_name, ""))
        return found

    def _wrong(self, key: str, why: str) -> None:
        self.problems.append(f"{key} (in {self.toml_name}): {why}")

    # All together

    def _refuse_unknown_variables(self) -> None:
        known = {CONFIG} | {name for row in self.rows for name in _variables(*row)}
        for name in sorted(self.environ):
            if name.startswith(PREFIX) and name not in known and not _is_service_link(name, self.environ[name]):
                self.problems.append(f"{name} is not a setting{_suggestion(name, known)}")

    def _refuse_unknown_keys(self) -> None:
        top = {name.removeprefix(PREFIX).lower() for row in self.rows for name in _variables(*row)} | set(STRUCTURED)
        lists = {"limits", "meters", "prices", "upstreams"}
        pairs = {setting.name for backend, setting in self.rows if backend is None and isinstance(setting.kind, Many)}
        tables = {*STRUCTURED, *pairs, *self.backend_settings}
        for key, value in self.toml.items():
            if key in self.backend_settings and isinstance(value, dict):
                own = [name for s in self.backend_settings[key] for name in (s.name, *([s.name + "_file"] * s.secret))]
                for name in value:
                    self._wrong(f"{key}.{name}", f"is not a setting{_suggestion(name, own)}")
            else:
                # A table is likely to be meant for another one, and a variable's name for its key.
                known = tables if isinstance(value, dict) else lists if isinstance(value, list) else top
                guess = _suggestion(key.removeprefix(PREFIX).lower(), known)
                if not guess and key in tables:  # a list of tables where one is taken
                    guess = f"; did you mean [{key}]?"
                self._wrong(key, f"is not a setting{guess}")

    def _check_together(self, settings: Settings) -> None:
        for name in settings.backends:
            if name not in self.backend_settings:
                have = ", ".join(sorted(self.backend_settings))
                guess = _suggestion(name, self.backend_settings)
                self.problems.append(f"SIDECAR_BACKENDS: {name} is no backend{guess or f'; there are {have}'}")
        for side in ("tls", "upstream"):
            cert, key = (f"{side}_cert_file", f"{side}_key_file")
            if (getattr(settings.proxy, cert) is None) != (getattr(settings.proxy, key) is None):
                have, need = (cert, key) if getattr(settings.proxy, cert) is not None else (key, cert)
                self.problems.append(f"{PREFIX}{need.upper()} is not set: expected beside {PREFIX}{have.upper()}")
        listen, admin = settings.serve.listen, settings.serve.admin_listen
        if listen.overlaps(admin):
            also = "" if listen == admin else f", {listen},"
            self.problems.append(f"SIDECAR_ADMIN_LISTEN={admin}: is SIDECAR_LISTEN{also} already")
        for name in ("upstream_ca_file", "upstream_cert_file", "upstream_server_name"):
            if getattr(settings.proxy, name) is not None:
                if settings.proxy.upstream_url is None and settings.proxy.upstreams:
                    own = name.removeprefix("upstream_")
                    self.problems.append(
                        f"{PREFIX}{name.upper()} is set, but SIDECAR_UPSTREAM_URL is not: "
                        f"expected {own} beside the url in [[upstreams]]"
                    )
                elif (settings.proxy.upstream_url or "").startswith("http://"):
                    self.problems.append(f"{PREFIX}{name.upper()} is set, but SIDECAR_UPSTREAM_URL is no https:// one")

    def _check_needed(self, settings: Settings) -> None:
        said = {line.variable for line in self.effective if line.origin != "default"}
        # What was said of several and cannot be used has been told already.
        if (
            self.toml_read
            and "SIDECAR_UPSTREAM_URL" not in said
            and not any("upstreams" in problem.lower() for problem in self.problems)
            and not settings.proxy.upstreams
        ):
            self.problems.append("SIDECAR_UPSTREAM_URL is not set: expected an http:// or https:// address")
        for backend, setting in self.rows:
            missing = self.toml_read and setting.variable(backend) not in said
            if setting.required and backend in settings.backends and missing:
                also = f" (or {' or '.join(setting.also)})" if setting.also else ""
                self.problems.append(
                    f"{setting.variable(backend)}{also} is not set: "
                    f"the backend {backend} needs it: expected {setting.kind.expected}"
                )


def _parse(setting: Setting, found: _Found) -> Any:
    """Read a text, or what TOML has read already; raises `ValueError`."""
    kind, value = setting.kind, found.value
    if found.problem:
        raise Unfit(found.problem)
    if setting.name == "routes" and isinstance(value, dict):
        return tuple(every(value.items(), lambda route: _route(*route)))
    if isinstance(kind, Many) and isinstance(value, list):
        return kind.parse_items([_scalar(item) for item in value])
    if isinstance(kind, Many) and isinstance(value, dict):
        return kind.parse_items([f"{key}={_scalar(item)}" for key, item in value.items()])
    return kind.parse(_scalar(value).strip())


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, (str, int, float)):
        raise ValueError
    return str(value)


def _route(pattern: str, table: Any) -> Route:
    if not isinstance(table, dict):
        raise Unfit('expected a table for each pattern: [routes."/v1/things/{id}"]')
    for name in table.keys() - {"on_disconnect", "provider", "record", "timeout_s"}:
        raise Unfit(
            f"{pattern}: {name} is not a setting of a route (on_disconnect, provider, record and timeout_s are)"
        )
    stay, provider, record = table.get("on_disconnect"), table.get("provider"), table.get("record", True)
    if stay is not None and stay not in set(OnDisconnect):
        raise Unfit(f"{pattern}: on_disconnect is one of {', '.join(OnDisconnect)}")
    if provider is not None and not isinstance(provider, str):
        raise Unfit(f"{pattern}: provider is a name")
    if not isinstance(record, bool):
        raise Unfit(f"{pattern}: record is true or false")
    timeout_s = None
    if "timeout_s" in table:
        kind = duration(0.001)
        try:
            timeout_s = kind.parse(_scalar(table["timeout_s"]))
        except ValueError:
            raise Unfit(f"{pattern}: timeout_s: expected {kind.expected}") from None
    return Route(
        pattern=check_pattern(pattern),
        on_disconnect=None if stay is None else OnDisconnect(stay),
        provider=provider,
        record=record,
        timeout_s=timeout_s,
    )


def read_toml(name: str) -> dict[str, Any]:
    """What a TOML file holds. Raises `OSError`, `UnicodeDecodeError`, `tomllib.TOMLDecodeError`, and `ValueError` or
    `RuntimeError` where `name` is no path."""
    content = read_given(Path(name).expanduser(), CONFIG_BYTES_MAX)
    # With the mark that some editors begin UTF-8 with: TOML 1.1 lets it stand.
    return tomllib.loads(io.TextIOWrapper(io.BytesIO(content), "utf-8-sig").read())


def _price_file(name: str) -> bytes | OSError | None:
    if name.strip().lower() in PRICE_WORDS:
        return None
    try:
        return _content(Path(name.strip()).expanduser(), PRICES_BYTES_MAX)
    except (RuntimeError, ValueError):  # it is no path, which is told with what else is wrong with prices
        return None


def _content(path: Path, most_bytes: int) -> bytes | OSError:
    """Or why it could not be read, for who says what is wrong with it."""
    try:
        return read_given(path, most_bytes)
    except OSError as error:
        return error


def _secret_file(name: str, origin: str) -> _Found:
    """The content of the file that a `…_FILE` variable names, without the line end that editors add."""
    try:
        content = read_given(Path(name).expanduser(), SECRET_FILE_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            return _Found(
                None, origin, f"{_quote(name)} holds more than {SECRET_FILE_BYTES} bytes: no key is that long"
            )
        # What looks like no path is likely to be the secret itself, in the variable for its file.
        plain = name.startswith(("/", "./", "../", "~")) or os.path.exists(name)
        shown = without_secrets(_quote(name)) if plain else "a file of that name (hidden)"
        return _Found(None, origin, f"{shown} cannot be read: {error.strerror}")
    except ValueError:
        return _Found(None, origin, "this is no path")
    except RuntimeError:
        return _Found(None, origin, "this is no path: there is no user whose home directory it begins with")
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        return _Found(None, origin, f"{_quote(name)} is not text")
    if text.startswith("\ufeff"):
        return _Found(None, origin, f"{_quote(name)} begins with a byte order mark: save it as UTF-8 without one")
    return _Found(text, origin, None if text else f"{_quote(name)} is empty")


def _is_service_link(name: str, value: str) -> bool:
    return _SERVICE_LINK.search(name) is not None and (not name.endswith("_PORT") or "://" in value or value.isdigit())


def named(names: Iterable[str]) -> str:
    """What a table defines, by name; of many the first, and how many more there are."""
    every = [name if len(name) <= SHOWN_CHARS else name[: SHOWN_CHARS - 1] + "…" for name in names]
    rest = len(every) - NAMES_SHOWN
    return ", ".join(every[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _called(table: Mapping[str, Any]) -> str:
    """What an entry of `[[meters]]`, `[[prices]]` or `[[limits]]` is called: its name, or what it is for."""
    found = next((table[key] for key in ("name", "model", "meter", "unit", "provider") if table.get(key)), None)
    if found is None:
        return "(unnamed)"
    return f"meter {found}" if found is table.get("meter") else str(found)


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(
            f"{key}={_as_text(item)}" if not isinstance(item, dict) else str(key) for key, item in value.items()
        )
    if isinstance(value, list):
        return ",".join(_as_text(item) for item in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def without_secrets(text: str) -> str:
    """Without what may be a password or a key in an address: who is named before its host, and its query; and without
    a key that stands where its file should be named. More may be hidden than has to be: where such a password ends
    cannot always be told."""
    return _PEM.sub(r"\1…", _QUERY.sub(r"\1?…", _USER.sub("//…@", text)))


def _quote(text: str) -> str:
    shown = text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"
    return repr(shown)


def _cut(word: re.Match[str]) -> str:
    return word[0][: SHOWN_CHARS - 1] + "…"


def _suggestion(name: str, known: Collection[str]) -> str:
    """Without the common beginning, by which every name would be like every other."""
    prefix = PREFIX if name.startswith(PREFIX) else ""
    rests = sorted(other.removeprefix(prefix) for other in known)
    # `SIDECAR_UPSTREAM`: the one address, not the list that is a letter away.
    if address := next((url for url in (f"{name}_URL", f"{name}_url") if url in known), None):
        return f"; did you mean {address}?"
    close = get_close_matches(name.removeprefix(prefix), rests, n=1, cutoff=0.7)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
