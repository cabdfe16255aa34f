"""What a slot holds when it is opened again: totals, open intents, origins, and files that need care.

Of sealed segments that are not the newest only the first and last bytes are read, because every segment begins by
restating what is open and all totals. So a million pending records cost no time and no memory here. A file that is not
what was written is replaced by what can be read of it (`repair`), and the service starts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sidecar.spool import files, last_words
from sidecar.spool.repair import remove_drafts, repair
from sidecar.spool.segment import (
    BEGINS,
    SEALS,
    CommitMark,
    Confirmed,
    Frame,
    Hole,
    Segment,
    SegmentFile,
)
from sidecar.spool.types import ORIGINS_KEPT, intent_id
from sidecar.storage.files import said_by

log = logging.getLogger("sidecar.spool")

# After a loss of unknown size, numbering goes on beyond anything that may have been given: a segment of 64 MiB holds
# some 250,000 of the smallest records. A number given twice would be passed over by delivery.
NUMBERS_SKIPPED: Final = 1_000_000


@dataclass(slots=True)
class Position:
    """Where the writer stands: what is on disk, cumulative."""

    instance: str
    segment_number: int = 0  # the highest in use
    commit_number: int = 0
    last_seq: int = 0
    admitted: int = 0
    recorded: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    open_intents: dict[str, bytes] = field(default_factory=dict)
    origins: dict[bytes, int] = field(default_factory=dict)  # the last frame of each source, least recently heard first

    def note_origins(self, origins: Iterable[tuple[bytes, int]]) -> None:
        for source, number in origins:
            self.origins[source] = max(self.origins.pop(source, 0), number)
        while len(self.origins) > ORIGINS_KEPT:
            del self.origins[next(iter(self.origins))]

    def fold(self, frame: Frame) -> None:
        """What a commit changes."""
        self.commit_number = frame.commit_number
        self.last_seq, self.admitted, self.recorded = frame.last_seq, frame.admitted, frame.recorded
        self.lost = frame.lost
        if frame.flags & BEGINS:
            self.open_intents, self.origins = {}, {}
        for line in frame.intents:
            try:
                self.open_intents[intent_id(line)] = line
            except ValueError as error:
                log.error("an intent cannot be read and is passed over: %s", said_by(error))
        for id_ in frame.closes:
            self.open_intents.pop(id_, None)
        self.note_origins(frame.origins)


@dataclass(slots=True)
class Recovered:
    """A slot, ready to be continued in a new segment."""

    position: Position
    to_seal: list[Segment] = field(default_factory=list)  # left by a crash; sealed off the writer thread
    set_aside: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)  # segments without records: may go once a new one has begun
    noted: bool = False  # the last life left word of what it could not write: to be forgotten once that is committed
    stopped: int = 0  # how many calls that adds to what is lost
    clean: bool = True  # nothing is open and nothing is to be mended: the slot can stay as it is


@dataclass(slots=True)
class _Survey:
    """What one file is."""

    path: Path
    number: int
    sealed: bool = False
    first: Frame | None = None
    last: Frame | None = None  # the last commit; the seal is none
    begins: bool = False  # restates what is open
    damaged: str | None = None
    unsure: bool = False  # what it ended with is not known
    torn: bool = False


def recover(root: Path, instance: str, *, remembered_seq: int = 0) -> Recovered:
    """Look at a slot whose lock is held. `remembered_seq`: the greatest number that delivery knows of it."""
    slot = files.slot_dir(root, instance)
    numbers = files.segment_numbers(slot)
    remove_drafts(slot)
    mark = CommitMark.read(slot)
    found = Recovered(Position(instance))
    at = found.position
    at.segment_number = max([*numbers, 0 if mark is None else mark.segment])
    surveys: list[_Survey] = []  # newest first
    known = False  # the newest that was begun, and what it says of open calls
    for number in reversed(numbers):
        survey = _survey(files.segment_path(slot, number), number, thorough=not known)
        surveys.append(survey)
        known = known or survey.begins
    _fold(surveys, at)
    newest = next((survey.number for survey in surveys if survey.last is not None), 0)
    lost = mark is not None and mark.commit_number > at.commit_number
    if lost and mark is not None:
        for survey in surveys:
            if survey.number == mark.segment and survey.damaged is None:
                survey.damaged = f"{survey.path} has lost its end"
    at_the_end = [survey for survey in surveys if survey.number >= newest and survey.damaged is not None]
    unsure = lost or any(survey.unsure for survey in at_the_end)
    bound: int | None = None  # commits from here on stand in a later segment
    for survey in surveys:
        _care_for(root, instance, survey, bound, found)
        if survey.first is not None:
            bound = survey.first.commit_number
    if lost and mark is not None:
        _take_mark(at, mark)
    if unsure or at_the_end:
        # A commit that cannot be read had counted its calls as a whole: those that are gone without a trace are in no
        # term, as after any crash.
        at.admitted = at.recorded + len(at.open_intents) + sum(at.lost.values())
    _skip_numbers(at, remembered_seq, unsure)
    _add_last_words(slot, found)
    found.clean = not (found.to_seal or found.set_aside or at.open_intents or found.noted or unsure)
    return found


def _survey(path: Path, number: int, *, thorough: bool) -> _Survey:
    """Look into a file; `thorough`: at every frame, also where it is sealed. Raises `SpoolError` for a newer format."""
    survey = _Survey(path, number)
    with SegmentFile(path) as file:
        seal = file.seal()
        survey.sealed = seal is not None
        holes = 0
        for item in file.frames():
            if isinstance(item, Hole):
                holes += 1
                if not item.torn:
                    survey.damaged = f"{path} is damaged at byte {item.offset}"
                    # Whether more commits stood there than the next frame tells of is known only where one follows.
                    survey.unsure = True
                elif survey.sealed:
                    survey.damaged, survey.unsure = f"{path} is damaged at byte {item.offset}", True
                survey.torn = item.torn
                continue
            survey.unsure = False
            if item.flags & SEALS:
                continue
            if survey.first is None:
                survey.first, survey.begins = item, bool(item.flags & BEGINS)
            survey.last = item
            if survey.sealed and not thorough:
                break  # the first frame and the last are whole: that is all that is needed of it here
        if file.damaged is not None and (survey.first is not None or holes):
            survey.damaged = survey.damaged or file.damaged
        if survey.sealed and survey.first is None:
            survey.damaged, survey.unsure = f"{path} is sealed and holds nothing that can be read", True
    return survey


def _fold(surveys: list[_Survey], at: Position) -> None:
    """Totals and what is open, from the newest segment that restates it on."""
    wanted: list[_Survey] = []
    for survey in surveys:
        wanted.append(survey)
        if survey.begins:
            break
    for survey in reversed(wanted):
        with SegmentFile(survey.path) as file:
            for item in file.frames():
                # What a seal says counts as well: the commit before it may be what cannot be read.
                if isinstance(item, Frame) and (item.commit_number >= at.commit_number or item.flags & BEGINS):
                    at.fold(item)


def _care_for(root: Path, instance: str, survey: _Survey, bound: int | None, found: Recovered) -> None:
    """Bring one file into order."""
    path, number = survey.path, survey.number
    if survey.damaged is not None:
        log.error("a segment is damaged: %s", survey.damaged)
        upto = None if bound is None else bound - 1
        done = repair(root, instance, path, number, upto=upto)
        found.set_aside.append(done.set_aside)
        facts = {"set_aside": str(done.set_aside), "records_salvaged": done.records}
        log.error("a damaged segment was set aside", extra={"facts": facts})
    elif survey.first is None:  # made ahead and never used, or its making or its first commit was interrupted
        path.unlink()
    elif survey.last is not None and survey.last.recorded == survey.first.before:
        if bound is None or not survey.sealed:
            found.empty.append(path)
    elif not survey.sealed and survey.last is not None:
        last: Frame | None = survey.last
        if bound is not None and survey.last.commit_number >= bound:
            last = _last_below(path, bound)
        if last is None:
            path.unlink()
        else:
            found.to_seal.append(Segment.reopen(path, number, last.salt, last))


def _last_below(path: Path, bound: int) -> Frame | None:
    """The last commit before one that was written again in the next segment."""
    last = None
    with SegmentFile(path) as file:
        for item in file.frames():
            if isinstance(item, Frame):
                if item.commit_number >= bound:
                    break
                last = item
    return last


def _take_mark(at: Position, mark: Confirmed) -> None:
    """Commits are gone that were on disk: what they recorded is missing, and known to have been recorded."""
    gone = mark.recorded - at.recorded
    log.error("the spool lost commits", extra={"facts": {"instance": at.instance, "records": max(gone, 0)}})
    at.commit_number = mark.commit_number
    at.last_seq = max(at.last_seq, mark.last_seq)
    at.recorded = max(at.recorded, mark.recorded)


def _skip_numbers(at: Position, remembered_seq: int, unsure: bool) -> None:
    if remembered_seq > at.last_seq:
        # Delivered, and no longer here: they were recorded. Readers see the hole as `missing`.
        gone = remembered_seq - at.last_seq
        log.error(
            "the spool lost records that delivery had seen", extra={"facts": {"instance": at.instance, "records": gone}}
        )
        at.last_seq = remembered_seq
        at.admitted += gone
        at.recorded += gone
        unsure = True
    if unsure:
        at.last_seq += NUMBERS_SKIPPED


def _add_last_words(slot: Path, found: Recovered) -> None:
    """What the last life lost at its end."""
    note = last_words.read(slot)
    if note is None:
        return
    at = found.position
    before = sum(at.lost.values())
    at.admitted, at.lost = last_words.add(
        note, admitted=at.admitted, recorded=at.recorded, open_calls=len(at.open_intents), lost=at.lost
    )
    found.noted, found.stopped = True, sum(at.lost.values()) - before
