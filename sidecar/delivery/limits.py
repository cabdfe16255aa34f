"""Every number of delivery in one place, so that each has a name, a unit and an origin. Tests make them small."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What delivery keeps to, with where each number is from."""

    backoff_base_s: float = 1.0  # mean first wait 0.5 s: a restart of a backend is over within a few of them
    backoff_cap_s: float = 3600.0  # an hour: what comes back is then noticed by a probe, not by a retry
    retry_after_cap_s: float = 900.0  # a quarter of an hour: a balancer that says a day is back long before
    window_margin_s: float = 3600.0  # windows end an hour early: clocks of two houses, and work under way
    window_warning_s: float = 21_600.0  # six hours before: time for an operator to look
    clock_step_s: float = 60.0  # what the wall clock may differ from the monotonic one before it has stepped
    down_after: int = 5  # requests failed in a row with nothing taken: the backend is down, one probe at a time
    probe_soon_s: float = 4.0  # a recovery is noticed within 5 s at first: a second is left for the probe itself
    probe_soon_for_s: float = 600.0  # how long "at first" is: most restarts and roll-outs are over by then
    down_cap_s: float = 25.0  # and within 30 s later
    blocked_base_s: float = 15.0  # an operator has to act; but a maintenance page is a block too, and ends by itself
    blocked_cap_s: float = 25.0
    suspect_after: int = 20  # the same refusal of whole requests in a row: more likely our setting than the records
    alone_after: int = 6  # a request came to nothing so often while others were taken: a minute or two of its own waits
    window_requests: int = 64  # sealed requests that wait for a free slot or are under way
    retry_records: int = 10_000  # the set that waits for another attempt: with its bytes on disk some 10 MB
    retry_bytes: int = 64 << 20
    encode_records: int = 100  # one slice of the event loop: about 1 ms
    parse_records: int = 40  # one slice of reading lines: about 0.5 ms
    read_bytes: int = 512 << 10  # of lines in one look at a spool: some 550 records
    sum_records: int = 500  # added at once by a backend that keeps sums and no lines
    sum_lines: int = 100  # parsed for that in one slice of the event loop: about 0.6 ms
    sum_groups: int = 200  # kinds of calls whose sums are made at once: some 2 ms of the event loop
    sums_kept: int = 512  # batches whose sums were handed over and wait to be added; more are read from the spool
    sums_records: int = 50_000  # of those, added at once: their sums are made, so that it is one short transaction
    sums_bytes: int = 8 << 20  # of lines handed over with their sums, where a backend keeps them; others are read
    lines_records: int = 5_000  # added at once where their lines go along: some 4 MiB, and 0.1 s of others' waiting
    lines_read_records: int = 5_000  # the same from the spool: with the next ones some 9 MiB
    sums_linger_s: float = 0.5  # between two such: each costs two syncs, whatever is in it
    tail_bytes: int = 2 << 20  # of lines kept for the other backends; parsed they take three times that
    tail_pieces: int = 64  # of one instance: a piece is a look, or a commit that was handed over
    linger_s: float = 0.1  # between two looks into a spool that was read to its end: batches fill up meanwhile
    gather_s: float = 0.01  # the same where one event is a request: a look for each commit would cost the proxy
    send_limit_s: float = 600.0  # a backend has its own time limits; this one frees the slot when they fail
    sweep_s: float = 60.0  # how often windows, ages and the clock are looked at while nothing happens
    history_entries: int = 20  # attempts remembered with a request: the first, and the last of them
