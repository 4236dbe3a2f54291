"""The memory store: records in an LMDB environment that all processes of this host map."""
