"""Adapters in buckets: `s3://` and `gs://`, as a folder or a .tar.

obstore knows the rules by which requests are signed and where credentials lie; the signed URLs are then fetched as all
others are, so that addresses, sizes and pace are checked here, too.
"""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import GCSStore, S3Store

from service.sources.credentials import SETTING, Credentials
from service.sources.locations import Location
from service.sources.transfer import Client, RemoteFile
from service.sources.web import ARCHIVE, list_names

VALID = timedelta(hours=1)
"""How long a URL may be used: each attempt has a new one."""
ANONYMOUS = {"access_key_id": "-", "secret_access_key": "-"}
GCS = "https://storage.googleapis.com"


async def find_files(location: Location, credentials: Credentials, client: Client) -> list[RemoteFile]:
    """The files of an adapter in a bucket, at URLs signed by the credentials: those given, else of the environment."""
    place = location.place
    keys = ["/".join(filter(None, (*place.path, name))) for name in list_names(location)]
    try:
        urls = [await _sign(place.scheme, place.host, key, credentials) for key in keys]
    except (BaseError, ValueError, TypeError) as error:  # its text holds more than one would show
        fault = f"no URL could be signed ({type(error).__name__}); check {SETTING}, or skip_signature = true there"
        raise client.reject(fault) from error
    return [RemoteFile(url, name or ARCHIVE) for url, name in zip(urls, list_names(location), strict=True)]


async def _sign(scheme: str, bucket: str, key: str, credentials: Credentials) -> str:
    config, endpoint = dict(credentials.options), credentials.endpoint
    is_open = bool(config.pop("skip_signature", False))
    if scheme == "gs":
        if is_open:
            return f"{endpoint or GCS}/{bucket}/{key}"
        place: Any = config | ({"base_url": endpoint} if endpoint else {})
        options: Any = {"allow_http": endpoint.startswith("http://")}
        return await obstore.sign_async(GCSStore(bucket, config=place, client_options=options), "GET", key, VALID)
    if is_open:
        credentials = replace(credentials, options=config | ANONYMOUS)
    url = await obstore.sign_async(open_s3(bucket, credentials), "GET", key, VALID)
    return url.partition("?")[0] if is_open else url


def open_s3(bucket: str, credentials: Credentials, *, client_options: Any = None, **options: Any) -> S3Store:
    """obstore's store of a bucket, for these credentials, or those of the environment; further `options` are its own.

    Plain HTTP is used where the endpoint says so.
    """
    endpoint = credentials.endpoint
    config: Any = dict(credentials.options) | ({"endpoint": endpoint} if endpoint else {})
    client: Any = {"allow_http": endpoint.startswith("http://"), **(client_options or {})}
    return S3Store(bucket, config=config, client_options=client, **options)
