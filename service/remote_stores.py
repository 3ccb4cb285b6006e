"""The shared place of replicas as stores of this server."""

from pathlib import Path

from service.bucket import Bucket, BucketRemote
from service.settings import Settings
from service.shared_store import FolderRemote, Remote, SharedStore

BUCKET = "://"
"""Marks a FUSION_STORE that is not a folder."""
UNLIMITED = 2**63 - 1


def open_bucket(settings: Settings) -> Bucket:
    """The bucket in FUSION_STORE."""
    credentials, timeout_s = settings.source_credentials, settings.source_timeout_s
    return Bucket(settings.store, credentials_file=credentials, timeout_s=timeout_s)


def open_shared_store(
    settings: Settings,
    local: Path,
    folder: str = "adapters",
    *,
    budget_bytes: int = UNLIMITED,
    only_reads: bool = False,
) -> SharedStore | None:
    """What replicas share under the name `folder`, copied to `local` when it is used; None for a server alone."""
    if not settings.store:
        return None
    remote: Remote
    if BUCKET in settings.store:
        remote = BucketRemote(open_bucket(settings), folder, budget_bytes=budget_bytes)
    else:
        remote = FolderRemote(Path(settings.store, folder), budget_bytes=budget_bytes)
    return SharedStore(local / folder, remote, budget_bytes=budget_bytes, only_reads=only_reads)
