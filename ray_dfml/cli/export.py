"""`ray-dfml export`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_dfml.cli import options
from ray_dfml.errors import UsageError
from ray_dfml.files import Uri

if TYPE_CHECKING:
    from ray_dfml.export import Graph

EPILOG = """\b
Example:
  ray-dfml export runs/free --support my_classes/ --out mine.onnx
"""


@click.command(epilog=EPILOG)
@click.argument("run", metavar="RUN|WEIGHTS", type=options.PLACE)
@click.option("--out", required=True, type=options.PATH, help="The .onnx file; must not exist.")
@click.option("--support", type=options.PATH, help="Folder of class folders to which the learner is adapted first.")
@click.option("--background", default="white", show_default=True, help="Colour that transparent parts are put on.")
@click.option("--teacher", metavar="ID", help="Whose student, if a run has several.")
@options.as_json
def export(
    run: Path | Uri, out: Path, support: Path | None, background: str, teacher: str | None, json_out: bool
) -> None:  # fmt: skip
    """Write the learner or a student of RUN to an ONNX file, which ONNX Runtime and others run.

    With --support a learner becomes a classifier of those classes; without, the file gives its features. Each image is
    classified by itself.
    """
    from ray_dfml.export import write_onnx
    from ray_dfml.runtime.shard import pin

    if out.suffix != ".onnx":
        raise UsageError(f"--out {out}: expected a name that ends in .onnx")
    options.check_out("--out", out)
    if out.exists():
        raise UsageError(f"{out}: exists already; choose another --out")
    pin()
    graph = _graph(run, support, background, teacher)
    write_onnx(graph, out)
    if json_out:
        options.print_json({"file": str(out), "input": list(graph.of.image.shape), "classes": list(graph.classes)})
    else:
        gives = f"probabilities of {len(graph.classes)} classes" if graph.classes else "features"
        size = "x".join(map(str, graph.of.image.shape))
        click.echo(f"{out}: images n x {size} in [0, 1] -> {gives}")


def _graph(run: Path | Uri, support: Path | None, background: str, teacher: str | None) -> "Graph":
    from ray_dfml import export, published
    from ray_dfml.data.folders import read_folder
    from ray_dfml.learner import Learner
    from ray_dfml.student import Student, of_run

    folder = published.local(run)
    if of_run(folder):
        if support is not None:
            raise UsageError(f"{run}: holds students, which adapt to no classes; leave out --support")
        return export.of_student(Student.load(folder, teacher=teacher))
    learner = Learner.load(run)
    if teacher is not None:
        raise UsageError(f"{run}: holds a learner and no students; leave out --teacher")
    if support is None:
        return export.of_learner(learner)
    shown = read_folder(support, learner.image, background=background)
    for note in shown.notes:
        options.say(f"--support: {note}")
    if learner.bn == "transductive":
        options.say("batch norm of this learner is transductive; the file uses the statistics of the support instead")
    return export.of_adapted(learner.adapt(shown.images, shown.labels))
