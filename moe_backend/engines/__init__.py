"""Everything that knows an engine's private names, each with the versions it was checked on."""
