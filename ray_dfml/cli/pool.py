"""`ray-dfml pool build`, `pool add` and `pool check`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click
import yaml

from ray_dfml import yaml_text
from ray_dfml.cli import options
from ray_dfml.data.services import Adapter, Terms
from ray_dfml.data.weights_file import write_bytes
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.files import Uri
from ray_dfml.types import LEVELS, Access


@click.group()
def pool() -> None:
    """Pools of teachers: a folder with pool.yaml and weights/*.safetensors."""


@pool.command(
    epilog="\b\nExample:\n  ray-dfml pool build --data cifar-fs:$RAY_DFML_DATA/cifar100.parquet --models 100"
    " --arch conv4 --way 5 --out pools/cifar-fs"
)
@click.option("--data", "spec", required=True, metavar="SPEC", help="Data whose meta-train classes the teachers learn.")
@click.option("--models", type=click.IntRange(min=1), required=True, help="Number of teachers.")
@click.option(
    "--arch", "archs", default="conv4", show_default=True, help="Architecture, or several with commas, in turn."
)
@click.option("--way", type=click.IntRange(min=2), default=5, show_default=True, help="Classes of a teacher.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--out", required=True, type=options.PATH, help="Pool folder.")
@click.option("--resume", is_flag=True, help="Add the teachers that an interrupted build left out.")
@options.settings
@options.workers
@options.as_json
def build(
    spec: str,
    models: int,
    archs: str,
    way: int,
    seed: int,
    out: Path,
    resume: bool,
    settings: Any,
    workers: int,
    json_out: bool,
) -> None:
    """Train teachers on random class subsets of real data, then keep only their weights."""
    from ray_dfml.config import pretrain_config
    from ray_dfml.core.backbones import known_arch
    from ray_dfml.data.pool import Pool
    from ray_dfml.runtime import build_pool, cost_lines
    from ray_dfml.runtime.driver import Machine
    from ray_dfml.runtime.place import opened

    names = [name.strip() for name in archs.split(",")]
    for name in names:
        try:
            known_arch(name)
        except ValueError as error:
            raise UsageError(f"--arch: {error}") from None
    cfg = pretrain_config(settings)
    workers = min(workers, models)
    if workers > 1:
        options.need_ray()
    with opened(Machine(backend="ray" if workers > 1 else "local", workers=workers)) as place:
        image, planned = build_pool.plan(spec, models=models, archs=names, way=way, seed=seed, note=options.say)
        target = Pool.open(out) if resume and out.exists() else Pool.create(out)
        if lacking := build_pool.lacking(target, planned):
            options.say(cost_lines.of_pool(spec, lacking, cfg, workers))
        accuracies = build_pool.build(
            target, spec, image, planned, cfg, backend=place.backend(), at_once=2 * workers if workers > 1 else 1,
            seed=seed, on_teacher=lambda id, accuracy: options.say(f"{id}  held-out accuracy {accuracy:.1f} %"),
        )  # fmt: skip
    summary = {"pool": str(out), "teachers": len(accuracies), "accuracy_mean": sum(accuracies) / len(accuracies)}
    if json_out:
        options.print_json(summary)
    else:
        click.echo(f"{out}: {summary['teachers']} teachers, mean held-out accuracy {summary['accuracy_mean']:.1f} %")


ADD = """\b
Example:
  ray-dfml pool add pools/mine --weights birds.safetensors --arch resnet10 --input 3x32x32 --mean 0.5,0.5,0.5
  --std 0.25,0.25,0.25 --classes wren,robin,owl,jay,tit
  ray-dfml pool add pools/mine --api https://models.example.org --adapter oip --model digits --output probabilities
  --access probs --input 1x28x28 --classes 0,1,2,3,4,5,6,7,8,9 --authorization "J. Doe, owner" --key-env DIGITS_KEY
"""


@pool.command(epilog=ADD)
@click.argument("path", metavar="POOL", type=options.PATH)
@click.option("--weights", type=options.PATH, help="safetensors, or what torch.save wrote, of tensors.")
@click.option("--api", metavar="URL", help="Instead of weights: a prediction service. It is asked once, charged.")
@click.option("--arch", help="Architecture of the weights: one of ours, torchvision:NAME or timm:NAME.")
@click.option("--input", "size", required=True, help="Channels x height x width, such as 3x32x32.")
@click.option("--classes", help="Class names in the order of the outputs, with commas; DATASET/NAME if known.")
@click.option("--classes-file", type=options.PATH, help="A UTF-8 text with one class name a line instead.")
@click.option("--mean", help="Per channel, for pixels in [0, 1]; default 0. A service normalises unless it is given.")
@click.option("--std", help="Per channel; default 1.")
@click.option("--id", "id", help="Name in the pool; default: the file's or the model's name.")
@click.option("--accuracy", type=click.FloatRange(0, 100), help="Accuracy the owner reports, percent.")
@click.option("--source", default="", help="Where the teacher comes from.")
@click.option("--authorization", default="", help="Who permits its use; required with --api.")
@click.option(
    "--access", type=options.Choice(LEVELS), help="What is given away; weights are given whole by default."
)  # fmt: skip
@click.option("--decimals", type=int, help="Decimals to which probabilities are rounded.")
@click.option("--top-k", type=int, help="How many of the largest probabilities are given.")
@click.option("--price", type=float, help="Money for one image.")
@click.option("--budget", type=int, help="Most images that a run may send.")
@click.option("--money", type=float, help="Most that a run may spend.")
@click.option("--adapter", type=options.Choice(get_args(Adapter)), help="How the service is asked.")
@click.option("--model", help="Name of the model at the service.")
@click.option("--output", help="Name of the tensor of answers (oip).")
@click.option("--template", type=options.PATH, help="YAML of the request of adapter json.")
@click.option("--key-env", metavar="NAME", help="Environment variable that holds the key; never the key itself.")
@click.option("--rate", type=float, help="Most images a second.")
@click.option("--concurrency", type=int, help="Most requests at a time.")
@click.option("--batch", type=int, help="Most images in a request.")
@options.as_json
def add(
    path: Path, weights: Path | None, api: str | None, arch: str | None, size: str, classes: str | None,
    classes_file: Path | None, mean: str | None, std: str | None, access: Access | None, json_out: bool, **rest: Any,
) -> None:  # fmt: skip
    """Add your own weights, or a service, to POOL, which is made if it does not exist."""
    from ray_dfml.data.pool import Pool

    if (weights is None) == (api is None):
        raise UsageError("name either the weights of a teacher with --weights, or a service with --api")
    names, pool = _class_names(classes, classes_file), Pool.at(path)
    about = {key: rest[key] for key in ("id", "accuracy", "source", "authorization")}
    terms = {key: rest[key] for key in Terms.model_fields if rest[key] is not None}
    reach = {key: rest[key] for key in _REACH if rest[key] is not None}
    norm = {"mean": _numbers("--mean", mean), "std": _numbers("--std", std)}
    if weights is not None:
        id = _add_weights(pool, weights, arch, reach, terms, input=size, classes=names, access=access, **norm, **about)
    else:
        if arch is not None:
            raise UsageError("--arch: a service tells no architecture; leave it out")
        if access is None:
            raise UsageError("--access: say what the service answers: logits, probs or label")
        reach |= {"url": api} | {key: value for key, value in norm.items() if value is not None}
        id = _add_service(pool, reach, terms, input=size, classes=names, access=access, **about)
    if json_out:
        options.print_json({"pool": str(path), "id": id})
    else:
        click.echo(f"{path}: added {id}")


_REACH = ("adapter", "model", "output", "template", "key_env", "rate", "concurrency", "batch")
"""Options of a service that stand in its `api` block."""


def _add_weights(
    pool: Any, weights: Path, arch: str | None, reach: Mapping[str, Any], terms: Mapping[str, Any], *,
    access: Access | None, **rest: Any,
) -> str:  # fmt: skip
    from ray_dfml.data.manifest import terms_of
    from ray_dfml.data.pool import add_file

    if arch is None:
        raise UsageError("--arch: name the architecture of the weights")
    if reach:
        raise UsageError(f"--{next(iter(reach)).replace('_', '-')}: is of services, which have --api and no --weights")
    id, notes = add_file(pool, weights, arch=arch, access=access or "weights", terms=terms_of(terms), **rest)
    for note in notes:
        options.say(f"{weights}: {note}")
    return id


def _add_service(pool: Any, reach: dict[str, Any], terms: Mapping[str, Any], **rest: Any) -> str:
    from ray_dfml.services.members import add_service

    if (file := reach.get("template")) is not None:
        try:
            reach["template"] = yaml_text.load(file.read_bytes())
        except (OSError, yaml.YAMLError, ValueError) as error:
            raise UsageError(f"--template {file}: not YAML, or cannot be read: {str(error).splitlines()[0]}") from None
    id, spent, notes = add_service(pool, reach, terms=terms, **rest)
    for note in (*notes, f"the probe sent {spent.sent} image{'s' if spent.sent != 1 else ''}, cost {spent.cost:g}"):
        options.say(f"{id}: {note}")
    return id


def _class_names(names: str | None, file: Path | None) -> list[str]:
    if (names is None) == (file is None):
        raise UsageError("name the classes with --classes, or with --classes-file where a name has a comma")
    if file is None:
        return [name.strip() for name in (names or "").split(",")]
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--classes-file {file}: cannot be read: {reason}") from None
    return [line.strip() for line in lines if line.strip()]


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: expected numbers with commas, such as 0.5,0.5,0.5") from None


CHECK = """\b
Example:
  ray-dfml pool check pools/mine --html pool.html
  ray-dfml pool check pools/mine --quarantine out.yaml
  ray-dfml train free --pool pools/mine --set pool.without=out.yaml --run-dir runs/free
"""


@pool.command(epilog=CHECK)
@click.argument("path", metavar="POOL", type=options.PLACE)
@click.option("--html", metavar="FILE", type=options.PATH, help="Also write a page about the pool; replaces FILE.")
@click.option(
    "--quarantine", metavar="FILE", type=options.PATH,
    help="Also write the teachers that should be left out, with the evidence, for --set pool.without=FILE.",
)  # fmt: skip
@click.option("--ask", is_flag=True, help="Also ask each service about one image, which is charged.")
@options.as_json
def check(path: Path | Uri, html: Path | None, quarantine: Path | None, ask: bool, json_out: bool) -> int:
    """Load and run each teacher, print one line for each, then what was found about them without any data.

    The exit code is 3 if any is rejected. Warnings and notes are for the reader to weigh. A service is asked only with
    --ask.
    """
    from ray_dfml.data import quarantine as lists
    from ray_dfml.data.pool import Pool
    from ray_dfml.doctor.examine import examine, seconds
    from ray_dfml.doctor.page import page
    from ray_dfml.runtime import cost_lines

    for option, file in (("--html", html), ("--quarantine", quarantine)):
        options.check_out(option, file)
    found = Pool.open(path)
    services = [entry for card in found.cards if (entry := found.entry(card.id)).api is not None]
    asked = {entry.id: entry.price or 0.0 for entry in services} if ask else {}
    if found.cards:
        options.say(cost_lines.of_check(lambda: seconds(found), len(found.cards), asked))
    rows = found.check()
    if ask:
        from ray_dfml.services.members import check_service

        rows = [check_service(found, row["id"]) if found.entry(row["id"]).api else row for row in rows]
    seen = examine(found, rows)
    if html is not None:
        write_bytes(html, page(seen).encode())
        options.say(f"wrote {html}")
    if quarantine is not None:
        write_bytes(quarantine, lists.text(seen.leave_out(), f"ray-dfml pool check {path}").encode())
        options.say(f"wrote {quarantine}: {len(seen.leave_out())} of {len(rows)} teachers")
    if json_out:
        options.print_json([row | {"findings": [one.tree() for one in seen.of(row["id"])]} for row in rows])
    else:
        for row in rows:
            click.echo(f"{row['id']:<32} {'ok' if row['ok'] else 'REJECTED'}  {row['reason']}".rstrip())
        for line in ["", *(one.line() for one in seen.findings)] if rows else []:
            click.echo(line)
    if not rows:
        raise RejectedError(f"{path}: the pool holds no teacher; add one with `ray-dfml pool add`")
    return 3 if seen.unusable else 0
