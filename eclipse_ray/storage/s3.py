"""S3 through its own requests: put-if-absent, multipart uploads, checked reads, listings page by page."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from eclipse_ray.errors import StorageError
from eclipse_ray.storage import Entry, ObjectFile, is_hidden, join
from eclipse_ray.storage.retries import Action, ShortReadError, http_answer, retried

T = TypeVar("T")
Parameters = dict[str, Any]

# An object of up to this many bytes is written by one request, a larger one in parts of this size.
PART_BYTES = 32 * 2**20
# Most keys on one page of a listing; the limit is set by S3.
PAGE_ITEMS = 1000
# Parts of one object that are uploaded at the same time.
_PARTS_AT_ONCE = 4
# Attempts to upload one object before giving up because its uploads vanish.
_UPLOAD_TRIES = 3
# Read-ahead of an opened object.
_BUFFER_BYTES = 256 * 2**10
# Metadata key that identifies the writer. If the answer to a write is lost, the retry recognises its own object.
_WRITER = "eclipse-writer"
_IF_ABSENT: Parameters = {"IfNoneMatch": "*"}
_RENEWING = threading.Lock()

READ = Action("read", "s3:GetObject, and s3:ListBucket to tell an absent object from a forbidden one,")
WRITE = Action("write", "s3:PutObject")
LIST = Action("list", "s3:ListBucket")
DELETE = Action("remove", "s3:DeleteObject")
LIST_UPLOADS = Action("list unfinished uploads of", "s3:ListBucketMultipartUploads")
ABORT = Action("abort an unfinished upload of", "s3:AbortMultipartUpload")


class S3Folder:
    """The objects below one prefix of a bucket, or one object, through a connected s3fs filesystem."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.root = root
        self.bucket, self.prefix, _ = fs.split_path(root)

    def exists(self, key: str) -> bool:
        full = join(self.prefix, key)
        if full and self._head(key) is not None:
            return True
        page = self._request(LIST, "list_objects_v2", key, {"Prefix": full and f"{full}/", "MaxKeys": 1})
        return bool(page.get("Contents")) or not full

    def is_file(self) -> bool:
        return bool(self.prefix) and self._head("") is not None

    def read(self, key: str) -> bytes:
        return self._get(key, {})

    def open(self, key: str) -> BinaryIO:
        entry = self.entry(key)
        return io.BufferedReader(ObjectFile(self.read_part, entry), _BUFFER_BYTES)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        return self._get(key, {"Range": f"bytes={start}-{stop - 1}"})

    def read_part(self, entry: Entry, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop`. Raises StorageError if the object changed since `entry` was listed."""
        condition = {"Range": f"bytes={start}-{stop - 1}", "IfMatch": f'"{entry.version}"'}
        try:
            return self._get(entry.key, condition, stop - start)
        except FileExistsError as error:
            raise StorageError(
                f"{self._where(entry.key)}: changed while it was read; start again once nobody writes to it"
            ) from error

    def entry(self, key: str) -> Entry:
        head = self._head(key)
        if head is None:
            raise FileNotFoundError(f"{self._where(key)}: there is no such object")
        return Entry(key, int(head["ContentLength"]), str(head["ETag"]).strip('"'))

    def walk(self, prefix: str, hidden: bool) -> Iterator[Entry]:
        """Yield the objects below a folder, sorted by key.

        Amazon's listing is yielded page by page; the listing of another store is first read completely and sorted.
        Raises StorageError if Amazon's listing is out of order.
        """
        entries = self._entries(prefix, hidden)
        first = next(entries, None)
        if first is None:
            return
        entries = itertools.chain([first], entries)
        if self._lists_in_order():
            yield from _in_order(entries, self._where(prefix))
        else:
            yield from sorted(entries, key=lambda entry: entry.key)

    def _entries(self, prefix: str, hidden: bool) -> Iterator[Entry]:
        base = join(self.prefix, prefix)
        for item in self._pages(LIST, "list_objects_v2", "Contents", prefix, _NEXT_OBJECTS):
            relative = item["Key"][len(base) + 1 if base else 0 :]
            # Some tools mark a folder by an empty object whose name ends in a slash.
            if relative and not relative.endswith("/") and (hidden or not is_hidden(relative)):
                yield Entry(join(prefix, relative), int(item["Size"]), str(item["ETag"]).strip('"'))

    def _lists_in_order(self) -> bool:
        # SeaweedFS lists "a/x" before "a-b", and S3 Express has no order.
        host = urlsplit(self.fs.s3.meta.endpoint_url).hostname or ""
        return host.endswith((".amazonaws.com", ".amazonaws.com.cn")) and not self.bucket.endswith("--x-s3")

    def write(self, key: str, data: bytes) -> None:
        self._store(key, data, {})

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists; return whether this call wrote it.

        Above `PART_BYTES` some servers do not decide a race exactly: SeaweedFS 4.48 and moto 5.2 may tell several
        multipart uploads that they won, and keep the last one complete. Statuses are far smaller than that.
        """
        return self._store(key, data, _IF_ABSENT)

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._request(DELETE, "delete_object", key, {"Key": join(self.prefix, key)})

    def abort_uploads(self, prefix: str) -> int:
        count = 0
        for upload in self._pages(LIST_UPLOADS, "list_multipart_uploads", "Uploads", prefix, _NEXT_UPLOADS):
            # An upload that was just completed or aborted by somebody else no longer exists.
            with suppress(FileNotFoundError):
                target = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                self._request(ABORT, "abort_multipart_upload", prefix, target)
                count += 1
        return count

    def seconds_ahead(self) -> float:
        page = self._request(LIST, "list_objects_v2", "", {"Prefix": join(self.prefix, ""), "MaxKeys": 1})
        return time.time() - parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def _store(self, key: str, data: bytes, condition: Parameters) -> bool:
        writer = uuid.uuid4().hex
        target = {"Key": join(self.prefix, key), "Metadata": {_WRITER: writer}}
        for _ in range(_UPLOAD_TRIES):
            try:
                if len(data) <= PART_BYTES:
                    self._request(WRITE, "put_object", key, {**target, "Body": data, **condition})
                else:
                    self._put_parts(key, data, target, condition)
                return True
            except (FileExistsError, FileNotFoundError) as error:
                # Either another writer was first, or our write succeeded and its answer was lost.
                head = self._head(key)
                if head is not None and head.get("Metadata", {}).get(_WRITER) == writer:
                    return True
                if isinstance(error, FileExistsError) and head is not None:
                    return False
        raise StorageError(
            f"{self._where(key)}: {_UPLOAD_TRIES} uploads vanished before they were complete; "
            "see who aborts uploads there, then run the same command again"
        )

    def _put_parts(self, key: str, data: bytes, target: Parameters, condition: Parameters) -> None:
        upload = self._request(WRITE, "create_multipart_upload", key, target)["UploadId"]
        place = {"Key": target["Key"], "UploadId": upload}

        def put(index: int) -> Parameters:
            body = data[index * PART_BYTES : (index + 1) * PART_BYTES]
            part = {**place, "PartNumber": index + 1, "Body": body}
            return {"PartNumber": index + 1, "ETag": self._request(WRITE, "upload_part", key, part)["ETag"]}

        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
                parts = list(pool.map(put, range(-(-len(data) // PART_BYTES))))
            # This request creates the object, so it carries the condition.
            whole = {**place, "MultipartUpload": {"Parts": parts}, **condition}
            self._request(WRITE, "complete_multipart_upload", key, whole)
        except Exception:
            # If the upload cannot be aborted now, the next clean-up aborts it.
            with suppress(FileNotFoundError, StorageError):
                self._request(ABORT, "abort_multipart_upload", key, place)
            raise

    def _head(self, key: str) -> Mapping[str, Any] | None:
        parameters = {"Bucket": self.bucket, "Key": join(self.prefix, key)}

        def call() -> Mapping[str, Any]:
            try:
                return self.fs.call_s3("head_object", **parameters)
            except OSError as error:
                if (http_answer(error) or (0,))[0] in (400, 403):
                    # The answer to HEAD has no body and so no reason. The answer to GET has one.
                    self.fs.call_s3("get_object", **parameters, Range="bytes=0-0")["Body"].close()
                raise

        try:
            return self._retried(READ, key, call)
        except FileNotFoundError:
            return None

    def _get(self, key: str, condition: Parameters, size: int | None = None) -> bytes:
        parameters = {"Key": join(self.prefix, key), **condition}

        def call() -> bytes:
            response = self.fs.call_s3("get_object", parameters, Bucket=self.bucket)
            reading = _read_body(response["Body"])
            data = asyncio.run_coroutine_threadsafe(reading, self.fs.loop).result()
            expected = response["ContentLength"] if size is None else size
            if len(data) != expected:
                raise ShortReadError(f"{len(data)} bytes came, {expected} were expected")
            return data

        return self._retried(READ, key, call)

    def _pages(
        self, action: Action, method: str, field: str, prefix: str, following: Mapping[str, str]
    ) -> Iterator[Mapping[str, Any]]:
        base = join(self.prefix, prefix)
        limit = "MaxKeys" if field == "Contents" else "MaxUploads"
        parameters: Parameters = {"Prefix": base and f"{base}/", limit: PAGE_ITEMS}
        while True:
            page = self._request(action, method, prefix, parameters)
            yield from page.get(field, ())
            if not page.get("IsTruncated"):
                return
            marks = {name: page[source] for name, source in following.items() if page.get(source)}
            if marks.items() <= parameters.items():
                raise StorageError(
                    f"{self._where(prefix)}: the store says that its listing goes on but not where; nothing "
                    "was left out silently, try again or use another store"
                )
            parameters.update(marks)

    def _request(self, action: Action, method: str, key: str, parameters: Parameters) -> Mapping[str, Any]:
        return self._retried(action, key, lambda: self.fs.call_s3(method, parameters, Bucket=self.bucket))

    def _retried(self, action: Action, key: str, call: Callable[[], T]) -> T:
        used: list[Any] = [None]

        def attempt() -> T:
            used[0] = self.fs.s3
            return call()

        def renew() -> None:
            # If the credentials of many threads expire together, the first thread reconnects for all of them.
            with _RENEWING:
                if self.fs.s3 is used[0]:
                    self.fs.connect(refresh=True)

        return retried(action, self._where(key), attempt, renew, _servers())

    def _where(self, key: str) -> str:
        return f"s3://{join(self.bucket, self.prefix, key)}"


def _servers() -> str:
    """Return in words where requests go: to S3, and to the server of credentials if one is set."""
    get = os.environ.get
    found = [get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL") or "Amazon S3"]
    if relative := get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
        found.append(f"credentials from http://169.254.170.2{relative}")
    elif full := get("AWS_CONTAINER_CREDENTIALS_FULL_URI"):
        found.append(f"credentials from {full}")
    if metadata := get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        found.append(f"credentials from {metadata}")
    if get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        found.append(f"credentials from {get('AWS_ENDPOINT_URL_STS') or get('AWS_ENDPOINT_URL') or 'AWS STS'}")
    return f" at {', '.join(found)}"


_NEXT_OBJECTS = {"ContinuationToken": "NextContinuationToken"}
_NEXT_UPLOADS = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}


def _in_order(entries: Iterator[Entry], where: str) -> Iterator[Entry]:
    last = ""
    for entry in entries:
        if entry.key < last:
            raise StorageError(f"{where}: the store lists {entry.key} after {last}; report this to its makers")
        last = entry.key
        yield entry


async def _read_body(body: Any) -> bytes:
    async with body:
        return await body.read()
