"""The page with long names and many documents."""

import json

from tests.e2e.browser import IN_CHROMIUM, Page

pytestmark = IN_CHROMIUM
LONG = "annual-reports-and-contracts-of-the-northern-region"


def test_a_collection_has_the_room_for_its_name(page):
    page.make_collection(LONG[:30])
    for width in (1440, 820, 360):
        with page.screen(width):
            if width == 360:
                page.find("[data-show=documents]").click()
            shown = page.find("#collection").rect["width"]
            assert shown >= 250, width
            buttons = page.find_all("#choose-files, #choose-folder")
            assert buttons[0].rect["y"] == buttons[1].rect["y"], width
    assert page.find("#collection").get_attribute("title") == LONG[:30]
