"""`ray-dfml serve`."""

import asyncio
import json
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_dfml.cli import options
from ray_dfml.errors import UsageError, first_of
from ray_dfml.files import resolved

if TYPE_CHECKING:
    import numpy as np

    from ray_dfml.services.hosting import Adapts, Gives, Served

EPILOG = """\b
Example:
  ray-dfml serve pools/omniglot:teacher-0003 --access label --port 8080
"""

COUNTER = "served.sqlite"
"""The file in the folder of a pool or a run that counts what was asked."""


@click.command(epilog=EPILOG)
@click.argument("model", metavar="POOL[:ID]|RUN[:ID]")
@click.option("--access", required=True, type=options.Choice(["label", "probs", "logits"]), help="What is given away.")
@click.option("--decimals", type=click.IntRange(0, 9), help="Round probabilities.")
@click.option("--top-k", type=click.IntRange(min=1), help="Give only the largest probabilities; the others are 0.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Images a second, for all callers together.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 finds a free one.")
@click.option("--token-env", metavar="NAME", help="Environment variable with a token that callers must send.")
@click.option("--counter", type=options.PATH, help=f"File that counts images; default: {COUNTER} in that folder.")
@options.as_json
def serve(
    model: str, access: str, decimals: int | None, top_k: int | None, rate: float | None, host: str, port: int,
    token_env: str | None, counter: Path | None, json_out: bool,
) -> None:  # fmt: skip
    """Answer to images over HTTP, in the Open Inference Protocol v2: teachers of a pool, students or learner of a run.

    Without an ID all of them are served. A learner makes classifiers of labelled images that are sent to it. The server
    runs until SIGTERM or Ctrl-C. Without --token-env it answers to this machine only.
    """
    from ray_dfml.runtime.shard import pin
    from ray_dfml.services.counter import Counter
    from ray_dfml.services.hosting import Gives
    from ray_dfml.services.server import Server, run

    token = _token(token_env, host)
    pin()
    gives = Gives(access=access, decimals=decimals, top_k=top_k)  # pyright: ignore[reportArgumentType]
    folder, served = _chosen(model, gives)
    ids = [one.id for one in served]
    learner = None if served else _learner(folder, gives)

    def announce(url: str) -> None:
        if json_out:  # in one line, since the command goes on
            click.echo(json.dumps({"url": url, "models": ids, "access": access, "output": gives.output}))
        else:
            click.echo(f"serving {first_of(ids) if ids else 'a learner'} at {url}")

    with closing(Counter(counter or folder / COUNTER)) as counts:
        server = Server(served, counts, rate=rate, token=token, learner=learner, note=options.say)
        asyncio.run(run(server, host, port, announce))
        for id, (received, answered) in counts.counts(server.ids).items():
            options.say(f"{id}: {received} images received, {answered} answered")


def _chosen(model: str, gives: "Gives") -> "tuple[Path, list[Served]]":
    """The folder that a user names, or that of a file, and the classifiers in it that are meant; none of a learner."""
    from ray_dfml.data.manifest import MANIFEST

    folder, id = _named(model)
    of_pool = (folder / MANIFEST).exists() or not folder.exists()
    served = (_teachers if of_pool else _students)(folder, id, gives)
    return folder.parent if folder.is_file() else folder, served


def _named(model: str) -> tuple[Path, str | None]:
    """The folder or file that a user names, and the id behind it. Paths and ids may hold colons themselves."""
    if resolved(model).exists():
        return resolved(model), None
    parts = model.split(":")
    splits = [(resolved(":".join(parts[:n])), ":".join(parts[n:])) for n in range(1, len(parts)) if parts[0]]
    there = [split for split in splits if split[0].exists()]
    return (there or splits or [(resolved(model), None)])[0]


def _teachers(folder: Path, id: str | None, gives: "Gives") -> "list[Served]":
    from ray_dfml.data.pool import Pool
    from ray_dfml.runtime.shard import pick_device
    from ray_dfml.services.hosting import from_pool

    pool = Pool.open(folder)
    ids = [card.id for card in pool.cards if pool.entry(card.id).api is None] if id is None else [id]
    for card in pool.cards if id is None else ():
        if card.id not in ids:
            options.say(f"{card.id}: is a service already; left out")
    if not ids:
        raise UsageError(f"{folder}: this pool has no weights to serve; add some with `ray-dfml pool add`")
    return [from_pool(pool, one, gives, pick_device()) for one in ids]


def _students(folder: Path, id: str | None, gives: "Gives") -> "list[Served]":
    from ray_dfml.runtime.shard import pick_device
    from ray_dfml.services.hosting import Served
    from ray_dfml.student import Student, of_run

    found = of_run(folder) if id is None else [Student.load(folder, teacher=id)]
    served = []
    for student in found:
        of, device = student.weights, pick_device()
        gives.check(student.card.teacher, len(student.classes))
        served.append(Served(
            id=student.card.teacher, image=of.image, classes=student.classes, gives=gives, net=of.net,
            theta=of.theta.to(device), stats=of.stats.to(device),
        ))  # fmt: skip
    return served


def _learner(folder: Path, gives: "Gives") -> "Adapts":
    """The learner of a run, each of whose classifiers answers to an image by itself."""
    from ray_dfml.learner import Learner
    from ray_dfml.services.hosting import Adapts, Served

    learner = Learner.load(folder)
    gives.check("learner", learner.way)
    if learner.bn == "transductive":
        options.say("batch norm of this learner is transductive; served images get the statistics of the support")

    def adapt(id: str, images: "np.ndarray", labels: list[str]) -> Served:
        adapted = learner.adapt(images, labels)
        gives.check(id, len(adapted.classes))
        return Served(
            id=id, image=learner.image, classes=tuple(adapted.classes), gives=gives, net=learner.weights.net,
            theta=adapted.theta, stats=adapted.stats,
        )  # fmt: skip

    return Adapts(image=learner.image, adapt=adapt)


def _token(name: str | None, host: str) -> str | None:
    """The token that callers must send. It stands in no message."""
    from ray_dfml.data.services import is_loopback, variable

    if name is None:
        if not is_loopback(host):
            raise UsageError(f"--host {host}: others can reach this address; set a token with --token-env NAME")
        return None
    try:
        token = os.environ.get(variable(name), "")
    except ValueError as error:
        raise UsageError(f"--token-env: {error}") from None
    if not token or not token.isascii() or not token.isprintable() or token != token.strip():
        raise UsageError(f"--token-env {name}: the variable must hold a token of printable ASCII without spaces around")
    if not is_loopback(host):
        options.say(f"--host {host}: http does not encrypt; put a proxy with TLS in front, or use a private network")
    return token
