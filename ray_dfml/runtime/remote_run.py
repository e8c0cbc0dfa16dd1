"""A run whose folder is in an object store: the work is done in a folder of this machine, whose versions are published.

The folder lies in the cache, under a name that derives from the URI. A run that goes on, on any machine, begins with
the version that was published last. Only the ledger of questions is never published: it must be on a disk, and what it
has counted must not be lost, so a run that asks services goes on where its ledger is.
"""

import hashlib
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from ray_dfml import published
from ray_dfml.data import cache
from ray_dfml.errors import DfmlError, ResourceError, UsageError
from ray_dfml.files import Uri, shown
from ray_dfml.published import Publisher
from ray_dfml.runtime import locks
from ray_dfml.runtime.accounts import LEDGER
from ray_dfml.runtime.owner import Owner

KEEP_DAYS = 7
"""How long the folder stays of a run that was killed here and has gone on nowhere, or elsewhere."""

PATIENCE = 120.0
"""How many seconds a store may refuse to take a round before the run ends."""


class Remote:
    """Publishes the folder of one run. The process owns the run."""

    def __init__(self, folder: Path, publisher: Publisher) -> None:
        self.uri, self.folder = publisher.uri, folder
        self._publisher = publisher

    def publish(self) -> None:
        """Publish the folder as it is now, and try again for PATIENCE seconds if the store refuses.

        Raises ResourceError if it still does, or if the run belongs to another process now.
        """
        tries = Retrying(
            retry=retry_if_exception(_may_pass), stop=stop_after_delay(PATIENCE),
            wait=wait_exponential(max=15), before_sleep=self._say, reraise=True,
        )  # fmt: skip
        try:
            tries(self._publisher.publish)
        except OSError as error:
            raise ResourceError(
                f"{self.uri}: cannot be written: {error.strerror or error}; the rounds before are there, go on with "
                "--resume"
            ) from None

    def publish_once(self) -> bool:
        """Publish the folder if the store takes it. If not, a line on the terminal says so. Returns whether it did."""
        try:
            self._publisher.publish()
        except (OSError, DfmlError) as error:
            _note(f"{self.uri}: what is in {self.folder} could not be published: {error}")
            return False
        return True

    def _say(self, state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            _note(f"{self.uri}: {state.outcome.exception()}; trying again for {PATIENCE:g} s")


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and not isinstance(error, PermissionError | FileNotFoundError)


def _note(line: str) -> None:
    print(shown(line), file=sys.stderr, flush=True)


def scratch(uri: Uri) -> Path:
    """The folder of this machine in which a run is done."""
    return cache.folder() / "runs" / hashlib.sha256(uri.encode()).hexdigest()[:16] / uri.name


@contextmanager
def working(place: Path | Uri, *, new: bool) -> Iterator[tuple[Path, Remote | None]]:
    """The folder in which a run is done, and what publishes it; None for a run on a disk, whose folder is `place`.

    For a URI this process becomes the owner of the run, and the folder holds the version that was published last, or
    nothing with `new`. At the end, also after an error, the folder is published once more if it is not, and the run may
    belong to others. The folder is then cleared, but for a ledger; what the store refused stays. Raises UsageError if
    there is a run already with `new`, or none without; or if another process writes it; and ResourceError if the store
    does not answer.
    """
    if isinstance(place, Path):
        yield place, None
        return
    folder = scratch(place)
    with _alone(place, folder), _owning(place) as owner:
        try:
            if new and published.current(place) is not None:
                raise UsageError(
                    f"{place}: exists already; add --resume to continue that run, or choose another --run-dir"
                )
            _clear_others(folder)
            _clear(folder, ledger=new)
        except OSError as error:
            raise ResourceError(f"{place}: cannot be read: {error.strerror or error}") from None
        kept = False
        try:
            remote = _fetched(place, folder, owner, new=new)
            try:
                yield folder, remote
            except BaseException:
                kept = folder.is_dir() and any(folder.iterdir())
                kept = kept and not remote.publish_once()  # if that is interrupted, the folder stays
                raise
        finally:
            if not kept:
                _clear(folder)


def _fetched(place: Uri, folder: Path, owner: Owner, *, new: bool) -> Remote:
    """Bring the newest version to the folder, unless the run is new. Returns what publishes it."""
    try:
        version = None if new else published.fetch(place, folder)
        return Remote(folder, Publisher(place, folder, version, owner.check))
    except OSError as error:
        raise ResourceError(f"{place}: cannot be read: {error.strerror or error}") from None


@contextmanager
def _alone(uri: Uri, folder: Path) -> Iterator[None]:
    """Keep other processes away from a folder, also those that take this one for dead while it is only stopped."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = locks.hold(folder.with_name(".lock"), f"{uri}: another process is at work on this run in {folder}")
    except OSError as error:
        raise ResourceError(f"{folder.parent}: cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _owning(uri: Uri) -> Iterator[Owner]:
    owner = Owner.claim(uri, _note)
    try:
        yield owner
    finally:
        owner.release()


def check_ledger(folder: Path, began_at: object) -> None:
    """Raise UsageError unless the ledger of a run that asks services is in its folder on this machine.

    `began_at` says where the run began.
    """
    if not (folder / LEDGER).exists():
        raise UsageError(
            f"this run asks services, and its {LEDGER} is where it began ({began_at}): go on there, or copy the file "
            f"from there to {folder}; without it what was paid for would be asked and counted again"
        )


def _clear_others(folder: Path) -> None:
    """Clear the folders beside one that nobody has worked in for KEEP_DAYS. Ledgers stay."""
    for path in folder.parent.parent.glob("*/*"):
        if not path.is_dir() or path == folder or _idle_seconds(path) < KEEP_DAYS * 86_400:
            continue
        lock = filelock.FileLock(path.with_name(".lock"), timeout=0)
        with suppress(OSError, filelock.Timeout), lock:
            _clear(path)


def _idle_seconds(folder: Path) -> float:
    """How long ago something in a folder was changed last; 0 if that cannot be told, as while another one writes."""
    try:
        return time.time() - max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return 0.0


def _clear(folder: Path, *, ledger: bool = False) -> None:
    """Empty a folder, but for a ledger unless it is to go too, and remove it if it is then empty."""
    left = False
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif ledger or not path.name.startswith(LEDGER):
            path.unlink()
        else:
            left = True
    if folder.is_dir() and not left:
        folder.rmdir()
