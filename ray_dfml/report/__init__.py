"""Makes `report.html`, one self-contained page, and `MODEL_CARD.md` from the files of a run folder.

It works after a run and during one. The part of an absent file is left out, and only `config.yaml` is needed.
Everything that is shown is escaped.
"""

from pathlib import Path

from ray_dfml import plots
from ray_dfml.data import weights_file
from ray_dfml.methods import METHODS
from ray_dfml.report.pages import cards as cards
from ray_dfml.report.pages import markdown as markdown
from ray_dfml.report.pages import pages as pages
from ray_dfml.report.record import Record as Record
from ray_dfml.report.record import dicts as dicts
from ray_dfml.report.record import read as read
from ray_dfml.report.scores import verdict as verdict
from ray_dfml.report.values import values


def write(run: Path) -> None:
    """Make `report.html` and `MODEL_CARD.md` in a run folder from its files. Each is replaced in one step.

    Raises what `read` raises.
    """
    record = read(run)
    found = values(record)
    panels = METHODS[record.name].panels if record.name in METHODS else ()
    text = pages().get_template("report.html").render(found, plots=plots.draw(record.metrics, panels))
    weights_file.write_bytes(run / "report.html", text.encode())
    text = cards().get_template("MODEL_CARD.md").render(found)
    weights_file.write_bytes(run / "MODEL_CARD.md", text.encode())
