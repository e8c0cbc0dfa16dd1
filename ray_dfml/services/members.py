"""Services as members of a pool: each is asked one image of noise before it enters, and on request later."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ray_dfml.data.manifest import Entry, checked
from ray_dfml.data.pool import Pool, percent, size_of
from ray_dfml.data.services import Asked
from ray_dfml.errors import DfmlError, ResourceError, UsageError
from ray_dfml.files import resolved
from ray_dfml.services.ledger import Ledger
from ray_dfml.services.probe import Probed, probe
from ray_dfml.types import Access, Spent

LEDGER = ".probes.sqlite"
"""The ledger of the probes, in the folder of a pool."""


class Joined(NamedTuple):
    """The id of a service that `add_service` added, what the probe cost, and what it assumed."""

    id: str
    spent: Spent
    notes: list[str]


def add_service(
    pool: Pool,
    api: Mapping[str, Any],
    *,
    id: str | None = None,
    access: Access,
    input: str,
    classes: Sequence[str],
    accuracy: float | None = None,
    source: str = "",
    authorization: str,
    terms: Mapping[str, Any],
) -> Joined:
    """Add a prediction service to a pool, after one probe, which is charged.

    `api` and `terms` are the fields of `data.services.Api` and `Terms`. `id` is by default the model's name, `input` is
    `CHANNELSxHEIGHTxWIDTH`, and `accuracy` is in percent. Nothing is sent for arguments that cannot hold. Raises
    UsageError for these, and RejectedError for a service that cannot be reached or does not answer as the entry says.
    """
    channels, height, width = size_of(input)
    if not authorization.strip():
        raise UsageError("authorization: say who permits to query the service, such as --authorization 'J. Doe, owner'")
    entry = checked({
        "id": id or str(api.get("model") or ""),
        "access": access,
        "api": dict(api),
        "input": {"channels": channels, "height": height, "width": width},
        "classes": list(classes),
        "accuracy": percent(accuracy),
        "source": source,
        "authorization": authorization,
        **terms,
    })  # fmt: skip
    pool.check_free(entry.id)
    found = _probe(pool, entry)
    pool.add_entry(entry.model_copy(update={"api": found.api}))
    return Joined(entry.id, found.spent, found.notes)


def check_service(pool: Pool, id: str) -> dict[str, Any]:
    """Ask a service of a pool about one image, which is charged. Returns `{"id", "ok", "reason"}` as `Pool.check`."""
    resolved(pool.path)  # the ledger of what is asked lies in the pool, so a pool in an object store is refused
    try:
        found = _probe(pool, pool.entry(id))
    except DfmlError as error:
        return {"id": id, "ok": False, "reason": str(error).removeprefix(f"{id}: ")}
    said = f"asked {found.spent.sent} image{'s' if found.spent.sent != 1 else ''}, cost {found.spent.cost:g}"
    return {"id": id, "ok": True, "reason": "; ".join([said, *found.notes])}


def _probe(pool: Pool, entry: Entry) -> Probed:
    """Ask a service once. If nothing was sent, nothing is left on the disk that was not there before."""
    folder = resolved(pool.path)
    ledger, new = folder / LEDGER, not folder.exists()
    asked = Asked(card=entry.card, terms=entry.terms, api=entry.api)
    try:
        return probe(asked, ledger)
    except DfmlError as error:
        if new and not isinstance(error, ResourceError):  # the ledger itself may be what cannot be opened
            _forget(ledger, asked)
        raise


def _forget(path: Path, asked: Asked) -> None:
    ledger = Ledger(path, [asked])
    sent = sum(one.sent for one in ledger.totals().values())
    ledger.close()
    if not sent:
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
        path.parent.rmdir()
