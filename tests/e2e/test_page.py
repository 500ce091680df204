"""The page in a real Chromium against a real service: add a document, ask, follow a citation to the words."""

import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_core_python.selenium import Axe
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.e2e.service import RunningService

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (CHROMIUM and CHROMEDRIVER), reason="no Chromium here; on Debian: apt-get install chromium chromium-driver"
    ),
]

WAIT_S = 30
WIDTHS = (1440, 1000, 360)
PDF = Path(__file__).resolve().parents[2] / "samples" / "documents" / "fr12-handbook.pdf"
HANDBOOK = """# Lighthouse handbook

## Lamps
The lamp is trimmed twice a night, at ten and at two. 🌊 After a storm the keeper checks the wick.

## Boats
The supply boat comes on the first Monday of the month.
"""
KEEP_REQUESTS = """
window.sent = [];
const send = window.fetch;
window.fetch = (path, options) => {
  if (String(path).endsWith("answers")) window.sent.push(options.body);
  return send(path, options);
};
"""
ORDERS = """# Notes
<script>document.title = "taken over"</script>
<img src="https://example.invalid/x" onerror="document.title='taken over'">
[remote](https://example.invalid) ![picture](https://example.invalid/y.png)
"""


class Page:
    """The page as a person uses it."""

    def __init__(self, driver: Chrome, service: RunningService) -> None:
        self.driver, self.service = driver, service

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector: str) -> list[WebElement]:
        return [element for element in self.driver.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed()]

    def wait(self, condition: Callable[[], object]) -> None:
        wait = WebDriverWait(self.driver, WAIT_S, ignored_exceptions=[StaleElementReferenceException])
        try:
            wait.until(lambda _: condition())
        except TimeoutException:
            console = "\n".join(entry["message"] for entry in self.driver.get_log("browser"))
            pytest.fail(f"waited {WAIT_S} s; the page shows:\n{self.find('body').text[-2000:]}\n{console}")

    def sign_in(self, key: str) -> None:
        self.driver.get(self.service.url)
        self.wait(lambda: self.find_all("#sign-in-form"))
        self.find("#key").send_keys(key, Keys.ENTER)

    def make_collection(self, name: str) -> None:
        self.find("#new-collection").click()
        self.find("#collection-name").send_keys(name, Keys.ENTER)
        self.wait(lambda: self.find("#collection").get_property("value") == name)

    def add(self, path: Path) -> WebElement:
        """Upload a file; returns its line in the list once it is ready or has failed."""
        self.find("#files").send_keys(str(path))
        self.wait(lambda: self.line(path.name) and self.status(path.name) in ("ready", "failed"))
        return self.line(path.name)

    def line(self, name: str) -> WebElement | None:
        return next((line for line in self.find_all("#document-list li") if name in line.text), None)

    def status(self, name: str) -> str | None:
        line = self.line(name)
        return line and line.get_attribute("data-status")

    @contextmanager
    def screen(self, width: int, height: int = 800, scheme: str = "light") -> Iterator[None]:
        """As on a screen of this size, for someone who likes light or dark."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def barriers(self) -> list[str]:
        """What axe finds wrong with the page as it is now."""
        found = Axe().run(self.driver)["violations"]
        return [f"{rule['id']}: {rule['help']}: {node['html'][:200]}" for rule in found for node in rule["nodes"]]

    def cite(self, turn: WebElement) -> None:
        """Follow the turn's first citation to the words, wherever they're marked."""
        turn.find_element(By.CSS_SELECTOR, ".cite").click()
        self.wait(lambda: self.find_all("#source-text mark, .page-image"))

    def ask(self, question: str) -> WebElement:
        """Returns the whole turn when the answer is complete."""
        self.find("#question").send_keys(question, Keys.ENTER)
        self.wait(lambda: self.find_all(".turn") and self.find("#ask-button").text == "Ask")
        self.wait(lambda: self.find_all(".turn")[-1].find_elements(By.CSS_SELECTOR, ".measures, .error"))
        return self.find_all(".turn")[-1]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    os.environ.setdefault("SE_AVOID_STATS", "true")
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}", "--window-size=1440,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: Chrome, service: RunningService) -> Page:
    """Signed in, in an empty collection of its own."""
    page = Page(driver, service)
    driver.get(service.url)
    driver.execute_script("sessionStorage.clear()")
    page.sign_in(service.key)
    page.wait(lambda: page.find_all("#workspace"))
    page.make_collection(f"c-{secrets.token_hex(4)}")
    return page


@pytest.fixture
def handbook(tmp_path: Path) -> Path:
    path = tmp_path / "handbook.md"
    path.write_text(HANDBOOK)
    return path


def test_citation_leads_to_its_words(page, handbook):
    page.add(handbook)
    turn = page.ask("When is the lamp trimmed?")
    quote = turn.find_element(By.CSS_SELECTOR, ".passage .quote").text
    turn.find_element(By.CSS_SELECTOR, ".cite").click()
    page.wait(lambda: page.find_all("#source-text mark"))
    marked = "".join(mark.text for mark in page.find_all("#source-text mark"))
    assert quote and " ".join(marked.split()) == " ".join(quote.split())
    assert "handbook.md" in page.find("#source-title").text
    assert "prompt tokens from the cache" in turn.text and "First word after" in turn.text


def test_citation_in_a_pdf_leads_to_the_picture_of_its_page(page):
    page.add(PDF)
    page.cite(page.ask("How high is the mast?"))
    image = page.find(".page-image")
    page.wait(lambda: image.get_property("naturalWidth") > 500)
    quote = page.find(".passage .quote").text
    assert " ".join(quote.split())[:20] in " ".join(image.get_attribute("alt").split())
    height = page.driver.execute_script("return arguments[0].clientHeight", page.find("#source-text"))
    page.find("#source-zoom").click()
    assert image.rect["width"] >= 900 and image.rect["height"] > height
    page.find("#source-view").click()
    page.wait(lambda: page.find_all("#source-text mark"))
    assert not page.find_all(".page-image, #source-zoom")
    page.find("#source-view").click()
    page.wait(lambda: page.find_all(".page-image"))
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert page.driver.switch_to.active_element.get_attribute("class") == "cite"


def test_page_without_a_picture_is_shown_as_text(page):
    page.add(PDF)
    turn = page.ask("How high is the mast?")
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/image?*"]})
    try:
        turn.find_element(By.CSS_SELECTOR, ".cite").click()
        page.wait(lambda: page.find_all("#source-text mark"))
        assert not page.find_all(".page-image, #source-view")
    finally:
        page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})


def test_follow_up_takes_the_conversation_along(page, handbook):
    page.add(handbook)
    page.driver.execute_script(KEEP_REQUESTS)
    page.ask("When is the lamp trimmed?")
    page.ask("And why?")
    assert len(page.find_all(".turn")) == 2
    page.find("#clear-thread").click()
    assert not page.find_all(".turn") and page.find_all("#welcome")
    page.ask("When does the boat come?")
    sent = [json.loads(body)["messages"] for body in page.driver.execute_script("return window.sent")]
    assert [[message["role"] for message in messages] for messages in sent] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert [message["content"] for message in sent[1][::2]] == ["When is the lamp trimmed?", "And why?"]
    assert sent[1][1]["content"]


def test_escape_closes_the_source_and_returns_the_focus(page, handbook):
    page.add(handbook)
    page.ask("When does the boat come?").find_element(By.CSS_SELECTOR, ".cite").send_keys(Keys.ENTER)
    page.wait(lambda: page.find_all("#source-text mark"))
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not page.find_all("#source")
    assert page.driver.switch_to.active_element.get_attribute("class") == "cite"


def test_second_question_uses_the_cache(page, handbook):
    page.add(handbook)
    page.ask("When is the lamp trimmed?")
    measures = page.ask("When does the boat come?").find_element(By.CSS_SELECTOR, ".measures").text
    assert not measures.partition(" · ")[2].startswith("0 of")


def test_says_when_documents_hold_no_answer(page):
    turn = page.ask("Who owns the moon?")
    assert turn.find_element(By.CSS_SELECTOR, ".not-found").text == "This is not in your documents."


def test_failed_document_says_why_and_can_go(page, tmp_path):
    broken = tmp_path / "broken.pdf"
    broken.write_bytes(b"%PDF-1.7\nthis is no PDF at all\n" * 20)
    line = page.add(broken)
    assert line.get_attribute("data-status") == "failed"
    assert len(line.find_element(By.CSS_SELECTOR, ".state").text) > 10
    assert page.find_all(f"button[aria-label='Retry {broken.name}']")
    page.find(f"button[aria-label='Delete {broken.name}']").click()
    page.find("#confirm-yes").click()
    page.wait(lambda: page.line(broken.name) is None)


def test_document_read_in_part_says_what_is_missing(page, tmp_path):
    path = tmp_path / "lamps.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lamps.txt", "The lamp is trimmed twice a night.")
        archive.writestr("photo.png", b"\x89PNG\r\n\x1a\n")
    line = page.add(path)
    note = line.find_element(By.CSS_SELECTOR, ".note")
    assert line.get_attribute("data-status") == "ready" and note.is_displayed()
    assert note.text.startswith("Read only in part: 1 of 2 files") and "photo.png" in note.text
    assert note.text in page.find("#announcer").get_property("textContent")
    assert page.barriers() == []


def test_refused_file_says_why(page, tmp_path):
    program = tmp_path / "program.bin"
    program.write_bytes(bytes(range(256)) * 40)
    assert "upload" not in (page.add(program).find_element(By.CSS_SELECTOR, ".state").text or "upload")


def test_nothing_of_a_document_runs_or_is_fetched(page, tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text(ORDERS)
    page.add(notes)
    page.driver.get_log("browser")
    page.find("#document-list .link").click()
    page.wait(lambda: "onerror" in page.find("#source-text").text)
    page.ask("What do the notes say?")
    assert page.driver.title == "Jamba RAG"
    assert page.driver.find_elements(By.CSS_SELECTOR, "img, iframe, script:not([src]), a[href^=http]") == []
    fetched = page.driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in fetched if not name.startswith(page.service.url)] == []
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_reload_keeps_the_answers(page, handbook):
    page.add(handbook)
    answer = page.ask("When is the lamp trimmed?").find_element(By.CSS_SELECTOR, ".answer").text
    page.driver.refresh()
    page.wait(lambda: page.find_all(".turn"))
    assert page.find(".turn .answer").text == answer


def test_wrong_key_is_refused(driver, service):
    page = Page(driver, service)
    driver.get(service.url)
    driver.execute_script("sessionStorage.clear()")
    page.sign_in("not-a-key")
    page.wait(lambda: page.find_all("#sign-in-error"))
    assert not page.find_all("#workspace")


@pytest.mark.parametrize("width", WIDTHS)
def test_fits_the_screen(page, handbook, width):
    page.add(handbook)
    page.ask("When is the lamp trimmed?")
    with page.screen(width):
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
        controls = page.find_all("button, select, textarea")
        assert [control.text for control in controls if control.rect["x"] + control.rect["width"] > width] == []


def test_every_control_has_a_name(page, handbook):
    page.add(handbook)
    page.ask("When is the lamp trimmed?").find_element(By.CSS_SELECTOR, ".cite").click()
    page.wait(lambda: page.find_all("#source-text mark"))
    controls = page.find_all("button, input, select, textarea, progress, [role=region], aside, section, nav")
    assert [control.get_attribute("outerHTML") for control in controls if not control.accessible_name] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_no_barrier(page, handbook, width, scheme):
    with page.screen(width, scheme=scheme):
        assert page.barriers() == []
        page.driver.execute_script("document.querySelector('[data-show=documents]').click()")
        page.add(handbook)
        page.add(PDF)
        assert page.barriers() == []
        page.driver.execute_script("document.querySelector('[data-show=ask]').click()")
        page.cite(page.ask("How high is the mast?"))
        assert page.barriers() == []
        page.find("#source-close").click()
        page.driver.execute_script("document.querySelector('#document-list .link').click()")
        page.wait(lambda: page.find("#source-text").text)
        assert page.barriers() == []
        page.find("#source-close").click()
        page.find("#sign-out").click()
        assert page.barriers() == []
