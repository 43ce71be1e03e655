"""vLLM connector: prefix reuse through kvstore.

`register` is the ``vllm.general_plugins`` entry point, so users only write ``"kv_connector": "KVStoreConnector"``.
"""

NAME = "KVStoreConnector"


def register() -> None:
    """Make the connector known to vLLM by name. Runs in every vLLM process, sometimes more than once."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "kvstore_connectors.vllm.connector", NAME)
