"""All commands of the command line by name; the group itself imports each one when it is asked for."""

from __future__ import annotations

import click

from nvfp4_prep.cli import cli


def all_commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


COMMANDS = all_commands()
