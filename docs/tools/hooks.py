"""Hooks of the site's build: the command line's reference."""

from __future__ import annotations

from typing import Any

MARKER = "<!-- commands -->"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the commands, as they are declared, in place of the marker."""
    if page.file.src_uri != "reference/cli.md":
        return markdown
    return markdown.replace(MARKER, _commands())


def _commands() -> str:
    import typer

    from dcompile.cli.app import app

    group: Any = typer.main.get_command(app)
    return "\n\n".join(_command(name, group.commands[name]) for name in sorted(group.commands))


def _command(name: str, command: Any) -> str:
    argument = "".join(f" {p.name.upper()}" for p in command.params if _is_argument(p))
    lines = [f"## dcompile {name}", "", command.help or "", "", "```text"]
    lines += [f"dcompile {name} [OPTIONS]{argument}", "```", "", "| option | meaning | default |"]
    lines += ["| --- | --- | --- |"]
    lines += [_row(parameter) for parameter in command.params if parameter.name != "help"]
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    names = [parameter.name.upper()] if _is_argument(parameter) else parameter.opts
    default = parameter.default
    shown = "" if default is None or callable(default) or default is False else f"`{default}`"
    label = ", ".join(f"`{name}`" for name in names)
    return f"| {label} | {(parameter.help or '').replace('|', '/')} | {shown} |"


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")
