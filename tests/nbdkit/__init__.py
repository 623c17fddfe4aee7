"""The plugin: its parts by themselves, and as nbdkit runs it, against the programs people use."""
