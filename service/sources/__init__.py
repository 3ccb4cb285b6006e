"""Adapters from where they lie: places on hubs, in buckets, registries and on web servers, fetched in the background.

Every byte comes through one HTTP client (`http`), which alone checks addresses, redirects, sizes and pace; the files of
the schemes (`hub`, `objects`, `oci`, `web`) only say which files there are, and at which URL.
"""
