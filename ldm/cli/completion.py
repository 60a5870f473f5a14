"""Write what a shell needs to complete commands, flags, their values, shipped configs and run folders.

    ldm completion bash > ~/.local/share/bash-completion/completions/ldm    then open a new shell
    ldm completion zsh > ~/.ldm_completion                  and `source ~/.ldm_completion` in ~/.zshrc

The script is made of the parsers of all commands, and starts no Python when it completes; write it again after an
update.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence

from ldm.cli.arguments import TaskParser, parser_of
from ldm.cli.entry import main_guard
from ldm.cli.program import COMMANDS, module_of
from ldm.config import shipped

_KINDS = {"YAML": "@config", "STUDY": "@config", "RUN": "@run"}  # of values, by how the help calls them
_ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
autoload -Uz bashcompinit && bashcompinit
"""
# A value follows a flag, or stands at a position, counted from 1. What _ldm_takes finds is how many values there may be
# (0, 1 or *), and the words that they may be; @config and @run stand for names and folders.
_SCRIPT = """\
# Completion of ldm, written by `ldm completion`.
_ldm_takes() {
    takes=0
    case "$1" in
%(takes)s
    esac
}

_ldm_flags() {
    found=""
    case "$1" in
%(flags)s
    esac
}

_ldm_runs() {
    local place
    for place in "$1"*/configs logs/"$1"*/configs; do
        if [ -d "$place" ]; then echo "${place%%/configs}"; fi
    done
}

_ldm() {
    local word="${COMP_WORDS[COMP_CWORD]}" command="" flag="" position=1 takes=0 i found=""
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "${COMP_WORDS[i]}" in
        =) continue ;;
        -*) flag="${COMP_WORDS[i]}"; continue ;;
        esac
        _ldm_takes "$command $flag"
        case "$takes" in
        1*) flag="" ;;
        "*"*) ;;
        *)
            flag=""
            _ldm_takes "$command $position"
            position=$((position + 1))
            case "$takes" in
            *@command*) command="${command:+$command }${COMP_WORDS[i]}"; position=1 ;;
            esac ;;
        esac
    done
    if [ "$word" = "=" ]; then word=""; fi
    _ldm_takes "$command $flag"
    if [ "$takes" = 0 ]; then _ldm_takes "$command $position"; fi
    case "$word" in
    -*) _ldm_flags "$command" ;;
    *)
        found="${takes#[01*]}"
        case "$found" in
        *@config*) found="%(configs)s" ;;
        *@run*) found="$(_ldm_runs "$word")" ;;
        *@command*) found="${found#*@command}" ;;
        esac ;;
    esac
    # Not by compgen -W, which runs what stands in $() and backquotes in the names of folders.
    local newline=$'\n' name
    COMPREPLY=()
    while IFS= read -r name; do
        case "$name" in
        "") ;;
        "$word"*) printf -v name %%q "$name"; COMPREPLY+=("$name") ;;
        esac
    done <<<"${found// /$newline}"
}
complete -o default -F _ldm ldm
"""


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Print the script."""
    parser = TaskParser("completion", __doc__)
    parser.add_argument("shell", choices=("bash", "zsh"))
    shell = parser.parse_args(argv).shell
    parsers = {name: parser_of(module_of(name).main) for name in COMMANDS}
    sys.stdout.write(script(parsers, shipped.names(), shell))


def script(parsers: Mapping[str, argparse.ArgumentParser], configs: Sequence[str], shell: str = "bash") -> str:
    """Return the script of a shell for commands with these parsers, and configs of these names."""
    takes = [_case(" 1", f"1 @command {' '.join(parsers)}")]
    flags = []
    for name, parser in nested(parsers):
        takes += [_case(f"{name} {key}", values) for key, values in _values(parser)]
        options = (
            flag for action in parser._actions for flag in action.option_strings if action.help != argparse.SUPPRESS
        )
        flags.append(f'    "{name}") found="{" ".join(options)}" ;;')
    found = {"takes": "\n".join(takes), "flags": "\n".join(flags), "configs": " ".join(configs)}
    return (_ZSH if shell == "zsh" else "") + _SCRIPT % found


def nested(parsers: Mapping[str, argparse.ArgumentParser]) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield the parsers with those inside of them, as `doctor data`."""
    for name, parser in parsers.items():
        yield name, parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from nested({f"{name} {inner}": part for inner, part in action.choices.items()})


def _values(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yield each flag that takes values, or the number of a position, with what the script is to know of the values."""
    position = 0
    for action in parser._actions:
        many = action.nargs in ("*", "+") or (isinstance(action.nargs, int) and action.nargs > 1)
        if isinstance(action, argparse._SubParsersAction):
            words = f"@command {' '.join(action.choices)}"
        else:
            words = _KINDS.get(str(action.metavar), " ".join(map(str, action.choices or ())))
        if action.nargs == 0:
            continue
        for flag in action.option_strings:
            yield flag, f"{'*' if many else 1} {words}"
        if not action.option_strings:
            position += 1
            yield ("[1-9]*" if many else str(position)), f"{'*' if many else 1} {words}"
        if isinstance(parser, TaskParser) and parser.leading in action.option_strings:
            yield "[1-9]*", f"* {words}"


def _case(key: str, values: str) -> str:
    """Return a branch; a pattern is left outside of the quotes."""
    name, _, last = key.rpartition(" ")
    return f'    "{name} "{last}) takes="{values.rstrip()}" ;;'
