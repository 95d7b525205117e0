"""`puna launch`: prints what starts a recipe on many machines."""

from typing import Annotated

import typer

from puna.cli import app
from puna.cli.train import Overrides, Recipe


@app.command()
def launch(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(help="Devices of each machine.")] = ...,  # type: ignore[assignment]
    format: Annotated[str, typer.Option(help="shell, slurm or kubernetes.")] = "shell",
    master_addr: Annotated[
        str | None, typer.Option(help="The first machine's name or address; a shell on several needs it.")
    ] = None,
    port: Annotated[int, typer.Option(help="Where the machines meet, on the first one.")] = 29500,
    max_restarts: Annotated[int, typer.Option(help="How often all start again after one has died.")] = 3,
    min_nodes: Annotated[int | None, typer.Option(help="Go on with so many machines where others are lost.")] = None,
    image: Annotated[str | None, typer.Option(help="Container image with puna; Kubernetes needs it.")] = None,
    claim: Annotated[
        str | None, typer.Option(help="Kubernetes volume claim with data and runs; puna if not given.")
    ] = None,
) -> None:
    """Print what starts RECIPE on many machines; start nothing."""
    from puna.launch import launch

    text = launch(
        recipe,
        overrides,
        nodes=nodes,
        gpus=gpus,
        format=format,
        master_addr=master_addr,
        port=port,
        max_restarts=max_restarts,
        min_nodes=min_nodes,
        image=image,
        claim=claim,
    )
    print(text, end="")
