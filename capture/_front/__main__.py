"""The command line: `layertap`, or `python -m layertap`.

Commands are loaded when they are called, so that `--help` is quick and drawing needs no framework.
"""

from __future__ import annotations

from importlib import import_module

import click
from layertap import __version__

#: Command -> (where it is, its sentence in the overview).
COMMANDS = {
    "demo": ("layertap.capture.cli_demo:demo", "Train a small network on digits, capture it and draw it."),
    "layers": ("layertap.capture.cli:layers", "List what can be captured of a model."),
    "capture": ("layertap.capture.cli:capture", "Capture layers of a model over a data set into a store."),
    "profile": ("layertap.capture.cli_profile:profile", "Measure what a capture costs, and what would help."),
    "info": ("layertap.capture.cli:info", "Say what a store holds."),
    "verify": ("layertap.capture.cli:verify", "Read all of a store and name what is damaged."),
    "pack": ("layertap.capture.cli:pack", "Pack a finished store into one zip file."),
    "render": ("layertap.render.cli:render", "Draw pictures from a store, without the model."),
    "view": ("layertap.render.cli_view:view", "Show a store as a web page: rows by layers by channels."),
    "export": ("layertap.render.cli_view:export", "Write what others can open without layertap."),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, sentence) for name, (_, sentence) in COMMANDS.items()])


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="layertap")
def main() -> None:
    """Capture the activations of neural networks, and draw them again without the model.

    \b
    layertap demo
    layertap layers torchvision:resnet18
    layertap capture torchvision:resnet18 folder:pictures run.zarr --layers 'conv1,layer*.1' --resize 224
    layertap render grid run.zarr --rows 0 --out grid.png
    """


if __name__ == "__main__":
    main(prog_name="layertap")
