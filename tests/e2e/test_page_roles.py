"""What the page offers to keys that may not do everything."""

from collections.abc import Callable

import pytest
from selenium.webdriver.common.keys import Keys

from tests.e2e.browser import IN_CHROMIUM, Page

pytestmark = IN_CHROMIUM
WRITES = "#delete-collection, #dropzone, .actions button"


@pytest.fixture
def sign_in_as(page: Page) -> Callable[..., Page]:
    """Sign in again, with a new key of this role on the same collection."""

    def sign_in(role: str, **bound: object) -> Page:
        name = page.find("#collection").get_property("value")
        with page.service.client() as client:
            key = client.post("/v1/keys", json={"name": role, "role": role} | bound).json()["key"]
        page.find("#sign-out").click()
        page.driver.execute_script("sessionStorage.setItem('jamba-rag.collection', arguments[0])", name)
        page.sign_in(key)
        page.wait(lambda: page.find_all("#workspace") and page.find("#collection").get_property("value") == name)
        return page

    return sign_in


def test_a_reader_is_offered_nothing_that_would_be_refused(page, handbook, sign_in_as):
    page.add(handbook)
    assert page.find_all(WRITES) and page.find_all("#new-collection") and not page.find_all(".read-only-note")
    sign_in_as("reader")
    page.wait(lambda: page.line(handbook.name) and page.find_all(".read-only-note"))
    assert not page.find_all(WRITES) and not page.find_all("#new-collection")
    assert page.ask("When is the lamp trimmed?").find_elements("css selector", ".cite")
    assert page.barriers() == []


def test_an_empty_collection_asks_no_reader_for_documents(page, sign_in_as):
    sign_in_as("reader")
    page.wait(lambda: page.find_all(".read-only-note"))
    assert page.find("#welcome-empty").text == "This collection is empty."
    assert page.find("#no-documents").text == "Nothing here yet."


def test_a_writer_of_one_collection_makes_no_other(page, handbook, sign_in_as):
    page.add(handbook)
    sign_in_as("writer", collections=[page.find("#collection").get_property("value")])
    page.wait(lambda: page.line(handbook.name))
    assert page.find_all(WRITES) and not page.find_all("#new-collection, .read-only-note")


def test_a_form_left_open_is_not_there_for_the_next_key(page):
    with page.service.client() as client:
        key = client.post("/v1/keys", json={"name": "next", "role": "reader"}).json()["key"]
    page.find("#new-collection").click()
    assert page.find_all("#new-collection-form")
    page.find("#sign-out").click()
    page.find("#key").send_keys(key, Keys.ENTER)  # on the same page, not loaded anew
    page.wait(lambda: page.find_all(".read-only-note"))
    assert not page.find_all("#new-collection-form")


def test_a_reader_without_any_collection_is_offered_no_upload(page):
    with page.service.client() as client:
        client.post("/v1/collections", json={"name": "short-lived"})
        bound = {"name": "bound", "role": "reader", "collections": ["short-lived"]}
        key = client.post("/v1/keys", json=bound).json()["key"]
        client.delete("/v1/collections/short-lived")
    page.find("#sign-out").click()
    page.sign_in(key)
    page.wait(lambda: page.find_all(".read-only-note"))
    assert not page.find_all(WRITES)
