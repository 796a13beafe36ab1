"""Pictures of the explorer page for README and docs, taken in a headless Chromium.

    python main.py && python main.py mode=vis
    python scripts/screenshot_explorer.py outputs/vis/<run>/explorer.html [--out docs]

Writes explorer.png, layers 0 and 7 side by side on a laptop (1280 px), and explorer_phone.png, a scene drawn in the page on a
phone (390 px, dark). The view comes from the link alone; an error that the page logs ends the script.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from browser import CHROMIUM, Page, open_browser

READY = "document.body.dataset.ready"
# Four objects, two of them of one shape and colour, side by side.
SCENE = "ring,34,36,19,2fae9b;ring,60,58,18,2fae9b;star,72,24,17,d0507a;box,26,72,15,c9a227"


def take(tab: Page, page: Path, out: Path) -> list[Path]:
    """Both pictures of a page."""
    files = [out / "explorer.png", out / "explorer_phone.png"]
    tab.size(1280, 800)
    tab.open(f"{page.as_uri()}#opacity=80&a=0.0.probe&b=0.7.probe", READY)
    tab.shot(files[0], whole=False)
    tab.size(390, 844, dark=True)
    tab.open(f"{page.as_uri()}#opacity=80&scene={SCENE.replace(',', '%2C').replace(';', '%3B')}&at=0.2.4", READY)
    tab.shot(files[1], whole=False)
    return files


def main() -> None:
    """Read the command line and take the pictures."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("page", type=Path, help="explorer.html of a run of the embedded backbone")
    options.add_argument("--out", type=Path, default=Path("docs"))
    options = options.parse_args()
    if CHROMIUM is None:
        sys.exit("no chromium here; install it (Debian: apt-get install chromium)")
    if not options.page.is_file():
        sys.exit(f"error: {options.page} is no file; make one with python main.py mode=vis")
    with tempfile.TemporaryDirectory() as folder, open_browser(Path(folder)) as tab:
        files = take(tab, options.page.resolve(), options.out)
        wrong = tab.complaints() + tab.fetched()
    if wrong:
        sys.exit(f"the page complains: {wrong[0]}")
    print(*files, sep="\n")


if __name__ == "__main__":
    main()
