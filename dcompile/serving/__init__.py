"""Serving and bulk generation: jobs, the engine that runs them, HTTP, metrics, shipped programs.

Nothing here knows Ray: ``dcompile.integrations.serve`` and ``dcompile.integrations.bulk`` do.
"""
