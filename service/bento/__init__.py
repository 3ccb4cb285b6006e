"""Everything that touches BentoML, and nothing else does.

`patches` replaces what BentoML does not let one configure, each name checked, and `app` is the service class that
`bentoml serve` loads.
"""
