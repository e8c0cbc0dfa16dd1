"""`ray-dfml data list` and `ray-dfml data check`."""

import click

from ray_dfml.cli import options


@click.group()
def data() -> None:
    """Data specs: `glyphs` (embedded), or NAME:PATH."""


@data.command("list", epilog="\b\nExample:\n  ray-dfml data list")
@options.as_json
def list_(json_out: bool) -> None:
    """List the names that a SPEC can have."""
    from ray_dfml.data import DATASETS

    rows = {name: entry.description for name, entry in DATASETS.items()}
    if json_out:
        options.print_json(rows)
        return
    for name, about in rows.items():
        click.echo(f"{name:<16} {about}")


@data.command(epilog="\b\nExample:\n  ray-dfml data check omniglot:$RAY_DFML_DATA/omniglot28.parquet")
@click.argument("spec")
@options.as_json
def check(spec: str, json_out: bool) -> None:
    """Show what SPEC stands for: classes, sizes, splits, md5. The exit code is 3 if it cannot be used."""
    from ray_dfml.data.datasets import describe

    found = describe(spec)
    if json_out:
        options.print_json(found)
        return
    for key, value in found.items():
        for one in value if key == "notes" else [value]:
            click.echo(f"{key.removesuffix('s') if key == 'notes' else key:<10} {one}")
