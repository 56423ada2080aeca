"""Shell completion of `openvla`: this module completes commands, Hydra completes their options."""

from collections.abc import Sequence

_BASH = """_openvla() {{
    local line="${{COMP_LINE:0:$COMP_POINT}}" word="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}"
    if [ "$COMP_CWORD" -le 1 ]; then
        COMPREPLY=( $(compgen -W "{commands}" -- "$word") )
    elif [[ " {of_hydra} " == *" $command "* ]]; then
        line="${{line#*openvla }}"
        COMPREPLY=( $(COMP_LINE="$line" COMP_POINT=${{#line}} openvla "$command" -sc query=bash 2>/dev/null) )
        [ "${{COMPREPLY[0]: -1}}" = "=" ] && compopt -o nospace
    else
        COMPREPLY=( $(compgen -f -- "$word") )
    fi
}}
COMP_WORDBREAKS=${{COMP_WORDBREAKS//=}}
complete -F _openvla openvla"""

_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def script(shell: str, commands: Sequence[str], of_hydra: Sequence[str]) -> str:
    """The script that `eval "$(openvla completion bash)"` runs.

    Args:
        shell: `bash` or `zsh`.
        commands: all commands.
        of_hydra: commands whose options Hydra completes.

    Raises:
        SystemExit: for another shell.
    """
    if shell not in ("bash", "zsh"):
        raise SystemExit(f"error: openvla completion knows bash and zsh, not {shell!r}")
    text = _BASH.format(commands=" ".join(commands), of_hydra=" ".join(of_hydra))
    return text if shell == "bash" else _ZSH + text
