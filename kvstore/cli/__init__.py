"""The command line. `main` is the entry; each command is one file and imports what it needs when it runs."""
