"""The command line: kvray dashboard install, uninstall, status, grafana."""

from __future__ import annotations

import msgspec
import typer
from rich.console import Console

from cluster.client import AsJson
from cluster.ray_dashboard import install as installing
from cluster.ray_dashboard.install import RAY_VERSION, DashboardState

dashboard_app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The placement page on Ray's own dashboard, and a dashboard for Grafana.",
)

_out = Console(highlight=False, soft_wrap=True, emoji=False)


@dashboard_app.command()
def install(as_json: AsJson = False) -> None:
    """Have the Ray of this Python show the placement page at /kvray of its dashboard, once it is started anew."""
    _tell(installing.install(), as_json=as_json)


@dashboard_app.command()
def uninstall(as_json: AsJson = False) -> None:
    """Have it show the page no more."""
    _tell(installing.uninstall(), as_json=as_json)


@dashboard_app.command()
def status(as_json: AsJson = False) -> None:
    """Say whether the page is installed, and for which Ray it is."""
    _tell(installing.state(), as_json=as_json)


@dashboard_app.command()
def grafana() -> None:
    """Print a dashboard for Grafana, as JSON; where Ray's UI is to show it, docs/CACHE_PAGE.md says."""
    from cluster.ray_dashboard.grafana import dashboard_json

    print(dashboard_json())  # noqa: T201 - machine-readable output


def _tell(state: DashboardState, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(state), indent=2).decode())  # noqa: T201
        return
    if state.is_installed:
        line = f"installed in {state.folder}: Ray's dashboard shows the placement page at /kvray when it starts"
    elif state.files:
        line = f"not whole, or of another kvray, in {state.folder}: kvray dashboard install puts it right"
    else:
        line = f"not installed in {state.folder}"
    if not state.fits:
        line += f"; Ray is {state.ray_version or 'not there'}, and the page is for {RAY_VERSION}"
    _out.print(line, markup=False)
