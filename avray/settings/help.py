"""The text of ``--help``: what a command is for, its most used keys, its groups, examples."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from avray.settings.convert import did_you_mean
from avray.settings.describe import Described, describe

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"

_FLAGS = """\
  --help [GROUP]         this text, or every key of one group (--help data)
  --cfg job [--resolve]  print the whole configuration and stop
  --multirun             run each of several values: trainer.optimizer.lr=1e-3,3e-4
  --config-dir DIR       YAML of your own beside avray's: with DIR/family/mine.yaml, family=mine
  --config-path DIR, --config-name NAME   a root configuration of your own
  --hydra-help           Hydra's other flags"""

_OWN_CODE = """\
  family=own family._target_=mypackage.MyFamily family.width=64 takes a class of yours, as trainer.hooks does.
  AVRAY_DEBUG=1 shows the traceback behind an error, AVRAY_CACHE says where encoded data goes.
  Exit codes: 0 done, 2 bad settings, 3 bad data, 4 missing weights or tool, 5 training failed, 130 interrupted."""


@dataclass(frozen=True)
class Command:
    """One command: its root in ``avray/conf``, its settings, and what its help says."""

    name: str
    """Of its YAML and of the script."""
    settings: type
    summary: str
    keys: tuple[str, ...]
    """The most used ones, in the order to show them."""
    examples: tuple[str, ...]
    folder: str = "pipelines"
    """Of the script."""
    extra_keys: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Default and meaning of keys that no dataclass here holds, or whose default the YAML sets."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """What older scripts call a key, as ``name=``, ``--name=`` or ``--name value`` → our key, or for a flag the whole
    ``key=value``."""

    @property
    def script(self) -> str:
        return f"python {self.folder}/{self.name}.py"


def help_text(command: Command, group: str | None = None, config_dir: str | None = None) -> str:
    """The whole help, or every key of ``group`` (ValueError where there is none)."""
    described = {setting.key: setting for setting in describe(command.settings)}
    for key, (default, meaning) in command.extra_keys.items():
        described[key] = Described(key, default, meaning)
    if group is not None:
        prefixes = {key.partition(".")[0] for key in described if "." in key}
        if group not in prefixes:
            raise ValueError(f"There is no group {group}{did_you_mean(group, prefixes)}")
        chosen = [setting for key, setting in described.items() if key.startswith(f"{group}.")]
        return _table(chosen)
    usage = f"{command.script} [key=value …] [group=option …] [flags]"
    parts = [command.summary, f"Usage\n  {usage}",
             "Most used keys (default)\n" + _table([described[key] for key in command.keys]),
             "Groups (group=option; any key inside one as group.key=value)\n" + _groups(command, config_dir),
             "Examples\n" + "\n".join(f"  {command.script} {example}".rstrip() for example in command.examples),
             f"Flags\n{_FLAGS}", f"Also\n{_OWN_CODE}"]
    return "\n\n".join(parts)


def _table(settings: Sequence[Described]) -> str:
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    heads = [f"  {setting.key} ({setting.default})" for setting in settings]
    column = min(40, max(map(len, heads)) + 2)
    lines = []
    for head, setting in zip(heads, settings, strict=True):
        meaning = textwrap.wrap(setting.meaning, max(30, width - column)) or [""]
        if len(head) > column - 2:
            lines.append(head)
            head = ""
        lines.append(f"{head:<{column}}{meaning[0]}".rstrip())
        lines.extend(" " * column + line for line in meaning[1:])
    return "\n".join(lines)


def _groups(command: Command, config_dir: str | None) -> str:
    folders = [CONF_DIR, *([Path(config_dir)] if config_dir else [])]
    names = [name for name in _groups_in_root(command) if (CONF_DIR / name).is_dir()]
    width = max(map(len, names)) + 4
    lines = []
    for name in names:
        options = sorted({path.stem for folder in folders for path in (folder / name).glob("[!_]*.yaml")})
        lines.append(textwrap.fill(", ".join(options), 96, initial_indent=f"  {name:<{width - 2}}",
                                   subsequent_indent=" " * width))
    return "\n".join(lines)


def _groups_in_root(command: Command) -> list[str]:
    """The groups that the root's defaults list names. Read as text: help needs neither Hydra nor a YAML parser."""
    root = (CONF_DIR / f"{command.name}.yaml").read_text(encoding="utf-8")
    entries = [line.strip().removeprefix("- ") for line in root.splitlines() if line.strip().startswith("- ")]
    return [entry.partition(":")[0] for entry in entries if ":" in entry]
