"""Forks services off a process that has imported what they need, which is most of the work of starting one.

Orders come as JSON lines on standard input, each is answered by one: {"start": arguments of `jamba-rag`, "environment":
all of it, "log": file} by the process id, {"poll": process id} by the exit status or null, {"wait": process id} by it.
"""

import json
import os
import sys
from typing import Any, NoReturn

import uvicorn  # noqa: F401

import app.log
import app.main  # noqa: F401
from app.cli import main


def start(arguments: list[str], environment: dict[str, str], log: str) -> NoReturn:
    os.environ.clear()
    os.environ.update(environment)
    with open(os.devnull) as nothing, open(log, "w") as output:
        for descriptor, file in enumerate((nothing, output, output)):
            os.dup2(file.fileno(), descriptor)
    sys.argv = ["jamba-rag", *arguments]
    sys.exit(main())


def obey(order: dict[str, Any]) -> int | None:
    if "start" in order:
        return os.fork() or start(order["start"], order["environment"], order["log"])
    process, status = os.waitpid(order.get("poll") or order["wait"], os.WNOHANG if "poll" in order else 0)
    return os.waitstatus_to_exitcode(status) if process else None


if __name__ == "__main__":
    for line in iter(sys.stdin.readline, ""):
        print(json.dumps(obey(json.loads(line))), flush=True)
