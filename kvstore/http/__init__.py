"""HTTP: health, metrics, stats, actions and the dashboard. The only place that imports aiohttp."""

from kvstore.http.face import Face, Operator, Places, Rules, Source
from kvstore.http.routes import TABLE, Route
from kvstore.http.server import HttpServer, start_http

__all__ = ["TABLE", "Face", "HttpServer", "Operator", "Places", "Route", "Rules", "Source", "start_http"]
