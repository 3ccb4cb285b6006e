"""The outermost ASGI layer: what a request's head, body and pace must satisfy before anything else sees it.

Each module is one concern, as a small ASGI middleware; `service.bento.app` adds them, the outermost first.
"""
