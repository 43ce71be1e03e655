"""Blocks in Redis: how one is written (`record`), and which are there (`index`). The tier is `kvstore.tiers.redis`."""
