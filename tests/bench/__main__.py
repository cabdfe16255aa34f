"""`make bench`: the sidecar beside its peers, in one run, as CPU microseconds per call and per streamed chunk.

CPU time of all processes of a proxy (user + system), read when they are idle again, is divided by what it forwarded;
throughput and latency move with the machine's mood, CPU per call hardly does. The rounds are interleaved, so that a
slow minute hits all. The goals stand beside the figures at the end. Raw figures go to `results/` as JSON. Nothing here
is a test: no figure is asserted. A run of half a minute:

    make bench ARGS="--parts unary --peers envoy,buffered --cases 1 --rounds 1 --seconds 2"
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import endtoend  # noqa: E402
import goals  # noqa: E402
import latency as lat  # noqa: E402
import peers as p  # noqa: E402

BODY = '{"model":"gpt-5-mini","messages":[{"role":"user","content":"%s"}]}'
LUA = f"""wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer sk-bench"
wrk.body = '{BODY}'
"""
# No two heads are the same, as with real clients: who caches heads is not flattered.
UNIQUE_LUA = f"""local texts, calls, run = {{}}, 0, string.format("%08x", os.time())
for length = 1, 97 do texts[length] = string.format('{BODY}', string.rep("x", 130 + length)) end
function request()
  calls = calls + 1
  local id = string.format("%s%08x", run, calls)
  return wrk.format("POST", nil, {{
    ["Content-Type"] = "application/json", ["Authorization"] = "Bearer sk-bench",
    ["traceparent"] = "00-" .. id .. id .. "-" .. id .. "-01", ["Idempotency-Key"] = "call-" .. id,
  }}, texts[calls % 97 + 1])
end
"""

# As of an API that is no model's: each call to a target of its own, every other one with a body.
TARGETS_LUA = """local calls, run = 0, os.time() % 100000
function request()
  calls = calls + 1
  local target = string.format("/orders/%d%07d/items?page=%d", run, calls, calls % 50)
  if calls % 2 == 0 then return wrk.format("GET", target, {["Authorization"] = "Bearer key"}) end
  return wrk.format("POST", target, {
    ["Content-Type"] = "application/json", ["Authorization"] = "Bearer key",
  }, '{"name": "salt", "grams": 500}')
end
"""


def wrk(peer: p.Peer, path: str, *, seconds: int, connections: int, script: Path | None) -> dict[str, float]:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", f"http://127.0.0.1:{peer.port}{path}"]
    if script is not None:
        command[1:1] = ["-s", str(script)]
    before = peer.idle_cpu_s()
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cpu_s = peer.idle_cpu_s() - before
    calls = int(re.search(r"(\d+) requests in", out)[1])  # type: ignore[index]
    errors = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
    if errors or not calls:
        raise RuntimeError(f"{peer.name}: {out}")
    latency = {name: _ms(out, name) for name in ("50%", "99%")}
    return {
        "calls": calls,
        "us": cpu_s / calls * 1e6,
        "per_s": calls / seconds,
        "p50_ms": latency["50%"],
        "p99_ms": latency["99%"],
    }


def _ms(out: str, name: str) -> float:
    value, unit = re.search(rf"{name}\s+([\d.]+)(us|ms|s)", out).groups()  # type: ignore[union-attr]
    return float(value) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]


def streams(peer: p.Peer, *, count: int, rounds: int) -> dict[str, float]:
    before = peer.idle_cpu_s()
    command = [sys.executable, str(HERE / "streams.py"), "load", str(peer.port), str(count), str(rounds)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(out)
    return found | {"us": (peer.idle_cpu_s() - before) / found["chunks"] * 1e6}


def apart(peer: p.Peer, *, seconds: int) -> dict[str, float]:
    before = peer.idle_cpu_s()
    command = [sys.executable, str(HERE / "apart.py"), "load", str(peer.port), "32", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{peer.name}: {done.stderr}")
    calls = json.loads(done.stdout)["calls"]
    return {"calls": calls, "us": (peer.idle_cpu_s() - before) / calls * 1e6}


def open_streams(make: Callable[[Path, int], p.Peer], folder: Path, count: int) -> dict[str, float]:
    """Memory of all processes before load and with so many open streams, one worker (goal P5)."""
    port = p.free_port()
    command = [sys.executable, str(HERE / "streams.py"), "upstream", str(port), "100000", "20"]
    upstream = p.start("slow streams", command, port, folder)
    peer = make(folder, port)
    try:
        peer.idle_cpu_s()
        empty = peer.memory_bytes()
        holder = subprocess.Popen(
            [sys.executable, str(HERE / "streams.py"), "hold", str(peer.port), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout is not None
        line = holder.stdout.readline()
        opened = json.loads(line)["open"]
        time.sleep(2)
        full = peer.memory_bytes()
        holder.communicate("")
        return {
            "open": opened,
            "processes": len(peer.pids()),
            "before_mib": empty / 2**20,
            "kib_each": (full - empty) / opened / 1024,
        }
    finally:
        peer.stop()
        upstream.stop()


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and so do the peers
    files = _allow_files()
    raw: dict[str, object] = {"at": time.time(), "machine": platform.platform(), "python": platform.python_version()}
    makers: dict[str, Callable[[Path, int], p.Peer]] = {
        "nginx": p.nginx,
        "haproxy": p.haproxy,
        "envoy": p.envoy,
        "litellm": p.litellm,
        "buffered": p.sidecar("buffered"),
        "committed": p.sidecar("committed"),
        "buffered2": p.sidecar("buffered", 2),
        "down": p.sidecar("committed", down=True),
    }
    chosen = [name for name in makers if name in arguments.peers.split(",")]
    loaded = [name for name in chosen if name != "down"]  # at full load it has no time for a backend that is down
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sidecar-bench-")))
        script = folder / "post.lua"
        script.write_text(LUA % ("x" * 180))
        (folder / "unique.lua").write_text(UNIQUE_LUA)
        (folder / "targets.lua").write_text(TARGETS_LUA)
        if "unary" in arguments.parts:
            raw["unary"] = _unary(arguments, makers, loaded, folder, script)
        if "apart" in arguments.parts:
            raw["apart"] = _apart(arguments, makers, loaded, folder)
        if "streams" in arguments.parts:
            raw["streams"] = _streams(arguments, makers, loaded, folder)
        if "latency" in arguments.parts:
            raw["latency"] = _latency(arguments, makers, chosen, folder)
        if "open" in arguments.parts:
            most = (files - 256) // 2  # the sidecar needs two descriptors a stream
            if most < arguments.open:
                print(f"this machine allows {files} descriptors a process: {most} streams instead of {arguments.open}")
            found = open_streams(makers["committed"], folder, min(arguments.open, most))
            raw["open"] = found
            print(
                f"\nOpen streams: {found['open']}; {found['kib_each']:.1f} KiB each; before load "
                f"{found['before_mib']:.1f} MiB (PSS of {found['processes']:.0f} processes)"
            )
    if "delivery" in arguments.parts:
        raw["delivery"] = endtoend.measure(arguments.rounds, arguments.scale)
    print("\n" + goals.text(raw))
    target = HERE / "results"
    target.mkdir(exist_ok=True)
    path = target / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(raw, indent=1))
    print(f"\nraw figures: {path.relative_to(HERE.parent.parent)}")


def _started(
    stack: ExitStack, makers: dict[str, Callable[[Path, int], p.Peer]], chosen: list[str], folder: Path, port: int
) -> list[p.Peer]:
    running = []
    for name in chosen:
        try:
            peer = makers[name](folder, port)
        except FileNotFoundError as missing:
            print(f"not measured: {missing} is not installed")
            continue
        stack.callback(peer.stop)
        running.append(peer)
    return running


def _unary(
    arguments: argparse.Namespace,
    makers: dict[str, Callable[[Path, int], p.Peer]],
    chosen: list[str],
    folder: Path,
    script: Path,
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    cases: list[tuple[str, str, Path | None, int]] = [
        ("chat", "/v1/chat/completions", script, 32),
        ("chat, unique heads", "/v1/chat/completions", folder / "unique.lua", 32),
        ("chat, 1 connection", "/v1/chat/completions", script, 1),
    ]
    cases += [(f"GET {size}", f"/{size}", None, 32) for size in ("1k", "16k", "1m")]
    cases.append(("each target another", "/", folder / "targets.lua", 32))
    with ExitStack() as stack:
        upstream = p.nginx_upstream(folder)
        stack.callback(upstream.stop)
        running = _started(stack, makers, chosen, folder, upstream.port)
        for peer in running:  # warm: pools filled, code specialised
            wrk(peer, "/v1/chat/completions", seconds=8 if peer.name == "LiteLLM" else 1, connections=32, script=script)
        for title, path, lua, connections in cases[: arguments.cases]:
            table, latency = p.Table(title, "CPU µs per call"), p.Table(title, "p99 ms")
            for _ in range(arguments.rounds):
                for peer in running:
                    if peer.name == goals.LITELLM and "chat" not in title:
                        continue  # it serves models, and nothing else
                    found = wrk(peer, path, seconds=arguments.seconds, connections=connections, script=lua)
                    table.add(peer.name, found["us"])
                    latency.add(peer.name, found["p99_ms"])
                    rows.append({"case": title, "peer": peer.name, **found})
            print("\n" + table.text("Envoy"), flush=True)
    return rows


def _apart(
    arguments: argparse.Namespace, makers: dict[str, Callable[[Path, int], p.Peer]], chosen: list[str], folder: Path
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    hops = [name for name in chosen if name != "litellm"]  # it makes requests and responses of its own
    for kind in ("sized", "chunked", "gzip"):
        with ExitStack() as stack:
            port = p.free_port()
            command = [sys.executable, str(HERE / "apart.py"), "upstream", str(port), kind]
            stack.callback(p.start("apart", command, port, folder).stop)
            table = p.Table(f"chat, head and body apart, the response {kind}", "CPU µs per call")
            running = _started(stack, makers, hops, folder, port)
            for peer in running:
                apart(peer, seconds=1)
            for _ in range(arguments.rounds):
                for peer in running:
                    found = apart(peer, seconds=arguments.seconds)
                    table.add(peer.name, found["us"])
                    rows.append({"kind": kind, "peer": peer.name, **found})
            print("\n" + table.text("Envoy"), flush=True)
    return rows


def _streams(
    arguments: argparse.Namespace, makers: dict[str, Callable[[Path, int], p.Peer]], chosen: list[str], folder: Path
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with ExitStack() as stack:
        port = p.free_port()
        upstream = p.start("streams", [sys.executable, str(HERE / "streams.py"), "upstream", str(port)], port, folder)
        stack.callback(upstream.stop)
        table = p.Table("64 streams of 100 events", "CPU µs per chunk")
        running = _started(stack, makers, chosen, folder, port)
        for _ in range(arguments.rounds):
            for peer in running:
                found = streams(peer, count=64, rounds=8)
                table.add(peer.name, found["us"])
                rows.append({"peer": peer.name, **found})
        print("\n" + table.text("Envoy"), flush=True)
    return rows


def _latency(
    arguments: argparse.Namespace, makers: dict[str, Callable[[Path, int], p.Peer]], chosen: list[str], folder: Path
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    body = folder / "chat.json"
    body.write_text(BODY % ("x" * 180))
    tables = {share: p.Table(f"added at {lat.CALLS_PER_S} calls/s, p{share * 100:.0f}", "ms") for share in (0.5, 0.99)}
    with ExitStack() as stack:
        upstream = p.nginx_upstream(folder)
        stack.callback(upstream.stop)
        running = _started(stack, makers, chosen, folder, upstream.port)
        try:
            for peer in running:
                lat.load(peer.port, body, folder, seconds=1)
            for _ in range(arguments.rounds):
                direct = lat.load(upstream.port, body, folder, seconds=arguments.seconds)
                for peer in running:
                    took = lat.load(peer.port, body, folder, seconds=arguments.seconds)
                    for share, table in tables.items():
                        direct_ms = lat.quantile(direct, share)
                        added = lat.quantile(took, share) - direct_ms
                        table.add(peer.name, added)
                        rows.append({"peer": peer.name, "share": share, "added_ms": added, "ms": added + direct_ms})
        except FileNotFoundError as missing:
            print(f"not measured: {missing} is not installed")
            return rows
        for table in tables.values():
            print("\n" + table.text("Envoy", places=3), flush=True)
    return rows


def _allow_files() -> int:
    """Take all the descriptors that there may be, here and in every child; root may go beyond the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (65_536, max(65_536, hard)))
    except (ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--seconds", type=int, default=4, help="length of one measurement (default 4)")
    parser.add_argument("--cases", type=int, default=7, help="how many of the unary cases (default all 7)")
    parser.add_argument("--open", type=int, default=10_000, help="open streams for the memory figure (default 10000)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the records of `delivery` (default 1)")
    parser.add_argument("--parts", default="unary,apart,streams,latency,open,delivery")
    parser.add_argument(
        "--peers",
        default="nginx,haproxy,envoy,litellm,buffered,committed,buffered2,down",
        help="`down`: committed, with a backend that takes nothing",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
