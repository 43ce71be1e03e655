"""Blocks in Redis: the way there (`link`, `lane`), how a block is written (`record`, `values`), and which there are (`index`,
`follower`, `uses`), changed together (`blocks`). The tier is `kvstore.tiers.redis`.
"""
