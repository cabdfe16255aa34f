"""`spool redrive` and `spool retry`: what is parked is offered again, what waits is offered now. Through the running
instance alone, because it is the one that delivers; where sidecars deliver together, any of them that runs does it, and
none has to run here.

A redrive says what became of each event where they are few, and counts them by reason where they are many. Exit codes:
0, everything went, or what did not is said; 1, an id or a reason is not parked, or nothing that was chosen could go; 2,
it could not be asked, or there is no such backend; 3, it is not done on all lanes of a fleet.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sidecar.cli.output import amount
from sidecar.cli.shared import EXIT_FAILED, EXIT_OK, EXIT_PART, EXIT_USAGE, CommandError
from sidecar.model.delivery import NO_CUSTOMER
from sidecar.settings import Settings

if TYPE_CHECKING:
    from sidecar.delivery.wishes import Asked

REDRIVE_S: Final = 600.0  # a million of them are sealed anew before the answer comes
RETRY_S: Final = 60.0  # twice what the holders of lanes are waited for

# What became of it -> how it is said of a number of events, with the reason for which they are parked.
_SAID: Final = {
    "offered": "offered",
    "skipped": "passed over: nothing is sent for them any more",
    "still_parked": "still parked: {reason}",
    "maybe_taken": "may have been taken ({reason}): --resend-unknown offers them, at the risk of doubles",
    "siblings_taken": "still parked: {reason} (they would take along what {backend} has: --resend-unknown)",
    "no_room": "still parked: {reason} (too much waits for another attempt: run it again later)",
    "not_configured": "still parked: {reason} (their backend is not in SIDECAR_BACKENDS)",
}
_WENT: Final = ("offered", "skipped")
# What to do about a reason that redriving alone does not mend.
_MENDS: Final = {NO_CUSTOMER: "name them under [subscribers.ID]"}


def redrive(arguments: argparse.Namespace, data_dir: Path) -> int:
    from sidecar.cli.instance import change

    request = {
        "backend": arguments.backend,
        "reason": arguments.reason,
        "ids": arguments.ids or None,
        "since_s": None if arguments.since is None else arguments.since.timestamp(),
        "resend_unknown": arguments.resend_unknown,
    }
    answer = change(data_dir, "/redrive", request, limit_s=REDRIVE_S)
    if answer is None:
        answer = _redriven_stopped(arguments.settings, request)
    nothing = not (answer["counts"] or answer["unskipped"] or answer["not_found"] or "lanes" in answer)
    if nothing and arguments.reason is not None:  # a word that is misspelt looks like one of which all is done
        where = "" if arguments.backend is None else f" at {arguments.backend}"
        raise CommandError(f"nothing is parked{where} with the reason {arguments.reason!r}: see `spool parked`")
    if answer["counts"] or answer["unskipped"] or "lanes" not in answer:
        print(summary(answer))
    for one in _each(answer):
        print(one)
    for missing in answer["not_found"]:
        known = missing["known"] or "not known: never recorded here, or older than the retention"
        print(f"{missing['id']}  not found among what is parked: {known}", file=sys.stderr)
    stays = any(one["became"] not in _WENT for one in answer["counts"])
    code = EXIT_FAILED if answer["not_found"] or (stays and not answer["redriven"]) else EXIT_OK
    left = left_over(answer)
    return code or left


def left_over(answer: dict[str, Any]) -> int:
    """Say of which lanes a change is not made; the exit code for that, 0 where there are none."""
    if "lanes" not in answer:
        return EXIT_OK
    for text in answer["lanes"]["texts"]:
        print(text, file=sys.stderr)
    return EXIT_PART


def _redriven_stopped(settings: Settings, request: dict[str, Any]) -> dict[str, Any]:
    """On the lanes, by who runs elsewhere. What is parked in the data directory itself needs its own instance."""
    from sidecar.cli.files import accounts_of
    from sidecar.delivery.wishes import redriven
    from sidecar.runtime.lanes import looked_up

    stopped = f"no instance is running on {settings.data_dir}: start it, then redrive"
    wish = {"do": "redrive", **request}
    asked = on_lanes(settings, wish, stopped)
    answers, texts = list(asked.answers), list(asked.said.get("texts", ()))
    with accounts_of(settings.data_dir) as accounts:
        if accounts is not None:
            would, answer = looked_up(wish, accounts)
            answers.append(answer)
            texts += [f"{stopped} what is parked there itself"] if would else []
    found = redriven(answers)
    return found | {"lanes": {**asked.said, "texts": texts}} if texts else found


def on_lanes(settings: Settings, wish: dict[str, Any], stopped: str) -> Asked:
    """Have a change made on the lanes, while no instance runs here. `stopped`: what is said where that is of no use."""
    from sidecar.delivery.rows import StateError
    from sidecar.runtime import backend_factory
    from sidecar.runtime.lanes import correct, url_of

    url, backend = url_of(settings), wish["backend"]
    if url is None or (backend is not None and backend in backend_factory.own(settings)):
        raise CommandError(stopped, EXIT_USAGE)
    try:
        if backend is not None and backend not in settings.backends:
            with backend_factory.accounts(settings) as accounts:
                if not any(backend == name for one in accounts for name, _ in one.parked_now()):
                    names = ", ".join(settings.backends) or "none"
                    said = f"{backend} is not one of the backends of this instance ({names})"
                    raise CommandError(said, EXIT_USAGE)
        return correct(url, wish)
    except StateError as error:
        raise CommandError(str(error), EXIT_USAGE) from None


def summary(answer: dict[str, Any]) -> str:
    """All of it in one sentence."""
    if all(one["became"] == "offered" for one in answer["counts"]):
        return f"{amount(answer['redriven'], 'event')} offered again"
    offered = sum(one["events"] for one in answer["counts"] if one["became"] == "offered")
    parts = [f"{offered:,} offered"]
    if answer["unskipped"]:
        parts.append(f"{amount(answer['unskipped'], 'skipped record')} offered")
    few = len(answer["each"]) == sum(one["events"] for one in answer["counts"])
    for one in answer["counts"]:
        if one["became"] == "offered":
            continue
        said = _SAID.get(one["became"], one["became"]).format(reason=one["reason"], backend="their backend")
        alike = [e for e in answer["each"] if (e["became"], e["reason"]) == (one["became"], one["reason"])]
        detail = alike[0]["detail"] if few and len(alike) == 1 else ""
        detail = detail or (_MENDS.get(one["reason"], "") if one["became"] == "still_parked" else "")
        parts.append(f"{one['events']:,} {said}{f' ({detail})' if detail else ''}")
    return ", ".join(parts)


def _each(answer: dict[str, Any]) -> list[str]:
    """What became of each, where all of them can be told."""
    each = answer["each"]
    if all(one["became"] == "offered" for one in each) or len(each) < sum(one["events"] for one in answer["counts"]):
        return []
    lines = []
    for one in each:
        said = one["became"].replace("_", " ")
        why = one["reason"] if one["became"] not in _WENT else ""
        lines.append("  ".join(filter(None, (one["backend"], one["event_id"], said, why, one["detail"]))))
    return lines


def retry(arguments: argparse.Namespace, data_dir: Path) -> int:
    from sidecar.cli.instance import change
    from sidecar.delivery.wishes import retried

    answer = change(data_dir, "/retry", {"backend": arguments.backend}, limit_s=RETRY_S)
    if answer is None:
        stopped = f"no instance is running on {data_dir}: nothing waits; a start begins without waits"
        asked = on_lanes(arguments.settings, {"do": "retry", "backend": arguments.backend}, stopped)
        answer = retried(asked.answers) | ({"lanes": asked.said} if asked.said else {})
    left = left_over(answer)
    if not answer["any"]:
        if not left:
            print(f"nothing waits at {arguments.backend}")
        return left or EXIT_FAILED
    was = f"was paused for {answer['paused_s']:.0f} s more" if answer["paused_s"] else f"was {answer['was']}"
    offered = amount(answer["requests"], "waiting request is", "waiting requests are")
    print(f"{arguments.backend} {was}; {offered} offered now")
    return left
