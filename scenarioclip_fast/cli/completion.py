"""Shell completion: a static script made by shtab, so that a press of TAB starts no Python.

source <(scenarioclip-fast --print-completion bash)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from scenarioclip_fast.requirements import require

SHELLS = ("bash", "zsh", "tcsh")
# The metavars of arguments that are paths.
_FILES = {"FILE", "RECORD", "SOURCE"}
_DIRECTORIES = {"CHECKPOINT", "DIR", "PATH", "RUN", "SHARDS"}

_KEYS = "_scenarioclip_fast_config_keys"
# Defines the function that completes config keys, such as "optim.lr=".
_PREAMBLE = {
    "bash": _KEYS + '() {{ compgen -W "{keys}" -- "$1"; }}',
    "zsh": _KEYS + "() {{ compadd -S '' -- {keys}; }}",
    "tcsh": "",
}
# Adds no space after the "=" of a config key.
_BASH_WITHOUT_SPACE = """
_scenarioclip_fast() {
  _shtab_scenarioclip_fast
  if [[ "${COMPREPLY-}" == *= ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o bashdefault -F _scenarioclip_fast scenarioclip-fast
"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of `parser` and its subcommands for one of SHELLS.

    Raises:
        MissingDependencyError: shtab is not installed.
    """
    shtab = require("shtab")
    from scenarioclip_fast.train.config_reference import sections

    for action in _actions(parser):
        names = set(str(action.metavar).split("|"))
        if "key=value" in names:
            action.complete = {"bash": _KEYS, "zsh": _KEYS, "tcsh": ""}  # type: ignore[attr-defined]
        elif names & _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif names & _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    keys = " ".join(f"{key.name}=" for section in sections() for key in section.keys)
    text: str = shtab.complete(
        parser, shell, root_prefix="scenarioclip_fast", preamble=_PREAMBLE[shell].format(keys=keys)
    )
    return text + (_BASH_WITHOUT_SPACE if shell == "bash" else "")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _actions(subparser)
        else:
            yield action
