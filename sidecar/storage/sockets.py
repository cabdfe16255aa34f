"""Sockets that listen: what is said when they cannot, and Unix sockets in a directory whose path may be long.

A Unix socket's address takes about a hundred bytes; a data directory's path may be longer. The kernel is then
given the directory through a descriptor (`/proc/self/fd/N/NAME`), which is short. Nobody but the owner can ever connect
to what `listen_privately` makes: the mode is set before anybody can be let in.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sidecar.settings import Address

CONTROL: Final = "control.sock"  # in the data directory: what changes something goes over it
PATH_BYTES_MAX: Final = 103  # of an address: Linux has 108, macOS 104, the last one is zero
OWN_DESCRIPTORS: Final = Path("/proc/self/fd")
BACKLOG: Final = 16  # commands that wait: somebody types them
# For `loop.create_unix_server`: from Python 3.13 on it removes the socket's file with its server by itself, also where
# another process listens on that socket still (https://docs.python.org/3/library/asyncio-eventloop.html).
FILE_STAYS: Final[Mapping[str, Any]] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
_SOL_LOCAL: Final = 0  # macOS, sys/un.h: LOCAL_PEERCRED is asked of this level
_LOCAL_PEERCRED: Final = 1
_XUCRED_BYTES: Final = 76  # version, uid, then a number of groups
_ATTACH_FILTER: Final = 26  # Linux, asm-generic/socket.h: SO_ATTACH_FILTER and SO_DETACH_FILTER
_DETACH_FILTER: Final = 27
# Classic BPF over the TCP header; its 14th byte holds the flags. What has SYN and not ACK is dropped, all else passes.
_NO_SYN: Final = (
    (0x30, 0, 0, 13),  # load that byte
    (0x54, 0, 0, 0x12),  # of it SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone?
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # pass
)


log = logging.getLogger(__name__)


class SocketError(OSError):
    """The socket cannot be made or reached. The text says why, and what to do about it."""


@contextlib.contextmanager
def listening(address: Address, setting: str) -> Iterator[None]:
    """Around the opening of a port: removes a socket file that was left behind, and turns what goes wrong into a
    `SocketError` that names the address and the setting."""
    try:
        if address.path is not None:
            _remove_leftover(Path(address.path))
        yield
    except SocketError as error:
        raise SocketError(f"{error}; or set {setting}") from None
    except OSError as error:
        raise SocketError(f"{_why(error, address)}; set {setting}") from None


def _remove_leftover(path: Path) -> None:
    """One that nobody listens on any more goes; that of another program stays, and so does anything else."""
    if not path.exists() and not path.is_symlink():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise SocketError(f"unix:{path} is there and is no socket: move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        trial.setblocking(False)
        try:
            trial.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:  # its queue is full: it is very much alive
            pass
    raise SocketError(f"unix:{path} is in use by another program: stop it")


def _why(error: OSError, address: Address) -> str:
    number = error.errno
    if isinstance(error, socket.gaierror):
        return f"{address}: {address.host} is no address and no name that this machine knows"
    if number == errno.EADDRINUSE:
        return f"{address} is in use by another program"
    if number == errno.EADDRNOTAVAIL:
        return f"{address} is no address of this machine"
    if number in (errno.EACCES, errno.EPERM):
        if address.path is None and 0 < address.port < 1024:
            return f"{address}: user {os.geteuid()} may not use a port below 1024"
        return f"{address} may not be used by user {os.geteuid()}"
    if address.path is not None and number in (errno.ENOENT, errno.ENOTDIR):
        return f"{address}: there is no directory {Path(address.path).parent}"
    if number == errno.EAFNOSUPPORT:
        return f"{address}: this machine has no such kind of address"
    return f"cannot listen on {address}: {os.strerror(number) if number else error}"


def for_both_families(host: str | None, port: int) -> socket.socket | None:
    """For `::` a socket, bound and not listening, that takes IPv4 as well; asyncio and the system's default may leave
    that out. None for every other address, and where there is no such socket. Raises `OSError`."""
    if host is None or host.strip("[]") != "::" or not socket.has_dualstack_ipv6():
        return None
    sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
    except BaseException:
        sock.close()
        raise
    return sock


def hold_new(fd: int, held: bool) -> bool:
    """While held, the kernel drops the first packet of each new connection to this listening socket, whose client sends
    it again after a second; connections that are under way are made. So the queue of those that wait to be accepted can
    be emptied and the socket closed, and none is cut off in between. False: only Linux's TCP sockets can do that."""
    if sys.platform != "linux":
        return False
    program = b"".join(struct.pack("HBBI", *step) for step in _NO_SYN)
    buffer = ctypes.create_string_buffer(program)
    argument = struct.pack("HP", len(_NO_SYN), ctypes.addressof(buffer))
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                return False
            if held:
                sock.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, argument)
            else:
                sock.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)
    except OSError:  # a system that only looks like Linux
        return False
    return True


def listen_privately(path: Path) -> socket.socket:
    """A socket at this path that only its owner can connect to. One left by a process that is gone is replaced.

    Who calls this holds the directory alone. Raises `SocketError`.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(OSError):
            os.fchmod(listener.fileno(), 0o600)  # Linux makes the file with the mode of the socket
        with _short(path) as address:
            remove(path)
            listener.bind(address)
        # Elsewhere it was made with the umask's; until `listen` nobody gets in all the same.
        path.chmod(0o600)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno is not None and path.exists() and not is_socket(path):
            raise SocketError(f"{path} is there and is no socket: move it away") from None
        raise SocketError(f"{path} cannot be made: {error.strerror or error}") from None
    return listener


def connect(path: Path, *, timeout_s: float) -> socket.socket:
    """A connection to the socket at this path. Raises `OSError`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        with _short(path) as address:
            sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def remove(path: Path) -> None:
    """A socket file goes; what is anything else stays. Raises `OSError`."""
    if is_socket(path):
        path.unlink(missing_ok=True)


def is_socket(path: Path) -> bool:
    """Not through a symbolic link: what that names is somebody else's."""
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False


def peer_uid(fd: int) -> int | None:
    """The user at the other end of a Unix socket, as the kernel says; None where it does not say."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            if hasattr(socket, "SO_PEERCRED"):
                return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])
            return int(struct.unpack_from("2I", sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED_BYTES))[1])
    except (OSError, struct.error):
        return None


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """An address of the kernel's length for this path."""
    if len(os.fsencode(path)) <= PATH_BYTES_MAX:
        yield str(path)
        return
    if not OWN_DESCRIPTORS.is_dir():
        raise SocketError(f"its path is longer than {PATH_BYTES_MAX} bytes; set SIDECAR_DATA_DIR to a shorter one")
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"{OWN_DESCRIPTORS}/{fd}/{path.name}"
    finally:
        os.close(fd)


class _HangUp(asyncio.Protocol):
    """In the place of a protocol that could not be made."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def accepting(make: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
    """What a listener is to be given instead of `make`: where that raises, one connection is closed. libuv would take
    no further one at this listener, ever: it waits for the one at hand to be accepted (`uv__server_io`)."""

    def accept() -> asyncio.Protocol:
        try:
            return make()
        except Exception:
            log.exception("a connection could not be taken, and is closed")
            return _HangUp()

    return accept
