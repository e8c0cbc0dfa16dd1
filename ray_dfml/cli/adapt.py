"""`ray-dfml adapt`."""

from pathlib import Path

import click

from ray_dfml.cli import options
from ray_dfml.files import Uri


@click.command(epilog="\b\nExample:\n  ray-dfml adapt runs/free --support my_classes/ --query unsorted/ --json")
@click.argument("run", type=options.PLACE)
@click.option("--support", required=True, type=options.PATH, help="Folder of class folders, 1-5 images each.")
@click.option("--query", required=True, type=options.PATH, help="Folder of images to name.")
@click.option("--background", default="white", show_default=True, help="Colour that transparent parts are put on.")
@options.as_json
def adapt(run: Path | Uri, support: Path, query: Path, background: str, json_out: bool) -> None:
    """Adapt the learner of RUN to your own classes and name the query images."""
    from ray_dfml.data.folders import read_folder
    from ray_dfml.learner import Learner
    from ray_dfml.runtime.shard import pin

    pin()
    learner = Learner.load(run)
    shown = read_folder(support, learner.image, background=background)
    unknown = read_folder(query, learner.image, background=background)
    for option, found in (("--support", shown), ("--query", unknown)):
        for note in found.notes:
            options.say(f"{option}: {note}")
    adapted = learner.adapt(shown.images, shown.labels)
    probabilities = adapted.predict_proba(unknown.images)
    rows = [
        {"file": name, "class": adapted.classes[int(p.argmax())], "probability": round(float(p.max()), 4)}
        for name, p in zip(unknown.names, probabilities, strict=True)
    ]
    if json_out:
        options.print_json(rows)
    else:
        for row in rows:
            click.echo(f"{row['file']:<40} {row['class']:<24} {row['probability']:.2f}")
