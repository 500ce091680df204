"""The log as an operator's programs read it: one JSON object a line, with the id of the request it belongs to."""

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from app.log import configure_logging

pytestmark = pytest.mark.anyio

CONFIGURED = (None, "httpx", "httpcore", "uvicorn.access")


@contextmanager
def logging_as_json() -> Iterator[None]:
    """What the commands configure, on stderr; then what was there before."""
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in CONFIGURED}
    handlers, root.handlers = root.handlers, []
    try:
        configure_logging("info", "json")
        yield
    finally:
        root.handlers = handlers
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


async def test_each_line_is_one_object_with_the_id_of_its_own_request(client, monkeypatch, capsys):
    def fail(*_):
        raise KeyError("two\nlines")

    monkeypatch.setattr(client.app.state.service, "search", fail)
    with logging_as_json():
        await asyncio.gather(
            *(client.get(f"/v1/documents/doc_{n}", headers={"X-Request-ID": f"get-{n}"}) for n in range(8)),
            *(
                client.post("/v1/search", json={"query": f"{n}"}, headers={"X-Request-ID": f"failed-{n}"})
                for n in range(4)
            ),
        )
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all(line.keys() >= {"ts", "level", "logger", "message", "request_id"} for line in lines)
    access = [line for line in lines if line["logger"] == "app.access"]
    gets = {line["request_id"]: line["message"].split()[1] for line in access if line["status"] == 404}
    assert gets == {f"get-{n}": f"/v1/documents/doc_{n}" for n in range(8)}
    assert all(line["ms"] >= 0 and line["key"].startswith("key_") for line in access) and len(access) == 12
    faults = {line["request_id"]: line["exception"] for line in lines if "exception" in line}
    assert faults.keys() == {f"failed-{n}" for n in range(4)}
    assert all("Traceback" in text and "fail" in text for text in faults.values())


def test_no_message_breaks_the_line_it_is_on(capsys):
    with logging_as_json():
        logging.getLogger("app.test").warning("one\r\ntwo \u2028 “three” %s", '{"a": 1}\n', extra={"path": object})
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    told = json.loads(line)
    assert told["message"] == 'one\r\ntwo \u2028 “three” {"a": 1}\n' and told["path"] == str(object)
    assert (told["level"], told["logger"], told["request_id"]) == ("warning", "app.test", "-")


def test_what_the_server_says_to_terminals_is_left_out(capsys):
    extra = {"color_message": "Started server process [\x1b[36m%d\x1b[0m]"}  # as uvicorn does
    with logging_as_json():
        logging.getLogger("uvicorn.error").info("Started server process [%d]", 7, extra=extra)
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "Started server process [7]" and "36m" not in line
