"""The page in two tabs of one browser, and what is left when somebody signs out."""

from collections.abc import Iterator

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from tests.e2e.browser import IN_CHROMIUM, Page

pytestmark = IN_CHROMIUM


def collection_of(page: Page) -> str:
    return page.find("#collection").get_property("value")


class Tab:
    """A second tab beside `page`, signed in, on the same collection."""

    def __init__(self, page: Page) -> None:
        self.page, self.first = page, page.driver.current_window_handle
        collection = collection_of(page)
        page.driver.switch_to.new_window("tab")
        self.second = page.driver.current_window_handle
        page.sign_in(page.service.key)
        page.wait(lambda: page.find_all("#workspace") and len(Select(page.find("#collection")).options) > 1)
        Select(page.find("#collection")).select_by_value(collection)

    def go(self, handle: str) -> None:
        self.page.driver.switch_to.window(handle)


@pytest.fixture
def tabs(page: Page, handbook) -> Iterator[Tab]:
    page.add(handbook)
    tab = Tab(page)
    page.wait(lambda: page.line(handbook.name))
    yield tab
    tab.go(tab.second)
    page.driver.close()
    tab.go(tab.first)


def delete(page: Page, name: str) -> None:
    page.find(f"button[aria-label='Delete {name}']").click()
    page.find("#confirm-yes").click()
    page.wait(lambda: page.line(name) is None)


def test_a_document_deleted_in_another_tab_leaves_this_one(page, handbook, tabs):
    turn = page.ask("When is the lamp trimmed?")
    page.cite(turn)
    tabs.go(tabs.first)
    assert page.ask("When does the boat come?").find_elements(By.CSS_SELECTOR, ".cite")
    delete(page, handbook.name)
    tabs.go(tabs.second)
    page.wait(lambda: page.line(handbook.name) is None)
    page.wait(lambda: page.find_all("#source-error"))
    assert page.find("#source-error").text == "This document has been deleted."
    assert not page.find_all("#source-text *") and "trimmed" not in page.find("#source-text").text
    assert turn.find_element(By.CSS_SELECTOR, ".cite")
    assert "No document was read" in page.ask("When is the lamp trimmed?").text


def test_what_another_tab_uploads_is_here_when_one_looks(page, tmp_path, tabs):
    notes = tmp_path / "notes.txt"
    notes.write_text("The boat is green.")
    page.add(notes)
    tabs.go(tabs.first)
    page.wait(lambda: page.line(notes.name) and page.status(notes.name) == "ready")
    assert len(page.find_all("#document-list li")) == 2


def test_a_collection_deleted_in_another_tab_is_left(page, tabs):
    name = collection_of(page)
    page.find("#delete-collection").click()
    page.find("#confirm-yes").click()
    page.wait(lambda: collection_of(page) != name)
    tabs.go(tabs.first)
    page.wait(lambda: collection_of(page) != name)
    page.wait(lambda: name in page.find("#documents-error").text)
    assert page.ask("Who owns the moon?").find_elements(By.CSS_SELECTOR, ".not-found")


def test_signing_out_in_one_tab_ends_what_it_was_doing_and_nothing_else(page, tmp_path, handbook, tabs):
    large = tmp_path / "large.txt"
    large.write_text("word " * 60_000)
    with page.slow_uploads():
        page.find("#files").send_keys(str(large))
        page.wait(lambda: page.line(large.name) and "Sending" in page.line(large.name).text)
        page.find("#question").send_keys("half a question")
        page.find("#sign-out").click()
        page.driver.execute_async_script("setTimeout(arguments[0], 4500)")  # the upload would have ended by then
    assert not page.find_all("#sign-in-error, #workspace, #document-list li")
    with page.service.client() as client:
        assert large.name not in client.get("/v1/documents?limit=1000").text
    page.find("#key").send_keys(page.service.key + "\n")
    page.wait(lambda: page.find_all("#workspace"))
    assert page.find("#question").get_property("value") == "" and page.line(large.name) is None
    tabs.go(tabs.first)
    assert page.ask("When is the lamp trimmed?").find_elements(By.CSS_SELECTOR, ".cite")


def test_signing_out_while_a_document_is_read_is_no_lost_key(page, tmp_path):
    lamps = tmp_path / "lamps.txt"
    lamps.write_text("".join(f"Lamp {number} is blue.\n" for number in range(20_000)))
    page.find("#files").send_keys(str(lamps))
    page.wait(lambda: page.line(lamps.name) and page.status(lamps.name) != "sending")
    page.find("#sign-out").click()
    page.driver.execute_async_script("setTimeout(arguments[0], 2000)")  # the page would have asked for it twice
    assert not page.find_all("#sign-in-error")
