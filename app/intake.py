"""Handles an upload request: writes files to disk, validates fields, and queues or refuses each file.

One bad file never fails the others. Start at `accept_upload`; `RagService.submit_document` handles a single file.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import anyio.to_thread
from starlette.requests import Request

from app import schemas
from app.auth import Principal
from app.errors import InvalidRequest, UploadRefused, kind_of
from app.field_checks import plain
from app.service import RagService, ReceivedFile
from app.settings import IngestSettings
from app.uploads import BadUpload, Part, read_field, read_in_thread, read_parts
from ingest.files import FileTooLarge
from retrieval.types import Document, OnConflict, StoredReply

log = logging.getLogger(__name__)

MAX_METADATA_CHARS = 65_536
MAX_IDEMPOTENCY_KEY_CHARS = 255
_FIELDS = ("collection", "metadata", "on_conflict")


@dataclass
class UploadForm:
    """The content of a form; each file is on disk, or was refused with an error."""

    fields: dict[str, str] = field(default_factory=dict)
    files: list[ReceivedFile | tuple[str, Exception]] = field(default_factory=list)

    def digests(self) -> list[str]:
        return [file.sha256 for file in self.files if isinstance(file, ReceivedFile)]

    def fingerprint(self) -> str:
        """Equal for equal requests, regardless of the multipart boundary."""
        names = [(f.filename, f.sha256) if isinstance(f, ReceivedFile) else (f[0], str(f[1])) for f in self.files]
        return hashlib.sha256(json.dumps([sorted(self.fields.items()), names]).encode()).hexdigest()


@dataclass(frozen=True)
class UploadOptions:
    """The validated fields of an upload; `metadata` is None if not given."""

    collection: str
    metadata: dict[str, Any] | None
    on_conflict: OnConflict


async def receive_form(
    request: Request, service: RagService, principal: Principal, limits: IngestSettings
) -> UploadForm:
    """Read the whole form. Raises BadUpload, StorageFull, StorageBusy, RateLimited, after deleting its files."""
    form = UploadForm()
    await anyio.to_thread.run_sync(service.meter.charge_bytes, principal, 0)
    try:
        try:
            async for part in read_parts(request):
                await _receive_part(part, form, service, principal, limits)
            if not form.files:
                raise BadUpload("the form has no part named `file`; send at least one")
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(service.meter.save, principal)
    except BaseException:
        await _drop(service, form)
        raise
    return form


async def _receive_part(
    part: Part, form: UploadForm, service: RagService, principal: Principal, limits: IngestSettings
) -> None:
    if part.name != "file":
        if part.name not in _FIELDS:
            raise BadUpload(f"the form has an unknown field {part.name[:80]!r}; known are file, {', '.join(_FIELDS)}")
        if part.name in form.fields:
            raise BadUpload(f"the form has the field {part.name!r} twice")
        form.fields[part.name] = await read_field(part)
        return
    if part.filename is None:
        raise BadUpload("a part named `file` has no file name; send it as a file")
    if len(form.files) >= limits.max_files_per_request:
        raise BadUpload(f"more than {limits.max_files_per_request} files in one request; send them in several")
    try:
        save = service.files.save_stream
        sha256, nbytes = await read_in_thread(
            part,
            lambda pieces: save(_charge(pieces, service, principal), limits.max_file_bytes, hold=True),
            limits.max_file_bytes,
        )
        form.files.append(ReceivedFile(part.filename, sha256, nbytes))
        service.metrics.upload_bytes.inc(nbytes)
    except FileTooLarge as error:
        form.files.append((part.filename, error))


def _charge(pieces: Iterator[bytes], service: RagService, principal: Principal) -> Iterator[bytes]:
    for piece in pieces:
        service.meter.charge_bytes(principal, len(piece))
        yield piece


async def _drop(service: RagService, form: UploadForm) -> None:
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(service.release_files, form.digests())


def read_options(form: UploadForm, principal: Principal, service: RagService) -> UploadOptions:
    """Validate the fields. Raises InvalidRequest, CollectionNotFound. Blocks."""
    on_conflict = form.fields.get("on_conflict") or "skip"
    if on_conflict not in get_args(OnConflict):
        raise InvalidRequest(f"on_conflict is {on_conflict[:80]!r}, must be one of {', '.join(get_args(OnConflict))}")
    collection = service.visible_collection(form.fields.get("collection") or "default", principal)
    return UploadOptions(collection, _read_metadata(form.fields.get("metadata")), cast(OnConflict, on_conflict))


def _read_metadata(text: str | None) -> dict[str, Any] | None:
    if not text:
        return None
    if len(text) > MAX_METADATA_CHARS:
        raise InvalidRequest(f"metadata has {len(text)} characters, the limit is {MAX_METADATA_CHARS}")
    try:
        metadata = json.loads(text, parse_constant=_refuse_constant)
        plain(json.dumps(metadata, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"metadata is not JSON that can be kept: {error}") from error
    if not isinstance(metadata, dict):
        raise InvalidRequest('metadata must be a JSON object, such as {"year": 2024}')
    return metadata


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


async def accept_upload(
    request: Request, service: RagService, principal: Principal, limits: IngestSettings, idempotency_key: str | None
) -> StoredReply:
    """Store, queue and answer `POST /v1/documents`; a repeated Idempotency-Key gets the first reply again.

    Raises UploadRefused if no file was accepted, and whatever `receive_form` and `read_options` raise.
    """
    form = await receive_form(request, service, principal, limits)
    try:
        return await anyio.to_thread.run_sync(_accept_form, form, service, principal, idempotency_key)
    finally:
        await _drop(service, form)


def _accept_form(
    form: UploadForm, service: RagService, principal: Principal, idempotency_key: str | None
) -> StoredReply:
    reply_key = _reply_key(principal, idempotency_key)
    if reply_key is None:
        return _submit_files(form.files, read_options(form, principal, service), service, principal)
    with service.replies_lock:  # the same request may arrive twice at once
        if earlier := service.store.find_reply(reply_key, form.fingerprint()):
            return earlier
        reply = _submit_files(form.files, read_options(form, principal, service), service, principal)
        service.store.save_reply(reply_key, form.fingerprint(), reply)
        return reply


def _reply_key(principal: Principal, idempotency_key: str | None) -> str | None:
    if idempotency_key is None:
        return None
    if not 1 <= len(idempotency_key) <= MAX_IDEMPOTENCY_KEY_CHARS:
        raise InvalidRequest(f"Idempotency-Key must have 1 to {MAX_IDEMPOTENCY_KEY_CHARS} characters")
    return f"{principal.key_id}:{idempotency_key}"


def _submit_files(
    files: Sequence[ReceivedFile | tuple[str, Exception]],
    options: UploadOptions,
    service: RagService,
    principal: Principal,
) -> StoredReply:
    documents: list[Document] = []
    refused: list[tuple[str, Exception]] = []
    any_new = False
    max_documents = service.meter.documents_limit(principal)
    for file in files:
        if not isinstance(file, ReceivedFile):
            refused.append(file)
            continue
        try:
            document, is_new = service.submit_document(
                file, options.collection, options.metadata or {}, options.on_conflict, max_documents
            )
        except ValueError as error:
            refused.append((file.filename, error))
            continue
        documents.append(document)
        any_new |= is_new
    errors = [_describe(name, error) for name, error in refused]
    service.metrics.count_uploads(len(documents), len(refused))
    if not documents:
        raise UploadRefused(refused[0][1], [error.model_dump() for error in errors])
    service.wake_workers()
    result = schemas.UploadResult(data=[schemas.Document.model_validate(d) for d in documents], errors=errors)
    return StoredReply(202 if any_new else 200, result.model_dump_json())


def _describe(filename: str, error: Exception) -> schemas.UploadError:
    kind = kind_of(error)
    if kind.status == 500:
        log.error("cannot accept an upload", exc_info=error)
    detail = str(error) if kind.status != 500 else kind.title
    return schemas.UploadError(filename=filename[:255], code=kind.code, detail=detail)


async def accept_version(
    request: Request, service: RagService, principal: Principal, limits: IngestSettings, document_id: str
) -> tuple[Document, bool]:
    """Store and queue `PUT /v1/documents/{id}`. Raises the error with which its file was refused."""
    form = await receive_form(request, service, principal, limits)
    try:
        return await anyio.to_thread.run_sync(_accept_version, form, service, principal, document_id)
    finally:
        await _drop(service, form)


def _accept_version(
    form: UploadForm, service: RagService, principal: Principal, document_id: str
) -> tuple[Document, bool]:
    document = service.visible_document(document_id, principal)
    if unknown := form.fields.keys() - {"metadata"}:
        raise InvalidRequest(f"a new version takes file and metadata, not {min(unknown)}")
    if len(form.files) != 1:
        raise InvalidRequest(f"the form has {len(form.files)} files, a new version is exactly one")
    (file,) = form.files
    if not isinstance(file, ReceivedFile):
        raise file[1]
    result = service.submit_version(document, file, _read_metadata(form.fields.get("metadata")))
    service.wake_workers()
    return result
