"""How optional dependencies of this package are installed."""


def install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml, from a package index or in a checkout."""
    return f"pip install 'openvla-lightning[{extra}]', or in a checkout pip install -e '.[{extra}]'"
