"""The commands, a file for each family: `COMMANDS` and the `TYPES` that they use."""
