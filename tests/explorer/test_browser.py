"""The explorer in a real browser: Chromium, driven by playwright."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mfa_kernels import MFA, fit
from mfa_kernels.data import ActivationStore
from mfa_kernels.data.genres import genre_texts
from mfa_kernels.data.harvest import harvest
from mfa_kernels.data.language_model import load_language_model
from mfa_kernels.explorer import Explorer, server
from mfa_kernels.interpret.labels import Label
from tests.explorer.test_server import TOKEN, Client, served
from tests.helpers.language import make_model, make_tokenizer

if has_playwright := importlib.util.find_spec("playwright") is not None:
    from playwright.sync_api import expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<img src=x onerror=\"document.title='pwned'\"></script><script>document.title='pwned'</script>"
VIEWS = ("#/", "#/topics", "#/search/w1", "#/region/1", "#/text", "#/steer/1", "#/steer/genre/1")

pytestmark = [
    pytest.mark.more,
    pytest.mark.skipif(not has_playwright, reason="needs playwright"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


class Page:
    """A page of a served explorer; what its console and its errors say is kept."""

    def __init__(self, browser: Any, client: Client, **options: Any) -> None:
        self.said: list[str] = []
        self.page = browser.new_context(**options).new_page()
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.said.append("a dialog"), dialog.dismiss()))
        self.root = f"http://127.0.0.1:{client.port}/"
        self.page.goto(f"{self.root}?token={TOKEN}")
        self.page.wait_for_selector("[data-test=region-row]")

    def open(self, view: str) -> None:
        self.page.goto(self.root + view)
        self.page.wait_for_load_state("networkidle")

    def find(self, name: str) -> Any:
        return self.page.locator(f"[data-test={name}]")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    """A mixture of the texts of the demonstration, as SmolLM2-135M reads them; fewer of them, and fewer regions."""
    folder = tmp_path_factory.mktemp("real")
    model, tokenizer = load_language_model("smollm2")
    harvest(model, tokenizer, genre_texts(), 24, folder / "store", max_tokens=6000, seed=None)
    store = ActivationStore(folder / "store")
    mfa = fit(store, n_components=32, rank=4, epochs=2)
    mfa.save_pretrained(folder / "mfa")
    return Explorer(MFA.from_pretrained(folder / "mfa"), store, tokenizer, model, 24, progress=False)


def test_a_researcher_looks_around(browser: Any, real: Explorer, tmp_path: Path) -> None:
    with served(real) as client:
        on = Page(browser, client, viewport={"width": 1280, "height": 800})
        page = on.page
        assert on.find("map-canvas").is_visible()
        assert on.find("region-row").count() == 32

        # Search a word of the texts, and open a region that owns it.
        page.keyboard.press("/")
        page.keyboard.type("the")
        page.keyboard.press("Enter")
        page.wait_for_selector("[data-test=context] mark, [data-test=context] .here, [data-test=context] .token")
        page.locator("main a[href^='#/region/']").first.click()
        page.wait_for_selector("[data-test=region-title]")
        k = int(page.url.rsplit("/", 1)[1])
        assert real.catalog.labels[k].split()[0].strip("·") in on.find("region-title").inner_text()
        assert on.find("context").count() > 0

        # A text of one's own.
        on.open("#/text")
        on.find("own-text").fill("In the beginning God created the heaven and the earth.")
        expect(on.find("own-tokens")).to_contain_text("heaven", timeout=30_000)

        # Steer, move the slider meanwhile, and stop.
        on.open(f"#/steer/{k}")
        on.find("prompt").fill("The captain said that")
        on.find("write").click()
        expect(on.find("steered-text")).to_have_text(re.compile(r".{60}", re.DOTALL), timeout=60_000)
        on.find("alpha").focus()
        page.keyboard.press("ArrowRight")
        on.find("stop").click()
        expect(on.find("write")).to_be_enabled(timeout=30_000)
        assert "The captain said that" in on.find("steered-text").inner_text()
        # Toward a whole genre, from the page of topics.
        on.open("#/topics")
        page.get_by_text(re.compile("^Steer toward ")).first.click()
        expect(page.locator("main")).to_contain_text("together, by weight")
        expect(on.find("alpha")).to_have_value("1.5")
        on.find("write").click()
        expect(on.find("steered-text")).to_have_text(re.compile(r".{60}", re.DOTALL), timeout=60_000)
        on.find("stop").click()
        page.screenshot(path=tmp_path / "steered.png")
        assert on.said == []


class Hostile:
    """A tokenizer, two of whose tokens are markup."""

    def __init__(self) -> None:
        self._inner = make_tokenizer(bos=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._inner(*args, **options)

    def decode(self, ids: Any, **options: Any) -> str:
        text = self._inner.decode(ids, **options)
        return text.replace("w11", EVIL).replace("w12", "\u202eltr\u202c" + "x" * 300)


@pytest.fixture
def hostile(mfa: MFA, store: ActivationStore) -> Explorer:
    labels = {1: Label(EVIL, EVIL, EVIL)}
    return Explorer(mfa, store, Hostile(), make_model("llama").eval(), labels=labels, progress=False)


def test_hostile_tokens_run_nothing(browser: Any, hostile: Explorer) -> None:
    with served(hostile) as client:
        on = Page(browser, client)
        for view in VIEWS:
            on.open(view)
            if view == "#/text":
                on.find("own-text").fill("w11 w12 w11")
                expect(on.find("own-tokens")).to_contain_text("onerror")
            if view.startswith("#/steer"):
                on.find("prompt").fill(EVIL)
                on.find("write").click()
                on.page.wait_for_timeout(1500)
            assert on.page.locator("main img, main script, main iframe").count() == 0
            assert "pwned" not in on.page.title()
        on.open("#/region/1")
        assert EVIL in on.find("region-title").inner_text()
        assert on.said == []


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_view_is_wider_than_its_window(browser: Any, hostile: Explorer, width: int, scheme: str) -> None:
    with served(hostile) as client:
        on = Page(browser, client, viewport={"width": width, "height": 740}, color_scheme=scheme)
        for view in VIEWS:
            on.open(view)
            on.page.wait_for_timeout(200)
            assert on.page.evaluate("document.documentElement.scrollWidth") <= width, view
        assert on.said == []


def test_the_page_that_leads_there_is_let_in(browser: Any, explorer: Explorer, tmp_path: Path) -> None:
    """What `serve` opens is a file, from which the browser comes as from another site."""
    with served(explorer) as client:
        page = browser.new_context().new_page()
        page.goto(server.redirection(tmp_path, f"http://127.0.0.1:{client.port}/?token={TOKEN}").as_uri())
        page.wait_for_selector("[data-test=region-row]", timeout=15_000)


def test_keyboard_and_theme(browser: Any, explorer: Explorer) -> None:
    with served(explorer) as client:
        on = Page(browser, client)
        page = on.page
        page.keyboard.press("?")
        assert page.locator("dialog[open]").is_visible()
        page.keyboard.press("Escape")
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.dataset.test") == "search-field"
        page.keyboard.press("Escape")
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        on.find("theme").click()
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert dark != before
        page.reload()
        page.wait_for_selector("[data-test=region-row]")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
        on.find("region-row").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("[data-test=region-title]")
        page.go_back()
        page.wait_for_selector("[data-test=region-table]")
        assert on.said == []


def test_without_a_model_the_page_says_so(browser: Any, explorer: Explorer) -> None:
    explorer.model = None
    explorer.__dict__.pop("lens", None)
    with served(explorer) as client:
        on = Page(browser, client)
        for view in ("#/text", "#/steer"):
            on.open(view)
            assert "--model" in on.page.locator("main").inner_text()
        on.open("#/region/2")
        expect(on.find("region-title")).to_be_visible()
        assert on.said == []


def test_the_pictures_of_the_documents_are_taken(browser: Any, real: Explorer, tmp_path: Path) -> None:
    """As scripts/screenshots.py takes them, of every page that a document shows."""
    from scripts import screenshots

    with served(real) as client:
        page = browser.new_context(viewport=screenshots.VIEWPORT).new_page()
        screenshots.take(page, f"http://127.0.0.1:{client.port}/?token={TOKEN}", tmp_path)
    shown = {path.name: path for path in screenshots.FIGURES.glob("explorer-*.png")}
    taken = {path.name: path for path in tmp_path.glob("*.png")}
    assert shown.keys() == taken.keys()
    for name, path in taken.items():
        assert path.read_bytes()[16:24] == shown[name].read_bytes()[16:24], f"{name}: its width and height"
        assert path.stat().st_size > 20_000, f"{name} is empty"
