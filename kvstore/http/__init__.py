"""HTTP: health, metrics, stats and the dashboard. Read-only, and the only place that imports aiohttp."""

from kvstore.http.server import ROUTES, HttpServer, Source, start_http

__all__ = ["ROUTES", "HttpServer", "Source", "start_http"]
