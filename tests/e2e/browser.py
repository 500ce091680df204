"""A real Chromium, and the page as a person uses it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.selenium import Axe
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.e2e.service import RunningService

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
IN_CHROMIUM = [  # the marks of a module whose tests need it
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (CHROMIUM and CHROMEDRIVER), reason="no Chromium here; on Debian: apt-get install chromium chromium-driver"
    ),
]
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
WAIT_S, POLL_S = 60, 0.05
KEEP_REQUESTS = """
window.sent = [];
const send = window.fetch;
window.fetch = (path, options) => {
  if (String(path).endsWith("answers")) window.sent.push(options.body);
  return send(path, options);
};
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
        wait = WebDriverWait(self.driver, WAIT_S, POLL_S, [StaleElementReferenceException])
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
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.prefer(scheme)
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def prefer(self, scheme: str) -> None:
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def slow_uploads(self) -> AbstractContextManager[None]:
        """20 KB a second leave the browser."""
        return self._network(uploadThroughput=20_000)

    def offline(self) -> AbstractContextManager[None]:
        """Nothing leaves the browser."""
        return self._network(offline=True)

    @contextmanager
    def _network(self, **conditions: object) -> Iterator[None]:
        usual = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.driver.execute_cdp_cmd("Network.enable", {})
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", usual | conditions)
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", usual)

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

    def answers(self) -> list[dict[str, Any]]:
        """Those of the conversation, as the service gave them."""
        thread = self.driver.execute_script("return sessionStorage.getItem('jamba-rag.thread')")
        return [turn["answer"] for turn in json.loads(thread)]

    def keep_requests(self) -> None:
        """From now on, for `requests`."""
        self.driver.execute_script(KEEP_REQUESTS)

    def requests(self) -> list[dict[str, Any]]:
        """What was asked of the service since `keep_requests`."""
        return [json.loads(body) for body in self.driver.execute_script("return window.sent")]


@contextmanager
def run_chromium(profile: Path) -> Iterator[Chrome]:
    os.environ.setdefault("SE_AVOID_STATS", "true")
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={profile}", "--window-size=1440,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(CHROMEDRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def tab_through(driver: Chrome, presses: int) -> set[str]:
    """Ids of what has the focus after each press of Tab, wrapping round at the end of the page."""
    driver.execute_script("document.activeElement.blur()")
    ids = set()
    for _ in range(presses):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        ids.add(driver.execute_script("return document.activeElement.id"))
    return ids
