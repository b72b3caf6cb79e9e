"""Who owns what: experts, tensor-parallel shards, token routing, and the checks of each."""
