"""A load to look at: prompts as engines make them, of a system prompt, one of 60 documents, and a question.

python bench/browser/load.py SOCKET SECONDS
"""

from __future__ import annotations

import random
import sys
import threading
import time

from kvstore import BlockHeader, KVStoreClient, Namespace
from kvstore.keys import prefix_keys
from kvstore.types import Miss

BLOCK_BYTES = 1 << 20
DOCUMENTS = 60


def engine(seed: int, address: str, seconds: float) -> None:
    """One engine that loads what there is, computes the rest, and stores it."""
    chance = random.Random(seed)
    model, tenant = (("Qwen3-8B", ""), ("Llama-3.1-8B", "acme"))[seed % 2]
    namespace = Namespace(model=model, dtype="bfloat16", layers=36, tenant=tenant)
    weights = [1 / (i + 1) ** 0.9 for i in range(DOCUMENTS)]
    data = bytes(BLOCK_BYTES)
    end = time.monotonic() + seconds
    with KVStoreClient(address, namespace=namespace) as kv:
        while time.monotonic() < end:
            document, length = chance.choices(range(DOCUMENTS), weights)[0], chance.randint(3, 10)
            tokens = [seed % 2] * 512 + [1000 + document] * (256 * length) + [chance.randint(0, 9999)] * 256
            keys = prefix_keys(namespace, tokens)
            with kv.lease(keys) as lease:
                hits = next((i for i, block in enumerate(lease.blocks) if isinstance(block, Miss)), len(keys))
                time.sleep(0.03 * chance.random())
            time.sleep(0.02 * (len(keys) - hits))  # computing takes longer than loading
            parents = dict(zip(keys, [b"", *keys], strict=False))
            kv.put_many([(key, data, BlockHeader(parent=parents[key])) for key in keys[hits:]])
            time.sleep(0.05)


def main() -> None:
    address, seconds = sys.argv[1], float(sys.argv[2])
    engines = [threading.Thread(target=engine, args=(seed, address, seconds)) for seed in range(3)]
    for each in engines:
        each.start()
    for each in engines:
        each.join()


if __name__ == "__main__":
    main()
