"""Serve checkpoints over HTTP: ``python serve/app.py checkpoints=[runs/a,runs/b]``.

Also what Serve's own commands import: ``serve run serve.app:build checkpoint=runs/a`` (gateway and models in one
application), and ``serve deploy serve/config.yaml`` (``gateway`` and ``model``, each an application).
"""

from __future__ import annotations

from typing import Any

from avray.cli import APP, compose, run_command
from avray.config import AppSettings


def main(settings: AppSettings) -> str:
    """Serve until interrupted; with ``cluster=`` load into, or unload from, the server that runs there."""
    from avray.serving.environment import set_environment

    set_environment(settings.serve.proxy if settings.cluster is None else None)
    from avray.serving import launch

    return launch.run(settings)


def build(args: dict[str, Any]) -> Any:
    """Gateway and models in one application."""
    from avray.serving import launch

    settings = _settings(args)
    models = {model.name: launch.model_app(model, settings.serve) for model in launch.models_of(settings)}
    return launch.gateway_app(settings.serve, models)


def gateway(args: dict[str, Any]) -> Any:
    """The gateway alone; it finds the applications named ``model-…`` by itself."""
    from avray.serving import launch

    return launch.gateway_app(_settings(args).serve)


def model(args: dict[str, Any]) -> Any:
    """One model; its application is to be named ``model-<name>``."""
    from avray.serving import launch

    settings = _settings(args)
    [named] = launch.models_of(settings)
    return launch.model_app(named, settings.serve)


def _settings(args: dict[str, Any]) -> AppSettings:
    """``{"checkpoint": "runs/a", "serve.replica.slots": 8}`` is the command line ``checkpoint=runs/a …``."""
    return compose(APP, [f"{key}={value}" for key, value in args.items()])


if __name__ == "__main__":
    run_command(main, APP)
