"""`metering-sidecar demo`: the whole thing on one machine, in a few seconds, with no account, no key and no internet.

It starts a scripted model upstream, the whole sidecar in a temporary data directory, and, with a backend named, the
receiver in that backend's place. Then it sends calls as clients would and shows what the sidecar made of them. It
checks what it shows: the tokens in the ledger are the tokens that the upstream reported, and the balance holds;
otherwise it says so and ends with 1.

The sidecar is started through `start`, which is given an environment: the demo knows settings only by the names that
a user knows.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final, Protocol

import aiohttp
import orjson

from sidecar.backends import BACKENDS
from sidecar.dev import summary
from sidecar.dev.mock_backends import Receiver, Taken, Terms, backends
from sidecar.dev.mock_backends.vendors import VENDORS
from sidecar.dev.mock_llm import CHAT, EMBEDDINGS, MESSAGES, RESPONSES, Script, ScriptedLLM, Tokens
from sidecar.ledger import LedgerError, LedgerReader, UsageRow
from sidecar.runtime.signals import stop_event
from sidecar.settings import PREFIX

SETTLE_S: Final = 15.0  # for the records to reach every backend; it takes well under a second
SETTLE_STEP_S: Final = 0.05
PIECE_DELAY_S: Final = 0.02  # between the pieces of a streamed answer, so that it is one


class Running(Protocol):
    """A sidecar that takes calls."""

    @property
    def proxy_url(self) -> str: ...

    @property
    def admin_url(self) -> str: ...


Start = Callable[[Mapping[str, str]], AbstractAsyncContextManager[Running]]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Printing:
    """How tables are drawn; the commands' own way is handed in, because the demo stands below them.

    `usage`: sums of the ledger by the named groups. `table`: rows under these columns. `pairs`: names and values.
    """

    usage: Callable[[Sequence[UsageRow], Sequence[str]], str]
    table: Callable[[Sequence[Mapping[str, Any]], Sequence[str]], str]
    pairs: Callable[[Sequence[tuple[str, str]]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of the demo, and what the upstream reports for it."""

    subscriber: str
    title: str
    path: str
    body: Mapping[str, Any]
    script: str = ""
    tokens: Tokens | None = None  # None: it fails, and nothing is consumed
    hangs_up: bool = False  # the client leaves after the first piece

    @property
    def vendor(self) -> str:
        """Whose API it calls."""
        return "anthropic" if self.path == "/v1/messages" else "openai"

    @property
    def is_streamed(self) -> bool:
        return self.body.get("stream") is True


class DemoError(Exception):
    """The demo cannot run; the message says what to do."""


_QUESTION: Final = [{"role": "user", "content": "How is the sea?"}]
_CHAT: Final = {"model": "gpt-5-mini", "messages": _QUESTION}
_USAGE: Final = {"stream": True, "stream_options": {"include_usage": True}}
_CLAUDE: Final = {"model": "claude-sonnet-4-6", "max_tokens": 256, "messages": _QUESTION}
_CHAT_PATH: Final = "/v1/chat/completions"
_EMBED: Final = {"model": "text-embedding-3-small", "input": ["tide", "wave"]}

CALLS: Final = (
    Call(subscriber="acme", title="openai chat", path=_CHAT_PATH, body=_CHAT, tokens=CHAT),
    Call(subscriber="acme", title="openai chat", path=_CHAT_PATH, body=_CHAT | _USAGE, tokens=CHAT),
    Call(subscriber="acme", title="openai embeddings", path="/v1/embeddings", body=_EMBED, tokens=EMBEDDINGS),
    Call(
        subscriber="globex", title="openai responses", path="/v1/responses",
        body={"model": "gpt-5-mini", "input": "How is the sea?", "stream": True}, tokens=RESPONSES,
    ),
    Call(subscriber="globex", title="anthropic messages", path="/v1/messages", body=_CLAUDE, tokens=MESSAGES),
    Call(
        subscriber="globex", title="anthropic messages, gzip", path="/v1/messages", body=_CLAUDE | {"stream": True},
        script="encoding=gzip", tokens=MESSAGES,
    ),
    Call(
        subscriber="initech", title="anthropic messages, client hangs up", path="/v1/messages",
        body=_CLAUDE | {"stream": True}, tokens=MESSAGES, hangs_up=True,
    ),
    Call(subscriber="initech", title="openai chat, refused", path=_CHAT_PATH, body=_CHAT, script="status=429"),
)  # fmt: skip


KEYS: Final = {"openai": "sk-demo-openai", "anthropic": "sk-ant-demo"}
"""What each vendor wants, and only the sidecar has."""


def say_at_once(line: str) -> None:
    """Print, also into a pipe, when it happens."""
    print(line, flush=True)


async def run(
    start: Start,
    printing: Printing,
    *,
    keep: bool = False,
    backend: str | None = None,
    mode: str | None = None,
    say: Say = say_at_once,
    settle_s: float = SETTLE_S,
) -> int:
    """The demo from beginning to end; the exit code. `keep` stays until Ctrl-C, `settle_s` is waited for delivery."""
    if mode is not None and backend not in (known := _with_modes()):
        raise DemoError(f"--mode {mode}: only {' and '.join(known)} have modes, and are named with --backend")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metering-sidecar-demo-")))
        data_dir = folder / "data"
        urls = {name: await stack.enter_async_context(_scripted(key)) for name, key in KEYS.items()}
        config = folder / "sidecar.toml"
        config.write_text(_upstreams(folder, urls))
        environ = environment(None, data_dir) | {"SIDECAR_CONFIG": str(config)}
        receiver, receiver_url = None, ""
        if backend is not None:
            receiver, receiver_url = await stack.enter_async_context(_receiving(backend))
            environ |= pointed_at(backend, receiver_url, mode)
            environ |= {"SIDECAR_BACKENDS": f"ledger,{backend}"}
            with config.open("a") as file:
                file.write(_customers(backend))
        sidecar = await stack.enter_async_context(start(environ))
        for name, url in urls.items():
            say(f"scripted {name:<9} {url}  (refuses without its key; nothing leaves this machine)")
        say(f"sidecar            {sidecar.proxy_url}  in front of both, with their keys, which clients do not have")
        say(f"                   {', '.join(f'/{name}' for name in urls)} choose the vendor; records go to {data_dir}")
        if backend is not None:
            say(f"receiver           {receiver_url}  in the place of {backend}")
        say("")
        await _send_calls(sidecar.proxy_url, say)
        balance = await settled(sidecar.admin_url, len(CALLS), settle_s)
        problems = _show_usage(data_dir, printing, say) + _show_balance(balance, say)
        if receiver is not None:
            problems += _show_arrived(receiver, str(backend), balance, printing, say)
        for problem in problems:
            say(f"WRONG: {problem}")
        if keep:
            await _keep(sidecar, data_dir, say)
        else:
            _say_next(backend, say)
    return 1 if problems else 0


def environment(upstream_url: str | None, data_dir: Path) -> dict[str, str]:
    """The settings of the demo's sidecar: what a user would write into an env file."""
    return {
        **({} if upstream_url is None else {"SIDECAR_UPSTREAM_URL": upstream_url}),
        "SIDECAR_LISTEN": "127.0.0.1:0",
        "SIDECAR_ADMIN_LISTEN": "127.0.0.1:0",
        "SIDECAR_DATA_DIR": str(data_dir),
        "SIDECAR_SUBSCRIBER": "header:x-tenant",
        "SIDECAR_BACKENDS": "ledger",
        "SIDECAR_LOG_LEVEL": "WARNING",
    }


STAND_INS: Final = {row.backend: row.vendor for row in reversed(VENDORS)}
"""What `--backend` takes: whatever the receiver stands in for, and what points the backend at it."""


def pointed_at(backend: str, url: str, mode: str | None) -> dict[str, str]:
    """The settings of the backend whose place the receiver at this address takes."""
    own = {**STAND_INS[backend].settings(url)} | ({} if mode is None else {"mode": mode})
    return {f"{PREFIX}{backend}_{name}".upper(): value for name, value in own.items()}


def _with_modes() -> list[str]:
    """Those that speak more than one interface."""
    return [name for name, row in BACKENDS.items() if any(setting.name == "mode" for setting in row.settings)]


def _upstreams(folder: Path, urls: Mapping[str, str]) -> str:
    """The settings of both vendors, with the files that hold their keys."""
    text = ""
    for name, url in urls.items():
        path = folder / f"{name}.key"
        path.write_text(f"{KEYS[name]}\n")
        header = f'x-api-key = "file:{path}"' if name == "anthropic" else f'authorization = "Bearer file:{path}"'
        text += f'[[upstreams]]\nname = "{name}"\nprefix = "/{name}"\nurl = "{url}"\nset_headers = {{ {header} }}\n\n'
    return text


def _customers(backend: str) -> str:
    """Who the demo's subscribers are at the backend, which most backends want to know."""
    names = dict.fromkeys(call.subscriber for call in CALLS)
    return "".join(f'[subscribers.{name}]\n{backend} = "cus_{name}"\n' for name in names)


@asynccontextmanager
async def _scripted(key: str) -> AsyncIterator[str]:
    llm = ScriptedLLM(Script(delay_s=PIECE_DELAY_S), key=key)
    url = await llm.start()
    try:
        yield url
    finally:
        await llm.aclose()


@asynccontextmanager
async def _receiving(backend: str) -> AsyncIterator[tuple[Receiver, str]]:
    if backend not in STAND_INS:
        raise DemoError(f"--backend {backend}: the demo knows {', '.join(backends())}")
    receiver = Receiver(terms={backend: Terms(secret=STAND_INS[backend].settings("").get("secret"))})
    url = await receiver.start()
    try:
        yield receiver, url
    finally:
        await receiver.aclose()


async def _send_calls(proxy_url: str, say: Say) -> None:
    say("Calls, as clients would send them:")
    async with aiohttp.ClientSession(proxy_url) as session:
        for call in CALLS:
            say(f"  {call.subscriber:<8} {call.title:<36} {await _send(session, call)}")
    say("")


async def _send(session: aiohttp.ClientSession, call: Call) -> str:
    """Send one call; what came back, in words."""
    headers = {
        "x-tenant": call.subscriber,
        "X-Script": call.script,
        "Content-Type": "application/json",
        "anthropic-version": "2023-06-01",
    }
    begun = monotonic()
    async with session.post(f"/{call.vendor}{call.path}", data=orjson.dumps(call.body), headers=headers) as answer:
        pieces = 0
        async for _ in answer.content.iter_any():
            pieces += 1
            if call.hangs_up:
                break
        took = f"{answer.status}  {(monotonic() - begun) * 1000:5.0f} ms"
        if call.hangs_up:
            answer.close()
            return f"{took}  left after {pieces} piece of the stream"
    return f"{took}  {f'streamed in {pieces} pieces' if call.is_streamed else 'plain'}"


async def settled(admin_url: str, calls: int, settle_s: float) -> dict[str, Any]:
    """The balance once every call is recorded and delivered, or as it is when that takes too long."""
    deadline = monotonic() + settle_s
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{admin_url}/balance") as answer:
                balance: dict[str, Any] = orjson.loads(await answer.read())
            waits = balance["open"] or any(totals["pending"] for totals in balance["backends"].values())
            if (balance["recorded"] >= calls and not waits) or monotonic() > deadline:
                return balance
            await asyncio.sleep(SETTLE_STEP_S)


def _show_usage(data_dir: Path, printing: Printing, say: Say) -> list[str]:
    """The usage table out of the ledger, and where it is not what the upstream reported."""
    by = ("subscriber", "provider", "model")
    try:
        rows = LedgerReader(data_dir / "ledger.db").usage(by)
    except LedgerError as error:
        return [str(error)]
    say("Usage, from the ledger:")
    say(indent(printing.usage(rows, by)))
    say("")
    problems = []
    for subscriber in dict.fromkeys(call.subscriber for call in CALLS):
        expected = [call.tokens for call in CALLS if call.subscriber == subscriber and call.tokens]
        mine = [row for row in rows if row.group[0] == subscriber]
        for name, wanted, found in (
            ("input", sum(t.input for t in expected), sum(row.input_tokens or 0 for row in mine)),
            ("output", sum(t.output for t in expected), sum(row.output_tokens or 0 for row in mine)),
        ):
            if wanted != found:
                problems.append(f"{subscriber}: the upstream reported {wanted} {name} tokens, the ledger has {found}")
    return problems


def _show_balance(balance: Mapping[str, Any], say: Say) -> list[str]:
    say("Balance (every call is in exactly one place):")
    lost = sum(balance["lost"].values())
    say(
        f"  admitted {balance['admitted']}  =  recorded {balance['recorded']}  +  open {balance['open']}"
        f"  +  lost {lost}"
    )
    for name, totals in balance["backends"].items():
        say(
            f"  {name}: recorded {balance['recorded']}  =  delivered {totals['delivered']}"
            f"  +  duplicate {totals['duplicate']}  +  parked {_reasons(totals['parked'])}"
            f"  +  pending {totals['pending']}  +  skipped {_reasons(totals['skipped'])}"
        )
    say("")
    problems = [] if balance["holds"] else ["the balance does not hold"]
    if balance["admitted"] != len(CALLS):
        problems.append(f"{len(CALLS)} calls were sent, {balance['admitted']} admitted")
    waiting = [name for name, totals in balance["backends"].items() if totals["pending"]]
    if waiting or balance["open"]:
        problems.append(f"not settled in time: {', '.join(waiting) or 'calls are still open'}")
    return problems


def _show_arrived(
    receiver: Receiver, backend: str, balance: Mapping[str, Any], printing: Printing, say: Say
) -> list[str]:
    """What the receiver took, whether anything was refused, and whether it adds up to what the upstream reported."""
    rows = receiver.received
    taken = [(row.path, row.body) for row in rows if row.verdict == "delivered"]
    say(f"What arrived at {backend}: {_reasons(Counter(str(row.verdict) for row in rows))}, the first of it:")
    if not taken:
        lacking = balance["backends"].get(backend, {}).get("delivered")
        return _refusals(rows) + ([f"the balance says delivered, and nothing arrived at {backend}"] if lacking else [])
    path, body = taken[0]
    say(f"  POST {path}")
    say(indent(indent(printing.pairs(summary.first_fields(body)))))
    say("")
    arrived = summary.added_up(backend, taken)
    say("All of it added up by customer:")
    say(indent(printing.table(arrived.rows(), summary.COLUMNS)))
    say("")
    if arrived.own_counts:
        say("Completions have the tokens as each vendor counts them: Anthropic's input is without what its cache had.")
        say("")
    return _refusals(rows) + _not_as_reported(arrived, backend)


def _refusals(rows: Iterable[Taken]) -> list[str]:
    bad = [row for row in rows if row.verdict not in ("delivered", "duplicate", "retry")]
    return [f"{row.path} was {row.verdict} by the receiver" for row in bad]


def _not_as_reported(arrived: summary.Arrived, backend: str) -> list[str]:
    """Where what arrived is not what the calls were."""
    problems = []
    by_meters = any(one.name == "meters" for one in BACKENDS[backend].settings)
    for subscriber in dict.fromkeys(call.subscriber for call in CALLS):
        customer = f"cus_{subscriber}" if arrived.is_mapped else subscriber
        mine = [call for call in CALLS if call.subscriber == subscriber]
        reported = [call.tokens for call in mine if call.tokens]
        # The default meters count calls that were answered below 400; who is given records counts them all.
        wanted = {summary.CALLS: sum(not (by_meters and call.script.startswith("status=4")) for call in mine)}
        if not arrived.own_counts:
            wanted |= {summary.INPUT: sum(t.input for t in reported), summary.OUTPUT: sum(t.output for t in reported)}
        found = arrived.sums.get(customer, {})
        problems += [
            f"{customer}: {backend} was told {found.get(name, 0)} {name} instead of {value}"
            for name, value in wanted.items()
            if found.get(name, 0) != value
        ]
    return problems


async def _keep(sidecar: Running, data_dir: Path, say: Say) -> None:
    say("It stays up. Look around, and end it with Ctrl-C:")
    say(f"  {sidecar.admin_url}/   the page, in a browser")
    say(f"  curl {sidecar.admin_url}/balance   also /metrics, /readyz, /healthz")
    say(f"  SIDECAR_DATA_DIR={data_dir} metering-sidecar records   also usage, balance, spool status")
    say(f"  curl {sidecar.proxy_url}/openai/v1/chat/completions -H 'x-tenant: you' \\")
    say('    -H \'Content-Type: application/json\' -d \'{"model": "gpt-5-mini", "messages": []}\'')
    with stop_event() as stop:
        await stop.wait()
    say("Stopping; the demo's data goes with it.")


def _say_next(backend: str | None, say: Say) -> None:
    say("Where to look next:")
    if backend is None:
        say(f"  metering-sidecar demo --backend NAME      the same with a billing backend: {', '.join(backends())}")
    say("  metering-sidecar demo --limits            a customer runs into its limit")
    say("  metering-sidecar demo --keep              stays up, with a call to send yourself")
    say("  metering-sidecar serve https://api.openai.com")
    say("                                            in front of the real thing; in a clone: make run UPSTREAM=…")


def _reasons(counts: Mapping[str, int]) -> str:
    """A sum, and its parts where there are any."""
    parts = ", ".join(f"{reason} {count}" for reason, count in counts.items() if count)
    return f"{sum(counts.values())} ({parts})" if parts else "0"


def indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
