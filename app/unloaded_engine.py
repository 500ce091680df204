"""Replaces the engine in commands that ask no questions."""

from model.engine_request import EngineRequest, StepOutput
from model.engine_thread import EngineStopped


class UnloadedEngine:
    """An `Engine` that refuses all requests."""

    def add(self, request: EngineRequest) -> str:
        raise EngineStopped("this command runs without the model")

    def step(self) -> list[StepOutput]:
        return []

    def abort(self, request_id: str) -> None:
        pass

    def has_work(self) -> bool:
        return False

    def prepare(self) -> bool:
        return False
