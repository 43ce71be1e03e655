#!/bin/sh
# What the image starts. `serve` (the default) runs the daemon, `healthy` asks whether it is ready, and anything else is
# a command of kvstore. The daemon is started by exec, so that signals reach it.
set -eu
umask 077

say() { echo "kvstore-entrypoint: $*" >&2; }

# The socket's directory is made below the mounted one: a volume of Kubernetes is writable by everybody in the pod, and
# the daemon refuses to listen where others could put a socket of theirs.
prepare() {
    socket="${KVSTORE_SOCKET:-/run/kvstore/private/kvstore.sock}"
    place="$(dirname "$socket")"
    if ! mkdir -p "$place" 2>/dev/null; then
        say "cannot make $place as user $(id -u): mount a directory this user may write to, or set KVSTORE_SOCKET"
        exit 2
    fi
    disk="${KVSTORE_DISK_PATH:-}"
    if [ -n "$disk" ] && [ "${KVSTORE_DISK_BYTES:-}" != 0 ] && ! mkdir -p "$disk" 2>/dev/null; then
        say "cannot make $disk as user $(id -u): mount a volume there, or set KVSTORE_DISK_BYTES=0"
        exit 2
    fi
}

healthy() {
    address="${KVSTORE_HTTP_ADDRESS:-${KVSTORE_HTTP:-127.0.0.1:7070}}"
    exec python -c '
import sys, urllib.request
port = sys.argv[1].rpartition(":")[2]
try:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
        print(answer.read().decode())
except OSError as error:
    sys.exit(f"not ready: {error}")
' "$address"
}

case "${1:-serve}" in
healthy)
    healthy
    ;;
serve)
    [ $# -gt 0 ] && shift
    prepare
    exec kvstore serve "$@"
    ;;
-*)
    prepare
    exec kvstore serve "$@"
    ;;
*)
    exec kvstore "$@"
    ;;
esac
