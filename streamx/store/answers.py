"""What the failures of a service mean, in our words: trying again may help, or not, and why."""

from __future__ import annotations

import re

from streamx.errors import IntegrityError, StorageError
from streamx.store.location import RESTORE

# What a 404 means: to who reads an object, and to who needs no more than the bucket.
NO_OBJECT = (IntegrityError, "object is missing", RESTORE)
NO_BUCKET = (StorageError, "there is no such bucket", "make it, or check the URL")
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


class ShortAnswer(Exception):
    """Fewer bytes than were asked for."""


def final_error(error: Exception, where: str, credentials: str) -> Exception | None:
    """What the error is if trying again is no use; None if it may be."""
    from obstore import exceptions

    if isinstance(error, (exceptions.AlreadyExistsError, exceptions.PreconditionError)):
        return error
    text, status = str(error), status_of(error)
    denied = isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError))
    if denied or status in (401, 403):
        return StorageError(f"access is denied ({reason(error)})", where=where, fix=credentials)
    if "/latest/api/token" in text or "metadata.google.internal" in text or "/identity/oauth2" in text:
        return StorageError("there are no credentials", where=where, fix=credentials)
    if status == 416:
        return IntegrityError("object is cut short", where=where, fix=RESTORE)
    passing = status is None or status >= 500 or status in (408, 409, 429) or "<Code>RequestTimeout<" in text
    if passing and isinstance(error, exceptions.GenericError):
        return None
    return StorageError(
        f"the request failed ({reason(error)})", where=where, fix="check the URL and settings"
    )


def status_of(error: Exception) -> int | None:
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found.group(1)) if found else None


def reason(error: Exception) -> str:
    """A few words of an error, none of which can be an address, a header or a key."""
    text = str(error)
    status, code = re.search(r"status code: (\d{3}[ \w]*)", text), re.search(r"<Code>(\w+)</Code>", text)
    if status:
        return status.group(1).strip() + (f", {code.group(1)}" if code else "")
    known = ("timed out", "connection closed", "Connection reset", "Connection refused", "end of file")
    return next((words for words in known if words.lower() in text.lower()), type(error).__name__)
