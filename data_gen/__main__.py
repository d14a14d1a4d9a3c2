"""`python -m data_gen`: the same as `sublim generate`."""

from __future__ import annotations

import sys

import click

from data_gen.command import generate
from sublim_plugin.core.errors import SublimError

try:
    generate(prog_name="python -m data_gen")
except SublimError as error:
    click.echo(f"data_gen: {error}", err=True)
    sys.exit(error.exit_code)
