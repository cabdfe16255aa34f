"""Names that nobody looks up for a minute hold nothing up but the calls that need them."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from support.whole import Whole, running_receiver

LIMIT_S = 30.0
# `….hangs` is not found until the file DIR/go is there, and says in DIR that it is asked for; `….here` is this machine.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int ends(const char *name, const char *end) {
  size_t n = strlen(name), e = strlen(end);
  return n >= e && strcmp(name + n - e, end) == 0;
}

int getaddrinfo(const char *name, const char *port, const struct addrinfo *hints, struct addrinfo **found) {
  int (*real)() = (int (*)())dlsym(RTLD_NEXT, "getaddrinfo");
  char path[4096];
  if (name && ends(name, ".hangs")) {
    snprintf(path, sizeof path, "%s/%s", getenv("NAMES"), name);
    close(open(path, O_CREAT | O_WRONLY, 0600));
    snprintf(path, sizeof path, "%s/go", getenv("NAMES"));
    while (access(path, F_OK) != 0) usleep(10000);
    return EAI_AGAIN;
  }
  return real(name && ends(name, ".here") ? "127.0.0.1" : name, port, hints, found);
}
"""


async def until_asked_for(tmp_path: Path, *names: str) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not all((tmp_path / "names" / f"{name}.hangs").exists() for name in names):
            await asyncio.sleep(0.01)


@pytest.fixture
def shim(tmp_path: Path) -> dict[str, str]:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux, for a library that stands in for getaddrinfo")
    names = tmp_path / "names"
    names.mkdir()
    (tmp_path / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", "shim.so", "shim.c", "-ldl"], cwd=tmp_path, check=True)
    return {"LD_PRELOAD": str(tmp_path / "shim.so"), "NAMES": str(names)}


async def test_names_that_hang_hold_up_no_other_call_no_other_backend_and_no_stop(
    tmp_path: Path, shim: dict[str, str]
) -> None:
    async with running_receiver() as (_, url):
        port = url.rpartition(":")[2]
        whole = Whole(
            tmp_path / "data",
            f"http://upstream.here:{port}",
            **shim,
            SIDECAR_UPSTREAMS=",".join(f"/{name}=http://{name}.hangs:9" for name in "abcd"),
            SIDECAR_UPSTREAM_CONNECT_TIMEOUT_S="2",
            SIDECAR_BACKENDS="webhook,meter,revenium,flexprice,lago",
            SIDECAR_SUBSCRIBER="header:x-tenant",
            SIDECAR_WEBHOOK_URL=f"http://webhook.here:{port}/webhook",
            SIDECAR_METER_URL="http://meter.hangs:9",
            SIDECAR_REVENIUM_URL="http://revenium.hangs:9",
            SIDECAR_REVENIUM_API_KEY="k",
            SIDECAR_FLEXPRICE_URL="http://flexprice.hangs:9",
            SIDECAR_FLEXPRICE_API_KEY="k",
            SIDECAR_LAGO_URL="http://lago.hangs:9",
            SIDECAR_LAGO_API_KEY="k",
        )
        async with whole, aiohttp.ClientSession(headers={"x-tenant": "acme"}) as session:

            async def get(path: str) -> int:
                async with session.get(whole.proxy_url + path) as answer:
                    await answer.read()
                    return answer.status

            hanging = [asyncio.ensure_future(get(f"/{name}/x")) for name in "abcd"]
            await until_asked_for(tmp_path, *"abcd")
            assert await get("/_received") == 200, "its name is found while others are not"
            assert await asyncio.gather(*hanging) == [504] * 4
            await until_asked_for(tmp_path, "meter", "revenium", "flexprice", "lago")
            async with asyncio.timeout(LIMIT_S):
                while (await whole.get("/balance"))["backends"]["webhook"]["delivered"] < 5:
                    await asyncio.sleep(0.05)
            assert await whole.stop() == 0  # within the limit of `Whole`: nobody ever lets the names go
        (tmp_path / "names" / "go").touch()


async def test_check_says_of_a_name_that_hangs_that_it_does_and_ends(tmp_path: Path, shim: dict[str, str]) -> None:
    whole = Whole(tmp_path / "data", "http://upstream.hangs:9", **shim)
    async with asyncio.timeout(LIMIT_S):  # nobody ever lets the name go
        code, out, _ = await whole.command("check", "--connect")
    assert code == 1
    assert "timeout: no connection within" in out


async def test_a_stop_does_not_wait_for_the_name_of_a_nats_server(tmp_path: Path, shim: dict[str, str]) -> None:
    pytest.importorskip("nats")
    async with running_receiver() as (_, url):
        whole = Whole(
            tmp_path / "data",
            url,
            **shim,
            SIDECAR_BACKENDS="nats",
            SIDECAR_NATS_URL="nats://server.hangs:4222",
            SIDECAR_NATS_STREAM="METERING",
        )
        async with whole, aiohttp.ClientSession() as session:
            async with session.get(whole.proxy_url + "/_received") as answer:
                assert answer.status == 200
            await until_asked_for(tmp_path, "server")
            assert await whole.stop() == 0, "else it had to be killed by its supervisor"
