"""Takes the screenshots of the explorer in docs/figures, of what `make demo` left: a Chromium, driven by playwright.

pip install playwright && apt-get install chromium fonts-dejavu
make demo && python scripts/screenshots.py demo
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import expect, sync_playwright

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
VIEWPORT = {"width": 1280, "height": 800}
GENRE = "cooking"
PROMPT = "My grandmother always said that"
TEXT = """Mix the flour with the butter, and bake it in a hot oven for twenty minutes.
The captain stood upon the deck and looked at the whale.
And the LORD said unto Moses, Speak unto the children of Israel."""


def serve(demo: Path) -> tuple[subprocess.Popen[str], str]:
    """Returns the process that serves the explorer of a demonstration, and its address."""
    command = [sys.executable, "-m", "mfa_kernels", "explore", str(demo / "mfa"), str(demo / "activations")]
    process = subprocess.Popen([*command, "--port", "0", "--no-browser"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    if found is None:
        raise RuntimeError("the explorer printed no address")
    return process, found[0]


def take(page: Any, address: str, out: Path) -> None:
    """Takes the pictures, one for each view."""
    root = address.split("?")[0]
    page.goto(address)
    about = page.evaluate("() => fetch('/api/about').then((answer) => answer.json())")
    found = about["topics"]
    topic = next((each for each in found if about["genres"][each["genre"]] == GENRE), found[0])

    def find(name: str) -> Any:
        return page.locator(f"[data-test={name}]")

    def shoot(name: str) -> None:
        page.wait_for_timeout(800)
        page.screenshot(path=out / f"explorer-{name}.png")
        print(out / f"explorer-{name}.png")

    find("region-row").first.wait_for()
    expect(page.get_by_text("t-SNE")).to_be_visible(timeout=120_000)
    shoot("map")
    page.goto(f"{root}#/region/{topic['component']}")
    find("context").first.wait_for()
    shoot("region")
    page.goto(f"{root}#/text")
    find("own-text").fill(TEXT)
    expect(find("own-tokens")).to_contain_text("Israel", timeout=30_000)
    page.mouse.click(5, 790)
    shoot("text")
    page.goto(f"{root}#/steer/genre/{topic['genre']}")
    find("prompt").fill(PROMPT)
    find("write").click()
    expect(find("steered-text")).to_have_text(re.compile(".{120}", re.DOTALL), timeout=120_000)
    expect(find("write")).to_be_enabled(timeout=120_000)
    shoot("playground")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder of a demonstration")
    parser.add_argument("--out", type=Path, default=FIGURES)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    process, address = serve(options.demo)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            scheme = "dark" if options.dark else "light"
            take(browser.new_context(viewport=VIEWPORT, color_scheme=scheme).new_page(), address, options.out)
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
