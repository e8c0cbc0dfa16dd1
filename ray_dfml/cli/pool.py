"""`ray-dfml pool build`, `pool add` and `pool check`."""

from pathlib import Path
from typing import Any

import click

from ray_dfml.cli import options
from ray_dfml.errors import RejectedError, UsageError


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
    from ray_dfml.runtime import build_pool
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
        accuracies = build_pool.build(
            target, spec, image, planned, cfg, backend=place.backend(), at_once=2 * workers if workers > 1 else 1,
            seed=seed, on_teacher=lambda id, accuracy: options.say(f"{id}  held-out accuracy {accuracy:.1f} %"),
        )  # fmt: skip
    summary = {"pool": str(out), "teachers": len(accuracies), "accuracy_mean": sum(accuracies) / len(accuracies)}
    if json_out:
        options.print_json(summary)
    else:
        click.echo(f"{out}: {summary['teachers']} teachers, mean held-out accuracy {summary['accuracy_mean']:.1f} %")


@pool.command(
    epilog="\b\nExample:\n  ray-dfml pool add pools/mine --weights birds.safetensors --arch resnet10 --input 3x32x32"
    " --mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 --classes wren,robin,owl,jay,tit"
)
@click.argument("path", metavar="POOL", type=options.PATH)
@click.option("--weights", required=True, type=options.PATH, help="safetensors, or what torch.save wrote, of tensors.")
@click.option("--arch", required=True, help="Architecture: one of ours, torchvision:NAME or timm:NAME.")
@click.option("--input", "size", required=True, help="Channels x height x width, such as 3x32x32.")
@click.option("--classes", help="Class names in the order of the outputs, with commas; DATASET/NAME if known.")
@click.option("--classes-file", type=options.PATH, help="A UTF-8 text with one class name a line instead.")
@click.option("--mean", help="Per channel, for pixels in [0, 1]; default 0.")
@click.option("--std", help="Per channel; default 1.")
@click.option("--id", "id", help="Name in the pool; default: the file's name.")
@click.option("--accuracy", type=click.FloatRange(0, 100), help="Accuracy the owner reports, percent.")
@click.option("--source", default="", help="Where the weights come from.")
@click.option("--authorization", default="", help="Who permits their use.")
@options.as_json
def add(
    path: Path, weights: Path, size: str, classes: str | None, classes_file: Path | None, mean: str | None,
    std: str | None, json_out: bool, **rest: Any,
) -> None:  # fmt: skip
    """Add your own weights to POOL, which is made if it does not exist."""
    from ray_dfml.data.pool import Pool, add_file

    id, notes = add_file(
        Pool.at(path), weights, input=size, classes=_class_names(classes, classes_file),
        mean=_numbers("--mean", mean), std=_numbers("--std", std), **rest,
    )  # fmt: skip
    for note in notes:
        options.say(f"{weights}: {note}")
    if json_out:
        options.print_json({"pool": str(path), "id": id})
    else:
        click.echo(f"{path}: added {id}")


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


@pool.command(epilog="\b\nExample:\n  ray-dfml pool check pools/mine")
@click.argument("path", metavar="POOL", type=options.PATH)
@options.as_json
def check(path: Path, json_out: bool) -> int:
    """Load and run each teacher once, and print one line for each. The exit code is 3 if any is rejected."""
    from ray_dfml.data.pool import Pool

    rows = Pool.open(path).check()
    if json_out:
        options.print_json(rows)
    else:
        for row in rows:
            click.echo(f"{row['id']:<32} {'ok' if row['ok'] else 'REJECTED'}  {row['reason']}".rstrip())
    if not rows:
        raise RejectedError(f"{path}: the pool holds no teacher; add one with `ray-dfml pool add`")
    return 0 if all(row["ok"] for row in rows) else 3
