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
    from ray_dfml.data.pool import Pool

EPILOG = """\b
Example:
  ray-dfml serve pools/omniglot:teacher-0003 --access label --port 8080
"""

COUNTER = "served.sqlite"
"""The file in a pool's folder that counts what its teachers were asked."""


@click.command(epilog=EPILOG)
@click.argument("model", metavar="POOL[:ID]")
@click.option("--access", required=True, type=click.Choice(["label", "probs", "logits"]), help="What is given away.")
@click.option("--decimals", type=click.IntRange(0, 9), help="Round probabilities.")
@click.option("--top-k", type=click.IntRange(min=1), help="Give only the largest probabilities; the others are 0.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Images a second, for all callers together.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 finds a free one.")
@click.option("--token-env", metavar="NAME", help="Environment variable with a token that callers must send.")
@click.option("--counter", type=options.PATH, help=f"File that counts images; default: {COUNTER} in the pool's folder.")
@options.as_json
def serve(
    model: str, access: str, decimals: int | None, top_k: int | None, rate: float | None, host: str, port: int,
    token_env: str | None, counter: Path | None, json_out: bool,
) -> None:  # fmt: skip
    """Answer to images over HTTP, with one teacher of a pool or with all of them, in the Open Inference Protocol v2.

    It runs until SIGTERM or Ctrl-C. Without --token-env it answers to this machine only.
    """
    from ray_dfml.runtime.shard import pick_device, pin
    from ray_dfml.services.counter import Counter
    from ray_dfml.services.hosting import from_pool
    from ray_dfml.services.server import Server, run

    token = _token(token_env, host)
    pin()
    pool, ids = _chosen(model)
    served = [
        from_pool(pool, id, access=access, decimals=decimals, top_k=top_k, device=pick_device())  # pyright: ignore[reportArgumentType]
        for id in ids
    ]

    def announce(url: str) -> None:
        if json_out:  # in one line, since the command goes on
            click.echo(json.dumps({"url": url, "models": ids, "access": access, "output": served[0].output}))
        else:
            click.echo(f"serving {first_of(ids)} at {url}")

    with closing(Counter(counter or pool.path / COUNTER)) as counts:
        server = Server(served, counts, rate=rate, token=token, note=options.say)
        asyncio.run(run(server, host, port, announce))
        for id, (received, answered) in counts.counts(ids).items():
            options.say(f"{id}: {received} images received, {answered} answered")


def _chosen(model: str) -> tuple["Pool", list[str]]:
    """The pool that a user names, and the ids of those of its teachers that are meant."""
    from ray_dfml.data.pool import Pool

    folder, colon, id = model.rpartition(":")
    if colon and not resolved(model).exists():
        pool = Pool.open(folder)
        return pool, [pool.entry(id).id]
    pool = Pool.open(model)
    ids = [card.id for card in pool.cards if pool.entry(card.id).api is None]
    for card in pool.cards:
        if card.id not in ids:
            options.say(f"{card.id}: is a service already; left out")
    if not ids:
        raise UsageError(f"{model}: this pool has no weights to serve; add some with `ray-dfml pool add`")
    return pool, ids


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
