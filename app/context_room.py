"""Checks at startup that the configured context can hold at least a short question."""

from app.prompting import AnswerFormat
from app.setting_groups import MIN_EVIDENCE_TOKENS
from app.settings import Settings, SettingsError


def check_room(prompt_format: AnswerFormat, settings: Settings) -> None:
    """Raises SettingsError if not even a short question about a short passage fits."""
    room, output = prompt_format.max_context_tokens, settings.answers.max_output_tokens
    needed = prompt_format.count_prompt("?") + MIN_EVIDENCE_TOKENS + output
    if room >= needed:
        return
    given, state = settings.model.max_context_tokens, settings.model.state_max_bytes
    if given and given == room:
        cause = f"JAMBA_RAG_MODEL__MAX_CONTEXT_TOKENS={given} is"
    elif state:
        cause = f"JAMBA_RAG_MODEL__STATE_MAX_BYTES={state} holds {room} tokens, which is"
    else:
        cause = f"the model takes {room} tokens here, which is"
    raise SettingsError(
        f"{cause} too little to answer a question: instructions, {MIN_EVIDENCE_TOKENS} tokens of documents and an "
        f"answer of JAMBA_RAG_ANSWERS__MAX_OUTPUT_TOKENS={output} need {needed}; raise it or let answers be shorter"
    )
