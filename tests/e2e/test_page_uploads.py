"""The page while files are on their way: cancelled, failed, deleted elsewhere, asked about too early."""

from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from tests.e2e.browser import IN_CHROMIUM

pytestmark = IN_CHROMIUM


def test_says_when_documents_that_may_hold_the_answer_are_still_on_their_way(page, tmp_path):
    large = tmp_path / "not-yet-here.txt"
    large.write_text("word " * 200_000)
    with page.slow_uploads():
        page.find("#files").send_keys(str(large))
        page.wait(lambda: page.line(large.name))
        assert "still being read" in page.ask("Who owns the moon?").text
        page.find(f"button[aria-label='Cancel {large.name}']").click()


def test_says_so_of_an_answer_too_and_counts_what_is_ready(page, tmp_path, handbook):
    page.add(handbook)
    large = tmp_path / "not-yet-here.txt"
    large.write_text("word " * 200_000)
    with page.slow_uploads():
        page.find("#files").send_keys(str(large))
        page.wait(lambda: "1 of 2 documents ready" in page.find("#collection-facts").text)
        turn = page.ask("When is the lamp trimmed?")
        assert turn.find_elements(By.CSS_SELECTOR, ".cite") and "still being read" in turn.text
        page.find(f"button[aria-label='Cancel {large.name}']").click()
    page.wait(lambda: "1 document ·" in page.find("#collection-facts").text)


def test_what_failed_counts_among_the_documents_too(page, tmp_path, handbook):
    page.add(handbook)
    empty, large = tmp_path / "empty.txt", tmp_path / "not-yet-here.txt"
    empty.write_text("")
    large.write_text("word " * 200_000)
    with page.slow_uploads():
        page.find("#files").send_keys(f"{empty}\n{large}")
        page.wait(lambda: "1 of 3 documents ready · 1 failed" in page.find("#collection-facts").text)
        page.find(f"button[aria-label='Cancel {large.name}']").click()


def test_an_upload_can_be_cancelled(page, tmp_path, handbook):
    large = tmp_path / "large.txt"
    large.write_text("word " * 400_000)
    with page.slow_uploads():
        page.find("#files").send_keys(str(large))
        page.wait(lambda: page.line(large.name) and "Sending" in page.line(large.name).text)
        page.find(f"button[aria-label='Cancel {large.name}']").click()
        page.wait(lambda: page.line(large.name) is None)
    assert page.add(handbook).get_attribute("data-status") == "ready"
    with page.service.client() as client:
        assert large.name not in client.get("/v1/documents").text


def test_a_document_deleted_elsewhere_leaves_the_list(page, handbook):
    page.add(handbook)
    with page.service.client() as client:
        collection = page.find("#collection").get_property("value")
        (document,) = client.get("/v1/documents", params={"collection": collection}).json()["data"]
        client.delete(f"/v1/documents/{document['id']}").raise_for_status()
    page.find(f"button[aria-label='Delete {handbook.name}']").click()
    page.find("#confirm-yes").click()
    page.wait(lambda: page.line(handbook.name) is None)
    assert not page.find_all("#documents-error")


def test_the_list_of_collections_stays_as_it_is_when_none_comes_or_goes(page, handbook):
    facts, option = page.find("#collection-facts").text, page.find("#collection option:checked")
    page.add(handbook)
    page.wait(lambda: page.find("#collection-facts").text != facts)
    assert option.is_selected()  # and is not another one in its place


def test_an_upload_that_failed_is_still_there_after_a_look_at_another_collection(page, tmp_path):
    program = tmp_path / "program.bin"
    program.write_bytes(bytes(range(256)) * 40)
    page.add(program)
    mine = page.find("#collection").get_property("value")
    Select(page.find("#collection")).select_by_value("default")
    page.wait(lambda: page.line(program.name) is None)
    Select(page.find("#collection")).select_by_value(mine)
    page.wait(lambda: page.line(program.name) and page.status(program.name) == "failed")
