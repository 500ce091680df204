"""What the page says when the model finds no answer in the documents, and how one goes on from there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.e2e.browser import IN_CHROMIUM
from tests.e2e.service import RunningService, run_service

pytestmark = IN_CHROMIUM

SAID = "This is not in your documents."
PDF = Path(__file__).resolve().parents[2] / "samples" / "documents" / "fr12-handbook.pdf"


@pytest.fixture(scope="module")
def service(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """With this margin a random model always refuses."""
    with run_service(checkpoint, tmp_path_factory.mktemp("data"), ANSWERS__NONE_MARGIN="-50") as running:
        yield running


def passages(turn: WebElement) -> list[WebElement]:
    return turn.find_elements(By.CSS_SELECTOR, "ol[aria-label='Nearest passages'] .passage")


def words(text: str) -> list[str]:
    return text.split()


def test_says_so_plainly_and_leads_to_the_nearest_passages(page, tmp_path):
    texts = {
        f"{name}.txt": f"The {name} was painted by the keeper in May." for name in ("boat", "door", "roof", "wall")
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.write_text(f"{'Nothing of note happened. ' * 3}\n\n{text}")
        page.add(path)
    turn = page.ask("What is the price of tea?")
    assert turn.find_element(By.CSS_SELECTOR, ".answer").text == SAID
    assert page.find("#announcer").get_property("textContent") == SAID
    assert not turn.find_elements(By.CSS_SELECTOR, ".cite")
    assert "The nearest passages" in turn.text and len(passages(turn)) == 3
    for passage in passages(turn):
        name = passage.find_element(By.CSS_SELECTOR, ".where").text
        passage.click()
        page.wait(lambda name=name: page.find("#source-title").text == name and page.find_all("#source-text mark"))
        marked = "".join(mark.text for mark in page.find_all("#source-text mark"))
        assert texts[name] in marked and words(marked) == words(passage.find_element(By.CSS_SELECTOR, ".quote").text)
        page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        assert page.driver.switch_to.active_element == passage
    assert page.barriers() == []


def test_a_nearest_passage_of_a_pdf_opens_on_its_page(page):
    page.add(PDF)
    passage = passages(page.ask("What is the price of tea?"))[0]
    number = re.search(r"pages? (\d+)", passage.find_element(By.CSS_SELECTOR, ".where").text)[1]
    passage.click()
    page.wait(lambda: page.find_all(".page-image"))
    assert page.find(".page-image").get_attribute("alt") == f"Page {number}. The passage is marked on it."


def test_a_follow_up_takes_along_that_nothing_was_found(page, handbook):
    page.add(handbook)
    page.ask("What is the price of tea?")
    page.keep_requests()
    page.ask("And of coffee?")
    (request,) = page.requests()
    (first, question), (second, answer), (third, follow_up) = (one.values() for one in request["messages"])
    assert [first, second, third] == ["user", "assistant", "user"] and answer == page.answers()[0]["text"]
    assert [question, follow_up] == ["What is the price of tea?", "And of coffee?"]


def test_a_nearest_passage_names_its_heading_once(page):
    script = "return (await import('/web/ask.js')).withoutHeading(arguments[0])"
    shown = lambda text, *path: page.driver.execute_script(script, {"text": text, "location": {"heading_path": path}})
    assert shown("## Boats\nThe boat comes.", "Handbook", "Boats") == "The boat comes."
    assert shown("3.2 **Height**\nTen metres.", "3.2 Height") == "3.2 **Height**\nTen metres."
    assert shown("Boats", "Boats") == "Boats" and shown("The boat.") == "The boat."
    assert shown("Boatswains sleep here.", "Boats") == "Boatswains sleep here."
    assert shown("Boats sail\nat noon.", "Boats") == "Boats sail\nat noon."
