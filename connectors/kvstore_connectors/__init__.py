"""Connectors: how inference engines reach kvstore. Each engine's modules are imported only inside its own package."""
