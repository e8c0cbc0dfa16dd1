"""Pictures of the pages of finished runs for the documentation, in headless Chromium.

    python benchmarks/screenshots.py docs/img report-free=runs/free:top report-ideal=runs/ideal:asked ...

Each word is NAME=RUN:PART, where PART is `top`, `phone` (the top, on a phone, in the dark), or the kind of a gallery,
`recovered` or `asked`. The page is made anew from the run's folder, in a copy of it.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from ray_dfml import report

LARGEST = 150_000
"""Bytes of a picture at most."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZES = {"top": (1000, 760), "phone": (400, 760)}


def page_of(run: Path, scratch: Path) -> Path:
    """The page of a run as this version makes it."""
    copy = scratch / run.name
    if not copy.exists():
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "*.sqlite*", ".lock"))
        report.write(copy)
    return copy / "report.html"


def picture(browser: Browser, page_file: Path, part: str, out: Path) -> None:
    """Write a picture of a part of a page, with few colours, so that it is small."""
    width, height = SIZES.get(part, (1000, 900))
    scheme = "dark" if part == "phone" else "light"
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(page_file.as_uri())
    if part in SIZES:
        page.screenshot(path=out)
    else:
        page.locator("section", has=page.locator(f"h2#{part}")).screenshot(path=out)
    context.close()
    shown = Image.open(out).convert("RGB")
    shown.crop((0, 0, shown.width, min(shown.height, height))).quantize(64).save(out, optimize=True)
    if out.stat().st_size > LARGEST:
        sys.exit(f"{out}: {out.stat().st_size} bytes, more than {LARGEST}")


def main() -> None:
    """Make the pictures that the command line names."""
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for word in wanted:
            name, _, rest = word.partition("=")
            run, _, part = rest.rpartition(":")
            picture(browser, page_of(Path(run), Path(scratch)), part, folder / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
