"""The library functions behind the commands, one module a command."""
