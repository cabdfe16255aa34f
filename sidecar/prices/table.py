"""The table of providers' prices: where it is read from, and which entry a model's name finds.

The one in the wheel is made from the data of genai-prices (MIT; `NOTICE` beside it) by `make prices`. A file of the
same form, of genai-prices' own (v2) or of LiteLLM's can stand in its place. A table in memory is what its JSON holds,
with amounts as text; prices become numbers when a model is first asked for.

What a clause finds is as good as the clause: `starts_with: claude-sonnet-4-5` is meant for the dated releases of that
model, and finds `claude-sonnet-4-5-fancy` as well. So a match says whether the name is known (`near` is False) or
merely looks like one that is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal, InvalidOperation
from importlib import resources
from pathlib import Path
from typing import Any, Final

import orjson

from sidecar.prices.litellm import from_litellm
from sidecar.prices.rates import BY_PRICE_KEY, Price, pico
from sidecar.settings.given_file import read_given
from sidecar.settings.loader import PRICES_BYTES_MAX as FILE_BYTES_MAX

TABLE_FILE: Final = "table.json"
DEPTH_MAX: Final = 6  # of `or` and `and` in a match; the data have three

# What may stand behind the name of a model without making another one of it: a date, `latest`, `preview`, a release
# (`-001`), and on Bedrock a version (`-v1:0`; a second version of what has no date is another model). A digit or two
# more is another model too: `claude-sonnet-5-7` is none of `claude-sonnet-5`.
_MONTH_DAY: Final = r"(?:0[1-9]|1[0-2])-?(?:0[1-9]|[12]\d|3[01])"
_KNOWN_END: Final = rf"[-@:](?:20\d{{2}}-?{_MONTH_DAY}|{_MONTH_DAY}|\d{{4}}|0\d{{2}}|default|latest|preview)"
_KNOWN_ENDS: Final = re.compile(rf"(?:{_KNOWN_END})*(?:-v1(?::\d+)?)?|(?:{_KNOWN_END})+-v\d+(?::\d+)?")
_DATE_BEGUN: Final = re.compile(r"[-@:](?:20\d{2}-?|0)?\Z")  # the end of a clause's word that a date goes on from
_REGION: Final = re.compile(r"(?:us|eu|apac|jp|au|ca)\.")  # of Bedrock; `global.` and `us-gov.` have other prices
_TUNED_ENDS: Final = re.compile(r"[\d-]*(?::.*)?")
_COMPACT_DATE: Final = re.compile(r"(-)(20\d{2})(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(?=-|:|$)")
_AMOUNT: Final = re.compile(r"\d{1,18}(?:\.\d{1,40})?")

Model = Mapping[str, Any]


class TableError(ValueError):
    """A table that cannot be used. The text says what is wrong with it, and where."""


@dataclass(frozen=True, slots=True)
class Found:
    """A model of the table. `near`: its name only looks like the one asked for."""

    provider: str
    model: Model
    near: bool
    borrowed: bool = False  # another provider's entry, that this one has no own for

    @property
    def name(self) -> str:
        return str(self.model["id"])


@dataclass(slots=True)
class Provider:
    """One provider's models, and how it is told by an address or a word."""

    id: str
    address: re.Pattern[str]
    provider_match: Mapping[str, Any] | None
    model_match: Mapping[str, Any] | None
    others: Sequence[str]  # whose prices hold where it has none of its own
    models: Sequence[Model]
    _names: dict[str, int] | None = None  # equal names, to the first model that has it
    _clauses: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)

    def find(self, name: str) -> tuple[Model, bool] | None:
        """The first model that the name matches, and whether it is near only. `name` in lower case."""
        if self._names is None:
            self._index()
        assert self._names is not None
        first = self._names.get(name)
        for place, clause in self._clauses:
            if first is not None and place >= first:
                break
            if (fit := _fits(clause, name)) is not None:
                return self.models[place], fit and str(self.models[place]["id"]).lower() != name
        return None if first is None else (self.models[first], False)

    def _index(self) -> None:
        self._names = {}
        for place, model in enumerate(self.models):
            clauses = model["match"].get("or") or [model["match"]]
            for clause in clauses:
                if "equals" in clause:
                    self._names.setdefault(clause["equals"].lower(), place)
            rest = [clause for clause in clauses if "equals" not in clause]
            if rest:
                self._clauses.append((place, rest[0] if len(rest) == 1 else {"or": rest}))


class Table:
    """All providers. `source` goes into each cost: where the prices are from, and which edition."""

    def __init__(self, source: str, providers: Sequence[Mapping[str, Any]], digest: str) -> None:
        self.source = source
        self.digest = digest
        self.providers = {p["id"]: _provider(p) for p in providers}

    def __repr__(self) -> str:
        models = sum(len(provider.models) for provider in self.providers.values())
        return f"<Table {self.source}: {len(self.providers)} providers, {models} models>"

    def by_address(self, url: str) -> Provider | None:
        return next((p for p in self.providers.values() if p.address.match(url)), None)

    def by_word(self, word: str) -> Provider | None:
        """A provider by its id, or by a word that is commonly used for it."""
        word = word.lower().strip()
        if (found := self.providers.get(word)) is not None:
            return found
        rows = self.providers.values()
        return next((p for p in rows if p.provider_match and _fits(p.provider_match, word) is not None), None)

    def by_model(self, name: str) -> Provider | None:
        """Who makes a model of this name; not who serves it."""
        name = name.lower()
        return next(
            (p for p in self.providers.values() if p.model_match and _fits(p.model_match, name) is not None), None
        )

    def find(self, provider: Provider, name: str) -> Found | None:
        """What this provider has for the name of a model, its own entry or that of who it serves the models of."""
        name = name.lower()
        for spelled in dict.fromkeys((name, _dashed_dates(name))):
            if (own := provider.find(spelled)) is not None:
                return Found(provider.id, *own)
            for other in provider.others:
                if other in self.providers and (found := self.providers[other].find(spelled)) is not None:
                    return Found(provider.id, *found, borrowed=True)
        return None


def prices_at(
    model: Model, day: str, second: float, context: Mapping[str, str]
) -> tuple[dict[str, Price], frozenset[str]]:
    """The prices of a model in force at a time of a day (UTC, ISO 8601; seconds since midnight).

    The second value has the keys of `context` that the model has no price for: there the standard price stands.
    """
    conditions = model["prices"]
    if isinstance(conditions, Mapping):
        chosen = conditions
    else:  # the last one that holds
        holding = [row["prices"] for row in conditions if _holds(row.get("constraint"), day, second)]
        chosen = holding[-1] if holding else conditions[0]["prices"]
    spoken: set[str] = set()
    own: dict[str, Any] = {}
    for variant in model.get("price_variants") or () if context else ():
        when = variant["when"]
        if _holds(variant.get("constraint"), day, second) and all(context.get(k) == v for k, v in when.items()):
            spoken |= when.keys()
            own = {**variant["prices"], **own}  # the first that names a price has it
    prices = {**chosen, **own}
    return {BY_PRICE_KEY[key].name: _price(key, value) for key, value in prices.items()}, frozenset(context) - spoken


def hours_of(model: Model) -> list[int]:
    """The seconds of a day (UTC) at which another price of the model begins; none where a day has one price."""
    rows = model["prices"] if isinstance(model["prices"], list) else []
    constraints = [row.get("constraint") or {} for row in (*rows, *(model.get("price_variants") or ()))]
    return sorted({_second(text) for each in constraints for key, text in each.items() if key != "start_date"})


def _price(key: str, value: Any) -> Price:
    per = BY_PRICE_KEY[key].per
    if isinstance(value, Mapping):
        return pico(value["base"], per), tuple((t["start"], pico(t["price"], per)) for t in value["tiers"])
    return pico(value, per), ()


def _holds(constraint: Mapping[str, str] | None, day: str, second: float) -> bool:
    if constraint is None:
        return True
    if "start_date" in constraint:
        return day >= constraint["start_date"]
    start, end = _second(constraint["start_time"]), _second(constraint["end_time"])
    return start <= second < end if start <= end else second >= start or second < end


def _second(text: str) -> int:
    """Seconds since midnight in UTC of a time of day, which is UTC unless it says other."""
    at = time.fromisoformat(text)
    offset = at.utcoffset()
    moved = at.hour * 3600 + at.minute * 60 + at.second - (int(offset.total_seconds()) if offset else 0)
    return moved % 86_400


def _fits(clause: Mapping[str, Any], text: str) -> bool | None:
    """None: no match. Else whether the text is near only: more stands around the clause's word than dates."""
    kind, value = next(iter(clause.items()))
    if kind in ("or", "and"):
        found = [fit for each in value if (fit := _fits(each, text)) is not None]
        if kind == "and":
            return all(found) if len(found) == len(value) else None
        return all(found) if found else None
    if kind == "regex":
        if re.search(value, text) is None:
            return None
        return not (value.startswith("^") and value.endswith("$"))
    word = value.lower()
    if kind == "equals":
        return None if text != word else False
    if kind == "starts_with":
        return None if not text.startswith(word) else not _only_known(word, text[len(word) :])
    if kind == "ends_with":
        return None if not text.endswith(word) else text != word
    before, found_word, after = text.partition(word)
    if not found_word:
        return None
    return not ((not before or _REGION.fullmatch(before)) and _only_known(word, after))


def _only_known(word: str, rest: str) -> bool:
    """Whether what follows a model's name leaves it the same model."""
    if word.startswith("ft:"):  # a date, and whose it is
        return _TUNED_ENDS.fullmatch(rest) is not None
    if rest and (begun := _DATE_BEGUN.search(word)) is not None:
        rest = begun[0] + rest
    return _KNOWN_ENDS.fullmatch(rest) is not None


def _dashed_dates(name: str) -> str:
    """`gpt-5.2-20251211`, as gateways spell it, with the dashes that the table has."""

    def dashed(match: re.Match[str]) -> str:
        try:
            date(int(match[2]), int(match[3]), int(match[4]))
        except ValueError:
            return match[0]
        return f"{match[1]}{match[2]}-{match[3]}-{match[4]}"

    return _COMPACT_DATE.sub(dashed, name)


# Reading


def builtin() -> Table:
    """The table of the wheel. Raises `TableError` where it is not what was made at release."""
    data = resources.files("sidecar.prices").joinpath(TABLE_FILE).read_bytes()
    return read(data, TABLE_FILE)


def _builtin_rows() -> Sequence[Mapping[str, Any]]:
    data = resources.files("sidecar.prices").joinpath(TABLE_FILE).read_bytes()
    rows: Sequence[Mapping[str, Any]] = orjson.loads(data)["providers"]
    return rows


def load(path: Path, given: bytes | OSError | None = None) -> Table:
    """A table from a file. Raises `TableError`, with what is wrong. `given`: what came of reading it, where it was read
    already."""
    try:
        path = path.expanduser()
        if isinstance(given, OSError):
            raise given
        data = read_given(path, FILE_BYTES_MAX) if given is None else given
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise TableError(f"{path}: is larger than {FILE_BYTES_MAX >> 20} MiB: that is no table of prices") from None
        raise TableError(f"{path}: cannot be read: {error.strerror}") from None
    except (RuntimeError, ValueError):  # a home directory of nobody, a zero byte
        raise TableError(f"{path}: is no path: expected builtin, none, or a file") from None
    return read(data, str(path))


def read(data: bytes, name: str) -> Table:
    """A table in any of the three forms, from its bytes; `name` goes into messages."""
    ours = data.startswith(b'{"source":')
    try:
        # Amounts are text in ours; in the others they are numbers, which must not become floats on the way.
        document = orjson.loads(data) if ours else _loads_exactly(data)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{name}: is no JSON: {error}") from None
    if ours:
        providers = document.get("providers")
        said = document.get("sha256")
        if said != digest_of(providers):
            raise TableError(f"{name}: is damaged: its content is not what its hash says")
        return Table(str(document["source"]), providers, str(said))
    if isinstance(document, dict) and isinstance(document.get("providers"), list):
        document = document["providers"]
    if isinstance(document, dict) and any(isinstance(v, dict) and "litellm_provider" in v for v in document.values()):
        providers, form = from_litellm(document, _builtin_rows()), "litellm"
    elif isinstance(document, list):
        providers, form = document, "genai-prices"
    else:
        raise TableError(f"{name}: is neither genai-prices' data (v2) nor LiteLLM's")
    providers = checked(providers, name)
    if not any(provider["models"] for provider in providers):
        raise TableError(f"{name}: has no price of any model")
    return Table(f"{form}/file-{digest_of(providers)[:12]}", providers, digest_of(providers))


def _loads_exactly(data: bytes) -> Any:
    return json.loads(data, parse_float=Decimal)


def digest_of(providers: Any) -> str:
    return hashlib.sha256(orjson.dumps(providers, option=orjson.OPT_SORT_KEYS)).hexdigest()


def checked(providers: Sequence[Any], name: str) -> list[dict[str, Any]]:
    """The same with what is not used left out and amounts as text. Raises `TableError` with the first ten faults."""
    faults: list[str] = []
    made = []
    seen: set[str] = set()
    for provider in providers:
        try:
            if not isinstance(provider, Mapping):
                raise ValueError(f"expected an object, not {str(provider)[:40]!r}")
            made.append(_checked_provider(provider, faults))
            if made[-1]["id"] in seen:
                faults.append(f"{made[-1]['id']}: stands there twice")
            seen.add(made[-1]["id"])
        except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
            label = provider.get("id") if isinstance(provider, Mapping) else None
            faults.append(f"{label or 'a provider'}: {_said(error)}")
    if faults:
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise TableError("\n  ".join([f"{name}: cannot be used:", *faults[:10]]) + more)
    return made


def _checked_provider(row: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    made: dict[str, Any] = {"id": str(row["id"]), "api_pattern": str(row["api_pattern"]), "models": []}
    re.compile(made["api_pattern"])
    for key in ("provider_match", "model_match"):
        if row.get(key):
            made[key] = _checked_clause(row[key])
    if row.get("fallback_model_providers"):
        made["fallback_model_providers"] = [str(each) for each in row["fallback_model_providers"]]
    for model in row["models"]:
        try:
            made["models"].append(_checked_model(model))
        except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
            label = model.get("id") if isinstance(model, dict) else None
            faults.append(f"{made['id']} {label or 'a model'}: {_said(error)}")
    return made


def _said(error: Exception) -> str:
    """What is wrong with a part of a file."""
    match error:
        case KeyError():
            return f"{error} is missing"
        case re.error():
            return f"a pattern is wrong: {error}"
        case TypeError() | AttributeError():
            return f"is of another form than expected ({error})"
        case _:
            return str(error)


def _checked_model(row: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"id": str(row["id"]), "match": _checked_clause(row["match"])}
    prices = row["prices"]
    if isinstance(prices, list):
        if not prices:
            raise ValueError("has no price")
        made["prices"] = [{"prices": _checked_prices(each["prices"]), **_checked_constraint(each)} for each in prices]
    else:
        made["prices"] = _checked_prices(prices)
    if row.get("price_variants"):
        made["price_variants"] = [
            {
                "when": {str(key): str(value) for key, value in each["when"].items()},
                "prices": _checked_prices(each["prices"]),
                **_checked_constraint(each),
            }
            for each in row["price_variants"]
        ]
    if row.get("seconds_least"):
        made["seconds_least"] = int(row["seconds_least"])
    # No request or response is longer than that: what LiteLLM's file says itself, else the whole context.
    for key in ("input_tokens_max", "output_tokens_max", "context_window"):
        most = row.get(key)
        if type(most) is int and most > 0:
            made[key] = most
    return made


def _checked_constraint(row: Mapping[str, Any]) -> dict[str, Any]:
    constraint = row.get("constraint")
    if constraint is None:
        return {}
    if "start_date" in constraint:
        return {"constraint": {"start_date": date.fromisoformat(str(constraint["start_date"])).isoformat()}}
    times = {key: str(constraint[key]) for key in ("start_time", "end_time")}
    for text in times.values():
        _second(text)
    return {"constraint": times}


def _checked_clause(clause: Any, depth: int = 0) -> dict[str, Any]:
    if not isinstance(clause, Mapping) or len(clause) != 1 or depth > DEPTH_MAX:
        raise ValueError("a match is wrong: expected one of equals, starts_with, ends_with, contains, regex, or, and")
    kind, value = next(iter(clause.items()))
    if kind in ("or", "and") and isinstance(value, list) and value:
        return {kind: [_checked_clause(each, depth + 1) for each in value]}
    if kind not in ("equals", "starts_with", "ends_with", "contains", "regex") or not isinstance(value, str):
        raise ValueError(f"a match is wrong: {kind!r} is none of the kinds that are known")
    if kind == "regex":
        re.compile(value)
    if not value:
        raise ValueError(f"a match is wrong: {kind} of nothing")
    return {kind: value}


def _checked_prices(prices: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in prices.items():
        if value is None:
            continue
        if key not in BY_PRICE_KEY:
            raise ValueError(f"{key} is no price that is known")
        if isinstance(value, Mapping):
            tiers = sorted(
                ({"start": _start(tier["start"]), "price": amount(tier["price"])} for tier in value["tiers"]),
                key=_tier_start,
            )
            made[key] = {"base": amount(value["base"]), "tiers": tiers}
        else:
            made[key] = amount(value)
    return made


def _tier_start(tier: Mapping[str, Any]) -> int:
    return int(tier["start"])


def _start(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a tier that starts at {value!r}: expected a whole number of tokens")
    return value


def amount(value: Any) -> str:
    """A price as plain decimal text. Raises `ValueError` for what is negative, no number, or was a float."""
    if isinstance(value, bool) or not isinstance(value, (int, str, Decimal)):
        raise ValueError(f"{value!r} is no exact amount")
    try:
        number = Decimal(value)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number < 0:
        raise ValueError(f"{value} is no amount: expected a decimal of 0 or more")
    text = format(number.normalize(), "f")
    if not _AMOUNT.fullmatch(text):
        raise ValueError(f"{value} has more digits than a price has")
    return text


def _provider(row: Mapping[str, Any]) -> Provider:
    return Provider(
        id=row["id"],
        address=re.compile(row["api_pattern"]),
        provider_match=row.get("provider_match"),
        model_match=row.get("model_match"),
        others=row.get("fallback_model_providers", ()),
        models=row["models"],
    )
