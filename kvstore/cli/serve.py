"""`kvstore serve`: run the daemon."""

from __future__ import annotations

from kvstore.cli.flags import AllFlags, ConfigFile, Flags, settings


def serve(*, config: ConfigFile = None, flags: AllFlags = Flags()) -> int:  # noqa: B008 - frozen
    """Run the daemon until Ctrl-C or SIGTERM.

    Works without any flag.

    Each setting can also stand in the environment (KVSTORE_HOST_BYTES=8GiB)
    or in a TOML file ([host] bytes = "8GiB"). Flags win over the environment,
    the environment over the file. `kvstore config show` tells what came from
    where.
    """
    loaded = settings(config, flags)
    from kvstore import process

    return process.run(loaded)
