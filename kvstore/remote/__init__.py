"""Blocks in Redis: the way there (`link`, `lane`), how a block is written (`record`, `values`), which there are
(`index`, `follower`, `uses`), and both changed together (`blocks`). The tier is `kvstore.tiers.redis`.
"""
