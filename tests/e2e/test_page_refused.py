"""What the page says where a question is refused or does not get through, and how one goes on from there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.e2e.browser import IN_CHROMIUM
from tests.e2e.service import RunningService, run_service

pytestmark = IN_CHROMIUM


@pytest.fixture(scope="module")
def service(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with run_service(checkpoint, tmp_path_factory.mktemp("data"), ANSWERS__MAX_QUESTION_TOKENS="900") as running:
        yield running


def test_a_question_that_is_too_long_can_be_shortened(page):
    question = " ".join(f"{number} lamps" for number in range(300))
    page.driver.execute_script("document.getElementById('question').value = arguments[0]", question)
    turn = page.ask("?")
    assert "the limit is 900" in turn.find_element(By.CSS_SELECTOR, ".error").text
    assert page.find("#question").get_property("value") == question + "?"
    assert turn.find_element(By.CSS_SELECTOR, "h3").size["height"] < 250
    assert page.barriers() == []
    page.find("#question").clear()


def test_a_service_that_is_away_is_told_in_words(page):
    with page.offline():
        turn = page.ask("Who?")
        page.wait(lambda: "The service cannot be reached" in turn.find_element(By.CSS_SELECTOR, ".error").text)
    assert page.find("#question").get_property("value") == ""


def test_a_name_that_was_refused_is_forgotten_with_its_form(page):
    page.find("#new-collection").click()
    page.find("#collection-name").send_keys("two words", Keys.ENTER)
    page.wait(lambda: page.find("#documents-error").is_displayed())
    page.find("#collection-name").send_keys(Keys.ESCAPE)
    assert not page.find("#documents-error").is_displayed()
