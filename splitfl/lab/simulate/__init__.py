"""Many clients in one process, from one TOML file, with memory for those alone that have work."""
